"""The compiled products against their formulas in fp64, by each instruction set; and doing without a compiler."""

import ctypes
import functools
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from minivlm_kernels import cpu_products
from minivlm_kernels.cpu_products import Tiles, dequantize, pack, product, unpack
from torch import Tensor

needs_compiler = pytest.mark.skipif(not cpu_products.available(), reason="no GCC, or no AVX: products stay with torch")
BUILD = cpu_products.library.__wrapped__
FP32 = torch.finfo(torch.float32).eps


@functools.cache
def compiled(*options: str) -> ctypes.CDLL | None:
    """The library, built once with these options too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_products, "OPTIONS", (*cpu_products.OPTIONS, *options))
        return BUILD()


@pytest.fixture(params=[(), ("-mno-avx512f",)], ids=["native", "AVX2"])
def library(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library as it is here, and as a processor without AVX-512 would have it."""
    monkeypatch.setattr(cpu_products, "library", lambda: compiled(*request.param))


# Outputs, inputs, what scales are held as, zero points, inputs of a scale. Outputs that fill no tile; inputs that fill
# no group, an odd number of them; scales of 256 blocks that begin in the middle of a row.
CASES = [
    *[(3, 64, torch.float32, False, 64), (33, 384, torch.uint8, False, 64), (17, 1152, torch.uint8, False, 64)],
    *[(50, 2048, torch.uint8, False, 64), (300, 4096, torch.uint8, False, 64), (16, 128, torch.float32, False, 64)],
    *[(5, 37, torch.float32, True, 32), (33, 100, torch.bfloat16, True, 128), (64, 256, torch.float16, True, 64)],
    *[(1, 1, torch.float16, True, 32), (40, 4304, torch.bfloat16, True, 128)],
]


def weight(rows: int, columns: int, held: torch.dtype, zero_points: bool, group: int) -> tuple[Tiles, Tensor]:
    """A random weight, and its values (N, K) in fp64, worked out one scale at a time."""
    torch.manual_seed(rows + columns)
    groups = -(-columns // group)
    codes = torch.randint(16, (rows, columns + columns % 2))
    codes[:, columns:] = 0
    halves = (codes[:, 1::2], codes[:, ::2]) if zero_points else (codes[:, ::2], codes[:, 1::2])
    qweight = (halves[0] * 16 + halves[1]).to(torch.uint8)
    zeros = torch.randint(17, (rows, groups), dtype=torch.uint8) if zero_points else None
    table = torch.arange(16.0) if zero_points else torch.randn(16)
    nested = None
    if held == torch.uint8:
        scales = torch.randint(256, (rows, groups), dtype=torch.uint8)
        nested = (torch.randn(256), torch.rand(math.ceil(rows * groups / 256)), 0.25)
        number = torch.arange(rows * groups).view(rows, groups)
        values = nested[0][scales.long()].double() * nested[1][number // 256].double() + nested[2]
    else:
        scales = ((torch.rand(rows, groups) + 0.5) * 10.0 ** -torch.randint(1, 6, (rows, groups))).to(held)
        values = scales.double()
    each = torch.arange(columns) // group
    exact = table.double()[codes[:, :columns]] - (0 if zeros is None else zeros.double()[:, each])
    stream = pack(qweight, scales, zeros, group)
    back = unpack(stream, (rows, columns), group, held, zero_points)
    assert torch.equal(back[0], qweight)
    assert torch.equal(back[1], scales)
    assert back[2] is zeros is None or torch.equal(back[2], zeros)
    tiles = Tiles(stream, None if zero_points else table, (rows, columns), group, held, not zero_points, nested)
    return tiles, exact * values[:, each]


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16])
def test_products(case: tuple, rows: int, library: None) -> None:
    """fp32 sums of K products: an error of a few eps of the sum of their sizes. A code and its zero are added apart."""
    packed, exact = weight(*case)
    x = torch.randn(rows, packed.shape[1])
    error = (product(x, packed).double() - x.double() @ exact.T).abs()
    assert (error <= 16 * FP32 * exact.abs().max() * x.abs().sum(1, keepdim=True)).all()


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: tuple, library: None) -> None:
    """fp32: a rounding of the scale, one of the product. bf16: that, rounded once more."""
    packed, exact = weight(*case)
    for start, stop in ((0, packed.shape[0]), (packed.shape[0] // 32 * 16, packed.shape[0])):
        found = dequantize(packed, torch.float32, start, stop).T
        torch.testing.assert_close(found.double(), exact[start:stop], rtol=1e-6, atol=1e-6)
        assert torch.equal(dequantize(packed, torch.bfloat16, start, stop).T, found.bfloat16())


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_of_a_dense_weight(dtype: torch.dtype, rows: int, bias: bool, library: None) -> None:
    """fp32: sums of 640 products in another order. bf16: the same, rounded once."""
    torch.manual_seed(0)
    weight, x = torch.randn(333, 640).to(dtype), torch.randn(rows, 1, 640).to(dtype)
    extra = torch.randn(333).to(dtype) if bias else None
    expected = x.double() @ weight.double().T + (0 if extra is None else extra.double())
    with torch.no_grad():
        assert cpu_products.suits_dense(x, weight)
        found = cpu_products.dense_row(x, weight, extra)
    assert found.dtype == dtype
    assert found.shape == (rows, 1, 333)
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=16 * FP32 * 640**0.5)


@needs_compiler
def test_what_is_left_to_torch() -> None:
    weight, x = torch.randn(512, 512), torch.randn(1, 512)
    with torch.no_grad():
        assert cpu_products.suits_dense(x, weight)
        assert not cpu_products.suits_dense(torch.randn(9, 512), weight)
        assert not cpu_products.suits_dense(torch.randn(0, 512), weight)
        assert not cpu_products.suits_dense(x, weight[:64])  # too small to be worth it
        assert not cpu_products.suits_dense(x.half(), weight.half())
        assert not cpu_products.suits_dense(x.bfloat16(), weight)
        assert not cpu_products.suits_dense(x, torch.randn(512, 1024)[:, ::2])
    assert not cpu_products.suits_dense(x, weight)  # gradients may be wanted


@pytest.mark.parametrize("broken", ["no compiler", "an error in the source", "nowhere to keep it"])
def test_without_a_compiler_there_is_no_library(broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if broken == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif broken == "nowhere to keep it":
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    else:
        (tmp_path / "cpu_products.c").write_text("not C")
        monkeypatch.setattr(cpu_products, "SOURCE", tmp_path / "cpu_products.c")
    assert cpu_products.library.__wrapped__() is None
    monkeypatch.setattr(cpu_products, "library", cpu_products.library.__wrapped__)
    assert not cpu_products.available.__wrapped__()


@needs_compiler
def test_a_library_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpu_products.c").write_text(cpu_products.SOURCE.read_text().replace("4 * s)", "4 * (7 - s))"))
    monkeypatch.setattr(cpu_products, "SOURCE", tmp_path / "cpu_products.c")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = cpu_products.library.__wrapped__()
    monkeypatch.setattr(cpu_products, "library", lambda: broken)
    assert not cpu_products.available.__wrapped__()


@needs_compiler
def test_several_processes_compile_at_once_and_the_next_one_does_not(tmp_path: Path) -> None:
    code = "from minivlm_kernels import cpu_products; assert cpu_products.available()"
    environment = {"PYTHONPATH": str(Path(cpu_products.__file__).parents[1]), "XDG_CACHE_HOME": str(tmp_path)}

    def run(path: str) -> int:
        return subprocess.run([sys.executable, "-c", code], env={**environment, "PATH": path}, timeout=200).returncode

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, [os.environ["PATH"]] * 2)) == [0, 0]
    assert len(list((tmp_path / "minivlm").iterdir())) == 1
    assert run("") == 0  # no compiler is found, and none is needed
