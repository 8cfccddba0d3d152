"""Low-rank adapters: LoRA (Hu et al. 2021), rank-stabilised (Kalajdzievski 2023) and DoRA (Liu et al. 2024).

    y = W x + s · B (A x)        A (r, in), B (out, r), s = alpha / r; W is frozen and may be quantised (QLoRA)

`apply` takes a finished model and puts a `LoRALinear` in the place of each layer it targets, so model files stay plain.
Names and arithmetic are PEFT's; what an adapter's folder holds is read and written by `adapters.py`.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.modules.stacks import uncompiled
from minivlm.quantization import apply as quantise
from minivlm.quantization.linear import QuantizedLinear
from minivlm.training import lean, targets, tied
from minivlm.training.targets import LoraConfig


class LoRALinear(nn.Module):
    """A linear layer and its low-rank change. Stands where `base_layer`, quantised or not, stood."""

    def __init__(self, base_layer: nn.Module, r: int, alpha: float, config: LoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        device = next(base_layer.buffers() if self.quantised else base_layer.parameters(), torch.empty(0)).device
        options = {"device": device, "dtype": torch.float32}  # also over 16 bits, where small steps would be lost
        self.lora_A = nn.Parameter(torch.empty(r, base_layer.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(base_layer.out_features, r, **options))
        self.lora_magnitude_vector = None
        if config.use_dora:
            self.lora_magnitude_vector = nn.Parameter(torch.empty(base_layer.out_features, **options))

    @property
    def quantised(self) -> bool:
        return isinstance(self.base_layer, QuantizedLinear)

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base_layer.bias

    @property
    def weight(self) -> Tensor:
        """The changed weight (out, in), computed at each call, in the dtype of the base's."""
        return self.changed().to(self.base_layer.dtype if self.quantised else self.base_layer.weight.dtype)

    @torch.no_grad()
    def initialize(self, how: bool | str) -> None:
        """Random A, and B zero; see `LoraConfig.init_lora_weights`."""
        if how == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / len(self.lora_A))
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # ±1/sqrt(in)
        nn.init.zeros_(self.lora_B)
        if how is False:
            nn.init.normal_(self.lora_B)
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(self._row_norms())

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out), same dtype. The change is computed in fp32, unless autocast says otherwise."""
        if self.lora_magnitude_vector is not None:
            return self._dora(x, self.base_layer(x))
        shape, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
        dropped = self.dropout(x.to(self.lora_A.dtype)) if self.drops else None
        y = lean.adapted(self, x) if dropped is None else lean.plainly(self, x, dropped)
        return y.reshape(*shape, y.shape[-1])

    @property
    def drops(self) -> bool:
        return self.training and isinstance(self.dropout, nn.Dropout)

    def _dora(self, x: Tensor, y: Tensor) -> Tensor:
        """m / ‖W + s·BA‖ · (W + s·BA) x + bias; the norm is a constant for the gradient (their section 4.3)."""
        dropped = self.dropout(x.to(self.lora_A.dtype))
        scale = self.lora_magnitude_vector / self._row_norms()  # (out,)
        plain = y if self.bias is None else y - self.bias
        if self.drops:
            plain = F.linear(dropped, self._base_weight())
        change = F.linear(F.linear(dropped, self.lora_A), self.lora_B) * self.scaling
        return (y + (scale - 1) * plain + scale * change).to(y.dtype)

    def _base_weight(self) -> Tensor:
        base = self.base_layer
        return base.dequantize(torch.float32) if self.quantised else base.weight.detach().float()

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """‖W + s·BA‖ of each output, (out,)."""
        return torch.linalg.norm(self._base_weight() + self.scaling * (self.lora_B @ self.lora_A), dim=1)

    @torch.no_grad()
    def changed(self) -> Tensor:
        """W + s·BA, for DoRA with rows of the trained lengths, (out, in) in fp32."""
        weight = self._base_weight() + (self.lora_B.float() @ self.lora_A.float()) * self.scaling
        if self.lora_magnitude_vector is None:
            return weight
        return weight * (self.lora_magnitude_vector / torch.linalg.norm(weight, dim=1))[:, None]


class LoRAEmbedding(nn.Module):
    """An embedding table (V, C) and its low-rank change, (B A)ᵀ · s with A (r, V) and B (C, r)."""

    def __init__(self, base_layer: nn.Embedding, r: int, alpha: float, config: LoraConfig) -> None:
        super().__init__()
        if config.use_dora:
            raise ValueError("DoRA of an embedding table is not supported; train it whole, as modules_to_save")
        self.base_layer = base_layer
        self.scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        options = {"device": base_layer.weight.device, "dtype": torch.float32}
        self.lora_embedding_A = nn.Parameter(torch.empty(r, base_layer.num_embeddings, **options))
        self.lora_embedding_B = nn.Parameter(torch.empty(base_layer.embedding_dim, r, **options))

    @property
    def weight(self) -> Tensor:
        """The changed table (V, C), computed at each call, in the dtype of the base's."""
        return self.changed().to(self.base_layer.weight.dtype)

    @torch.no_grad()
    def initialize(self, how: bool | str) -> None:
        """Here A is zero and B random, as in PEFT."""
        nn.init.zeros_(self.lora_embedding_A)
        if how is False:
            nn.init.normal_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (…) → (…, C)."""
        y = self.base_layer(ids)
        h = F.embedding(ids, self.lora_embedding_A.T)  # (…, r)
        return (y + (h @ self.lora_embedding_B.T) * self.scaling).to(y.dtype)

    @torch.no_grad()
    def changed(self) -> Tensor:
        change = (self.lora_embedding_B.float() @ self.lora_embedding_A.float()).T * self.scaling
        return self.base_layer.weight.float() + change


ADAPTED = (LoRALinear, LoRAEmbedding)


def apply(model: nn.Module, config: LoraConfig) -> list[str]:
    """Freeze a model except for what `config` names, and put low-rank layers in; returns the targeted layers' names.

    ValueError if nothing matches, if a target can have no low-rank change, or if there is an adapter already.
    """
    model = uncompiled(model)
    if config.target_modules in targets.PRESETS:
        config = replace(config, target_modules=targets.preset_pattern(model, config.target_modules))
    names = spelling(model)
    chosen = targeted(model, config, names)
    if not chosen:
        raise ValueError(
            f"target_modules {config.target_modules!r:.200} matches no layer; names look like "
            f"{', '.join([name for name in names if name.endswith('_proj')][:3])}"
        )
    layers = wrap(model, config, {theirs: names[theirs] for theirs in chosen})
    for layer in layers.values():
        layer.initialize(config.init_lora_weights)
    set_trainable(model, config)
    return list(layers)


def spelling(model: nn.Module, generation: int = 0) -> dict[str, str]:
    """transformers' name of every module → ours; generation 0 is its version 5."""
    table = targets.generations(model)[generation]
    return {targets.spelled(name, table): name for name, _ in model.named_modules() if name}


def targeted(model: nn.Module, config: LoraConfig, names: dict[str, str]) -> list[str]:
    """transformers' names of the layers that get low-rank matrices. ValueError for one that can have none, and for a
    model that has an adapter."""
    if getattr(model, "adapter_config", None) is not None:
        raise ValueError("this model has an adapter already; merge it first (minivlm.training.lora.merge)")
    leaves = {theirs: model.get_submodule(ours) for theirs, ours in names.items()}
    leaves = {theirs: module for theirs, module in leaves.items() if not any(True for _ in module.children())}
    linear = nn.Linear | QuantizedLinear
    linears = [theirs for theirs, module in leaves.items() if isinstance(module, linear)]
    linears = [theirs for theirs in linears if theirs.rpartition(".")[2] != "lm_head"]
    chosen = targets.targeted(config, leaves, linears)
    for theirs in chosen:
        if not isinstance(leaves[theirs], linear | nn.Embedding):
            kind = type(leaves[theirs]).__name__
            raise ValueError(
                f"target_modules matches {theirs}, a {kind}, which has no low-rank change here: linear layers and "
                "embeddings do; write the targets more narrowly, or exclude it by exclude_modules"
            )
    return chosen


def wrap(model: nn.Module, config: LoraConfig, chosen: dict[str, str]) -> dict[str, LoRALinear | LoRAEmbedding]:
    """Replace the `chosen` layers by low-rank ones whose values are not set yet; returns these by our names.

    chosen: transformers' name → ours; rank and alpha patterns match the former. ValueError for a layer that is trained
    whole, too: no file could hold both.
    """
    saved = whole(model, config).values()
    for theirs, ours in chosen.items():
        if any(name.startswith(f"{ours}.") for name in saved):
            raise ValueError(f"modules_to_save {config.modules_to_save!r:.80} means {theirs} too, which is a target")
    tied.untie(model, saved)
    ranks = targets.valued(config.rank_pattern, config.r, list(chosen))
    alphas = targets.valued(config.alpha_pattern, config.lora_alpha, list(chosen))
    layers = {}
    for theirs, ours in chosen.items():
        base = model.get_submodule(ours)
        kind = LoRAEmbedding if isinstance(base, nn.Embedding) else LoRALinear
        layers[ours] = kind(base, ranks[theirs], alphas[theirs], config).train(base.training)
        model.set_submodule(ours, layers[ours])
    model.adapter_config = config
    return layers


def whole(model: nn.Module, config: LoraConfig, generation: int = 0) -> dict[str, str]:
    """The parameters of `modules_to_save`, transformers' names → ours. ValueError for an entry that names nothing."""
    table = targets.generations(model)[generation]
    ours = {targets.spelled(name, table): name for name, _ in model.named_parameters(remove_duplicate=False)}
    modules = list(spelling(model, generation))
    chosen = targets.saved_whole(config, modules, ours)
    for entry in config.modules_to_save or ():
        if not targets.saved_whole(replace(config, modules_to_save=(entry,)), modules, ours):
            raise ValueError(f"modules_to_save names {entry!r:.80}, but no module with weights to train ends so")
    return {theirs: ours[theirs] for theirs in chosen}


def set_trainable(model: nn.Module, config: LoraConfig) -> None:
    """Freeze everything but the adapter of this configuration."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, ADAPTED):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
            if config.bias == "lora_only" and isinstance(module, LoRALinear) and module.bias is not None:
                module.bias.requires_grad_(True)
    saved = set(whole(model, config).values())
    for name, parameter in model.named_parameters():
        if name in saved or (config.bias == "all" and name.rpartition(".")[2] == "bias"):
            parameter.requires_grad_(True)


def merge(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Add an adapter to the weights it changes, and take it off; in place.

    A quantised base becomes plain weights first, of `dtype` (None: that the model computes in): to round the sum to
    four bits again would lose most of the adapter. The sum is made in fp32 and rounded once. ValueError for a model
    with neither an adapter of ours nor quantised layers.
    """
    compiled, model = model, uncompiled(model)
    dtype = dtype or model.dtype
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (*ADAPTED, QuantizedLinear))}
    if all(name.endswith(".base_layer") for name in layers):
        raise ValueError("there is nothing to merge: no adapter of minivlm is on this model (PEFT: merge_and_unload())")
    for name, module in layers.items():
        if isinstance(module, LoRAEmbedding) or (isinstance(module, LoRALinear) and not module.quantised):
            module.base_layer.weight = nn.Parameter(module.weight, requires_grad=False)
            model.set_submodule(name, module.base_layer)
        elif isinstance(module, LoRALinear):
            model.set_submodule(name, _plain(module.changed(), module.bias, dtype))
        elif isinstance(module, QuantizedLinear) and not name.endswith(".base_layer"):
            model.set_submodule(name, _plain(module.dequantize(torch.float32), module.bias, dtype))
    tied.settle(model)
    model.adapter_config = model.quantization_config = None
    return compiled


def merge_quantised(model: nn.Module, config: Any) -> float:
    """Merge, and quantise the sum by `config`; how much of the change that costs: ‖rounded − exact‖ / ‖exact − base‖.

    Above 1, the rounding is larger than what was learned.
    """
    model = uncompiled(model)
    changed = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    bases = {name: module._base_weight() for name, module in changed.items()}
    exact = {name: module.changed() for name, module in changed.items()}
    quantise.quantize(merge(model), config)
    layers = quantise.layers(model)
    rounded = {name: layers[name].dequantize(torch.float32) for name in exact if name in layers}
    error = sum(float((rounded[name] - exact[name]).square().sum()) for name in rounded)
    change = sum(float((exact[name] - bases[name]).square().sum()) for name in rounded)
    return math.sqrt(error / change) if change else 0.0


def _plain(weight: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    linear.bias = bias
    return linear.eval()
