"""Pages of C are compiled when they are first needed, and done without where they cannot be."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import processes
import pytest
import torch
from minivlm_kernels import compiled, cpu_dense, cpu_int4

each = pytest.mark.parametrize("module", [cpu_dense, cpu_int4], ids=lambda module: module.__name__)
needs_compiler = pytest.mark.skipif(not cpu_int4.available(), reason="no GCC, or no AVX: products stay with torch")
BROKEN = {cpu_dense: ("squares += first * first", "squares += first"), cpu_int4: ("4 * s)", "4 * (7 - s))")}


@each
@pytest.mark.parametrize("broken", ["no compiler", "an error in the source", "nowhere to keep it", "a slow compiler"])
def test_without_a_compiler_there_is_no_library(
    module: ModuleType, broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    source = module.SOURCE
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if broken == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif broken == "nowhere to keep it":
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    elif broken == "a slow compiler":
        (tmp_path / "gcc").write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
        (tmp_path / "gcc").chmod(0o700)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(compiled, "SECONDS", 0.1)
    else:
        source = tmp_path / source.name
        source.write_text("not C", encoding="utf-8")
    assert compiled.library(source) is None
    assert capfd.readouterr().err.count("so torch computes instead") == 1
    monkeypatch.setattr(module, "_library", lambda: None)
    assert not module.available.__wrapped__()


@each
@needs_compiler
def test_a_library_that_computes_something_else_is_not_used(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    source = tmp_path / "page.c"
    right, wrong = BROKEN[module]
    text = module.SOURCE.read_text(encoding="utf-8")
    assert right in text
    source.write_text(text.replace(right, wrong), encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "SOURCE", source)
    library = module._library.__wrapped__()
    assert library is not None
    monkeypatch.setattr(module, "_library", lambda: library)
    assert not module.available.__wrapped__()
    monkeypatch.setattr(module, "_library", lambda: "no library at all")
    assert not module.available.__wrapped__()
    assert capfd.readouterr().err.count("fails its check") == 2


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = compiled._path(cpu_dense.SOURCE)
    kept.parent.mkdir()
    kept.write_bytes(b"\x7fELF, and then cut")
    assert compiled.library(cpu_dense.SOURCE) is not None
    assert kept.stat().st_size > 1000


@needs_compiler
def test_several_processes_compile_at_once_and_the_next_one_does_not(tmp_path: Path) -> None:
    code = "from minivlm_kernels import cpu_dense; assert cpu_dense.available()"

    def run(path: str) -> int:
        return processes.run(code, env={"XDG_CACHE_HOME": str(tmp_path), "PATH": path}).returncode

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, [os.environ["PATH"]] * 2)) == [0, 0]
    assert len(list((tmp_path / "minivlm").iterdir())) == 1
    assert run("") == 0  # no compiler is found, and none is needed


@needs_compiler
def test_of_several_threads_one_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "page.c"
    source.write_text("int one() { return 1; }", encoding="utf-8")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(compiled.library, [source] * 4))
    assert [library.one() for library in found] == [1] * 4
    assert capfd.readouterr().err.count("compiling page.c") == 1
