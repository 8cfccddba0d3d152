"""Layers that are quantised while a checkpoint is read, or that its files hold quantised already."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.quantization import apply, foreign
from minivlm.quantization.linear import QuantizedLinear
from minivlm.quantization.shares import narrow


@dataclass(frozen=True)
class Arrival:
    """How weights come in. stored: the files hold them quantised; else they are quantised one by one as they are read.

    dtype: that the weights are dequantised to where nothing else says one.
    """

    config: foreign.Config
    stored: bool

    def replace(self, model: nn.Module, names: Iterable[str]) -> dict[str, QuantizedLinear]:
        """Put empty quantised layers into a model whose files hold tensors of these names (ours, without prefixes).

        Stored layers are found by their names in the files, whatever a list of skipped modules says.
        """
        model.quantization_config = self.config
        if not self.stored:
            names = apply.selected(model, self.config.skip_modules, self.config.quantize_head)
            return apply.replace(model, names, self.config)
        ending = f".{self.config.stored.marker}"
        marked = {name.removesuffix(ending) for name in names if name.endswith(ending)}
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name in marked]
        if not linears:
            raise ValueError("config.json says that the weights are quantised, but the files hold no tensor *" + ending)
        return apply.replace(model, linears, self.config)

    def files(self, layer: QuantizedLinear, share: Any = None) -> dict[str, tuple[int, ...] | None]:
        """The tensors that files hold of a layer's weight, with their shapes (None: checked when read).

        share: of a layer that is narrower than the files' (`devices.parallel`); the shapes are those of the files."""
        shape = layer.shape if share is None else share.full
        return self.config.stored.files(shape) if self.stored else {"weight": shape}

    def read(
        self, name: str, layer: QuantizedLinear, tensors: dict[str, Tensor], share: Any = None
    ) -> dict[str, Tensor]:
        """The tensors that files hold of a layer's weight as the layer holds them; ValueError names the layer."""
        try:
            if share is None:
                return self.config.stored.read(tensors, layer.shape)
            found = self.config.stored.read(tensors, share.full)
            found, layer.format = narrow(found, layer.format, share)
            return found
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def take(
        self,
        name: str,
        layer: QuantizedLinear,
        tensors: dict[str, Tensor],
        dtype: torch.dtype | None,
        share: Any = None,
    ) -> None:
        """Give a layer its tensors, on the device where it is to live. dtype: the model's; None = the tensors' own."""
        if self.stored:
            layer.restore(self.read(name, layer, tensors, share), dtype or torch.float32)
            return
        try:
            layer.quantize_(tensors["weight"], dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def choose(values: Any, asked: Any) -> Arrival | None:
    """What a checkpoint's `quantization_config` says, or what the caller asks for.

    Raises ValueError where they contradict each other, or cannot be honoured.
    """
    if asked is not None and not isinstance(asked, foreign.Config):
        raise ValueError(
            f"quantization_config should be minivlm's BitsAndBytesConfig or Int4Config, found {type(asked).__name__}"
        )
    if values is None:
        return None if asked is None else Arrival(asked, stored=False)
    try:
        config = foreign.from_hub(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"quantization_config of config.json: {error}") from error
    if asked is not None and (asked.format, asked.quantize_head) != (config.format, config.quantize_head):
        raise ValueError(f"it is quantised already, as {config.format}; load it without quantization_config")
    return Arrival(config, stored=True)
