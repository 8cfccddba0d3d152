"""Tensor parallelism: the same network, narrower, on every process (Shoeybi et al. 2019, "Megatron-LM").

    torchrun --nproc-per-node 4 script.py      with from_pretrained(name, tp_plan="auto")

Each of the N processes ("ranks") holds towers, connectors, norms and embeddings whole, and a share of every decoder
block and of the output head:

    x ─► q, k, v: H/N heads ─► attention ─► o: its columns ─► sum over ranks ─► x + …
    x ─► gate, up: F/N rows ─►  act · up ─► down: its columns ─► sum over ranks ─► x + …
    x ─► lm_head: V/N rows ─► gathered: every rank has the same logits, bit by bit

Three steps, all from outside a finished model: `cut` makes the layers of a meta-device model narrower and says which
rows or columns are this rank's, loading reads only those, and `connect` adds the sums. Every tensor stays a plain one,
so quantised layers, kernels and the cache need no change. For inference; training shards by FSDP instead.

H query heads, K key/value heads, D head width, F MLP width, V vocabulary, N ranks.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minivlm.modules.config import text_config

# Where layers are cut (decoder blocks, and the gated blocks of IDEFICS), and how each of them is, by its name. A weight
# is (outputs, inputs): "rows" are outputs and take their bias along; "columns" are inputs, and the outputs are summed.
PARTS = (".text_model.layers.", ".language_model.layers.", ".gated_cross_attn_layers.")
CUTS = {
    "q_proj": "rows of whole heads",
    "k_proj": "rows of whole key/value heads",
    "v_proj": "rows of whole key/value heads",
    "o_proj": "columns of whole heads",
    "gate_proj": "rows",
    "up_proj": "rows",
    "down_proj": "columns",
}
TIMEOUT = timedelta(seconds=120)  # of a collective that other ranks do not join


@dataclass(frozen=True)
class Share:
    """What a rank holds of a tensor whose whole shape is `full`: entries `start` to `stop` of dimension `dim`."""

    dim: int
    start: int
    stop: int
    full: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.full[: self.dim], self.stop - self.start, *self.full[self.dim + 1 :])

    @property
    def index(self) -> tuple[slice, ...]:
        return (*[slice(None)] * self.dim, slice(self.start, self.stop))


def sizes_that_fit(config: Any, most: int = 64) -> list[int]:
    """Numbers of ranks among which a model can be cut: heads whole, key/value heads whole or held several times."""
    text = text_config(config)
    heads, kv = text.num_attention_heads, _kv_heads(text)
    return [n for n in range(1, min(heads, most) + 1) if heads % n == 0 and (kv % n == 0 or n % kv == 0)]


def check_size(config: Any, size: int) -> None:
    """ValueError, the same on every rank, unless a model can be cut among `size` ranks."""
    if size not in (fit := sizes_that_fit(config)):
        text = text_config(config)
        raise ValueError(
            f"{text.num_attention_heads} heads and {_kv_heads(text)} key/value heads cannot be cut among {size} "
            f"processes; start {', '.join(map(str, fit))} of them"
        )


def cut(model: nn.Module, rank: int, size: int, unit: int = 1) -> dict[str, Share]:
    """Make the layers of a meta-device model as narrow as this rank's; → parameter name → its share of the file's.

    unit: MLPs are cut at its multiples where every rank gets some, so that blocks of a four-bit format stay whole.
    """
    check_size(model.config, size)
    text, shares = text_config(model.config), {}
    for name, layer in list(model.named_modules()):
        leaf = name.rpartition(".")[2]
        if isinstance(layer, nn.Linear) and leaf in CUTS and any(part in f".{name}" for part in PARTS):
            kv = text.num_attention_heads if "cross_attn." in name else _kv_heads(text)
            start, stop = _range(layer, leaf, text.num_attention_heads, kv, rank, size, unit)
            shares |= _narrow(name, layer, "columns" in CUTS[leaf], start, stop)
    if not model.config.tie_word_embeddings:  # a tied head is the embedding, which is whole
        shares |= _narrow("lm_head", model.lm_head, False, *_even(model.lm_head.out_features, rank, size))
    return shares


def _kv_heads(text: Any) -> int:
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def _range(layer: nn.Linear, leaf: str, heads: int, kv: int, rank: int, size: int, unit: int) -> tuple[int, int]:
    """The rows or columns of this rank: first, and one past the last."""
    if leaf in ("q_proj", "o_proj"):
        width = (layer.out_features if leaf == "q_proj" else layer.in_features) // heads
        return rank * heads // size * width, (rank + 1) * heads // size * width
    if leaf in ("k_proj", "v_proj"):
        width, first = layer.out_features // kv, rank * kv // size
        return first * width, (first + max(1, kv // size)) * width  # fewer heads than ranks: some hold the same one
    total = layer.in_features if leaf == "down_proj" else layer.out_features
    if unit > 1 and total // unit >= size:
        start, stop = _even(total // unit, rank, size)
        return start * unit, total if rank == size - 1 else stop * unit
    return _even(total, rank, size)


def _even(total: int, rank: int, size: int) -> tuple[int, int]:
    return rank * total // size, (rank + 1) * total // size


def _narrow(name: str, layer: nn.Linear, columns: bool, start: int, stop: int) -> dict[str, Share]:
    """Give a layer the sizes of its share. The bias of a layer cut by columns is rank 0's: it is added once."""
    weight = Share(int(columns), start, stop, tuple(layer.weight.shape))
    layer.weight = nn.Parameter(layer.weight.new_empty(weight.shape), requires_grad=layer.weight.requires_grad)
    layer.out_features, layer.in_features = weight.shape
    shares = {f"{name}.weight": weight}
    if layer.bias is not None and not columns:
        bias = Share(0, start, stop, tuple(layer.bias.shape))
        layer.bias = nn.Parameter(layer.bias.new_empty(bias.shape), requires_grad=layer.bias.requires_grad)
        shares[f"{name}.bias"] = bias
    return shares


def connect(model: nn.Module, group: Any = None) -> nn.Module:
    """Add the collectives to a loaded model that `cut` has narrowed: sums of partial outputs, and whole logits."""
    for _, layer in connected(model):
        bias = getattr(layer, "bias", None)
        if bias is not None and dist.get_rank(group) > 0:
            with torch.no_grad():
                bias.zero_()
        layer.register_forward_hook(lambda layer, args, out: _summed(out, group))
    if not model.config.tie_word_embeddings:
        widths = [stop - start for start, stop in _pieces(model, group)]
        model.lm_head.register_forward_hook(lambda layer, args, out: _gathered(out, widths, group))
    model.agreed = partial(agreed, group=group)  # generation uses it for random draws and clocks
    return model


def connected(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers whose outputs are partial sums, by name."""
    for name, layer in model.named_modules():
        inside = any(part in f".{name}" for part in PARTS)
        if inside and "columns" in CUTS.get(name.rpartition(".")[2], ""):
            yield name, layer


def _pieces(model: nn.Module, group: Any) -> list[tuple[int, int]]:
    total = text_config(model.config).vocab_size
    return [_even(total, rank, dist.get_world_size(group)) for rank in range(dist.get_world_size(group))]


def _summed(out: Tensor, group: Any) -> Tensor:
    if out.requires_grad:  # an in-place sum under autograd would give silently wrong gradients
        raise RuntimeError(
            "a tensor-parallel model cannot be trained; use torch.no_grad(), or train with "
            "`torchrun --nproc-per-node N -m minivlm finetune`, which shares out the rows"
        )
    out = out.contiguous()
    dist.all_reduce(out, group=group)
    return out


def _gathered(out: Tensor, widths: list[int], group: Any) -> Tensor:
    """(…, V/N) of every rank → (…, V) on all, pieces of different widths padded on the way."""
    padded = nn.functional.pad(out, (0, max(widths) - out.shape[-1])).contiguous()
    pieces = [torch.empty_like(padded) for _ in widths]
    dist.all_gather(pieces, padded, group=group)
    return torch.cat([piece[..., :width] for piece, width in zip(pieces, widths, strict=True)], -1)


# ---- Processes -------------------------------------------------------------------------------------------------------


def start() -> tuple[int, int]:
    """Join the processes that torchrun started; → (rank, number of ranks). One process alone is rank 0 of 1."""
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise ValueError("tp_plan needs several processes: start them by `torchrun --nproc-per-node N script.py`")
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group(backend, timeout=TIMEOUT)
    return dist.get_rank(), dist.get_world_size()


def share(model: nn.Module, plan: Any, format: Any, mesh: Any = None) -> dict[str, Share]:
    """Join the processes of torchrun and `cut` the model for this one. format: in which weights will be quantised.

    mesh: of the processes that share the model, where these are not all."""
    if plan != "auto":
        raise ValueError(f'tp_plan={plan!r:.80} is not supported; pass "auto": parallel.CUTS says what is cut')
    if mesh is None:
        return cut(model, *start(), block_of(format))
    if getattr(mesh, "ndim", None) != 1:
        raise ValueError("device_mesh should be a DeviceMesh of one dimension; of a larger one pass a part, mesh['tp']")
    return cut(model, mesh.get_local_rank(), mesh.size(), block_of(format))


def agreed(value: Any, group: Any = None) -> Any:
    """The first rank's value, on all ranks: random draws and clocks must not make them differ."""
    found = [value]
    dist.broadcast_object_list(found, group=group, group_src=0)
    return found[0]


def block_of(format: Any) -> int:
    """How many weights of a row a quantised format takes together: shares should be multiples of it."""
    return math.lcm(getattr(format, "group_size", 1) or 1, 64) if format is not None else 1
