"""Pages of C are compiled when they are first needed, and done without where they cannot be."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from minivlm_kernels import compiled, cpu_dense, cpu_int4

each = pytest.mark.parametrize("module", [cpu_dense, cpu_int4], ids=lambda module: module.__name__)
needs_compiler = pytest.mark.skipif(not cpu_int4.available(), reason="no GCC, or no AVX: products stay with torch")
BROKEN = {cpu_dense: ("squares += first * first", "squares += first"), cpu_int4: ("4 * s)", "4 * (7 - s))")}


@each
@pytest.mark.parametrize("broken", ["no compiler", "an error in the source", "nowhere to keep it"])
def test_without_a_compiler_there_is_no_library(
    module: ModuleType, broken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = Path(module.__file__).with_suffix(".c")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if broken == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif broken == "nowhere to keep it":
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    else:
        source = tmp_path / source.name
        source.write_text("not C")
    assert compiled.library(source) is None
    monkeypatch.setattr(module, "_library", lambda: None)
    assert not module.available.__wrapped__()


@each
@needs_compiler
def test_a_library_that_computes_something_else_is_not_used(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "page.c"
    right, wrong = BROKEN[module]
    text = Path(module.__file__).with_suffix(".c").read_text()
    assert right in text
    source.write_text(text.replace(right, wrong))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "Path", lambda _: source)  # what it takes its page from
    library = module._library.__wrapped__()
    assert library is not None
    monkeypatch.setattr(module, "_library", lambda: library)
    assert not module.available.__wrapped__()


@needs_compiler
def test_several_processes_compile_at_once_and_the_next_one_does_not(tmp_path: Path) -> None:
    code = "from minivlm_kernels import cpu_int4; assert cpu_int4.available()"
    environment = {"PYTHONPATH": str(Path(cpu_int4.__file__).parents[1]), "XDG_CACHE_HOME": str(tmp_path)}

    def run(path: str) -> int:
        return subprocess.run([sys.executable, "-c", code], env={**environment, "PATH": path}, timeout=200).returncode

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, [os.environ["PATH"]] * 2)) == [0, 0]
    assert len(list((tmp_path / "minivlm").iterdir())) == 1
    assert run("") == 0  # no compiler is found, and none is needed
