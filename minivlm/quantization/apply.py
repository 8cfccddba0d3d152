"""Which layers of a model are quantised, and putting quantised ones in their places."""

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from minivlm import families
from minivlm.modules.stacks import uncompiled
from minivlm.quantization.linear import QuantizedLinear

# Which linear layers: those of the parts that the family's record names (`minivlm.families`). Everything that is not an
# `nn.Linear` stays: embeddings, norms, gates, patch convolutions, latents. To leave out more, name it in
# `llm_int8_skip_modules` or `skip_modules`.


def selected(model: nn.Module, skip: Iterable[str] = (), head: bool = False) -> list[str]:
    """Names of the linear layers that are quantised. skip: modules to leave out; head: the output head too; both as
    `BitsAndBytesConfig` explains.

    Raises ValueError for a name in `skip` that names nothing here, and for a head that is the embedding table.
    """
    record = families.family(model.config.model_type, "the model")
    names = kept(model)
    for pattern in set(skip) - set(present(model, skip)):
        raise ValueError(f"no module to skip is called {pattern!r}; names look like {', '.join(names[:3])}")
    if head and model.config.tie_word_embeddings:
        raise ValueError(
            "quantize_head=True: this model's head is its embedding table (tie_word_embeddings), which stays"
        )
    left = [name for name in names if not any(_inside(name, pattern) for pattern in skip)]
    parts = tuple(f"{part}." for part in record.quantised)
    return [name for name in left if (head if name in record.kept else name.startswith(parts))]


def present(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Of names of modules to skip those that name something: a file's list spells some modules in several ways."""
    names = [name for name, _ in model.named_modules()]
    return [pattern for pattern in patterns if any(_inside(name, pattern) for name in names)]


def _inside(name: str, pattern: str) -> bool:
    """Whether a dotted name has the words of `pattern` in a row: a.layers.1.mlp has "layers.1", a.layers.11 has not."""
    return re.search(rf"(^|\.){re.escape(pattern)}(\.|$)", name) is not None


def replace(model: nn.Module, names: Iterable[str], config: Any) -> dict[str, QuantizedLinear]:
    """Put an empty quantised layer in the place of each named linear layer, which keeps its bias; returns them."""
    layers = {}
    for name in names:
        linear = model.get_submodule(name)
        sizes = (linear.in_features, linear.out_features)
        layers[name] = QuantizedLinear(*sizes, linear.bias, config.format, config.compute_dtype)
        model.set_submodule(name, layers[name])
    return layers


def quantize(model: nn.Module, config: Any) -> nn.Module:
    """Quantise the layers of a model that holds its weights, in place; `from_pretrained` does it while loading.

    ValueError for a model with layers in another format, because a file has one, and where no layer is to be quantised.
    """
    inner = uncompiled(model)
    if others := {str(layer.format) for layer in layers(inner).values() if layer.format != config.format}:
        raise ValueError(f"it is quantised already, as {', '.join(others)}; load the model without and quantise that")
    names = selected(inner, config.skip_modules, config.quantize_head)
    if not names and not layers(inner):
        raise ValueError("no layer is to be quantised; of a wrapped model (PEFT's, say) quantise the one inside")
    for name in names:
        weight = inner.get_submodule(name).weight
        replace(inner, [name], config)[name].quantize_(weight)
    inner.quantization_config = config
    return model


def layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def kept(model: nn.Module) -> list[str]:
    """Names of the linear layers that are not quantised."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    quantised = layers(model)
    return [name for name in linears if name not in quantised]


def files(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model as files hold them: its state, with quantised weights as their format writes them."""
    quantised = layers(model)
    tensors = {}
    for name, value in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner in quantised and leaf != "bias":
            continue
        tensors[name] = value
    for name, layer in quantised.items():
        tensors |= {f"{name}.{leaf}": value for leaf, value in layer.files().items()}
    return tensors
