"""`int4_matmul.py`: by the interpreter on a CPU against float64, and at real sizes on a GPU where there is one."""

from typing import Any

import bounds
import pytest
import torch
from int4_weights import DEVICE, KINDS, dequantize, matmul, packed, reference, weight
from minivlm_kernels import int4_matmul, launching
from minivlm_kernels.int4_matmul import launches
from torch import Tensor


@pytest.fixture(autouse=True)
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN, so that an element that no kernel writes is seen."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))


def rows(M: int, K: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(device, dtype)


def assert_near(found: Tensor, x: Tensor, exact: Tensor, bias: Tensor | None = None) -> None:
    """Within the sum of what is rounded: the result, K products and sums in float32, and, but for one row, each weight.

    A unit is half the last place of the dtype, relative to the number rounded; 4 more for the scales in float32.
    """
    unit = bounds.unit(found.dtype)
    extra = 0 if bias is None else bias.double()
    expected = x.double() @ exact.T + extra
    size = x.double().abs() @ exact.abs().T + abs(extra)
    weight_unit = 0 if len(x) == 1 and x.shape[1] % 8 == 0 else unit
    bound = unit * expected.abs() + weight_unit * size + bounds.certain(x.shape[-1] + 4, size)
    bounds.assert_within(found, expected, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [65, 127, 130, 136, 304])
def test_against_float64(kind: str, K: int, dtype: torch.dtype) -> None:
    for N, M in ((3, 1), (33, 5), (3, 17), (33, 33)):
        arguments, exact = weight(kind, N, K)
        x, bias = rows(M, K, dtype), None if M == 5 else rows(1, N, dtype)[0]
        assert_near(matmul(x, arguments, bias), x, exact, bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("M", "K"), [(1, 4128), (3, 160)])
def test_split_along_k(kind: str, M: int, K: int) -> None:
    """Few outputs: several programs share a sum. Twice the same bits."""
    arguments, exact = weight(kind, 5, K)
    x, bias = rows(M, K), rows(1, 5)[0]
    assert len(launches(torch.empty(M, 5), x, packed(arguments), bias)) == 2
    found = matmul(x, arguments, bias)
    assert_near(found, x, exact, bias)
    assert torch.equal(found, matmul(x, arguments, bias))


def test_many_rows_decode_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_matmul, "MATMUL_ROWS", 16)
    arguments, exact = weight("nested", 33, 136)
    x, bias = rows(17, 136), rows(1, 33)[0]
    assert_near(matmul(x, arguments, bias), x, exact, bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [1, 6])
def test_gradients(kind: str, M: int) -> None:
    """Of x and of bias, in three dimensions, against autograd in float64."""
    arguments, exact = weight(kind, 33, 72)
    x, bias = rows(M, 72).view(1, M, 72).requires_grad_(), rows(1, 33)[0].requires_grad_()
    out = matmul(x, arguments, bias)
    assert out.shape == (1, M, 33)
    out.square().sum().backward()
    x64, bias64 = (tensor.detach().double().requires_grad_() for tensor in (x, bias))
    torch.nn.functional.linear(x64, exact, bias64).square().sum().backward()
    # sums of K and then of N random products, which are as large as the largest gradients
    for found, expected in ((x.grad, x64.grad), (bias.grad, bias64.grad)):
        bounds.assert_within(found, expected, bounds.random(72 + 33, expected.abs().max()))


def test_frozen_bias_and_input() -> None:
    arguments, _ = weight("int4", 3, 65)
    assert not matmul(rows(2, 65), arguments).requires_grad
    bias = torch.zeros(3, device=DEVICE, requires_grad=True)
    matmul(rows(2, 65), arguments, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((3,), 2.0, device=DEVICE))


def test_views_and_empty_batches() -> None:
    """The last token of each sequence, every other column, no rows at all."""
    arguments, exact = weight("nf4", 33, 72)
    hidden = rows(12, 72).view(3, 4, 72)[:, -1:]
    assert_near(matmul(hidden, arguments).squeeze(1), hidden.squeeze(1), exact)
    wide = rows(5, 144)[:, ::2]
    assert_near(matmul(wide, arguments), wide, exact)
    assert matmul(torch.empty(2, 0, 72, device=DEVICE), arguments).shape == (2, 0, 33)
    assert matmul(rows(1, 72)[0], arguments).shape == (33,)


@pytest.mark.parametrize(
    ("x", "bias", "change", "message"),
    [
        (rows(2, 64), None, {}, r"x should have 65 columns, the weight's in_features, found shape \(2, 64\)"),
        (rows(2, 65).double(), None, {}, "x should be float16, bfloat16 or float32, found float64"),
        (rows(2, 65).half(), torch.zeros(3), {}, r"bias should have .* dtype, float16, found \(3,\) of float32"),
        (rows(2, 65), torch.zeros(4), {}, r"bias should have shape \(3,\)"),
        (rows(2, 65).to("meta"), None, {}, "all tensors of .* should be on one device, found .*, meta"),
        (rows(2, 65), None, {"zeros": torch.zeros(3, 3)}, "zeros should have .* of uint8, found .* float32"),
        (rows(2, 65), None, {"shape": (3, 67)}, r"qweight should have shape \(3, 34\) of uint8, found \(3, 33\)"),
    ],
)
def test_bad_input(x: Tensor, bias: Tensor | None, change: dict[str, Any], message: str) -> None:
    arguments, _ = weight("int4", 3, 65)
    with pytest.raises(ValueError, match=message):
        matmul(x, arguments | change, bias)


def test_needs_a_device_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching.triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="needs a GPU, found tensors on cpu"):
        matmul(rows(2, 65, device="cpu"), weight("int4", 3, 65, device="cpu")[0])


LAYERS = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (32003, 4096), (1152, 4304)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_real_layers(kind: str, layer: tuple[int, int], dtype: torch.dtype) -> None:
    arguments, exact = weight(kind, *layer, device="cuda")
    assert torch.equal(dequantize(arguments, dtype), reference(arguments).to(dtype))
    for M in (1, 2, 3, 4, 5, 16, 17, 64, 100, 512, 513):
        x, bias = rows(M, layer[1], dtype, "cuda"), rows(1, layer[0], dtype, "cuda")[0]
        found = matmul(x, arguments, bias)
        assert_near(found, x, exact, bias)
        assert torch.equal(found, matmul(x, arguments, bias))


@pytest.mark.gpu
def test_a_captured_graph_gives_the_same() -> None:
    arguments, _ = weight("nested", 1024, 4096, device="cuda")
    x = rows(1, 4096, torch.bfloat16, "cuda")
    expected = matmul(x, arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = matmul(x, arguments)
    graph.replay()
    assert torch.equal(found, expected)
