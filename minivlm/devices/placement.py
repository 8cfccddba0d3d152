"""One model on several devices of one process: whole decoder blocks, in order, device after device (`device_map`).

    cuda:0  embedding, vision tower, connector, blocks 0 … 11 ─┐                       ┌─► norm, head ─► logits
    cuda:1                                    blocks 12 … 31 ◄─┘ ─► … ─► the last one ─┘
    cpu     blocks for which no GPU has room: their weights are copied to the GPU for each pass

Everything but the blocks lives on the first device, the "home". Only one device works at a time, so this adds memory
and no speed; `minivlm.devices.parallel` cuts the model instead, and all work at once. `place` decides from sizes before
anything is read, loading puts each tensor there, and `connect` adds hooks that move what passes between devices.
"""

import copy
import difflib
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.devices import memory
from minivlm.modules.attention import Mask
from minivlm.modules.cache import KVCache

BLOCK = re.compile(r"(.*\.)?(text_model|language_model)\.layers\.(\d+)|(.*\.)?gated_cross_attn_layers\.(\d+)")
SPARE = 0.9  # of a device's free memory that weights may take; the rest is for the cache and activations
CPU = torch.device("cpu")
ONLY_IN_TRANSFORMERS = ("rotary_emb", "post_layernorm")  # modules that only its device maps can name


@dataclass(frozen=True)
class Placement:
    """home: of everything but the blocks.  blocks: name of a block → where its weights are."""

    home: torch.device
    blocks: dict[str, torch.device]

    def of(self, name: str) -> torch.device:
        """Where a tensor of the model lives, by its name."""
        block = BLOCK.match(name)
        return self.blocks.get(block[0], self.home) if block else self.home

    def works_on(self, block: str) -> torch.device:
        """Where a block computes: one whose weights wait on the CPU is copied to the home for each pass."""
        device = self.blocks[block]
        return self.home if device == CPU else device

    @property
    def is_single(self) -> bool:
        """Whether everything is on one device and nothing has to move."""
        return set(self.blocks.values()) <= {self.home}

    def table(self) -> dict[str, int | str]:
        """As `hf_device_map` of transformers: "" is everything that no other line names."""
        return {"": _name(self.home)} | {name: _name(device) for name, device in self.blocks.items()}


def _name(device: torch.device) -> int | str:
    return device.index if device.type == "cuda" and device.index is not None else str(device)


# ---- Before loading: what goes where ---------------------------------------------------------------------------------


def place(model: nn.Module, device_map: Any, max_memory: dict | None, sizes: dict[str, int]) -> Placement:
    """Where the parts of a meta-device model are to live. sizes: bytes of every tensor by its name, as it will be held.

    device_map: None or one device; "auto": the first GPU if it has room, else all of them, evenly, and the CPU where
    these are too small, or the CPU alone where there is none; "balanced": all GPUs, always; "sequential": each is
    filled before the next; or a dict from names of parts, or of modules around them ("" is everything), to devices.
    max_memory: {0: "20GiB", 1: 10**9, "cpu": "60GiB"}.

    Raises ValueError for anything else, and for a model that does not fit.
    """
    blocks = [name for name, _ in model.named_modules() if BLOCK.fullmatch(name)]
    if isinstance(device_map, dict):
        _check_names(model, device_map)
        return _by_map(device_map, blocks)
    if device_map not in ("auto", "balanced", "sequential"):
        home = one_device(device_map)
        return Placement(home, dict.fromkeys(blocks, home))
    room = budgets(max_memory)
    if not any(device.type == "cuda" for device in room):
        return Placement(CPU, dict.fromkeys(blocks, CPU))
    weights = dict.fromkeys(blocks, 0)
    rest = 0
    for name, size in sizes.items():
        block = BLOCK.match(name)
        if block:
            weights[block[0]] += size
        else:
            rest += size
    fits = device_map == "auto" and rest + sum(weights.values()) <= next(iter(room.values()))
    return spread(_in_order(weights), rest, room, even=device_map != "sequential" and not fits)


def _in_order(weights: dict[str, int]) -> dict[str, int]:
    """Blocks in the order of the forward pass: gated block i of IDEFICS before the decoder block that follows it."""
    gated = [name for name in weights if "gated_cross_attn_layers" in name]
    plain = [name for name in weights if name not in gated]
    every = len(plain) // len(gated) if gated else 0
    order = []
    for index, name in enumerate(plain):
        if every and index % every == 0 and index // every < len(gated):
            order.append(gated[index // every])
        order.append(name)
    return {name: weights[name] for name in order}


def spread(blocks: dict[str, int], rest: int, room: dict[torch.device, int], even: bool = True) -> Placement:
    """Blocks (name → bytes, in the order of the forward pass) over devices with so much room, the CPU last.

    The first device also holds the rest. even: each GPU gets its share of all bytes, as far as it has room.
    """
    gpus = [device for device in room if device.type == "cuda"]
    waiting, placed, left = list(blocks), {}, rest + sum(blocks.values())
    if rest > room[gpus[0]]:
        raise ValueError(_too_large(rest + sum(blocks.values()), room, f"the parts beside its blocks take {rest:,}"))
    for index, device in enumerate(gpus):
        used = rest if index == 0 else 0
        share = left / (len(gpus) - index) if even else float("inf")
        while waiting:
            size = blocks[waiting[0]]
            if used + size > room[device] or used + size / 2 > share:
                break
            placed[waiting.pop(0)] = device
            used += size
        left -= used
    if sum(blocks[name] for name in waiting) > room.get(CPU, 0):
        raise ValueError(_too_large(rest + sum(blocks.values()), room, "no room is left"))
    return Placement(gpus[0], {name: placed.get(name, CPU) for name in blocks})


def _too_large(total: int, room: dict[torch.device, int], why: str) -> str:
    each = ", ".join(f"{device}: {size:,}" for device, size in room.items())
    return (
        f"the model takes {total:,} bytes, and {why}; found room for {each}. Load it with fewer bits "
        "(quantization_config=), on more devices, or raise max_memory="
    )


def budgets(max_memory: dict | None) -> dict[torch.device, int]:
    """Bytes that weights may take on each GPU, in order, and on the CPU last.

    Without max_memory, 90 % of what is free now. ValueError for sizes and devices that are not valid.
    """
    if max_memory is not None:
        if not isinstance(max_memory, dict):
            raise ValueError(
                f'max_memory should be a dict such as {{0: "20GiB", "cpu": "60GiB"}}, found {max_memory!r}'
            )
        room = {
            one_device(f"cuda:{key}" if isinstance(key, int) else key): memory.in_bytes(size, "a size in max_memory")
            for key, size in max_memory.items()
        }
    else:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = [*(torch.device("cuda", number) for number in range(count)), CPU]
        room = {device: int(SPARE * (memory.free(device) or 0)) for device in devices}
    return dict(sorted(room.items(), key=lambda item: (item[0] == CPU, item[0].index or 0)))


def _check_names(model: nn.Module, device_map: dict) -> None:
    """ValueError for a name that no part of the model has, here or in any spelling of checkpoints and transformers."""
    parts = [name for named in (model.named_modules(), model.named_parameters()) for name, _ in named if name]
    known = {"", *(spelled for name in parts for spelled in _spellings(name))}
    known |= {name[: end.start()] for name in known for end in re.finditer(r"\.", name)}
    for key in map(str, device_map):
        name = f"{key}."
        for theirs, ours in model.hub_prefixes.items():
            name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
        if not known & {key, name.rstrip(".")} and key.rpartition(".")[2] not in ONLY_IN_TRANSFORMERS:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"names look like {parts[len(parts) // 2]!r}"
            raise ValueError(f"device_map names {key!r:.200}, which is not a part of this model; {hint}")


def _by_map(device_map: dict, blocks: list[str]) -> Placement:
    """By a map like `hf_device_map`: the longest name that a block's name begins with decides; anything else goes where
    the embeddings go."""
    devices = {str(name): one_device(device) for name, device in device_map.items()}
    if torch.device("meta") in devices.values():
        raise ValueError("device_map names meta, where a tensor has no values; put every part on a real device")

    def of(name: str) -> torch.device | None:
        names = _spellings(name)
        fits = [key for key in devices if key == "" or any(f"{each}.".startswith(f"{key}.") for each in names)]
        return devices[max(fits, key=len)] if fits else None

    found = {name: of(name) for name in blocks}
    if missing := [name for name, device in found.items() if device is None]:
        raise ValueError(f'device_map does not say where {missing[0]} goes; "" stands for all that it does not name')
    stem = blocks[0].rpartition(".layers.")[0]
    return Placement(of(f"{stem}.embed_tokens") or found[blocks[0]], found)


def _spellings(name: str) -> list[str]:
    """A name here, and as checkpoints and the versions of transformers have it."""
    rest = name.removeprefix("model.").removeprefix("text_model.").removeprefix("language_model.")
    starts = ("model.text_model.", "model.language_model.", "language_model.model.", "model.")
    return [name, rest, *(start + rest for start in starts)]


def one_device(device: Any) -> torch.device:
    """None → cpu; an index, a name or a torch.device. ValueError for anything else."""
    if device is None:
        return CPU
    if isinstance(device, dict) and set(device) == {""}:
        device = device[""]
    try:
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'device_map names {device!r:.80}, which is not a device; pass "auto", "cpu", "cuda", "cuda:0" or a dict '
            "from names of modules to devices"
        ) from error


# ---- After loading: what passes from device to device ----------------------------------------------------------------


def connect(model: nn.Module, placement: Placement) -> nn.Module:
    """Have every block compute on its device; `model.hf_device_map` says where that is."""
    model.hf_device_map = placement.table()
    for name in ("to", "cuda", "cpu"):
        setattr(model, name, _stays)
    moves = _Moves()
    for name in placement.blocks:
        block, device = model.get_submodule(name), placement.works_on(name)
        if placement.blocks[name] != device:
            _stream(block, device)
        block.register_forward_pre_hook(moves.to(device), with_kwargs=True)
        if hasattr(block, "cross_attn"):  # IDEFICS computes its keys and values outside its forward pass
            _move_arguments(block.cross_attn, "keys_values", moves.to(device))
    decoder = model.decoder
    decoder.norm.register_forward_pre_hook(moves.to(placement.home, last=True), with_kwargs=True)
    devices = [placement.works_on(name) for name in placement.blocks if "gated" not in name]
    decoder.new_cache = lambda batch, slots, device, dtype: PlacedCache(
        type(decoder).new_cache(decoder, batch, 0, torch.device("meta"), dtype), slots, devices
    )
    return model


def _stays(*args: Any, **options: Any) -> None:
    raise ValueError(
        "this model lives on several devices (model.hf_device_map); load it again with another device_map= or dtype="
    )


class _Moves:
    """Moves the arguments of blocks. What blocks share (rotations, masks) is copied to a device once a pass."""

    def __init__(self) -> None:
        # (id of a value, device) → the value, which must live as long as its id is a key, and its copy there.
        # Values that are where they should be are not kept: every block's input would outlive its block.
        self.moved: dict[tuple[int, torch.device], tuple[Any, Any]] = {}

    def to(self, device: torch.device, last: bool = False) -> Any:
        """A pre-hook. last: the pass is over, and what has been moved for it can go."""

        def hook(module: nn.Module, args: tuple, options: dict) -> tuple[tuple, dict]:
            args = tuple(self._one(value, device) for value in args)
            options = {name: self._one(value, device) for name, value in options.items()}
            if last:
                self.moved.clear()
            return args, options

        return hook

    def _one(self, value: Any, device: torch.device) -> Any:
        if not isinstance(value, Tensor | Mask):
            return value
        key = (id(value), device)
        if key in self.moved:
            return self.moved[key][1]
        there = moved(value, device)
        if there is not value:
            self.moved[key] = (value, there)
        return there


def moved(value: Tensor | Mask, device: torch.device) -> Tensor | Mask:
    """The value on a device; itself if it is there."""
    if isinstance(value, Tensor):
        return to_device(value, device)
    if value.device == device:
        return value
    valid, filled = (None if part is None else to_device(part, device) for part in (value.valid, value.filled))
    return replace(value, valid=valid, filled=filled, device=device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; itself if it is there. A separate function, so that tests can replace it."""
    return tensor.to(device, non_blocking=device.type == "cuda")  # a CPU would read before the copy has arrived


def _move_arguments(module: nn.Module, method: str, hook: Any) -> None:
    """Let a method that is not `forward` move its arguments too."""
    original = getattr(module, method)

    def call(*args: Any, **options: Any) -> Any:
        args, options = hook(module, args, options)
        with streamed(module):
            return original(*args, **options)

    setattr(module, method, call)


def _stream(block: nn.Module, device: torch.device) -> None:
    """Have a block's weights copied to `device` for each pass, and dropped there afterwards."""
    for module in block.modules():
        module.streams_to = device
    entered: list[Any] = []

    def begin(module: nn.Module, args: tuple) -> None:
        entered.append(streamed(module))
        entered[-1].__enter__()

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        entered.pop().__exit__(None, None, None)

    block.register_forward_pre_hook(begin)
    block.register_forward_hook(end, always_call=True)


class streamed:
    """In this block, the parameters of a module that `_stream` has prepared are on the device where it computes.

    ValueError in training: the copies are dropped after the pass, and gradients with them.
    """

    def __init__(self, module: nn.Module) -> None:
        self.device = getattr(module, "streams_to", None)
        self.module, self.kept = module, []

    def __enter__(self) -> None:
        if self.device is not None and self.module.training and torch.is_grad_enabled():
            raise ValueError(
                "blocks that wait in main memory cannot be trained; use more devices, four bits on one "
                "(finetune --load nf4), or several processes (--fsdp)"
            )
        for module in self.module.modules() if self.device is not None else ():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self.kept.append((module, name, parameter))
                    copied = to_device(parameter.detach(), self.device)
                    module._parameters[name] = nn.Parameter(copied, requires_grad=False)

    def __exit__(self, *_: Any) -> None:
        for module, name, parameter in self.kept:
            module._parameters[name] = parameter
        self.kept = []


class PlacedCache(KVCache):
    """A `KVCache` whose layers are on several devices: one cache per device, with the same methods."""

    def __init__(self, like: KVCache, slots: int, devices: list[torch.device]) -> None:
        """like: of the same sizes but without slots, on any device.  devices: of each layer."""
        _, _, batch, heads, _, width = like.data.shape
        self.where = [(device, devices[:layer].count(device)) for layer, device in enumerate(devices)]
        self.parts = {
            device: KVCache(devices.count(device), batch, heads, slots, width, device=device, dtype=like.data.dtype)
            for device in dict.fromkeys(devices)
        }
        self.cross, self.cross_seen = [], None

    @property
    def data(self) -> Tensor:
        """Of the first device."""
        return next(iter(self.parts.values())).data

    @property
    def length(self) -> int:
        return next(iter(self.parts.values())).length

    @length.setter
    def length(self, length: int) -> None:
        for part in self.parts.values():
            part.length = length

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        device, index = self.where[layer]
        self.parts[device].grows = self.grows
        return self.parts[device].update(index, k, v)

    def expand(self, times: int, slots: int) -> "PlacedCache":
        wide = copy.copy(self)
        wide.parts = {device: part.expand(times, slots) for device, part in self.parts.items()}
        wide._move_images(torch.arange(self.batch).repeat_interleave(times))
        return wide

    def reorder(self, rows: Tensor, shared: int = 0) -> None:
        for device, part in self.parts.items():
            part.reorder(to_device(rows, device), shared)
        if not shared:
            self._move_images(rows)

    def _move_images(self, rows: Tensor) -> None:
        self.cross = [(_at(k, rows), _at(v, rows)) for k, v in self.cross]
        self.cross_seen = None if self.cross_seen is None else _at(self.cross_seen, rows)


def _at(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor[to_device(rows, device_of(tensor))]


def device_of(tensor: Tensor) -> torch.device:
    return tensor.device
