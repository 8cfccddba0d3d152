"""Few rows times a weight on a CPU, in a page of C (`cpu_products.c`) that is compiled when it is first needed.

A decode step reads every weight once, so it should take as long as reading them. torch takes two to three times as
long in fp32 and bf16 (`dense_rows`), and has no operator at all that looks weights up in a table of 16 numbers, as NF4
and FP4 are (`matvec`): the C does that with one shuffle for 16 weights.

Of four bits, x (K,) has its 128 floats for each 16 words of codes in the order in which the codes come out of them:

    word i of a chunk   weights 8·i … 8·i + 7, the one at bit 4·s is the one at PLACES[s]
    x[chunk, s, i]      what that weight is multiplied by

Needs GCC (its vector extensions) and an x86 processor with AVX2 or AVX-512; `library()` is None without, or where the
compiled code does not agree with the formula on a small weight.
"""

import ctypes
import functools
import math
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".c")
OPTIONS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fPIC")
LARGE = {
    torch.float32: 2**17,
    torch.bfloat16: 2**13,
}  # numbers in a weight from which on `dense_rows` is worth its call
MOST_ROWS, MOST_NUMBERS = 8, 2**18  # of x: more rows are torch's; the C has room for so many on its stack
CHUNK, BLOCK, MOST_BLOCKS = 128, 64, 2048
PLACES = (1, 0, 3, 2, 5, 4, 7, 6)  # the first weight of a byte is in its upper half


@dataclass(frozen=True)
class Packed:
    """A four-bit weight (N, K): value = table[code] · scale, one scale for each 64 weights of a row.

    qweight: N·K/2 bytes, two codes in each.  scales: N·K/64 of them, fp32; or uint8, and `nested` has the table, the
    scales of each 256 of them and the number to add.  table: (16,) fp32.
    """

    qweight: Tensor
    scales: Tensor
    table: Tensor
    shape: tuple[int, int]
    nested: tuple[Tensor, Tensor, Tensor | float] | None = None

    @property
    def suits(self) -> bool:
        """Whether the C can read it: whole words in each row, and blocks that do not straddle rows."""
        rows, columns = self.shape
        whole = columns % CHUNK == 0 and columns <= BLOCK * MOST_BLOCKS
        plain = all(t.device.type == "cpu" and t.is_contiguous() for t in (self.qweight, self.scales))
        held = torch.float32 if self.nested is None else torch.uint8
        return whole and rows > 0 and plain and self.scales.dtype == held


class _Weight(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qweight", "absmax", "codes", "nested_map", "nested_absmax")),
        ("offset", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("first", "rows", "columns", "threads")),
    )


def suits_dense(x: Tensor, weight: Tensor) -> bool:
    """Whether `dense_rows` serves x (…, K) and a weight (N, K): few rows, a weight worth it, and what `suits` asks."""
    few = x.numel() <= min(MOST_ROWS * weight.shape[1], MOST_NUMBERS)
    return few and weight.numel() >= LARGE.get(x.dtype, math.inf) and suits(x, weight)


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether the C may be given these: not much, on a CPU, of one dtype, in whole vectors; and no gradients wanted."""
    return (
        x.numel() <= MOST_NUMBERS
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in LARGE
        and weight.shape[-1] % 32 == 0
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
        and available()
    )


def dense_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, K), a few rows, times a weight (N, K) of the same dtype, + bias (N,) → (…, N). Sums are in fp32."""
    rows, columns = weight.shape
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], rows)
    pointers = (weight.data_ptr(), x.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr())
    half = x.dtype == torch.bfloat16
    library().matvec_dense(*pointers, x.numel() // columns, rows, columns, half, torch.get_num_threads())
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (…, C) / rms(x) · weight (C,), where `suits` allows it. In bf16, x / rms(x) is rounded first."""
    x, columns = x.contiguous(), len(weight)
    y = torch.empty_like(x)
    pointers = (x.data_ptr(), weight.data_ptr(), y.data_ptr())
    library().rms_norm(*pointers, x.numel() // columns, columns, x.dtype == torch.bfloat16, eps)
    return y


def matvec(x: Tensor, weight: Packed) -> Tensor:
    """x (M, K) fp32 → (M, N) fp32, row by row: for the few rows for which reading the weight again costs less than
    writing it out."""
    ordered = x.reshape(len(x), -1, CHUNK // 8, 8)[..., PLACES].transpose(2, 3).contiguous()  # (M, chunks, 8, 16)
    y = x.new_empty(len(x), weight.shape[0])
    described, table = _described(weight, 0, weight.shape[0]), weight.table.float().contiguous()
    for row in range(len(x)):
        pointers = (table.data_ptr(), ordered[row].data_ptr(), y[row].data_ptr())
        library().matvec_int4(ctypes.byref(described), *map(ctypes.c_void_p, pointers))
    return y


def dequantize(weight: Packed, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows of the weight, (stop − start, K) fp32 or bf16."""
    table = weight.table.float().contiguous()
    rows = (weight.shape[0] if stop is None else stop) - start
    out = torch.empty(rows, weight.shape[1], dtype=dtype)
    pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (table, out))
    bf16 = ctypes.c_int64(dtype == torch.bfloat16)
    library().dequantize(ctypes.byref(_described(weight, start, rows)), *pointers, bf16)
    return out


def _described(weight: Packed, first: int, rows: int) -> _Weight:
    if weight.nested is None:
        scales = (weight.scales.data_ptr(), None, None, None, 0.0)
    else:
        table, absmax, offset = weight.nested
        scales = (None, weight.scales.data_ptr(), table.data_ptr(), absmax.data_ptr(), float(offset))
    return _Weight(weight.qweight.data_ptr(), *scales, first, rows, weight.shape[1], torch.get_num_threads())


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled C, once a process; None where there is none that can be trusted."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None
    with tempfile.TemporaryDirectory() as folder:  # once loaded, the file is not needed
        compiled, path = f"{folder}/cpu_products.o", f"{folder}/cpu_products.so"
        # The threads of torch's own OpenMP: those of another would wait, spinning, on the same cores.
        threads = [str(each) for each in Path(torch.__file__).parent.glob("lib/libgomp*.so*")] or ["-fopenmp"]
        try:
            for command in (["-c", str(SOURCE), *OPTIONS, "-o", compiled], ["-shared", compiled, *threads, "-o", path]):
                subprocess.run(["gcc", *command], check=True, capture_output=True, timeout=60)
            found = ctypes.CDLL(path)
        except (OSError, subprocess.SubprocessError):
            return None
    found.matvec_dense.argtypes = (ctypes.c_void_p,) * 4 + (ctypes.c_int64,) * 5
    found.rms_norm.argtypes = (ctypes.c_void_p,) * 3 + (ctypes.c_int64,) * 3 + (ctypes.c_double,)
    return found


@functools.cache
def available() -> bool:
    """Whether there is a library, and it agrees with the formula on small weights of every form."""
    return library() is not None and _agrees_dense() and _agrees_four_bits()


def _agrees_dense() -> bool:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, generator=generator), torch.randn(3, 64, generator=generator)
    exact = torch.allclose(dense_rows(x, weight), weight @ x, rtol=1e-5, atol=1e-5)
    half = dense_rows(x.bfloat16(), weight.bfloat16()).float()
    return exact and torch.allclose(half, weight.bfloat16().float() @ x.bfloat16().float(), rtol=1e-2, atol=1e-2)


def _agrees_four_bits() -> bool:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (3, 128), dtype=torch.uint8, generator=generator)
    x, table = torch.randn(1, 256, generator=generator), torch.randn(16, generator=generator)
    weight = Packed(codes, torch.rand(3, 4, generator=generator), table, (3, 256))
    values = table[torch.stack((codes >> 4, codes & 15), 2).flatten(1).long()].view(3, 4, BLOCK)
    expected = (values * weight.scales[..., None]).flatten(1)
    exact = torch.allclose(dequantize(weight, torch.float32), expected, rtol=1e-6, atol=1e-6)
    return exact and torch.allclose(matvec(x, weight), x @ expected.T, rtol=1e-4, atol=1e-4)
