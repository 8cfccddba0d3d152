"""The compiled products of four bits against their formulas in fp64, by each instruction set."""

import math

import bounds
import pytest
import torch
from instruction_sets import each_instruction_set
from minivlm_kernels import cpu_int4
from minivlm_kernels.cpu_int4 import Tiles, dequantize, pack, product, unpack
from torch import Tensor

from minivlm.quantization import codebook
from minivlm.quantization.codebook import CODES

needs_compiler = pytest.mark.skipif(cpu_int4._library() is None, reason="no GCC, or no AVX: products stay with torch")
library = each_instruction_set(cpu_int4)


@needs_compiler
def test_the_page_passes_its_own_check(library: None) -> None:
    assert cpu_int4._is_right()


# Outputs, inputs, what scales are held as, zero points, inputs of a scale. Outputs that fill no tile; inputs that fill
# no group, an odd number of them; scales of 256 blocks that begin in the middle of a row, or several times in one.
CASES = [
    *[(3, 64, torch.float32, False, 64), (33, 384, torch.uint8, False, 64), (17, 1152, torch.uint8, False, 64)],
    *[(50, 2048, torch.uint8, False, 64), (300, 4096, torch.uint8, False, 64), (16, 128, torch.float32, False, 64)],
    *[(5, 37, torch.float32, True, 32), (33, 100, torch.bfloat16, True, 128), (64, 256, torch.float16, True, 64)],
    *[(1, 1, torch.float16, True, 32), (40, 4304, torch.bfloat16, True, 128), (3, 32768, torch.uint8, False, 64)],
]


def weight(
    rows: int,
    columns: int,
    held: torch.dtype,
    zero_points: bool,
    group: int,
    half: bool = False,
    table: Tensor | None = None,
) -> tuple[Tiles, Tensor]:
    """A random weight, and its values (N, K) in fp64, worked out one scale at a time. half: its table is in bf16."""
    torch.manual_seed(rows + columns)
    groups = -(-columns // group)
    codes = torch.randint(16, (rows, columns + columns % 2))
    codes[:, columns:] = 0
    halves = (codes[:, 1::2], codes[:, ::2]) if zero_points else (codes[:, ::2], codes[:, 1::2])
    qweight = (halves[0] * 16 + halves[1]).to(torch.uint8)
    zeros = torch.randint(17, (rows, groups), dtype=torch.uint8) if zero_points else None
    table = torch.arange(16.0) if zero_points else torch.randn(16) if table is None else table
    table = table.bfloat16().float() if half else table
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
    """fp32 sums of K products. A code and its zero are added apart, so what counts is the largest weight there is."""
    packed, exact = weight(*case)
    x = torch.randn(rows, packed.shape[1])
    largest = exact.abs().amax(1, keepdim=True).expand_as(exact)
    expected, bound = bounds.linear(x, exact, dtype=torch.float32, terms=largest)
    bounds.assert_within(product(x, packed), expected, bound, case)


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16])
def test_products_of_bf16(case: tuple, rows: int, library: None) -> None:
    """With bf16 instructions or without: exact products of x and the table as bf16 holds them, and sums in fp32."""
    packed, exact = weight(*case, half=True)
    x = torch.randn(rows, packed.shape[1]).bfloat16()
    largest = exact.abs().amax(1, keepdim=True).expand_as(exact)
    expected, bound = bounds.linear(x, exact, dtype=torch.float32, terms=largest)
    found = product(x, packed)
    assert found.dtype == torch.float32
    bounds.assert_within(found, expected, bound, case)
    bounds.assert_within(product(x.float(), packed), expected, bound, case)  # the slow twin


def sizes() -> Tensor:
    """Rows (9, 256) of bf16: few large numbers among tiny ones, zeros, the smallest and the largest, and mixtures."""
    x = torch.randn(9, 256).bfloat16()
    x[0, ::40] *= 4096
    x[1] *= 2.0 ** torch.randint(-20, 20, (256,))
    x[2] = 0
    x[3] *= 2.0**-112  # not denormal: AVX512_BF16 takes those for zero
    x[4] = torch.randn(256).sign() * torch.finfo(torch.bfloat16).max / 2**20
    x[5] = torch.randn(256).bfloat16() ** 5
    x[6, 128:] *= 2.0**-50
    x[7] *= (torch.arange(256) % 9 > 0) + 2.0**-9  # one number in nine is small
    return x


WHOLE = {"int4": None, **{kind: codebook.codebook(kind) for kind in CODES}}


@needs_compiler
@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("rows", [1, 2, 5, 9])
def test_numbers_of_very_different_sizes(kind: str, rows: int, library: None) -> None:
    """In bf16, and in fp32 with all 24 bits of a number. What is not finite stays so."""
    group = 64 if WHOLE[kind] is not None else 32
    packed, exact = weight(33, 256, torch.float32, WHOLE[kind] is None, group, table=WHOLE[kind])
    half, exact_half = weight(33, 256, torch.float32, WHOLE[kind] is None, group, WHOLE[kind] is not None, WHOLE[kind])
    largest = exact.abs().amax(1, keepdim=True).expand_as(exact)
    for shift in range(0, 9, rows):
        x = sizes()[shift : shift + rows]
        for given, tiles, values in ((x, half, exact_half), (x * (1 + 2.0**-13 * torch.randn(256)), packed, exact)):
            expected, bound = bounds.linear(given, values, dtype=torch.float32, terms=largest)
            bounds.assert_within(product(given, tiles), expected, bound + torch.finfo(torch.float32).tiny)
    for value in (math.inf, -math.inf, math.nan):
        x[-1, 7] = value
        assert not product(x, packed)[-1].isfinite().any()


@needs_compiler
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize(("rows", "columns"), [(33, 384), (50, 1152), (33, 576)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_nested_scales_of_tables_in_units(kind: str, rows: int, columns: int, count: int, library: None) -> None:
    """Of several tiles at once; a group's scale is that of a block of 256 groups, which begins within a row."""
    table = codebook.codebook(kind)
    for half, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        packed, exact = weight(rows, columns, torch.uint8, False, 64, half, table)
        x = torch.randn(count, columns).to(dtype)
        largest = exact.abs().amax(1, keepdim=True).expand_as(exact)
        expected, bound = bounds.linear(x, exact, dtype=torch.float32, terms=largest)
        bounds.assert_within(product(x, packed), expected, bound)


@needs_compiler
@pytest.mark.parametrize("group", [32, 1024])
@pytest.mark.parametrize("count", [2, 9])
def test_rows_that_are_not_cut(group: int, count: int, library: None) -> None:
    """Numbers near the smallest, and groups too long for whole sums: zero points and several rows in fp32."""
    packed, exact = weight(33, 2048, torch.float32, True, group)
    largest = exact.abs().amax(1, keepdim=True).expand_as(exact)
    for dtype in (torch.bfloat16, torch.float32):
        x = (torch.randn(count, 2048) * 2.0**-80).to(dtype)
        expected, bound = bounds.linear(x, exact, dtype=torch.float32, terms=largest)
        bounds.assert_within(product(x, packed), expected, bound)


@needs_compiler
@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("power", [4, 10, 14, 18, 22, 40])
def test_nothing_is_lost_beside_an_outlier(kind: str, power: int, library: None) -> None:
    """One number is far larger than the others of its group, and its weight is zero: the others count in full."""
    exact = torch.arange(-8.0, 8) if WHOLE[kind] is None else WHOLE[kind]
    codes = torch.randint(16, (17, 64), generator=torch.Generator().manual_seed(power))
    codes[:, 20] = (exact == 0).nonzero()[0]
    halves = (codes[:, 1::2], codes[:, ::2]) if WHOLE[kind] is None else (codes[:, ::2], codes[:, 1::2])
    zeros = torch.full((17, 1), 8, dtype=torch.uint8) if WHOLE[kind] is None else None
    stream = pack((halves[0] * 16 + halves[1]).to(torch.uint8), torch.ones(17, 1), zeros, 64)
    for dtype in (torch.bfloat16, torch.float32):
        table = exact.to(dtype).float()
        packed = Tiles(stream, None if zeros is not None else table, (17, 64), 64, torch.float32, zeros is None)
        x = torch.randn(3, 64).to(dtype)
        x[:, 20] = 2.0**power
        values = table.double()[codes]
        size = x.double().abs().where(values[:, None] != 0, 0) * values[:, None].abs()  # (17, 3, 64)
        bounds.assert_within(product(x, packed), x.double() @ values.T, bounds.certain(128, size.sum(2).T))


@needs_compiler
def test_the_table_of_nf4_in_bf16(library: None) -> None:
    """NF4's table is rounded for x in bf16, as in prefill; FP4's need not be where products are of whole numbers."""
    for kind in CODES:
        table = codebook.codebook(kind)
        packed, exact = weight(33, 256, torch.float32, False, 64, table=table)
        _, rounded = weight(33, 256, torch.float32, False, 64, True, table)
        x = torch.randn(2, 256).bfloat16()
        found, largest = product(x, packed).double(), exact.abs().amax(1, keepdim=True).expand_as(exact)
        errors = []
        for values in (exact, rounded):
            expected, bound = bounds.linear(x, values, dtype=torch.float32, terms=largest)
            errors.append(((found - expected).abs() / bound).max().item())
        assert min(errors) < 1 < max(errors)
        assert kind == "fp4" or errors[1] < 1


@needs_compiler
@pytest.mark.parametrize("group", [32, 64, 96, 16384, 24576])
@pytest.mark.parametrize("mantissa", [129, 254, 255])  # 254: the two upper limbs are largest
def test_the_largest_sums_of_whole_numbers(group: int, mantissa: int, library: None) -> None:
    """Nothing overflows, however long a group is: all codes are 15, all x the same number."""
    for zero in (0, 8, 16):
        codes, zeros = torch.full((3, group // 2), 0xFF, dtype=torch.uint8), torch.full((3, 1), zero, dtype=torch.uint8)
        packed = Tiles(pack(codes, torch.ones(3, 1), zeros, group), None, (3, group), group, torch.float32)
        for exponent in (-133, 0, 100):
            x = (torch.full((1, group), float(mantissa)) * 2.0**exponent).bfloat16()
            size = x.double().sum()
            bound = bounds.certain(2 * group, 16 * size) + torch.finfo(torch.float32).tiny
            bounds.assert_within(product(x, packed), (15 - zero) * size, bound)


# "large": sums of a group are 2^31 if x is rounded to a power of two.
LARGE = torch.tensor([1 / 2048, -1.0, 1.0] + 13 * [0.0])
LARGEST = {**{kind: codebook.codebook(kind) for kind in CODES}, "large": LARGE}


@needs_compiler
@pytest.mark.parametrize("kind", LARGEST)
@pytest.mark.parametrize("mantissa", [129, 254, 255, 256 - 2**-16])
def test_the_largest_sums_of_tables(kind: str, mantissa: float, library: None) -> None:
    """As above, where all values are 1 or −1; the last number is not one of bf16, and rounded to 16 bits it is 256."""
    table = LARGEST[kind]
    for code in (table.argmax().item(), table.argmin().item()):
        codes = torch.full((3, 32), 17 * code, dtype=torch.uint8)
        packed = Tiles(pack(codes, torch.ones(3, 1), None, 64), table, (3, 64), 64, torch.float32, True)
        for number in (mantissa, -mantissa):
            x = torch.full((1, 64), number).to(torch.float32 if mantissa % 1 else torch.bfloat16)
            bounds.assert_within(product(x, packed), table[code] * x.double().sum(), bounds.certain(64, 64 * 256.0))


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
@pytest.mark.parametrize("kind", CODES)
def test_quantised_as_by_torch(kind: str, library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and scales, bit by bit: of blocks of all sizes, zeros, midpoints, their neighbours and denormal numbers."""
    torch.manual_seed(0)
    middles = codebook._middles(kind)[0]
    near = torch.cat([middles, middles.nextafter(torch.ones(())), middles.nextafter(-torch.ones(())), torch.ones(19)])
    random = torch.randn(50, 64) * 10.0 ** torch.randint(-44, 38, (50, 1))
    numbers = torch.cat([torch.zeros(64), near, 0.3 * near, -near, 1e-39 * near, random.flatten()])
    for weight, dtype in ((numbers, None), (numbers, torch.bfloat16), (numbers[:-1], None)):
        packed, scales = codebook.quantize(weight, kind, dtype)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_int4, "available", lambda: False)
            expected = codebook.quantize(weight, kind, dtype)
        assert torch.equal(packed, expected[0])
        assert torch.equal(scales, expected[1])
    for value in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match="not finite"):
            codebook.quantize(torch.cat([numbers[:-1], torch.tensor([value])]), kind)
