"""Measures how far apart two tensors are, and how far apart they may be.

R rows, C channels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 21  # elements compared at a time, in float64


@dataclass
class Difference:
    """Statistics of a stage, collected piece by piece by `add`; side a is the reference.

    largest: max |Δ|, at (row, channel).  peak: max |a|.  eps: of the coarser dtype of the two.
    """

    rows: int = 0
    elements: int = 0
    largest: float = 0.0
    at: tuple[int, int] = (0, 0)
    total: float = 0.0
    peak: float = 0.0
    eps: float = 0.0
    squares: float = 0.0  # of Δ
    a_squares: float = 0.0
    b_squares: float = 0.0
    products: float = 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        """The next rows of both sides, (R, C) each. ValueError if the shapes differ."""
        if a.shape != b.shape:
            raise ValueError(f"shape {tuple(b.shape)} instead of {tuple(a.shape)}")
        for dtype in (a.dtype, b.dtype):
            self.eps = max(self.eps, torch.finfo(dtype).eps if dtype.is_floating_point else 0.0)
        step = max(1, CHUNK // max(1, a.shape[1]))
        for start in range(0, len(a), step):
            self._add(a[start : start + step].double(), b[start : start + step].double())

    def _add(self, a: Tensor, b: Tensor) -> None:
        delta = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=math.inf)
        if delta.numel() and (worst := delta.max().item()) > self.largest:
            row, channel = divmod(int(delta.argmax()), a.shape[1])
            self.largest, self.at = worst, (self.rows + row, channel)
        self.rows += len(a)
        self.elements += a.numel()
        self.total += delta.sum().item()
        self.squares += delta.square().sum().item()
        self.peak = max(self.peak, a.abs().max().item() if a.numel() else 0.0)
        self.a_squares += a.square().sum().item()
        self.b_squares += b.square().sum().item()
        self.products += (a * b).sum().item()

    def add_scores(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> list[tuple[int, int]]:
        """Add the scores (B, N, V) that greedy tokens (B, N) were chosen by, for each row up to the first step at which
        the tokens differ, since the texts differ after it. → (row of the batch, step) of each row that was added.
        """
        steps_added = []
        for row, tokens in enumerate(zip(a["tokens"].tolist(), b["tokens"].tolist(), strict=True)):
            unequal = (n for n, pair in enumerate(zip(*tokens, strict=False)) if pair[0] != pair[1])
            same = next(unequal, len(tokens[0]))
            pair = [side["scores"][row, : same + 1] for side in (a, b)]
            steps = min(map(len, pair))
            # forbidden tokens have -inf, which would become the peak
            self.add(*(scores[:steps].masked_fill(scores[:steps] == -math.inf, 0) for scores in pair))
            steps_added += [(row, step) for step in range(steps)]
        return steps_added

    @property
    def mean(self) -> float:
        return self.total / max(1, self.elements)

    @property
    def relative(self) -> float:
        """‖Δ‖ / ‖a‖."""
        return _ratio(math.sqrt(self.squares), math.sqrt(self.a_squares))

    @property
    def cosine(self) -> float:
        size = math.sqrt(self.a_squares * self.b_squares)
        return min(1.0, self.products / size) if size else float(self.a_squares == self.b_squares)


@dataclass(frozen=True)
class Yardstick:
    """How far side a is from itself at one stage when only its attention backend (or dtype) changes."""

    largest: float = 0.0
    relative: float = 0.0

    def bounds(self, found: Difference) -> tuple[float, float]:
        """The largest allowed max |Δ| and ‖Δ‖/‖a‖: twice the yardstick, with a floor.

        Once would do if a's two backends rounded independently; but both may round the same intermediate results, which
        a third (attention weights before normalisation, in our kernels) does not.

        The floor is for stages before any attention, where a's backends agree to the bit and another order of summation
        does not. In float32 a sum of a thousand products is off by some 10 steps of its last place: 1e-5 of the
        largest value (84 steps) is out of reach, and so is 1e-6 (8 steps) for all values together. In half precision
        sums are kept in float32 and only results are rounded. Each value is rounded twice, as a product and again as a
        sum, so it may end 2 steps (eps) away; and if each side rounded each value anew, ‖Δ‖ would be
        0.41 steps of the values' own, so half a step of relative difference is not reached by rounding alone.
        """
        largest = max(2 * self.largest, max(1e-5, 2 * found.eps) * found.peak)
        return largest, max(2 * self.relative, max(1e-6, found.eps / 2))

    def excess(self, found: Difference) -> float:
        """The larger of both differences, in units of what is allowed: above 1 the stage diverges."""
        largest, relative = self.bounds(found)
        return max(_ratio(found.largest, largest), _ratio(found.relative, relative))


def _ratio(part: float, whole: float) -> float:
    if whole:
        return part / whole
    return math.inf if part else 0.0
