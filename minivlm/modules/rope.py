"""Rotary positions (RoFormer, Su et al. 2021), and how to stretch them over longer texts than those of the training.

The pair i of a head's D numbers turns by position · frequency_i, where plain frequencies are theta^(−2i/D), i < D/2.

    linear      every frequency divided by one factor: positions move together (Chen et al. 2023)
    dynamic     theta grows with the text, once it is longer than those of the training ("NTK-aware", bloc97 2023)
    llama3      slow pairs divided by the factor, fast ones kept, those between blended by wavelength (Llama 3.1)
    yarn        the same, blended by the index of the pair, and sharper attention (YaRN, Peng et al. 2023)
    longrope    a divisor of its own for every pair, one list for short texts and one for long (Ding et al. 2024)

Frequencies are fp32 in any model (a bf16 copy moves logits by 0.1), computed in the order of the reference.

B batch, T new tokens, H heads, D head width.
"""

import functools
import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from minivlm.modules import config as hub_config

# What each type needs in `rope_scaling`; what else it may say has a default.
NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("factor", "short_factor", "long_factor", "original_max_position_embeddings"),
}
# The least that a field may say, 1e-6 for the others: nothing may divide by almost zero, or be a logarithm of less.
LEAST = {"original_max_position_embeddings": 2, "mscale": 0, "mscale_all_dim": 0}


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched, in the Hub's words. Raises ValueError for an unknown type or a missing field."""

    rope_type: str
    factor: float | None = None
    original_max_position_embeddings: int | None = None  # length of the texts of the training
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None  # null: 32
    beta_slow: float | None = None  # null: 1
    truncate: bool | None = None  # null: true
    attention_factor: float | None = None  # null: what the paper recommends for the factor
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: list | tuple | None = None  # D/2 divisors
    long_factor: list | tuple | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in NEEDS:
            raise ValueError(f"rope type {self.rope_type!r} is not supported; known: default, {', '.join(NEEDS)}")
        needs = NEEDS[self.rope_type]
        if missing := [name for name in needs if getattr(self, name) is None]:
            raise ValueError(f"rope type {self.rope_type!r} needs {', '.join(missing)} in rope_scaling")
        self._check_numbers()
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor ({self.low_freq_factor}) should be below high_freq_factor ({self.high_freq_factor})"
            )
        for name in ("short_factor", "long_factor"):  # tuples, so that a RopeScaling can be a key
            if (divisors := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(float(divisor) for divisor in divisors))

    def _check_numbers(self) -> None:
        for name, value in self.to_hub().items():
            least = LEAST.get(name, 1e-6)
            numbers = value if isinstance(value, list | tuple) else [value]
            fits = all(type(number) in (int, float) and least <= number < 2**31 for number in numbers)
            if not fits and name not in ("rope_type", "truncate"):
                wrong = "must be positive" if value == 0 else f"is made of numbers from {least}"
                raise ValueError(f"RopeScaling.{name} {wrong}, found {value!r:.80}")

    def to_hub(self) -> dict[str, Any]:
        """The entries that are set."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def attention_scale(self) -> float:
        """What cos and sin are multiplied by, so that attention stays as sharp on long texts as on short ones."""
        if self.rope_type not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        growth = math.log(self.factor)
        if self.rope_type == "longrope":
            return math.sqrt(1 + growth / math.log(self.original_max_position_embeddings))
        if self.mscale and self.mscale_all_dim:
            return (0.1 * self.mscale * growth + 1) / (0.1 * self.mscale_all_dim * growth + 1)
        return 0.1 * growth + 1


def read_rope(values: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a text config, spelled so or inside `rope_parameters` (transformers 5).

    Lengths that the entries leave out follow from `max_position_embeddings`. Raises ValueError for what cannot be
    followed: another type, missing fields, heads that are rotated in part, frequencies that differ by layer.
    """
    rope = hub_config.section(values, "rope_scaling") or hub_config.section(values, "rope_parameters")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"rope_scaling should be a JSON object of plain values, found {rope!r:.80}")
    for name in ("max_position_embeddings", "original_max_position_embeddings"):
        length = {**values, **rope}.get(name)
        if length is not None and (type(length) is not int or length < 0):
            raise ValueError(f"{name} should be a number of tokens, found {length!r:.80}")
    rope = {name: value for name, value in {**values, **rope}.items() if value is not None}
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor {rope['partial_rotary_factor']!r} is not supported: heads turn whole")
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    kind = rope.get("rope_type", rope.get("type", "default"))  # `type` is the older word
    if not isinstance(kind, str):
        raise ValueError(f"rope_type should be a string, found {kind!r:.80}")
    if kind == "default":
        return {**theta, "rope_scaling": None}
    positions = rope.get("max_position_embeddings")
    if positions and "original_max_position_embeddings" in NEEDS.get(kind, ()):
        trained = rope.setdefault("original_max_position_embeddings", positions)
        if trained and kind != "llama3":
            rope.setdefault("factor", positions / trained)
    return {**theta, "rope_scaling": hub_config.from_hub(RopeScaling, {**rope, "rope_type": kind})}


# ---- Frequencies -----------------------------------------------------------------------------------------------------


def rotary_frequencies(
    position_ids: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None, trained: int = 0
) -> Tensor:
    """(D/2,) fp32 frequencies for texts that reach as far as position_ids (B, T); `trained` is for dynamic scaling.

    Only dynamic and longrope look at the positions; the others are computed once. The reference keeps the frequencies
    of the longest text it has seen for later, shorter ones; here only the text at hand counts.
    """
    device = position_ids.device
    if scaling is None or scaling.rope_type not in ("dynamic", "longrope"):
        return _fixed(head_dim, theta, scaling, device)
    length = position_ids.max() + 1  # a tensor: asking for its value would wait for the device
    if scaling.rope_type == "longrope":
        powers = _powers(head_dim, theta, device)
        short, long = (_divisors(divisors, device) * powers for divisors in (scaling.short_factor, scaling.long_factor))
        return 1.0 / torch.where(length > scaling.original_max_position_embeddings, long, short)
    growth = (scaling.factor * length / trained - (scaling.factor - 1)).clamp(min=1)  # 1 up to the trained length
    return 1.0 / _powers(head_dim, theta * growth ** (head_dim / (head_dim - 2)), device)


@functools.lru_cache(maxsize=16)
def _fixed(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    powers = _powers(head_dim, theta, device)
    if scaling is None:
        return 1.0 / powers
    if scaling.rope_type == "linear":
        return 1.0 / powers / scaling.factor
    return _llama3(powers, scaling) if scaling.rope_type == "llama3" else _yarn(powers, theta, scaling)


def _llama3(powers: Tensor, scaling: RopeScaling) -> Tensor:
    plain = 1.0 / powers
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings / (2 * math.pi / plain)  # in the longest text of the training
    fast = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - fast) * plain / scaling.factor + fast * plain


def _yarn(powers: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    head_dim = 2 * len(powers)

    def index(turns: float) -> float:
        """Of the pair that turns so often in the longest text of the training."""
        trained = scaling.original_max_position_embeddings
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index(scaling.beta_fast or 32), index(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    pairs = torch.arange(len(powers), dtype=torch.float32, device=powers.device)
    keep = 1 - ((pairs - first) / ((last - first) or 0.001)).clamp(0, 1)
    return 1.0 / (scaling.factor * powers) * (1 - keep) + 1.0 / powers * keep


def _powers(head_dim: int, theta: float | Tensor, device: torch.device) -> Tensor:
    """theta^(2i/D), (D/2,) fp32."""
    return theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim)


@functools.lru_cache(maxsize=16)  # a copy from the host, which a captured step may not make
def _divisors(divisors: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(divisors, dtype=torch.float32, device=device)


# ---- Rotation --------------------------------------------------------------------------------------------------------


def rotary_cos_sin(
    position_ids: Tensor, frequencies: Tensor, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The table of rotations. position_ids (B, T) → cos · scale and ∓ sin · scale for `rotate`, each (B, 1, T, D)."""
    with torch.autocast(position_ids.device.type, enabled=False):
        angles = position_ids[:, None, :, None].float() * frequencies  # (B, 1, T, D/2)
        cos, sin = (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i+D/2}): halves, not neighbours, as Hub weights are laid out. x: (B, H, T, D)."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin  # −x_{i+D/2}, x_i: `sin` has the sign
