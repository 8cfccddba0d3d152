"""AWQ and GPTQ files: the numbers of `affine.py` in other packings. Read, and turned into ours without any loss.

Both hold a weight transposed, (K inputs, N outputs), in 32-bit words of eight codes, the first in the lowest bits,
with G = ⌈K / group_size⌉ groups along K:

    AWQ (Lin et al. 2023), "GEMM" layout       qweight (K, N/8): a word holds outputs 0 2 4 6 1 3 5 7 of its eight
                                               qzeros (G, N/8): likewise;  scales (G, N)
    GPTQ (Frantar et al. 2022), as AutoGPTQ    qweight (K/8, N): a word holds eight inputs of one output
    writes it                                  qzeros (G, N/8): eight outputs in order, each less one
                                               (not in "gptq_v2" files);  scales (G, N);  g_idx (K,): each input's group
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from minivlm.quantization import affine
from minivlm.quantization.affine import GROUP_SIZES, Affine
from minivlm.quantization.config import BitsAndBytesConfig, Int4Config
from minivlm.quantization.formats import Shape, Tensors, check_real

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)


def unpack_words(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """int32 words (R, C) → codes (R, 8·C) uint8. The i-th half byte of a word, from the lowest, has place order[i]."""
    if words.dtype != torch.int32:
        raise ValueError(f"its packed codes are {words.dtype}, expected torch.int32: words of eight codes")
    codes = [(words >> 4 * order.index(place) & 15).to(torch.uint8) for place in range(8)]
    return torch.stack(codes, dim=2).flatten(1)


def our_group_size(theirs: int) -> int:
    """32, 64 or 128, so that one of their groups is a number of ours; −1 means one group for all inputs."""
    for size in reversed(GROUP_SIZES):
        if theirs == -1 or (0 < theirs < 2**31 and theirs % size == 0):
            return size
    raise ValueError(f"group_size should be -1 or a multiple of {GROUP_SIZES[0]}, found {theirs!r}")


def _groups(group_size: int, columns: int) -> int:
    return 1 if group_size == -1 else -(-columns // group_size)


def _ours(codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensors:
    """Codes (K, N), scales and zeros (G, N) → the tensors of `Affine`."""
    columns, ours = len(codes), our_group_size(group_size)
    check_real("scales", scales)
    starts = torch.arange(0, columns, ours, device=codes.device)
    theirs = starts // (columns if group_size == -1 else group_size)
    return {
        "qweight": affine.pack(codes.T).contiguous(),
        "scales": scales[theirs].T.contiguous(),
        "zeros": zeros[theirs].T.contiguous(),
    }


def _multiple_of_eight(name: str, size: int) -> None:
    if size % 8:
        raise ValueError(f"its {name} of {size} do not fill words of eight codes")


@dataclass(frozen=True)
class AwqFiles:
    """A layer as AutoAWQ's GEMM layout holds it."""

    group_size: int

    marker = "qweight"

    def files(self, shape: Shape) -> dict[str, tuple[int, ...] | None]:
        rows, columns = shape
        groups = _groups(self.group_size, columns)
        return {"qweight": (columns, rows // 8), "qzeros": (groups, rows // 8), "scales": (groups, rows)}

    def read(self, found: Tensors, shape: Shape) -> Tensors:
        _multiple_of_eight("outputs", shape[0])
        codes, zeros = (unpack_words(found[name], AWQ_ORDER) for name in ("qweight", "qzeros"))
        return _ours(codes, found["scales"], zeros, self.group_size)


@dataclass(frozen=True)
class GptqFiles:
    """A layer as AutoGPTQ holds it. less_one: the zero points are written as one less (all files but "gptq_v2")."""

    group_size: int
    less_one: bool = True

    marker = "qweight"

    def files(self, shape: Shape) -> dict[str, tuple[int, ...] | None]:
        rows, columns = shape
        groups = _groups(self.group_size, columns)
        packed = {"qweight": (columns // 8, rows), "qzeros": (groups, rows // 8)}
        return {**packed, "scales": (groups, rows), "g_idx": (columns,)}

    def read(self, found: Tensors, shape: Shape) -> Tensors:
        rows, columns = shape
        _multiple_of_eight("outputs", rows)
        _multiple_of_eight("inputs", columns)
        size = columns if self.group_size == -1 else self.group_size
        if not torch.equal(found["g_idx"].cpu().long(), torch.arange(columns, device="cpu") // size):
            raise ValueError(
                "its g_idx mixes the inputs of different groups (quantised with desc_act=true), which is not "
                "supported; use a file made with desc_act=false"
            )
        codes = unpack_words(found["qweight"].T.contiguous(), IN_ORDER).T  # (K, N)
        zeros = unpack_words(found["qzeros"], IN_ORDER) + int(self.less_one)
        return _ours(codes, found["scales"], zeros, self.group_size)


@dataclass(frozen=True)
class ForeignConfig:
    """What a `config.json` says about AWQ or GPTQ files. Saving the model writes `Int4Config` files."""

    stored: AwqFiles | GptqFiles
    skip_modules: list[str] = field(default_factory=list)  # as the config says; what the files hold decides

    compute_dtype = None
    quantize_head = False

    @property
    def format(self) -> Affine:
        return Affine(our_group_size(self.stored.group_size))

    def to_hub(self, kept: list[str]) -> dict[str, Any]:
        return Int4Config(self.format.group_size).to_hub(kept)


Config = BitsAndBytesConfig | Int4Config | ForeignConfig


def from_hub(values: Any) -> Config:
    """The `quantization_config` of a `config.json`. Raises ValueError for what cannot be honoured, naming it."""
    if not isinstance(values, dict):
        raise ValueError(f"quantization_config should be a JSON object, found {type(values).__name__}")
    method = values.get("quant_method", "bitsandbytes" if "load_in_4bit" in values else None)
    readers = {"bitsandbytes": _bitsandbytes, "minivlm_int4": _int4, "awq": _awq, "gptq": _gptq}
    if not isinstance(method, str) or method not in readers:
        raise ValueError(f"quant_method {method!r} is not supported; known: {', '.join(readers)}")
    return readers[method](values)


def _bitsandbytes(values: dict[str, Any]) -> Config:
    known = {entry.name for entry in fields(BitsAndBytesConfig)}
    return BitsAndBytesConfig(**{name: value for name, value in values.items() if name in known})


def _int4(values: dict[str, Any]) -> Config:
    return Int4Config(values.get("group_size"), values.get("skip_modules") or [], values.get("quantize_head", False))


def _awq(values: dict[str, Any]) -> Config:
    version = str(values.get("version") or values.get("format") or "gemm").lower()
    _expect("AWQ", {"bits": values.get("bits", values.get("w_bit", 4)), "version": version}, bits=4, version="gemm")
    group_size = _group_size(values.get("group_size", values.get("q_group_size", 128)))
    return ForeignConfig(AwqFiles(group_size), values.get("modules_to_not_convert") or [])


def _gptq(values: dict[str, Any]) -> Config:
    form = values.get("checkpoint_format") or values.get("format") or "gptq"
    _expect("GPTQ", {"bits": values.get("bits")}, bits=4)
    if form not in ("gptq", "gptq_v2"):
        raise ValueError(f'GPTQ files of checkpoint_format {form!r} are not supported; known: "gptq", "gptq_v2"')
    return ForeignConfig(GptqFiles(_group_size(values.get("group_size")), less_one=form == "gptq"))


def _expect(kind: str, found: dict[str, Any], **wanted: Any) -> None:
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(f"{kind} files of {name} {found[name]!r} are not supported; only {value!r} is")


def _group_size(value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError(f"group_size should be a whole number, found {value!r}")
    our_group_size(value)
    return value
