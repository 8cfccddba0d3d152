"""What a caller asks for, and what the `quantization_config` of a `config.json` says.

`BitsAndBytesConfig` has the fields of the documentation, `Int4Config` is our own, AWQ's and GPTQ's (`foreign.py`) are
only read. Each says in which `format` the layers hold their weights, how files hold them (`stored`), in what fp16
inputs are multiplied (`compute_dtype`), and what is left out (`skip_modules`).
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from minivlm.quantization.affine import GROUP_SIZES, Affine
from minivlm.quantization.codebook import Codebook
from minivlm.quantization.formats import DTYPES, Format, checked_names
from minivlm.quantization.int8 import Int8


@dataclass(frozen=True)
class BitsAndBytesConfig:
    """NF4 or FP4 (`load_in_4bit`) or int8 (`load_in_8bit`), with the names and defaults of `transformers`.

    bnb_4bit_compute_dtype: in what fp16 inputs are multiplied; bf16 and fp32 inputs always keep their own dtype.
    llm_int8_skip_modules: modules that stay as they are, for either width, beside those that always do (`apply.py`);
    a name means that module and all inside it, wherever it stands: "vision_model", "layers.0", "q_proj".
    quantize_head: the output head too, in the same format; it stays as it is by default, because logits decide between
    near neighbours (docs/quantization.md has what it costs).
    llm_int8_threshold: of no effect, for activations stay in floating point (`int8.py`).

    Raises ValueError or TypeError for what is not supported, naming it.
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: torch.dtype | str | None = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: torch.dtype | str | None = None
    quantize_head: bool = False

    def __post_init__(self) -> None:
        for name in ("load_in_8bit", "load_in_4bit", "bnb_4bit_use_double_quant", "quantize_head"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} should be True or False, found {getattr(self, name)!r}")
        if self.load_in_8bit == self.load_in_4bit:
            raise ValueError("set one of load_in_4bit and load_in_8bit, and not both; without either, pass no config")
        if self.load_in_4bit and self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ValueError(f'bnb_4bit_quant_type should be "nf4" or "fp4", found {self.bnb_4bit_quant_type!r}')
        for name in ("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"):
            if getattr(self, name):
                raise ValueError(f"{name}=True is not supported: a model lives on one device, its weights in one form")
        checked_names("llm_int8_skip_modules", self.llm_int8_skip_modules)
        object.__setattr__(self, "bnb_4bit_compute_dtype", _dtype("bnb_4bit_compute_dtype", self.compute_dtype))
        storage = str(self.bnb_4bit_quant_storage or "uint8").removeprefix("torch.")
        if storage not in ("uint8", "int8", "bfloat16", "float16", "float32"):
            raise ValueError(f"bnb_4bit_quant_storage {storage!r} is not supported; it only names how bytes are stored")

    @property
    def compute_dtype(self) -> torch.dtype:
        asked = self.bnb_4bit_compute_dtype
        return torch.float32 if asked is None else asked

    @property
    def skip_modules(self) -> list[str]:
        return self.llm_int8_skip_modules or []

    @property
    def format(self) -> Format:
        return Int8() if self.load_in_8bit else Codebook(self.bnb_4bit_quant_type, self.bnb_4bit_use_double_quant)

    @property
    def stored(self) -> Format:
        return self.format

    def to_hub(self, kept: list[str]) -> dict[str, Any]:
        """As `transformers` writes it into `config.json`. kept: all linear layers that are not quantised; where modules
        were skipped it has to be told of the others too, for its own list then replaces what it keeps by itself."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["bnb_4bit_compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        values["llm_int8_skip_modules"] = kept if self.skip_modules or self.quantize_head else None
        if not self.quantize_head:
            del values["quantize_head"]  # a word of ours
        return {**values, "bnb_4bit_quant_storage": "uint8", "quant_method": "bitsandbytes"}


@dataclass(frozen=True)
class Int4Config:
    """Affine int4 in groups of 32, 64 or 128 inputs (`affine.py`).

    skip_modules, quantize_head: as `llm_int8_skip_modules` and `quantize_head` above.
    """

    group_size: int = 128
    skip_modules: list[str] = field(default_factory=list)
    quantize_head: bool = False

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size should be one of {', '.join(map(str, GROUP_SIZES))}, found {self.group_size}")
        checked_names("skip_modules", self.skip_modules)
        if not isinstance(self.quantize_head, bool):
            raise TypeError(f"quantize_head should be True or False, found {self.quantize_head!r}")

    compute_dtype = None  # inputs are multiplied in their own dtype

    @property
    def format(self) -> Format:
        return Affine(self.group_size)

    @property
    def stored(self) -> Format:
        return self.format

    def to_hub(self, kept: list[str]) -> dict[str, Any]:
        values: dict[str, Any] = {"group_size": self.group_size, "skip_modules": self.skip_modules}
        if self.quantize_head:
            values["quantize_head"] = True
        return {**values, "bits": 4, "quant_method": "minivlm_int4"}


def _dtype(name: str, value: Any) -> torch.dtype:
    found = DTYPES.get(str(value).removeprefix("torch."))
    if found is None:
        raise ValueError(f"{name} should be one of {', '.join(DTYPES)}, found {value!r}")
    return found
