"""Small parts that several networks share: linear layer, RMSNorm, MLPs, random initialisation. C hidden width."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from minivlm_kernels import cpu_dense
from torch import Tensor, nn

PIECE, MANY = 2**22, 48  # numbers of a weight that are turned into fp32 at once; rows of x that make up for it

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function behind a config's `hidden_act`. Raises ValueError for a name that no released checkpoint uses."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown hidden_act {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether a CPU is worth asking for matrix products in this dtype. An x86 processor without instructions for bf16
    takes two to three times as long as in fp32 (`torch.cpu` knows: AVX512_BF16)."""
    if dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)()
    return True


class Linear(nn.Linear):
    """`nn.Linear`, and on a CPU without autograd: few rows at the speed at which weights can be read, many rows in fp32
    where that is faster. Both sum in fp32 and round once, as torch does."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, in_features) → (…, out_features), same dtype."""
        if cpu_dense.suits_dense(x, self.weight):
            return cpu_dense.dense_rows(x, self.weight, self.bias)
        if self._slow_as_it_is(x):
            return self._in_fp32(x)
        return F.linear(x, self.weight, self.bias)

    def _slow_as_it_is(self, x: Tensor) -> bool:
        alike = x.device.type == "cpu" and x.dtype == self.weight.dtype and not torch.is_grad_enabled()
        return alike and x.numel() >= MANY * self.in_features and not multiplies(x.dtype)

    def _in_fp32(self, x: Tensor) -> Tensor:
        """A copy of the whole weight in fp32 never exists: PIECE numbers of it at a time."""
        wide, y = x.float(), x.new_empty(*x.shape[:-1], self.out_features)
        step = max(1, PIECE // self.in_features)
        for start in range(0, self.out_features, step):
            some = slice(start, start + step)
            bias = None if self.bias is None else self.bias[some].float()
            y[..., some] = F.linear(wide, self.weight[some].float(), bias)
        return y


class RMSNorm(nn.Module):
    """x / rms(x) · weight (Zhang & Sennrich 2019). Statistics in fp32, weight applied after the cast back."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C) → (..., C), same dtype."""
        if cpu_dense.suits(x, self.weight):
            return cpu_dense.rms_norm(x, self.weight, self.eps)
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # The order of the reference: in bf16, w·bf16(x̂) is not bf16(w·x̂).
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)


class MLP(nn.Module):
    """fc2(act(fc1(x))) with biases: the vision transformers."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str) -> None:
        super().__init__()
        self.fc1 = Linear(hidden_size, intermediate_size)
        self.fc2 = Linear(intermediate_size, hidden_size)
        self.act = activation(hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)) without biases (Shazeer 2020, "GLU variants"): decoders and the Idefics2 connector."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, hidden_act: str, output_size: int | None = None
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, output_size or hidden_size, bias=False)
        self.act = activation(hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


@torch.no_grad()
def initialize(model: nn.Module, std: float) -> None:
    """Random weights as the reference draws them: normal(0, std) matrices, zero biases, unit norms."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
