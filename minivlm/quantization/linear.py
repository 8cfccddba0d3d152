"""`QuantizedLinear`: a linear layer whose weight is held in one of the formats. Stands where an `nn.Linear` stood."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.quantization import products
from minivlm.quantization.formats import Format, Tensors


class QuantizedLinear(nn.Linear):
    """x Ŵᵀ + b. Gradients flow to x and b; the weight itself is not trained. It is an `nn.Linear` for whoever looks for
    linear layers, PEFT for one, but its `weight` has no data; `dequantize` makes one.

    Made empty, it gets its weight from `quantize_` (a floating-point one) or `restore` (the tensors of a file). Its
    tensors are buffers, named by the format: scales keep their dtype whatever dtype the model is cast to.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        format: Format,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """compute_dtype: in what fp16 inputs are multiplied, None = fp16. Other inputs keep their dtype."""
        nn.Module.__init__(self)  # nn.Linear's would make a weight
        self.in_features, self.out_features = in_features, out_features
        self.format, self.compute_dtype = format, compute_dtype
        self.dtype = torch.float32  # of the weight that was quantised
        self.bias = bias
        self._names: tuple[str, ...] = ()

    @property
    def weight(self) -> "Codes":
        """For whoever asks a linear layer for its weight's dtype or device."""
        return Codes(self)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def held(self) -> Tensors:
        """The tensors as they are held now: on a CPU, four bits have an order of their own (`products.pack`).

        Read from the module's dict: every product needs them, and `getattr` looks in three places first.
        """
        return {name: self._buffers[name] for name in self._names}

    @property
    def tensors(self) -> Tensors:
        """The tensors as the format names them."""
        return products.unpack(self.held, self.format, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and tables, without the bias."""
        return sum(tensor.nbytes for tensor in self.held.values())

    def quantize_(self, weight: Tensor, dtype: torch.dtype | None = None) -> None:
        """Take a floating-point weight (N, K), on the device where the layer is to live, rounded to `dtype` first."""
        self.dtype = dtype or weight.dtype
        self._take(self.format.quantize(weight, dtype))

    def restore(self, tensors: Tensors, dtype: torch.dtype) -> None:
        """Take the tensors of a file, as `Format.read` gives them."""
        self.dtype = dtype
        self._take(tensors)

    def _take(self, tensors: Tensors) -> None:
        """Hold these, in place of what is held."""
        for name in self._names:
            delattr(self, name)
        tensors = tensors and products.pack(tensors, self.format, self.shape)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.cpu() if tensor.ndim == 0 else tensor)
        self._names = tuple(tensors)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (N, K) as a plain tensor; None = of the dtype that it had."""
        return self.format.dequantize(self.tensors, self.shape, dtype or self.dtype)

    def files(self) -> Tensors:
        """The tensors that a file holds of this layer's weight, by the names they have there."""
        return self.format.write(self.tensors, self.shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, K) → (…, N), same dtype."""
        compute = self.compute_dtype if x.dtype == torch.float16 and self.compute_dtype else x.dtype
        bias = None if self.bias is None else self.bias.to(compute)
        if torch.is_grad_enabled():
            return _Product.apply(x.to(compute), bias, self).to(x.dtype)
        return products.linear(x.to(compute), self.held, self.format, self.shape, bias).to(x.dtype)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.format}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """What `.to`, `.cuda`, `.half` call. A single number stays on the CPU: kernels take it as an argument, and
        fetching it from a GPU would wait for all that is queued there."""
        held = self.tensors
        self._take({})
        super()._apply(fn, recurse)
        self._take({name: _moved(tensor, fn) for name, tensor in held.items()})
        return self


class Codes:
    """What stands in the place of a quantised layer's weight: nothing can be added to it."""

    def __init__(self, layer: QuantizedLinear) -> None:
        self.shape, self.dtype, self.requires_grad = layer.shape, layer.dtype, False
        self.device = next(layer.buffers()).device

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def data(self) -> Tensor:
        raise ValueError(
            "a quantised layer holds codes, and what is added to them is mostly rounded away; merge the adapter into "
            "the 16-bit model (minivlm merge, minivlm.training.lora.merge), or take dequantize()"
        )


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    moved = tensor if tensor.ndim == 0 else fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


class _Product(torch.autograd.Function):
    """The layer's product, and the gradient that QLoRA needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return products.linear(x, layer.held, layer.format, layer.shape, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        wanted_x, wanted_bias, _ = ctx.needs_input_grad
        layer = ctx.layer
        for_x = products.backward(gradient, layer.held, layer.format, layer.shape) if wanted_x else None
        return for_x, gradient.flatten(0, -2).sum(0) if wanted_bias else None, None
