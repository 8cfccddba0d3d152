"""Sides, recordings, reports and the command line of the parity instrument."""

import copy
import errno
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import oracle
import oracle_idefics
import oracle_llava
import processes
import pytest
import tiny_idefics
import torch

from minivlm import LlavaNextForConditionalGeneration
from minivlm.app import cli
from minivlm.auto import PRESETS, family
from minivlm.checkpoint import hub
from minivlm.devices.fast_cpu import FastLinear
from minivlm.parity import Question, Recording, Side, against, compare, drawn_image, plot, record, sides
from minivlm.parity.difference import Difference, Yardstick
from minivlm.parity.stages import stages_of

MODEL = "shapes-llava-next"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference on the drawn picture, by the command line."""
    path = tmp_path_factory.mktemp("recording") / "ref.safetensors"
    assert cli.main(["parity", MODEL, "--record", str(path), "--tokens", "4"]) == 0
    return path


def fails(capsys: Any, *argv: str) -> str:
    """The one line on stderr of a call that exits with 1 and prints nothing else."""
    capsys.readouterr()
    assert cli.main(["parity", *argv]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    return err


# ---- Measuring -------------------------------------------------------------------------------------------------------


def test_difference_in_pieces_is_that_of_the_whole() -> None:
    torch.manual_seed(0)
    a = torch.randn(50, 7)
    b = a + 1e-3 * torch.randn(50, 7)
    found = Difference()
    for start in (0, 20, 21):
        stop = {0: 20, 20: 21, 21: 50}[start]
        found.add(a[start:stop], b[start:stop])
    delta = (a.double() - b.double()).abs()
    assert found.largest == delta.max().item()
    assert found.at == divmod(int(delta.argmax()), 7)
    assert math.isclose(found.mean, delta.mean().item(), rel_tol=1e-12)
    assert math.isclose(found.relative, (delta.norm() / a.double().norm()).item(), rel_tol=1e-12)
    assert math.isclose(found.cosine, cosine(a, b), rel_tol=1e-12)
    assert found.eps == torch.finfo(torch.float32).eps


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_diverges_unless_it_is_equal(bad: float) -> None:
    a = torch.ones(2, 2)
    b = a.clone()
    b[1, 0] = bad
    found = Difference()
    found.add(a, b)
    assert Yardstick().excess(found) == math.inf
    assert found.at == (1, 0)
    same = Difference()
    same.add(torch.full((1, 1), -math.inf), torch.full((1, 1), -math.inf))
    assert same.largest == 0


def test_yardstick_and_its_floor() -> None:
    found = Difference()
    found.add(torch.full((1, 2), 4.0), torch.tensor([[4.0, 4.0001]]))
    assert Yardstick().bounds(found) == (4e-5, 1e-6)
    assert Yardstick(1e-3, 1e-4).bounds(found) == (2e-3, 2e-4)
    assert Yardstick().excess(found) > 1 > Yardstick(1e-3, 1e-4).excess(found)
    half = Difference()
    half.add(torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(1, 2))
    assert Yardstick().bounds(half) == (2**-6, 2**-8)


# ---- Recordings ------------------------------------------------------------------------------------------------------


def test_another_process_without_transformers_finds_the_same(recorded: Path, capsys: Any) -> None:
    capsys.readouterr()
    assert cli.main(["parity", MODEL, "--against", str(recorded), "--b", "attn=eager", "--json"]) == 0
    here = json.loads(capsys.readouterr().out)
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "from minivlm.app import cli\n"
        f"sys.exit(cli.main(['parity', {MODEL!r}, '--against', {str(recorded)!r}, '--b', 'attn=eager', '--json']))"
    )
    done = processes.run(code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == here
    assert here["float32"]["first_divergence"] is None
    assert len(here["float32"]["stages"]) == 22


def test_a_recording_is_a_safetensors_file_with_all_it_takes(recorded: Path) -> None:
    recording = Recording(recorded)
    about = recording.metadata
    assert about["side"].startswith("transformers 5.")
    assert about["config"]["text_config"]["hidden_size"] == 128
    assert about["question"]["prompt"] == "what is this?"
    assert set(recording.group("inputs")) == {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
    assert recording.shape("decoder layer 4") == (80, 128)
    assert torch.equal(recording.rows("logits", 3, 2), recording.tensor("logits#0")[3:5])
    assert about["yardsticks"]["decoder layer 4"][0] > 0


def test_recordings_of_something_else_are_refused(recorded: Path, capsys: Any, tmp_path: Path) -> None:
    assert "prompt 'where is it?'" in fails(capsys, MODEL, "--against", str(recorded), "--prompt", "where is it?")
    picture = tmp_path / "other.png"
    drawn_image().rotate(90).save(picture)
    assert "other inputs" in fails(capsys, MODEL, "--against", str(recorded), "--image", str(picture))
    assert "for sides in float32" in fails(capsys, MODEL, "--against", str(recorded), "--dtype", "bfloat16")
    assert "no common stages" in fails(capsys, "shapes-idefics2", "--against", str(recorded))


def test_an_edited_configuration_is_named(recorded: Path, capsys: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(hub.source(MODEL).folder, tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-6
    (folder / "config.json").write_text(json.dumps(config))
    error = fails(capsys, str(folder), "--against", str(recorded))
    assert "text_config.rms_norm_eps is 1e-05 there, 1e-06 here" in error


@pytest.mark.parametrize("left", [0.0, 0.001, 0.5, 0.999])
def test_a_cut_recording_is_refused(recorded: Path, capsys: Any, tmp_path: Path, left: float) -> None:
    cut = tmp_path / "cut.safetensors"
    data = recorded.read_bytes()
    cut.write_bytes(data[: int(left * len(data))])
    assert "complete recording" in fails(capsys, MODEL, "--against", str(cut))


def test_files_that_are_no_recordings(capsys: Any, tmp_path: Path) -> None:
    weights = hub.source(MODEL).folder / "model.safetensors"
    assert "not a parity recording" in fails(capsys, MODEL, "--against", str(weights))
    assert "there is no recording" in fails(capsys, MODEL, "--against", str(tmp_path / "none"))


def test_an_interruption_leaves_the_recording_that_was_there(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    path = Path(shutil.copy(recorded, tmp_path))
    monkeypatch.setattr(sides, "other_backend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        record(Side(MODEL), path, Question((drawn_image(),)))
    assert path.read_bytes() == recorded.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_recording_that_was_there(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Each of the writes fails in turn: the old file or none."""
    side, path = Side(LlavaNextForConditionalGeneration.from_pretrained(MODEL)), tmp_path / "ref.safetensors"
    question, options = Question(inputs=sides.encode(Side(MODEL), [drawn_image()], "?")), {"layers": [], "tokens": 0}
    writes, open_path = {"done": 0, "failing": 0}, Path.open

    def opened(self: Path, mode: str = "r", **options: Any) -> Any:
        if self.suffix == ".part":
            writes["done"] += 1
            if writes["done"] == writes["failing"]:
                raise OSError(errno.ENOSPC, "No space left on device")
        return open_path(self, mode, **options)

    monkeypatch.setattr(Path, "open", opened)
    record(side, tmp_path / "whole.safetensors", question, **options)
    count = writes["done"]
    assert count > 8
    (tmp_path / "whole.safetensors").unlink()
    for old in (None, recorded.read_bytes()):
        if old is not None:
            path.write_bytes(old)
        for k in range(1, count + 1):
            writes.update(done=0, failing=k)
            with pytest.raises(OSError, match="No space left"):
                record(side, path, question, **options)
            assert list(tmp_path.iterdir()) == ([] if old is None else [path])
            assert old is None or path.read_bytes() == old
    writes.update(done=0, failing=2)
    assert fails(capsys, MODEL, "--record", str(path)).startswith(
        f"minivlm: error: {path} cannot be written: No space left"
    )


def test_ours_of_yesterday_is_a_side_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Idefics2's groups of pictures come one after the other: a recording of them has parts."""
    name, question = "shapes-idefics2", Question((drawn_image(), drawn_image().crop((0, 0, 90, 200))))
    recording = record(Side(name), tmp_path / "ours.safetensors", question, tokens=2)
    assert {"vision layer 3#0", "vision layer 3#1"} <= recording.names
    assert against(recording, Side(name), question).first is None
    report = against(recording, Side(name, "transformers"), question)
    assert report.first is None, report.table()


# ---- Sides -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_idefics_from_pixels_on(tmp_path: Path, dtype: str) -> None:
    """The family without a chat template, and so far without a checkpoint that ships."""
    files = tiny_idefics.write_small(tmp_path / "idefics", tiny_idefics.SPECIAL[:-1])
    vision = {"embed_dim": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": tiny_idefics.IMAGE_SIZE, "patch_size": 4}
    config = oracle_idefics.idefics_config(vocab_size=110, interval=2, vision_config=vision)
    oracle.save(oracle_idefics.random_reference(config), files)
    a, b = Side(files, "transformers", dtype=dtype), Side(files, dtype=dtype)
    pictures = drawn_image(), drawn_image().rotate(90)
    report = compare(a, b, Question(pictures, "Which colours?"), tokens=4)
    assert report.first is None, report.table()
    stages = [finding.stage for finding in report.findings]
    assert stages[:4] == ["pixels", "token ids", "attention mask", "image mask"]
    assert stages.index("gated block 1") == stages.index("decoder layer 1") + 1


def test_another_dtype_is_measured_by_the_references_own_rounding() -> None:
    a, b = Side(MODEL, "transformers", dtype="float32"), Side(MODEL, dtype="bfloat16")
    report = compare(a, b, Question((drawn_image(),)), layers=[0, 4], tokens=0)
    assert report.first is None, report.table()
    assert max(finding.excess for finding in report.findings) > 0.3  # it is rounding that is seen
    stages = [finding.stage for finding in report.findings]
    assert {"vision layer 0", "decoder layer 4"} <= set(stages)
    assert "decoder layer 1" not in stages


def test_other_weights_diverge(tmp_path: Path, capsys: Any) -> None:
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32)
    folder = shutil.copytree(hub.source(MODEL).folder, tmp_path / "tuned")
    weight = model.model.language_model.layers[3].mlp.down_proj.weight
    with torch.no_grad():
        weight += 1e-3 * torch.randn_like(weight)
    model.save_pretrained(folder)
    options = ["--reference", "minivlm", "--b", f"model={folder}", "--tokens", "0"]
    assert cli.main(["parity", MODEL, *options]) == 1
    out = capsys.readouterr().out
    assert "first divergence: decoder layer 3\n" in out
    assert "minivlm/modules/decoder.py:" in out
    assert cli.main(["parity", MODEL, *options, "--layers", "3", "--inside"]) == 1
    assert "first divergence: decoder layer 3, down_proj\n" in capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100


def test_four_bit_diverges_from_the_first_quantised_layer() -> None:
    a, b = Side(MODEL, dtype="bfloat16"), Side(MODEL, dtype="bfloat16", quantize="nf4")
    report = compare(a, b, Question((drawn_image(),)), tokens=0)
    assert report.first is not None
    assert "layer 0" in report.first.stage
    assert all(finding.cosine > 0.9 for finding in report.findings if finding.stage.startswith("decoder"))


def test_loaded_models_and_a_tie() -> None:
    """Two tokens with the same row of the head, one of which a breath of rounding puts first."""
    torch.manual_seed(0)
    config = oracle_llava.llava_config()
    model = LlavaNextForConditionalGeneration(LlavaNextForConditionalGeneration.config_class.from_hub(config.to_dict()))
    inputs = oracle_llava.llava_inputs([[(30, 50)]], config)
    first = int(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1])
    with torch.no_grad():
        model.lm_head.weight[98] = model.lm_head.weight[first]
        other = copy.deepcopy(model)
        other.lm_head.weight[98 if first < 98 else first] *= 1 + 1e-6
    report = compare(model, other, inputs, tokens=2)
    assert report.first is None, report.table()
    assert "token 0: a tie" in report.findings[-1].note
    with torch.no_grad():  # the two lead by nothing at all: which of them a names first is chance
        other.lm_head.weight.copy_(model.lm_head.weight).mul_(1 - 1e-7)
    assert compare(other, model, inputs, tokens=2).first is None
    with torch.no_grad():
        other.lm_head.weight[97] = 2 * other.lm_head.weight[first]
    assert compare(model, other, inputs, tokens=2).findings[-1].diverges


@pytest.mark.parametrize(
    ("part", "new", "stage", "error"),
    [
        ("layers.2.mlp.up_proj", torch.nn.Linear(7, 7), "decoder layer 2", "RuntimeError"),
        ("norm", torch.nn.LayerNorm(7), "final norm", "RuntimeError"),
    ],
)
def test_an_error_on_the_way_is_part_of_the_report(part: str, new: Any, stage: str, error: str) -> None:
    model = LlavaNextForConditionalGeneration.from_pretrained(MODEL)
    broken = copy.deepcopy(model)
    broken.model.language_model.set_submodule(part, new)
    inputs = sides.encode(Side(MODEL), [drawn_image()], "what is this?")
    report = compare(model, broken, inputs)
    assert report.first.stage == stage
    assert report.first.note.startswith(error)
    assert "minivlm/modules/decoder.py" in report.first.code
    behind = [finding.stage for finding in report.findings]
    assert [finding.stage for finding in report.findings if finding.diverges] == behind[behind.index(stage) :]
    assert behind[-1] == "logits"  # no greedy tokens of a model that has failed


def test_memory_is_foreseen(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "available", lambda device: 2.0**20)
    error = fails(capsys, MODEL)
    assert "takes 0.0 GiB (0.00 billion weights), and 0.0 GiB are free on cpu" in error


def test_free_memory_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS, without /proc; and on Windows, without sysconf."""
    assert sides.available("cpu") > 2**20

    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert sides.available("cpu") > 2**20
    monkeypatch.delattr(os, "sysconf")
    assert sides.available("cpu") is None


def test_a_quantised_checkpoint_needs_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PRESETS["HuggingFaceM4/idefics2-8b"].to_hub() | {"quantization_config": {"load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sides, "available", lambda device: 6.0 * 2**30)
    sides.foresee(Side(tmp_path, dtype="bfloat16"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_8bit": True}}))
    with pytest.raises(MemoryError, match=r"in int8 takes 8\.\d GiB"):
        sides.foresee(Side(tmp_path, dtype="bfloat16"))


def test_a_large_model_is_refused_by_its_configuration_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are needed to know that they will not fit."""
    config = PRESETS["HuggingFaceM4/idefics2-8b"].to_hub()
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sides, "available", lambda device: 16.0 * 2**30)
    with pytest.raises(MemoryError, match=r"takes 31\.\d GiB \(8\.40 billion weights\), and 16\.0 GiB are free on cpu"):
        sides.load(Side(tmp_path, dtype="float32"))


def test_without_transformers(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "--against a recording, or --reference minivlm" in fails(capsys, MODEL)


def test_what_transformers_cannot_load(capsys: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(hub.source(MODEL).folder, tmp_path / "cut")
    os.truncate(folder / "model.safetensors", 100_000)
    assert "cannot load" in fails(capsys, str(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--b", "attn"], "a setting is KEY=VALUE"),
        (["--b", "colour=red"], "found 'colour=red'"),
        (["--dtype", "float8"], "dtype is one of"),
        (["--dtype", "float32,bfloat16", "--record", "x"], "of one dtype"),
        (["--against", "x", "--layers", "1"], "--layers and --against"),
        (["--against", "x", "--a", "attn=eager"], "--a and --against"),
        (["--against", "x", "--record", "y"], "--record and --against"),
    ],
)
def test_wrong_usage(capsys: Any, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["parity", MODEL, *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "0,99"], "numbered from 0 to 4 here, found 99"),
        (["--layers", "x"], "--layers takes numbers"),
        (["--b", "attn=quick"], "attn_implementation='quick' is not supported"),
        (["--b", "code=other"], "a side runs minivlm or transformers"),
        (["--b", "quantize=int3"], "quantize is one of nf4"),
        (["--reference", "minivlm", "--b", "model=shapes-idefics2"], "no common stages"),
        (["--image", "nowhere.png"], "nowhere.png"),
        (["--a", "quantize=nf4"], "sides that minivlm runs"),
        (["--device", "banana"], "'banana', which is not a device"),
        (["--tokens", "-1"], "found -1"),
        (["--record", "nowhere/ref.safetensors"], "nowhere/ref.safetensors cannot be written"),
        (["--record", "."], ". cannot be written"),
    ],
)
def test_bad_input(capsys: Any, options: list[str], message: str) -> None:
    assert message in fails(capsys, MODEL, *options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(capsys: Any) -> None:
    assert "pass cpu" in fails(capsys, MODEL, "--device", "cuda")


# ---- Reports ---------------------------------------------------------------------------------------------------------


def test_a_picture_of_both_dtypes(recorded: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    reports = {}
    for dtype in ("float32", "bfloat16"):
        side = Side("shapes-llava-next", dtype=dtype, attn="eager")
        reports[dtype] = compare(Side(MODEL, dtype=dtype), side, Question((drawn_image(),)), tokens=0)
    plot(reports, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OSError, match="pip install"):
        plot({}, tmp_path / "out.png")
    monkeypatch.setattr(sides, "load", None)
    assert "pip install" in fails(capsys, "--plot", str(tmp_path / "out.png"))  # before anything has run


@pytest.mark.parametrize("name", ["idefics-9b", "idefics2-8b", "llava-v1.6-mistral-7b-hf"])
def test_a_release_has_its_stages(name: str) -> None:
    """Names are unique, every path exists in our model, and layers are all there."""
    config = next(preset for release, preset in PRESETS.items() if release.endswith(f"/{name}"))
    with torch.device("meta"):
        model = family(config.model_type).model_class(config)
    stages = stages_of(config)
    assert len({stage.name for stage in stages}) == len(stages)
    for stage in stages:
        assert sides.path_of(model, stage) is not None, stage
        assert "minivlm/" in sides.blamed(model, stage)[1]
    layers = getattr(config, "text_config", config).num_hidden_layers
    assert sum(stage.name.startswith("decoder layer") for stage in stages) == layers


def test_the_code_around_a_part_is_named_too() -> None:
    """What is wrong with a projection is, as a rule, what the layer around it hands it."""
    model = LlavaNextForConditionalGeneration.from_pretrained(MODEL, fast_cpu=False)
    stage = next(stage for stage in stages_of(model.config, [1], inside=True) if stage.name.endswith("1, down_proj"))
    for fast, classes in ((False, ["GatedMLP", "DecoderBlock", "Decoder"]), (True, ["FastLinear", "GatedMLP"])):
        if fast:
            model.get_submodule(stage.ours).__class__ = FastLinear
        path, code = sides.blamed(model, stage)
        assert path == "model.language_model.layers.1.mlp.down_proj"
        assert [each.split()[1] for each in code.split(", in ")][: len(classes)] == classes
    assert sides.blamed(model, stages_of(model.config)[-1])[0] == "the model"
