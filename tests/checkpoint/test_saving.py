"""A save takes effect as a whole: whatever fails, and wherever, the folder loads as it was before or as it is to be."""

import dataclasses
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "hostile"))
import breaker

from minivlm import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, Idefics2ForConditionalGeneration
from minivlm.checkpoint import files, hub, journal, saving
from minivlm.checkpoint.files import WriteError
from minivlm.checkpoint.hub import CheckpointError
from minivlm.checkpoint.names import INDEX, SAVE_ID, WEIGHTS
from minivlm.training import adapters, lora
from minivlm.training.targets import LoraConfig

SHARDED = "40KB"  # which makes two shards


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return breaker.write_good("idefics2", tmp_path_factory.mktemp("good") / "idefics2")


@pytest.fixture
def model(good: Path) -> Any:
    return Idefics2ForConditionalGeneration.from_pretrained(good)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes after a killed save does not wait for it."""
    monkeypatch.setattr(journal, "PATIENCE", 0)


@torch.no_grad()
def changed(model: Any) -> Any:
    """All numbers of all tensors are other ones, and so are the settings."""
    for parameter in model.parameters():
        parameter += 1
    model.generation_config.max_new_tokens = 77
    return model


def state(folder: Path) -> tuple[Any, ...]:
    """What a folder loads as: every number, and the settings."""
    model = Idefics2ForConditionalGeneration.from_pretrained(folder)
    tensors = {name: value.double().sum().item() for name, value in model.state_dict().items()}
    return tensors, model.config, model.generation_config.max_new_tokens


def contents(folder: Path) -> dict[str, bytes]:
    """All files but hidden ones: where removing fails, an old file or a journal stays under a hidden name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


# ---- A write that fails ----------------------------------------------------------------------------------------------

CALLS = [(Path, "write_text"), (saving, "save_file"), (os, "fsync"), (os, "link"), (os, "replace"), (Path, "unlink")]


RENAMES = CALLS[3:]


def fail(patch: pytest.MonkeyPatch, fails_at: int, error: Callable[[], BaseException], calls: Any) -> list[int]:
    """Let the k-th of all calls that write, rename or remove raise an error; counts them."""
    count = [0]

    def failing(function: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == fails_at:
                raise error()
            return function(*args, **options)

        return call

    for owner, name in calls:
        patch.setattr(owner, name, failing(getattr(owner, name)))
    return count


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failures(
    save: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, error: Callable = full, calls: Any = CALLS
) -> Any:
    """Save with the first call failing, then the second, …; yields the error, and None when all went well."""
    for fails_at in range(1, 500):
        caught: BaseException | None = None
        with monkeypatch.context() as patch:
            count = fail(patch, fails_at, error, calls)
            try:
                save()
            except (OSError, Killed) as raised:
                caught = raised
        if count[0] < fails_at:
            yield None
            return
        yield caught


@pytest.mark.parametrize(("before", "after"), [("5GB", "5GB"), ("5GB", SHARDED), (SHARDED, SHARDED)])
def test_a_failed_write_leaves_the_old_model(
    before: str, after: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path, max_shard_size=before)
    old, listing = state(tmp_path), contents(tmp_path).keys()
    changed(model).save_pretrained(tmp_path / "new", max_shard_size=after)
    new = state(tmp_path / "new")
    shutil.rmtree(tmp_path / "new")
    tries = 0
    for error in failures(lambda: model.save_pretrained(tmp_path, max_shard_size=after), monkeypatch):
        tries += 1
        if isinstance(error, WriteError):
            assert "No space left" in str(error)
            assert "\n" not in str(error)
            assert contents(tmp_path).keys() == listing
            assert state(tmp_path) == old
        else:  # a failure that did not matter, such as that of a hard link
            assert state(tmp_path) == new
            model.save_pretrained(tmp_path, max_shard_size=after)
            listing, old = contents(tmp_path).keys(), new
    assert tries > 15
    assert old == new


def test_a_failed_write_leaves_the_old_quantised_model(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = Idefics2ForConditionalGeneration.from_pretrained(good, quantization_config=config)
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    old = state(tmp_path)
    for error in failures(lambda: model.save_pretrained(tmp_path), monkeypatch):
        if isinstance(error, WriteError):
            assert state(tmp_path) == old
        else:
            old = state(tmp_path)
    assert (tmp_path / "config.json").read_text().count("nf4") == 1


def test_a_failed_write_leaves_the_old_processor(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    AutoProcessor.from_pretrained(good).save_pretrained(tmp_path)
    old = contents(tmp_path)
    new = AutoProcessor.from_pretrained(good, chat_template="{{ messages }}", do_image_splitting=True)
    new.tokenizer.add_tokens(["<new>"])
    for error in failures(lambda: new.save_pretrained(tmp_path), monkeypatch):
        found = contents(tmp_path)
        if isinstance(error, WriteError):
            assert found == old
        else:
            old = found
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.chat_template == "{{ messages }}"
    assert again.image_processor.do_image_splitting
    assert again.tokenizer.encode("<new>", add_special_tokens=False) == [breaker.VOCABULARY]


def test_a_failed_write_leaves_the_old_adapter(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora.apply(model, LoraConfig(target_modules=["q_proj"]))
    adapters.save(model, tmp_path)
    old = contents(tmp_path)
    changed(model)
    for error in failures(lambda: adapters.save(model, tmp_path), monkeypatch):
        found = contents(tmp_path)
        if isinstance(error, WriteError):
            assert found == old
        old = found


@pytest.mark.parametrize("verb", [["quantize", "shapes-idefics2", "OUT", "--format", "nf4"]])
def test_a_full_disk_on_the_command_line(verb: list[str], tmp_path: Path) -> None:
    """The real thing, in a process that may write 100 kB: one line, exit status 1, and nothing is left."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from minivlm.app.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    result = processes.run(code, *(str(tmp_path / "out") if word == "OUT" else word for word in verb))
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert "cannot be written: File too large" in lines[-1]
    assert "Traceback" not in result.stderr
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


# ---- A process that dies ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing is put back and nothing cleaned up after it."""


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Killed` ends a save as SIGKILL does."""
    monkeypatch.setattr(files, "_undo", lambda *_: None)
    monkeypatch.setattr(files.Save, "discard", lambda self: None)


@pytest.mark.usefixtures("killed")
@pytest.mark.filterwarnings("ignore:a save into")
@pytest.mark.parametrize(
    ("before", "after"), [("5GB", "5GB"), ("5GB", SHARDED), (SHARDED, "5GB"), (SHARDED, SHARDED), (SHARDED, "20KB")]
)
def test_a_killed_save_is_no_mixture(
    before: str, after: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before, between and after all renames: config, settings and weights are all old or all new."""
    model.save_pretrained(tmp_path / "old", max_shard_size=before)
    model.config = dataclasses.replace(
        model.config, text_config=dataclasses.replace(model.config.text_config, rms_norm_eps=0.25)
    )
    changed(model).save_pretrained(tmp_path / "new", max_shard_size=after)
    old, new = state(tmp_path / "old"), state(tmp_path / "new")
    assert all(before != after for before, after in zip(old, new, strict=True))
    folder = tmp_path / "copy"
    shutil.copytree(tmp_path / "old", folder)
    seen = []
    for _ in failures(lambda: model.save_pretrained(folder, max_shard_size=after), monkeypatch, Killed):
        found = state(folder)
        assert found in (old, new)
        seen.append("old" if found == old else "new")
        assert not list(folder.glob(".*.json")) or found == old
        model.save_pretrained(folder, max_shard_size=after)
        assert state(folder) == new
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "old", folder)
    assert seen == sorted(seen, reverse=True)  # old until the journal is there, new from then on
    assert set(seen) == {"old", "new"}


def test_shards_of_two_saves_are_refused(model: Any, tmp_path: Path) -> None:
    """The case of a copy that overwrote some of the files: same names, same shapes."""
    model.save_pretrained(tmp_path / "old", max_shard_size=SHARDED)
    changed(model).save_pretrained(tmp_path / "new", max_shard_size=SHARDED)
    shards = sorted((tmp_path / "new").glob("*.safetensors"))
    shutil.copy(shards[1], tmp_path / "old")
    with pytest.raises(CheckpointError, match="mixture of several saves"):
        state(tmp_path / "old")
    for shard in shards:
        shutil.copy(shard, tmp_path / "old")
    with pytest.raises(CheckpointError, match="mixture of several saves"):  # the index is still the old one
        state(tmp_path / "old")
    shutil.copy(tmp_path / "new" / INDEX, tmp_path / "old")
    assert state(tmp_path / "old")[0] == state(tmp_path / "new")[0]


def test_a_save_of_another_program_over_ours(model: Any, tmp_path: Path) -> None:
    """transformers writes no id: its whole saves load, and a mixture with ours does not."""
    model.save_pretrained(tmp_path, max_shard_size=SHARDED)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=SHARDED)
    old = state(tmp_path)[0]
    assert state(tmp_path / "theirs")[0] == old
    index = json.loads((tmp_path / INDEX).read_text())
    assert len(index["metadata"][SAVE_ID]) == 16
    del index["metadata"][SAVE_ID]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert state(tmp_path)[0] == old
    name = sorted(path.name for path in tmp_path.glob("*.safetensors"))[0]
    bare = breaker.read_weights(tmp_path / name)
    bare[0].pop("__metadata__")
    breaker.write_weights(tmp_path / name, json.dumps(bare[0]).encode(), bare[1])
    with pytest.raises(CheckpointError, match="mixture"):
        state(tmp_path)


# ---- What is written -------------------------------------------------------------------------------------------------


def test_the_same_model_gives_the_same_files(model: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name, max_shard_size=SHARDED)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_only_our_older_files_are_removed(model: Any, tmp_path: Path) -> None:
    for name in ("model_ema.safetensors", "model-00007-of-00009.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    model.save_pretrained(tmp_path)
    assert contents(tmp_path).keys() == {
        WEIGHTS,
        "config.json",
        "generation_config.json",
        "model_ema.safetensors",
        "notes.txt",
    }


def test_other_tensors_than_the_models_own(model: Any, tmp_path: Path) -> None:
    """As a trainer collects them from several devices."""
    given = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=given, is_main_process=False)
    assert not contents(tmp_path)
    model.save_pretrained(tmp_path, state_dict=given, safe_serialization=True, save_function=torch.save)
    assert state(tmp_path)[0] == {name: value.double().sum().item() for name, value in given.items()}
    with pytest.raises(ValueError, match="state_dict"):
        model.save_pretrained(tmp_path, state_dict={"lm_head.weight": given["lm_head.weight"]})


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"safe_serialization": False}, ValueError, "safe_serialization=False .* safetensors"),
        ({"variant": "fp16"}, ValueError, "variant='fp16'"),
        ({"max_shard": "5GB"}, TypeError, "max_shard.*did you mean 'max_shard_size'"),
        *(
            ({"max_shard_size": size}, ValueError, "max_shard_size should be 1 or more bytes .*20GiB")
            for size in ("5 parsec", "5XB", "", "0GB", 0, -1, None, True)
        ),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], words: str, model: Any, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        model.save_pretrained(tmp_path, **options)
    assert not contents(tmp_path)


def test_push_to_hub(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to the Hub's own client."""
    import huggingface_hub

    asked: list[Any] = []

    class Api:
        def __init__(self, token: Any) -> None:
            asked.append(token)

        def create_repo(self, name: str, **options: Any) -> Any:
            asked.append((name, options))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{name}")

        def upload_folder(self, folder_path: Path, **options: Any) -> str:
            asked.append((state(folder_path)[0], options))
            return "https://huggingface.co/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, token="hf_x")
    assert asked[0] == "hf_x"
    assert asked[1] == ("mine", {"private": None, "exist_ok": True})
    assert asked[2][0] == state(tmp_path / "mine")[0]
    assert asked[2][1]["repo_id"] == "someone/mine"
    assert saving.push_to_hub(model, "mine", private=True, create_pr=True) == "https://huggingface.co/commit"
    assert asked[4] == ("mine", {"private": True, "exist_ok": True})
    assert asked[5][1]["create_pr"]

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("403\nForbidden")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(OSError, match=r"could not be uploaded to 'mine': 403 Forbidden. Are you logged in"):
        hub.upload(tmp_path, "mine")


def test_saving_is_loading(model: Any, tmp_path: Path) -> None:
    """The class is found again by the file's own words."""
    model.save_pretrained(tmp_path)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path), Idefics2ForConditionalGeneration)
