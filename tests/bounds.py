"""How far a computed number may be from the exact one: bounds that follow from lengths and dtypes, not from one BLAS.

Each operation rounds: fl(a ∘ b) = (a ∘ b)(1 + δ), |δ| ≤ u, where u, the unit roundoff, is eps / 2.

    certain     A sum of n products, added in any order, errs by at most n·u·Σ|product|, to first order (Higham 2002,
                "Accuracy and Stability of Numerical Algorithms", 3.1). Holds for all data; but grows with n.
    random      A test draws its numbers from a normal distribution, so partial sums grow as √n and not as n, and
                roundings are as often up as down: the sum of n terms errs by no more than about u·√n·‖terms‖₂ (n
                roundings of partial sums that are each at most about ‖terms‖₂; Higham & Mary 2019). `LIKELY` of these
                are allowed, twice four standard deviations: any order and blocking of the sum stays within it, while a
                single wrong product does not.

Numbers of these tests are of size 1, so that nothing overflows or vanishes.
"""

import torch
from torch import Tensor

LIKELY = 16.0


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


FP32 = unit(torch.float32)


def certain(n: int, size: Tensor | float) -> Tensor | float:
    """Of a sum in fp32 of n products, of which Σ|product| is `size`."""
    return n * FP32 * size


def random(n: int, norm: Tensor | float) -> Tensor | float:
    """Of a sum in fp32 of n random products, of which √Σ product² is `norm`."""
    return LIKELY * FP32 * n**0.5 * norm


def attention(dtype: torch.dtype, width: int, roundings: int) -> float:
    """Of softmax(q·kᵀ·scale)·v with normal q, k of this head width and scale 1/√width, relative to the largest v.

    Scores are sums of `width` products, of norm 1 once scaled; as much as a score errs, relatively, so does its weight,
    and by that part the mean of v. roundings: of weights, means and gradients, where they are held in half precision.
    """
    return random(width, 1.0) + (0.0 if dtype == torch.float32 else roundings * unit(dtype))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    weight_dtype: torch.dtype = torch.float64,
    terms: Tensor | None = None,
    roundings: int = 1,
) -> tuple[Tensor, Tensor]:
    """(x Wᵀ + b, how far a product in fp32 may be from it), both (M, N) in fp64, for random x (M, K) and W (N, K).

    dtype: of the result. roundings: how often the product is rounded to it before the bias is added, and once after.
    weight_dtype: what weights are rounded to on the way; float64 = they are not.
    terms: (N, K), what is really added up of each weight where it is larger than the weight: a code and its zero.
    """
    x, weight = x.double(), weight.double()
    product = x @ weight.T
    exact = product if bias is None else product + bias.double()
    norm = (x**2 @ (weight if terms is None else terms).double().T ** 2).sqrt()
    bound = random(x.shape[1] + 4, norm)  # 4 more for the scale of each weight
    if weight_dtype != torch.float64:
        bound = bound + LIKELY / 2 * unit(weight_dtype) * norm  # K roundings of as many sizes: one √n less
    return exact, bound + unit(dtype) * (roundings * product.abs() + exact.abs()) * 1.01


def assert_within(found: Tensor, exact: Tensor, bound: Tensor | float, what: object = "") -> None:
    """Every element of `found` is within its bound of `exact`; none is NaN. The message gives the worst."""
    assert not found.isnan().any(), what
    excess = ((found.double() - exact).abs() / bound).nan_to_num(0.0)  # 0 / 0: exact where it must be
    assert excess.max() <= 1, f"{what}: an error of {excess.max():.2f} times its bound"
