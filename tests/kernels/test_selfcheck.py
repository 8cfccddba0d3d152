"""A kernel is used where it gave its reference's numbers; one that fails, differs or hangs costs a warning."""

import json
import shutil
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from minivlm_kernels import selfcheck, selfcheck_cases
from minivlm_kernels.selfcheck import KERNELS, PASSED

pytest.importorskip("triton", reason="the kernels are written in triton, which is for Linux")
CPU = torch.device("cpu")
MATMUL = "    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)\n"
# What is planted into int4_matmul.py: (a line of it, what stands there instead, words of the result).
FAULTS = {
    "wrong numbers": (MATMUL, MATMUL + "    sums += 0.5\n", "differs by"),
    "does not compile": (MATMUL, MATMUL + "    tl.no_such_function(sums)\n", "no_such_function"),
    "hangs": ("import torch\n", "import torch\nwhile True: pass\n", "no result within"),
    "dies": ("import torch\n", "import torch, os\nos.abort()\n", "status -6"),
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(selfcheck_cases, "QUERIES", 17)
    monkeypatch.setattr(selfcheck_cases, "KEYS", 40)
    monkeypatch.setattr(selfcheck, "_warned", set())
    selfcheck._works.cache_clear()
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])  # the interpreter's bf16 is wrong
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernels_pass(kernel: str, dtype: torch.dtype) -> None:
    assert selfcheck.check(kernel, dtype, CPU, 24) is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_error_of_a_few_roundings_is_found(kernel: str) -> None:
    """The bounds would not let a real error pass: one part in fifty of the size of the result."""
    for name, found, expected, bound in selfcheck_cases.CASES[kernel](torch.float32, CPU, 24):
        wrong = [(name, found + 0.02 * expected.abs().max(), expected, bound)]
        assert "differs" in selfcheck._worst(iter(wrong))
        wrong = [(name, found * torch.nan, expected, bound)]
        assert "differs" in selfcheck._worst(iter(wrong))
        break


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, words = FAULTS[fault]
    package = shutil.copytree(selfcheck.ROOT / "minivlm_kernels", place / "minivlm_kernels")
    source = package / "int4_matmul.py"
    text = source.read_text(encoding="utf-8")
    assert right in text
    source.write_text(text.replace(right, wrong, 1), encoding="utf-8")
    monkeypatch.setattr(selfcheck, "ROOT", place)
    monkeypatch.setattr(selfcheck, "SECONDS", 1 if fault == "hangs" else 120)
    assert words in selfcheck.result("four bits", torch.float16, CPU)
    monkeypatch.setattr(selfcheck, "_in_child", None)  # kept: there is no second child
    assert words in selfcheck.result("four bits", torch.float16, CPU)
    assert words in selfcheck.table(CPU)["four bits"]["float16"]
    monkeypatch.setattr(torch, "__version__", "another")
    assert selfcheck.table(CPU)["four bits"]["float16"] == "not tried"


def test_a_sound_kernel_passes_in_a_child_and_is_not_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selfcheck.result("four bits", torch.float16, CPU) == PASSED
    start = time.monotonic()
    assert selfcheck.result("four bits", torch.float16, CPU) == PASSED
    assert time.monotonic() - start < 1
    table = selfcheck.table(CPU)
    assert table["four bits"] == {"float16": PASSED, "bfloat16": "not tried", "float32": "not tried"}
    selfcheck._file("four bits", torch.float16, CPU, 0).write_text("{", encoding="utf-8")
    assert selfcheck.table(CPU)["four bits"]["float16"] == "not tried"


def test_one_warning_and_no_second_child(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    asked = []

    def child(*arguments: str) -> tuple[str, bool]:
        asked.append(arguments)
        return "differs by 3", True

    monkeypatch.setattr(selfcheck, "_in_child", child)
    monkeypatch.setattr(selfcheck, "_about", lambda device: ["a chip"])
    gpu = torch.device("cuda", 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not selfcheck.works("attention", torch.bfloat16, gpu, 72)
        assert not selfcheck.works("attention", torch.bfloat16, gpu, 72)
        assert not selfcheck.works("attention", torch.float16, gpu, 128)
    assert ["differs by 3" in str(each.message) for each in caught] == [True]
    assert len(asked) == 2
    monkeypatch.setattr(selfcheck, "_in_child", lambda *_: (PASSED, True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selfcheck.works("attention", torch.bfloat16, gpu, 64)


def test_what_may_be_otherwise_next_time_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_in_child", lambda *_: ("no memory for its check", False))
    assert "no memory" in selfcheck.result("attention", torch.float16, CPU, 64)
    assert not selfcheck._file("attention", torch.float16, CPU, 64).exists()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setattr(selfcheck, "_in_child", lambda *_: (PASSED, True))
    assert selfcheck.result("attention", torch.float16, CPU, 64) == PASSED


def test_a_kernel_is_preferred_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (selfcheck.ROOT / "README.md").read_text(encoding="utf-8")
    for kernel, generations in selfcheck.AHEAD.items():
        for generation in generations:
            assert f"Measured on sm_{generation}" in readme, f"{kernel}: no table of measurements"
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(selfcheck, "AHEAD", {"attention": frozenset({9}), "four bits": frozenset({8})})
    assert selfcheck.preferred("attention", gpu)
    assert not selfcheck.preferred("four bits", gpu)
    monkeypatch.setenv("MINIVLM_TRITON", "1")
    assert selfcheck.preferred("four bits", gpu)


def test_the_child_speaks_json(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["", "four bits", "float16", "cpu", "0"])
    monkeypatch.setattr(selfcheck.os, "_exit", lambda status: None)
    selfcheck.main()
    assert json.loads(capfd.readouterr().out.splitlines()[-1]) == {"result": PASSED, "lasting": True}
