"""kernels/benchmarks without a GPU: each says what it needs, and its measuring runs through, on the CPU at tiny sizes.

Nothing is timed: a clock that calls what it is given once stands for the real ones. On a GPU these tests are skipped,
for there the benchmarks themselves run.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import inspect_kernels
import pytest
import torch
from minivlm_kernels.launching import run

pytest.importorskip("triton", reason="the kernels are written in triton, which is for Linux")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run the benchmarks")
FOLDER = Path(__file__).parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module, "DEVICE", "cpu")
        monkeypatch.setattr(module, "DTYPE", torch.float16, raising=False)  # the interpreter's bf16 is wrong
        return module

    return load


def once(calls: list[Callable[[], Any]], *_: int) -> float:
    """A microsecond, whatever it was."""
    for call in calls:
        call()
    return 1.0


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_says_what_it_needs(name: str, benchmark: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match=f"{name}.py measures .*GPU.* none here"):
        benchmark(name).main()


def test_bench_attention(benchmark: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """16,384 operations in a millisecond are 1.6e-8 TFLOP/s; torch's cuDNN kernel does not run on a CPU."""
    module = benchmark("bench_attention")
    monkeypatch.setattr(module, "milliseconds", lambda call: 1.0 if call() is not None else 0.0)
    shape = module.Shape("tiny", 2, 1, 8, 8, 16, causal=True)
    assert shape.pairs == 36
    name, *figures = module.row(shape, torch.float16).split()
    assert (name, figures) == ("tiny", ["1.000", "0", "1.000", "0", "1.00", "1.00", "–", "–"])


def test_work_is_counted_as_it_is_seen(benchmark: Callable) -> None:
    shape = benchmark("bench_attention").Shape
    assert shape("", 1, 1, 5, 9, 8).pairs == 45
    assert shape("", 1, 1, 5, 9, 8, causal=True).pairs == 5 + 6 + 7 + 8 + 9
    assert shape("", 2, 1, 5, 9, 8, batch=3, causal=True, window=6).operations == 4 * 3 * 2 * 8 * (5 + 6 + 6 + 6 + 6)


def test_tune_attention(benchmark: Callable) -> None:
    """All three kernels run with the blocks that are tried."""
    module = benchmark("tune_attention")
    tensors = module.problem(24, 33)
    launches = module.launches(tensors, (16, 32, 4, 1))
    for gradient in tensors[-3:]:
        gradient.fill_(float("nan"))
    run(*launches)
    assert [launch.grid for launch in launches] == [(3, 16, 1), (3, 16, 1), (2, 16, 1)]
    assert all(gradient.isfinite().all() for gradient in tensors[-3:])


def test_bench_decode(benchmark: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Both are checked against float64; a step of 20 keys reads 81,920 bytes: in 1 µs, 82 GB/s."""
    module = benchmark("bench_decode")
    monkeypatch.setattr(module, "microseconds", once)
    monkeypatch.setattr(module, "MEMORY", 0)
    module.bench(1, 20, torch.float16, bandwidth=163.84e9, tune=False)
    assert capsys.readouterr().out.split() == ["1", "20", "1.0", "50%", "1.0", "50%"]


@pytest.mark.parametrize("kind", ["nf4", "nested", "int4"])
def test_bench_int4(
    kind: str, benchmark: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module = benchmark("bench_int4")
    monkeypatch.setattr(module, "microseconds", once)
    monkeypatch.setattr(module, "COLD", 0)
    for other in ("int4pack", "bitsandbytes"):  # for GPUs only
        monkeypatch.setattr(module, other, lambda *_: float("nan"))
    candidates = module.candidates(2)
    monkeypatch.setattr(module, "candidates", lambda M: candidates[:1] + candidates[-1:])
    module.measure(kind, (48, 128), 1, 1.0)
    module.tune(kind, (48, 128), 2, 1.0)
    measured, *tuned = capsys.readouterr().out.splitlines()
    size = 48 * 128 // 2 + {"nf4": 96 * 4 + 64, "nested": 96 + 64 + 1024 + 4 + 4, "int4": 96 * 2 + 96}[kind]
    assert f"{size / 1e3:5.0f} GB/s" in measured
    assert "1.00× cuBLAS" in measured
    assert all("matmul_kernel Tile(BLOCK_M=16" in line for line in tuned)
    assert len(tuned) == 2


def test_innermost_loops_are_found() -> None:
    """Of two loops, one around the other, the inner one counts; a jump forwards is no loop."""
    lines = [
        "$L_outer:",
        "\tadd.s32 %r1;",
        "$L_inner:",
        "\t@%p1 mul.f32 %f1;",
        "\tsetp.lt.s32 %p2;",
        "\t@%p2 bra $L_inner;",
    ]
    lines += ["\t@%p3 bra.uni $L_outer;", "\tbra $L_end;", "$L_end:", "\tret;"]
    assert inspect_kernels.loops("\n".join(lines)) == [["mul.f32", "setp.lt.s32"]]
