"""Broken and hostile checkpoints: each is refused with one clear error, by a process that lives on.

They are loaded by a child process of limited memory and time (`worker.py`), which serves them all; one that crashes or
hangs is replaced, and fails its case.
"""

import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import breaker
import hypothesis.strategies as st
import pytest
from breaker import CASES, GROUPS, SOUND, WEIGHTS, write_json
from hypothesis import HealthCheck, given, settings

SECONDS = 20  # that a case may take; a good checkpoint takes 0.05
FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")


class Worker:
    """A child process that loads checkpoints."""

    def __init__(self, good: Path) -> None:
        self.good = good
        self.process: Any = None

    def start(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(self.good)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        environment["RUST_BACKTRACE"] = "0"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, args=(self.process.stdout, self.lines), daemon=True).start()

    @staticmethod
    def _listen(out: Any, lines: queue.Queue[str]) -> None:
        for line in out:
            lines.put(line)
        lines.put("")  # the process has ended

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process = None

    def __call__(self, folder: Path, action: str = "answer") -> dict[str, Any]:
        """What came of it: {"answer": …} or {"error": [type, bases …], "message": …}; "crash" and "hang" are errors."""
        fresh = self.process is None
        if fresh:
            self.start()
        self.process.stdin.write(json.dumps([action, str(folder)]) + "\n")
        self.process.stdin.flush()
        try:
            line = self.lines.get(timeout=SECONDS * (5 if fresh else 1))
        except queue.Empty:
            self.stop()
            return {"error": ["hang"], "message": f"no answer within {SECONDS} s"}
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.stop()
        return {"error": ["crash"], "message": f"the process ended with {code}"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound folder for each family."""
    home = tmp_path_factory.mktemp("good")
    return {family: breaker.write_good(family, home / family) for family in breaker.CONFIGS}


@pytest.fixture(scope="module")
def load(good: dict[str, Path]) -> Iterator[Worker]:
    worker = Worker(good["idefics2"])
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
def answers(good: dict[str, Path], load: Worker) -> dict[str, Any]:
    """What the sound folders answer."""
    return {family: load(folder)["answer"] for family, folder in good.items()}


def same(result: dict[str, Any], expected: list[Any]) -> bool:
    """The same ids; the sum of the logits may differ by roundings, since kernels go by where numbers lie in memory."""
    ids, total = result.get("answer", (None, 0.0))
    return ids == expected[0] and abs(total - expected[1]) < 1e-4


def is_refused(result: dict[str, Any], kind: str = "use") -> bool:
    """One error of the promised kind, in words a person can read."""
    wanted = {"file": "CheckpointFileError", "content": "CheckpointError", "use": "ValueError"}[kind]
    exact = kind != "content" or "CheckpointFileError" not in result.get("error", ())
    return wanted in result.get("error", ()) and exact and 20 < len(result["message"]) < 3000


def test_the_documentation_has_these_numbers() -> None:
    page = (Path(__file__).parents[2] / "docs" / "input.md").read_text(encoding="utf-8")
    stated = re.findall(r"^\| .* \| (\d+) \| refused", page, re.M)
    assert {str(len(group)) for group in GROUPS.values()} <= set(stated)


@pytest.mark.parametrize("name", CASES)
def test_broken_checkpoints_are_refused(name: str, good: dict[str, Path], load: Worker, tmp_path: Path) -> None:
    case = CASES[name]
    folder = shutil.copytree(good[case.family], tmp_path / "copy")
    case.damage(folder)
    result = load(folder)
    assert is_refused(result, case.kind), result
    assert re.search(case.words, result["message"]), result["message"]


@pytest.mark.parametrize("family", breaker.CONFIGS)
@pytest.mark.parametrize("name", SOUND)
def test_sound_checkpoints_are_not(
    name: str, family: str, good: dict[str, Path], load: Worker, answers: dict[str, Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(good[family], tmp_path / "copy"))
    SOUND[name](folder)
    assert same(load(folder), answers[family])
    assert load(folder, "check")["answer"]["tensors"] > 30


def test_check_finds_numbers_that_are_none(good: dict[str, Path], load: Worker, tmp_path: Path) -> None:
    folder = shutil.copytree(good["llava_next"], tmp_path / "copy")
    breaker.numbers(float("nan"))(folder)
    result = load(folder, "check")
    assert is_refused(result, "content")
    assert re.search(r"1 tensors with NaN or infinity:\n +.*lm_head.weight \(1 numbers\)", result["message"])


def test_check_holds_the_tokenizer_against_the_model(good: dict[str, Path], load: Worker, tmp_path: Path) -> None:
    for token, value, words in [("a", 500, "'a' has id 500, but the model has 102"), ("a", 9, "have the same id, 9")]:
        folder = shutil.copytree(good["idefics"], tmp_path / str(value))
        breaker.entry("tokenizer.json", f"model.vocab.{token}", value)(folder)
        assert words in load(folder, "check")["message"]


# ---- Anything at all -------------------------------------------------------------------------------------------------

any_way = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def scratch(good: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of the family to break and to break again: its files are links, which a change replaces."""
    home = tmp_path_factory.mktemp("scratch")

    def fresh(family: str) -> Path:
        shutil.rmtree(home / family, ignore_errors=True)
        return Path(shutil.copytree(good[family], home / family))

    return fresh


@any_way
@given(flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4), in_header=st.booleans())
def test_flipped_bytes(
    flips: list[tuple[float, int]], in_header: bool, load: Worker, scratch: Any, answers: Any
) -> None:
    """Bytes of the weights exchanged: another number is another answer, anything else is refused or changes nothing."""
    folder = scratch("idefics2")
    raw = bytearray((folder / WEIGHTS).read_bytes())
    data = 8 + int.from_bytes(raw[:8], "little")
    for place, byte in flips:
        raw[int(place * ((data if in_header else len(raw)) - 1))] = byte
    (folder / WEIGHTS).write_bytes(raw)
    result = load(folder)
    assert is_refused(result) or same(result, answers["idefics2"]) or ("answer" in result and not in_header), result


@any_way
@given(family=st.sampled_from([*breaker.CONFIGS]), name=st.sampled_from(FILES), size=st.floats(0, 1))
def test_files_cut_anywhere(family: str, name: str, size: float, load: Worker, scratch: Any, answers: Any) -> None:
    folder = scratch(family)
    path = folder / name
    path.write_bytes(path.read_bytes()[: int(size * path.stat().st_size)])
    result = load(folder)
    assert is_refused(result) or same(result, answers[family]), result


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
plain |= st.sampled_from(
    [-1, 0, 1, 2, 3, 2**31, 2**63, 10**30, 1e-30, 1e30, -0.5, "default", "full", "silu", "<image>"]
)
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all entries of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [below for key, item in inner for below in [(*path, key), *places(item, (*path, key))]]


@settings(any_way, max_examples=250)
@given(data=st.data())
def test_settings_of_any_kind(data: st.DataObject, load: Worker, scratch: Any) -> None:
    """Any value in the place of any entry of any JSON file: an answer, or a refusal, and never another error."""
    family = data.draw(st.sampled_from([*breaker.CONFIGS]))
    folder = scratch(family)
    name = data.draw(st.sampled_from([*FILES, "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"]))
    values = json.loads((folder / name).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(values)))
        inner = values
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = data.draw(anything)
        if not places(values):
            break
    write_json(folder / name, values)
    result = load(folder)
    assert "answer" in result or is_refused(result), result
