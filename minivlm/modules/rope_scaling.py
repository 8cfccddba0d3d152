"""How rotary positions are stretched over longer texts than those of the training. None of the released checkpoints of
the three families does it; fine-tuned ones do.

    linear      every frequency divided by one factor: positions move together (Chen et al. 2023)
    dynamic     theta grows with the text, once it is longer than those of the training ("NTK-aware", bloc97 2023)
    llama3      slow pairs divided by the factor, fast ones kept, those between blended by wavelength (Llama 3.1)
    yarn        the same, blended by the index of the pair, and sharper attention (YaRN, Peng et al. 2023)
    longrope    a divisor of its own for every pair, one list for short texts and one for long (Ding et al. 2024)

Frequencies are fp32, computed in the order of the reference. B batch, T new tokens, D head width.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from minivlm.modules.decoder import rotary_powers

# What each type needs in `rope_scaling`; the other fields have defaults.
NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("factor", "short_factor", "long_factor", "original_max_position_embeddings"),
}
# The least that a field may be, 1e-6 for the others: nothing may divide by almost zero, or be a logarithm of less.
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
        for name in ("short_factor", "long_factor"):
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

    def check_head(self, head_dim: int) -> None:
        """ValueError if heads of this width cannot be stretched so."""
        if head_dim == 2:
            raise ValueError("rope_scaling with head_dim 2 stretches nothing: its one pair has the frequency 1")
        for name in ("short_factor", "long_factor"):
            divisors = getattr(self, name)
            if divisors is not None and len(divisors) != head_dim // 2:
                raise ValueError(f"rope_scaling.{name} should have head_dim / 2 = {head_dim // 2} entries")

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

    def frequencies(self, position_ids: Tensor, head_dim: int, theta: float, trained: int) -> Tensor:
        """(D/2,) fp32 frequencies for texts that reach as far as position_ids (B, T).

        trained: max_position_embeddings, for dynamic scaling. Only dynamic and longrope depend on the positions. The
        reference keeps the frequencies of the longest text so far for later, shorter ones; here only this text counts.
        """
        powers = rotary_powers(head_dim, theta, position_ids.device)
        if self.rope_type == "linear":
            return 1.0 / powers / self.factor
        if self.rope_type == "llama3":
            return self._llama3(powers)
        if self.rope_type == "yarn":
            return self._yarn(powers, theta)
        length = position_ids.max() + 1  # a tensor: reading its value would wait for the device
        if self.rope_type == "longrope":
            short, long = (_divisors(each, powers.device) * powers for each in (self.short_factor, self.long_factor))
            return 1.0 / torch.where(length > self.original_max_position_embeddings, long, short)
        growth = (self.factor * length / trained - (self.factor - 1)).clamp(min=1)  # 1 up to the trained length
        return 1.0 / rotary_powers(head_dim, theta * growth ** (head_dim / (head_dim - 2)), powers.device)

    def _llama3(self, powers: Tensor) -> Tensor:
        plain = 1.0 / powers
        low, high = self.low_freq_factor, self.high_freq_factor
        turns = self.original_max_position_embeddings / (2 * math.pi / plain)  # in the longest text of the training
        fast = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - fast) * plain / self.factor + fast * plain

    def _yarn(self, powers: Tensor, theta: float) -> Tensor:
        head_dim = 2 * len(powers)

        def index(turns: float) -> float:
            """Of the pair that turns so often in the longest text of the training."""
            trained = self.original_max_position_embeddings
            return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first, last = index(self.beta_fast or 32), index(self.beta_slow or 1)
        if self.truncate is not False:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        pairs = torch.arange(len(powers), dtype=torch.float32, device=powers.device)
        keep = 1 - ((pairs - first) / ((last - first) or 0.001)).clamp(0, 1)
        return 1.0 / (self.factor * powers) * (1 - keep) + 1.0 / powers * keep


_KEPT: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def _divisors(divisors: tuple[float, ...], device: torch.device) -> Tensor:
    """longrope's list on the device. Kept, since a captured step may not copy from the host; but not what is made while
    a model is traced, which stands for a tensor and is none."""
    if (divisors, device) in _KEPT:
        return _KEPT[divisors, device]
    made = torch.tensor(divisors, dtype=torch.float32, device=device)
    if type(made) is Tensor and not torch.compiler.is_compiling():
        _KEPT[divisors, device] = made
    return made
