"""The layers of a finished model, for those that act on them from outside."""

from collections.abc import Iterator

from torch import nn


def stacked_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The members of all module lists: the layers of decoder, towers and resamplers, and IDEFICS' gated blocks."""
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            yield from (layer for layer in stack if not isinstance(layer, nn.ModuleList))


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile(model)` was given, whose modules have their own names; any other model itself."""
    return getattr(model, "_orig_mod", model)
