"""Flash attention against torch's own kernels, on this GPU: milliseconds, TFLOP/s, and ours over each of theirs.

    python kernels/benchmarks/bench_attention.py [--dtype bfloat16] [--skip-tests]

The tests run first: a fast wrong kernel is of no use. Work is counted as it is needed (4·D operations for each pair of
a query and a key that it sees, 2.5 times that for the backward pass): padding a head width does not look like speed.
Every figure is the median of what fits into half a second after a warm-up, inputs are random, and the first row is
measured twice: what lies between its two results is noise.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "kernels"))
DEVICE = "cuda"
THEIRS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention of the three models; `window` needs a mask in torch, which only takes a causal one."""

    name: str
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    batch: int = 1
    causal: bool = False
    window: int | None = None

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees."""
        if not self.causal:
            return self.queries * self.keys
        slots = range(self.keys - self.queries + 1, self.keys + 1)  # keys up to and including each query's own slot
        return sum(min(slot, self.window or slot) for slot in slots)

    @property
    def operations(self) -> float:
        return 4.0 * self.batch * self.heads * self.width * self.pairs


SHAPES = [
    Shape("siglip 70x70", 16, 16, 4900, 4900, 72),
    Shape("clip-l 577 x5", 16, 16, 577, 577, 64, batch=5),
    Shape("clip-h 257 x8", 16, 16, 257, 257, 80, batch=8),
    Shape("clip-h 4900", 16, 16, 4900, 4900, 80),
    Shape("perceiver", 16, 4, 64, 4964, 96, batch=5),
    *(Shape(f"prefill {n}", 32, 8, n, n, 128, causal=True) for n in (512, 1024, 2048, 4096, 8192)),
    Shape("full 8192, 128", 32, 8, 8192, 8192, 128),
    Shape("full 8192, 64", 32, 32, 8192, 8192, 64),
    Shape("window 4096", 32, 8, 16384, 16384, 128, causal=True, window=4096),
]


def inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As the models make them: heads inside rows, (B, T, H, D) in memory."""
    sizes = [(shape.queries, shape.heads), (shape.keys, shape.kv_heads), (shape.keys, shape.kv_heads)]
    return tuple(
        torch.randn(shape.batch, rows, heads, shape.width, device=DEVICE, dtype=dtype).transpose(1, 2).requires_grad_()
        for rows, heads in sizes
    )


def milliseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(call, warmup=100, rep=500, return_mode="median")


def measure(attend: Callable[[], Tensor], tensors: tuple[Tensor, ...]) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward pass."""
    with torch.no_grad():
        forward = milliseconds(attend)
    out = attend()
    gradient = torch.randn_like(out)
    return forward, milliseconds(lambda: torch.autograd.grad(out, tensors, gradient, retain_graph=True))


def ours(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    from minivlm_kernels.flash_attention import flash_attention

    return lambda: flash_attention(q, k, v, causal=shape.causal, window=shape.window)


def theirs(shape: Shape, q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Callable[[], Tensor]:
    def attend() -> Tensor:
        with sdpa_kernel(backend):
            grouped = shape.heads != shape.kv_heads
            return F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=grouped)

    return attend


def row(shape: Shape, dtype: torch.dtype) -> str:
    tensors = inputs(shape, dtype)
    forward, backward = measure(ours(shape, *tensors), tensors)
    work = shape.operations
    text = (
        f"{shape.name:15} {forward:8.3f} {work / forward / 1e9:7.0f} {backward:9.3f} {2.5 * work / backward / 1e9:7.0f}"
    )
    for backend in THEIRS.values():
        try:
            their_forward, their_backward = measure(theirs(shape, *tensors, backend), tensors)
            text += f" {their_forward / forward:9.2f} {their_backward / backward:9.2f}"
        except RuntimeError:  # this backend does not serve this shape
            text += f" {'–':>9} {'–':>9}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--skip-tests", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_attention.py measures a GPU, and torch finds none here")
    if not arguments.skip_tests:
        command = [sys.executable, "-m", "pytest", "-q", "tests/kernels/test_flash_attention.py", "-k", "not compiles"]
        subprocess.run(command, check=True, cwd=ROOT)
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {arguments.dtype}")
    print(f"{'':15} {'ours: forward':>16} {'backward':>17}  ours is so many times as fast as torch's")
    columns = "".join(f" {name + ' fw':>9} {name + ' bw':>9}" for name in THEIRS)
    print(f"{'shape':15} {'ms':>8} {'TFLOP/s':>7} {'ms':>9} {'TFLOP/s':>7}{columns}")
    for shape in [SHAPES[0], *SHAPES]:
        print(row(shape, getattr(torch, arguments.dtype)), flush=True)
    print("window 4096: torch's kernels take no window and attend to all earlier keys, 2.3 times the work")


if __name__ == "__main__":
    main()
