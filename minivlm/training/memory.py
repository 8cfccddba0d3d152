"""What training needs memory for, less of it, and an estimate before anything is loaded.

    weights, frozen or not      as they are loaded; a quarter of 16 bits for NF4
    gradients                   4 bytes for each trained number
    optimiser                   8 bytes (AdamW's two means) or 2 (8-bit); trained 16-bit weights: 4 for an fp32 copy
    activations                 what the backward pass needs of every layer; with checkpointing, what enters it

B batch, T tokens, P patches, C hidden width, F MLP width, H and K query and key heads of D numbers, L layers.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from minivlm.families import family
from minivlm.modules.config import text_config
from minivlm.modules.layers import GatedMLP
from minivlm.modules.stacks import stacked_layers
from minivlm.quantization import apply as quantise
from minivlm.training import lean, loss
from minivlm.training.lora import LoRALinear

# ---- Activation checkpointing

CHANGED = (
    "an input of a checkpointed layer was changed in place after the layer had run, so it cannot be run again for the "
    "gradients: change a copy (x = x + y in place of x += y), or train without checkpointing"
)


def checkpoint_layers(model: Any) -> None:
    """Let every layer keep its inputs alone; the backward pass runs it again for the rest. Takes about a third longer.

    Not reentrant, so gradients arrive wherever they are wanted, in a tower above a frozen embedding too.
    """
    if any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules()):
        model.gradient_checkpointing_enable({"preserve_rng_state": True})
        return
    for layer in stacked_layers(model):
        vars(layer).pop("forward", None)  # as it was checkpointed before
        layer.forward = _Rerun(layer.forward)


class _Rerun:
    """`torch.utils.checkpoint` of a forward pass without random numbers, in a few lines: torch's function imports
    torch's compiler, which takes 150 MB. Under autocast, which the backward pass has left, it is called."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
        kept: dict[int, Tensor] = {}  # by the order in which autograd asks to save them, the same in both passes
        asked = 0
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and not each.is_inference()]
        given = [(each, each._version) for each in tensors]

        def save(_: Tensor) -> int:
            nonlocal asked
            asked += 1
            return asked - 1

        def find(number: int) -> Tensor:
            if number not in kept:
                if any(each._version != version for each, version in given):
                    raise RuntimeError(CHANGED)
                again = saved_tensors_hooks(partial(_save_again, kept, itertools.count(1), asked), lambda _: None)
                with contextlib.suppress(_Enough), torch.enable_grad(), again:
                    self.forward(*args, **kwargs)
            return kept.pop(number)

        with saved_tensors_hooks(save, find):
            return self.forward(*args, **kwargs)


def _save_again(kept: dict[int, Tensor], counter: Iterator[int], most: int, tensor: Tensor) -> None:
    count = next(counter)
    kept[count - 1] = tensor.detach()
    if count == most:
        raise _Enough


class _Enough(Exception):
    """The last tensor is there; what the layer would compute from it is not needed."""


# ---- Less without running anything of size again


def lean_gates(model: nn.Module) -> None:
    """Let gated MLPs keep their gates and what these multiply, and compute the activation and the product again."""
    for module in model.modules():
        if isinstance(module, GatedMLP):
            module.forward = partial(_gated, module)


def _gated(mlp: GatedMLP, x: Tensor) -> Tensor:
    """`GatedMLP.forward`, same numbers. x (…, C) → (…, C)."""
    shape, x, down = x.shape[:-1], x.reshape(-1, x.shape[-1]), mlp.down_proj
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    plain = isinstance(down, LoRALinear) and not down.drops and down.lora_magnitude_vector is None
    if plain and not lean.touched(down):
        y = lean.adapted(down, gate, up, act=mlp.act)
    else:
        y = down(lean.gated(gate, up, mlp.act))
    return y.reshape(*shape, y.shape[-1])


# ---- Frozen towers


def freeze_tower(model: nn.Module, cache_bytes: int = 0) -> None:
    """Run the vision tower without gradients if nothing in it is trained, and keep up to so many bytes of its features.

    ValueError if there is something to keep and the tower is trained.
    """
    for prefix in family(model.config.model_type).parts.get("vision", ()):
        tower = model.get_submodule(prefix.rstrip("."))
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.forward = _Cached(tower.forward, cache_bytes) if cache_bytes else torch.no_grad()(tower.forward)
        elif cache_bytes:
            raise ValueError("the vision tower is trained, so its features change and cannot be kept")


class _Cached:
    """A tower's `forward` that remembers the features of images it has seen, by the pixels' hash.

    Images go through one by one, whether kept or not, so a resumed run gets the same bits. The first ones are kept:
    in an epoch every image comes once, so that of the newest ones none would be found again.
    """

    def __init__(self, forward: Callable[..., Any], most: int) -> None:
        self.forward, self.left = forward, most
        self.kept: dict[bytes, list[Tensor]] = {}
        self.single = True  # whether the tower gives one tensor, and not a list of them

    @torch.no_grad()
    def __call__(self, pixels: Tensor, *args: Any, **options: Any) -> Any:
        found = [
            self._one(pixels[n : n + 1], [_row(value, n, pixels) for value in args], options)
            for n in range(len(pixels))
        ]
        together = [torch.cat(parts).to(pixels.device) for parts in zip(*found, strict=True)]
        return together[0] if self.single else together

    def _one(self, pixels: Tensor, args: list[Any], options: dict[str, Any]) -> list[Tensor]:
        digest = hashlib.blake2b(digest_size=16)
        for value in (pixels, *args, *options.values()):
            plain = value.detach().cpu().contiguous() if isinstance(value, Tensor) else None
            digest.update(repr(value if plain is None else tuple(plain.shape)).encode())
            digest.update(b"" if plain is None else plain.view(torch.uint8).numpy().tobytes())
        key = digest.digest()
        if key in self.kept:
            return self.kept[key]
        features = self.forward(pixels, *args, **options)
        self.single = isinstance(features, Tensor)
        features = [features] if self.single else features
        size = sum(tensor.nbytes for tensor in features)
        if size <= self.left:
            self.left -= size
            self.kept[key] = [tensor.cpu() for tensor in features]
        return features


def _row(value: Any, number: int, pixels: Tensor) -> Any:
    per_image = isinstance(value, Tensor) and value.ndim and len(value) == len(pixels)
    return value[number : number + 1] if per_image else value


# ---- An estimate


@dataclass(frozen=True)
class Estimate:
    """Bytes by what they are for."""

    weights: int
    trained: int  # of adapters, and fp32 copies of trained 16-bit weights
    gradients: int
    optimiser: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def estimate(
    model: nn.Module,
    *,
    tokens: int,
    learned: int,
    dtype: torch.dtype,
    quantised: Any = None,
    optimiser_bytes: int = 8,
    checkpointing: bool = False,
) -> Estimate:
    """The memory of one pass of `tokens` tokens, `learned` of them, padding included.

    model: on the meta device, with its adapter. dtype: of its weights. quantised: a quantisation config, or None.
    Activations are those of the text decoder; a frozen tower keeps none. Images of a trained tower are not counted.
    """
    item = dtype.itemsize
    weights = trained = numbers = 0
    small = set() if quantised is None else {f"{name}.weight" for name in quantise.selected(model)}
    for name, parameter in model.named_parameters():
        adapter = "lora_" in name
        if name in small:
            weights += quantised.format.nbytes(tuple(parameter.shape))
        else:
            weights += 0 if adapter else parameter.numel() * item
        if parameter.requires_grad:
            numbers += parameter.numel()
            trained += 4 * parameter.numel() if adapter or item < 4 else 0
    config, trains = text_config(model.config), {name for name, p in model.named_parameters() if p.requires_grad}
    whole = any(name.endswith("down_proj.weight") for name in trains)
    each, entering = _kept_of_a_layer(config, item, whole), config.hidden_size * item
    depth = config.num_hidden_layers
    activations = tokens * (depth * entering + each if checkpointing else depth * each)
    rows = min(learned, max(1, loss.LOGITS // config.vocab_size))
    head = item * model.lm_head.weight.numel() if "lm_head.weight" in trains else 0  # its gradient, until it is added
    logits = 3 * 4 * rows * config.vocab_size + head
    return Estimate(weights, trained, 4 * numbers, optimiser_bytes * numbers, activations, logits)


def _kept_of_a_layer(config: Any, item: int, whole: bool) -> int:
    """Bytes that the backward pass needs of one decoder layer for one token: what its norms, low-rank changes,
    rotations and attention take in, an MLP's gate and what it multiplies, and if it is trained whole their product.
    Norms of 16 bits keep what they take in as fp32."""
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    normed = 4 * 2 * width + item * 2 * width
    return normed + item * (4 * queries + 3 * keys + (3 if whole else 2) * inner)
