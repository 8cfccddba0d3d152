"""What the processor is good at is found out once, kept, and not overruled by noise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from minivlm_kernels import compiled, processor

TRIED = ("", " row", " row in C", " attention", " attention in C")
EVEN = {f"{name}{tried}": 1.0 for name in ("fp32", "bf16") for tried in TRIED}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "minivlm"


def pretend(monkeypatch: pytest.MonkeyPatch, flags: str, name: str = "AMD EPYC", capability: str = "AVX512") -> None:
    text = f"vendor_id\t: {'GenuineIntel' if 'Intel' in name else name}\nmodel name\t: {name}\nflags\t\t: {flags}"
    monkeypatch.setattr(processor, "description", lambda: text)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


@pytest.mark.parametrize(
    ("flags", "times", "expected"),
    [
        ("avx2 avx512f avx512_bf16", {}, True),
        ("avx2 avx512f avx512_bf16", {"bf16": 1.4}, True),  # not clear enough
        ("avx2 avx512f avx512_bf16", {"bf16": 3.0}, False),  # a virtual machine that traps them, say
        ("avx2 avx512f", {}, False),
        ("avx2 avx512f", {"fp32": 1.4}, False),
        ("avx2 avx512f", {"fp32": 2.0}, True),
        ("", {}, True),  # another kind of processor: torch knows best, until a trial says otherwise
        ("", {"bf16": 2.0}, False),
    ],
)
def test_many_rows_of_bf16(flags: str, times: dict, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, flags, capability="AVX512" if flags else "DEFAULT")
    assert processor.judged({**EVEN, **times}).bf16_products == expected


def test_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "avx2 avx512f", "Intel Xeon")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert processor.judged(EVEN).fp32_row_in_torch
    assert not processor.judged({**EVEN, "fp32 row": 2.0}).fp32_row_in_torch
    pretend(monkeypatch, "avx2 avx512f", "AMD EPYC")
    assert not processor.judged(EVEN).fp32_row_in_torch
    assert processor.judged({**EVEN, "fp32 row in C": 2.0}).fp32_row_in_torch
    assert not processor.judged({**EVEN, "bf16 row in C": 1.4}).bf16_row_in_torch
    assert processor.judged({**EVEN, "bf16 row in C": 2.0}).bf16_row_in_torch
    without = {name: time for name, time in EVEN.items() if "C" not in name}
    assert not processor.judged(without).bf16_row_in_torch


def test_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "avx2 avx512f avx512_bf16", "AMD EPYC")
    assert not processor.judged(EVEN).bf16_attention_in_torch
    assert processor.judged({**EVEN, "bf16 attention in C": 2.0}).bf16_attention_in_torch
    assert not processor.judged(EVEN).fp32_attention_in_torch
    pretend(monkeypatch, "avx2 avx512f avx512_bf16 amx_bf16", "Intel Xeon")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert processor.judged(EVEN).bf16_attention_in_torch
    assert processor.judged(EVEN).fp32_attention_in_torch
    assert not processor.judged({**EVEN, "fp32 attention": 2.0}).fp32_attention_in_torch


def test_stand_ins_for_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "avx2 fma avx512f avx512_vnni avx512vbmi avx512_bf16")
    assert processor.instruction_sets() == ("avx2", "fma", "avx512f", "avx512_vnni", "avx512vbmi", "avx512_bf16")
    assert not [option for option in compiled._options() if option.startswith("-mno-avx512")]
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    assert processor.instruction_sets() == ("avx2", "fma", "avx512f", "avx512_vnni", "avx512vbmi")
    assert "-mno-avx512bf16" in compiled._options()
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX512_CORE")
    assert processor.instruction_sets() == ("avx2", "fma", "avx512f", "avx512vbmi")
    monkeypatch.delenv("DNNL_MAX_CPU_ISA")
    pretend(monkeypatch, "avx2 fma avx512f avx512_bf16", capability="AVX2")
    assert processor.instruction_sets() == ("avx2", "fma")
    assert "-mno-avx512f" in compiled._options()
    pretend(monkeypatch, "avx2 fma avx_vnni")
    for least in ("AVX2_VNNI", "ALL"):
        monkeypatch.setenv("DNNL_MAX_CPU_ISA", least)
        assert processor.instruction_sets() == ("avx2", "fma", "avx_vnni")
        assert "-mno-avxvnni" not in compiled._options()
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    assert processor.instruction_sets() == ("avx2", "fma")
    assert "-mno-avxvnni" in compiled._options()
    pretend(monkeypatch, "avx2 fma", capability="DEFAULT")
    assert processor.instruction_sets() == ()
    pretend(monkeypatch, "avx2 fma", capability="AVX2")
    assert compiled._options() == compiled.OPTIONS  # older compilers do not know the names of newer sets


def test_found_once_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "avx2 avx512f avx512_bf16")
    trials = []
    monkeypatch.setattr(processor, "trial", lambda: trials.append(1) or EVEN)
    find = processor.abilities.__wrapped__
    assert find() == find() == processor.Abilities(True, False, False, False, False, EVEN)
    assert len(trials) == 1
    (path,) = folder.iterdir()
    for damaged in ("{", "[]", json.dumps({"another": 1})):
        path.write_text(damaged, encoding="utf-8")
        assert find().bf16_products
    assert len(trials) == 4
    pretend(monkeypatch, "avx2 avx512f")  # another processor
    assert not find().bf16_products
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert not find().bf16_products


def test_a_busy_machine_does_not_look_like_another_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disturbed trial is repeated and the least times count; one that is always the same is believed."""
    pretend(monkeypatch, "avx2 avx512f avx512_bf16")
    disturbed = iter([{**EVEN, "bf16": 4.0}, {**EVEN, "bf16 row in C": 4.0}, EVEN])
    times = processor.confirmed(lambda: next(disturbed))
    assert processor.judged(times) == processor.Abilities(True, False, False, False, False, EVEN)
    assert next(disturbed) == EVEN  # two trials were enough
    slow = {**EVEN, "bf16": 4.0}
    assert processor.confirmed(lambda: slow) == slow


def test_the_trial_is_short() -> None:
    times = processor.trial()
    assert set(times) <= set(EVEN)
    assert {"fp32", "bf16"} <= set(times)
    assert all(0 < time < 1000 for time in times.values())


def test_in_processes_of_their_own(folder: Path) -> None:
    code = "from minivlm_kernels import processor; print(processor.abilities(), processor.instruction_sets())"
    said = processes.run(code, check=True).stdout
    assert processes.run(code, check=True).stdout == said  # the second reads what the first has kept
    plain = {**os.environ, "PYTHONPATH": str(Path(processor.__file__).parents[1])}
    held_back = {**plain, "ATEN_CPU_CAPABILITY": "avx2", "DNNL_MAX_CPU_ISA": "AVX2"}  # read when torch is loaded
    child = subprocess.run([sys.executable, "-c", code], env=held_back, capture_output=True, check=True)
    assert b"avx512" not in child.stdout
