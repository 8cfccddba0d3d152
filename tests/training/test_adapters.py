"""Adapters against PEFT: read from its folders, whatever names they use, written for it, and refused when broken."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle_peft as peft_side
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import minivlm
from minivlm.checkpoint.hub import CheckpointError
from minivlm.training import adapters, lora, targets
from minivlm.training.targets import LoraConfig

LOGITS = 2e-4  # of logits of about ±10, in fp32: four times what PEFT's own merging changes
OPTIONS = {
    "regex": {"target_modules": None},  # the family's notebook; see `options`
    "leaf names": {"target_modules": ["q_proj", "v_proj", "o_proj", "fc1", "linear_1", "gate_proj"], "r": 4},
    "all-linear": {"target_modules": "all-linear", "r": 4, "lora_alpha": 16, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
        "alpha_pattern": {"k_proj": 1},
        "layers_to_transform": [1, 2],
    },
    "dora": {"target_modules": ["q_proj", "fc1", "up_proj"], "use_dora": True},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "fc2"]},
    "biases": {"target_modules": ["fc1", "q_proj"], "bias": "all"},
    "biases of targets": {"target_modules": ["fc1", "q_proj"], "bias": "lora_only"},
}


def options(name: str, family: str) -> dict[str, Any]:
    given = dict(OPTIONS[name])
    given["target_modules"] = given["target_modules"] or peft_side.NOTEBOOK[family]
    return given


@torch.no_grad()
def logits(model: Any, family: str) -> torch.Tensor:
    inputs = peft_side.inputs(family)
    return model(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("family", peft_side.FAMILIES)
@pytest.mark.parametrize("name", OPTIONS)
def test_peft_to_ours_and_back(bases: Any, tmp_path: Path, family: str, name: str) -> None:
    reference, folder = bases(family)
    theirs = peft_side.adapted(reference, **options(name, family))
    expected = logits(theirs, family)
    assert (expected - logits(reference, family)).abs().max() > 100 * LOGITS  # the adapter acts

    model = adapters.load(peft_side.ours(reference, folder), peft_side.saved(theirs, tmp_path / "theirs"))
    assert (logits(model, family) - expected).abs().max() <= LOGITS

    adapters.save(model, tmp_path / "ours", base=str(folder))
    written, read = (load_file(tmp_path / side / adapters.WEIGHTS) for side in ("ours", "theirs"))
    assert written.keys() == read.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # between the two libraries
        again = peft.PeftModel.from_pretrained(peft_side.reference(family), tmp_path / "ours").eval()
    assert torch.equal(logits(again, family), expected)


@pytest.mark.parametrize("family", peft_side.FAMILIES)
@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_modules_trained_whole(bases: Any, tmp_path: Path, family: str, whole: list[str]) -> None:
    reference, folder = bases(family)
    theirs = peft_side.adapted(reference, target_modules=["q_proj"], modules_to_save=whole)
    expected = logits(theirs, family)
    model = adapters.load(peft_side.ours(reference, folder), peft_side.saved(theirs, tmp_path / "theirs"))
    assert (logits(model, family) - expected).abs().max() <= LOGITS
    adapters.save(model, tmp_path / "ours")
    assert (
        load_file(tmp_path / "ours" / adapters.WEIGHTS).keys()
        == load_file(tmp_path / "theirs" / adapters.WEIGHTS).keys()
    )


@pytest.mark.parametrize("family", ["idefics2", "llava_next"])  # the reference fails for IDEFICS's table
def test_embeddings_and_head_as_targets(bases: Any, tmp_path: Path, family: str) -> None:
    reference, folder = bases(family)
    theirs = peft_side.adapted(reference, target_modules=["embed_tokens", "lm_head", "q_proj"])
    expected = logits(theirs, family)
    model = adapters.load(peft_side.ours(reference, folder), peft_side.saved(theirs, tmp_path / "theirs"))
    assert (logits(model, family) - expected).abs().max() <= LOGITS
    adapters.save(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        again = peft.PeftModel.from_pretrained(peft_side.reference(family), tmp_path / "ours").eval()
    assert torch.equal(logits(again, family), expected)


# ---- Names of every version of transformers --------------------------------------------------------------------------

OLD = {
    "4.52 to 4.57": {"model.vision_tower.": "model.vision_tower.vision_model."},
    "before 4.52": {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.vision_tower.": "vision_tower.vision_model.",
    },
}


def renamed(name: str, table: dict[str, str]) -> str:
    for new, old in table.items():
        name = name.replace(new, old) if name.startswith((new, adapters.PREFIX + new)) else name
    return name


@pytest.mark.parametrize("version", OLD)
@pytest.mark.parametrize("targets", ["leaf names", "regex over old names", "in full", "whole modules"])
def test_older_names(bases: Any, tmp_path: Path, version: str, targets: str) -> None:
    reference, base = bases("llava_next")
    whole = ["lm_head", "multi_modal_projector"] if targets == "whole modules" else None
    theirs = peft_side.adapted(reference, target_modules="all-linear", modules_to_save=whole)
    expected, folder = logits(theirs, "llava_next"), peft_side.saved(theirs, tmp_path / "theirs")
    tensors = load_file(folder / adapters.WEIGHTS)
    save_file({renamed(name, OLD[version]): value for name, value in tensors.items()}, folder / adapters.WEIGHTS)
    names = [renamed(f"{name}.", OLD[version]).rstrip(".") for name in theirs.targeted_module_names]
    regex = rf".*({'|'.join(sorted({name.split('.')[0] for name in names}))}).*(_proj|fc[12]|linear_[12])"
    change_config(
        folder,
        {"regex over old names": {"target_modules": regex}, "in full": {"target_modules": names}}.get(targets, {}),
    )
    model = adapters.load(peft_side.ours(reference, base), folder)
    assert (logits(model, "llava_next") - expected).abs().max() <= LOGITS


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / adapters.CONFIG
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


# ---- Broken adapters -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(bases: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    reference, _ = bases("idefics2")
    theirs = peft_side.adapted(reference, target_modules=["q_proj", "up_proj"], r=4)
    return peft_side.saved(theirs, tmp_path_factory.mktemp("adapter") / "good")


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / adapters.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / adapters.WEIGHTS)


FIRST = "base_model.model.model.text_model.layers.0.self_attn.q_proj.lora_A.weight"
TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "one missing": (lambda t: t.pop(FIRST), "missing"),
    "a layer missing": (lambda t: [t.pop(n) for n in list(t) if ".layers.0.self_attn." in n], "missing"),
    "one that has no place": (lambda t: t.update({FIRST.replace("q_proj", "z_proj"): t[FIRST].clone()}), "unexpected"),
    "one that is not targeted": (
        lambda t: t.update({FIRST.replace("q_proj", "k_proj"): t[FIRST].clone()}),
        "unexpected",
    ),
    "another rank": (lambda t: t.update({FIRST: torch.ones(5, 64)}), "another shape"),
    "another width": (lambda t: t.update({FIRST: torch.ones(4, 65)}), "another shape"),
    "NaN": (lambda t: t[FIRST].view(-1)[3].fill_(float("nan")), "NaN"),
    "infinity": (lambda t: t[FIRST].view(-1)[3].fill_(float("inf")), "infinity"),
    "whole numbers": (lambda t: t.update({FIRST: torch.ones(4, 64, dtype=torch.int64)}), "floating"),
}
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "LORA"),
    "no method": ({"peft_type": ...}, "LORA"),
    "no targets": ({"target_modules": ...}, "target_modules"),
    "targets of a wrong type": ({"target_modules": [1, 2]}, "target_modules"),
    "more targets than tensors": ({"target_modules": ["q_proj", "up_proj", "down_proj"]}, "missing"),
    "another rank": ({"r": 8}, "another shape"),
    "no whole rank": ({"r": 2.5}, "rank"),
    "rank zero": ({"r": 0}, "rank"),
    "an alpha beyond all": ({"lora_alpha": 10**400}, "lora_alpha"),
    "an alpha beyond fp32": ({"alpha_pattern": {"q_proj": 1e39}}, "lora_alpha"),
    "another base's weights": ({"init_lora_weights": "pissa"}, "base"),
    "token rows": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "bias of B": ({"lora_bias": True}, "lora_bias"),
    "a broken expression": ({"target_modules": "((q_proj"}, "regular expression"),
    "dora without magnitudes": ({"use_dora": True}, "missing"),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_broken_tensors(bases: Any, good: Path, tmp_path: Path, fault: str) -> None:
    change, message = TENSORS[fault]
    folder = shutil.copytree(good, tmp_path / "adapter")
    change_tensors(folder, change)
    refused(bases, folder, message)


@pytest.mark.parametrize("fault", CONFIGS)
def test_broken_configurations(bases: Any, good: Path, tmp_path: Path, fault: str) -> None:
    changes, message = CONFIGS[fault]
    folder = shutil.copytree(good, tmp_path / "adapter")
    change_config(folder, changes)
    refused(bases, folder, message)


def refused(bases: Any, folder: Path, message: str) -> None:
    """One error, and the model is as it was."""
    reference, base = bases("idefics2")
    model = peft_side.ours(reference, base)
    before = logits(model, "idefics2")
    with pytest.raises(CheckpointError, match=message):
        adapters.load(model, folder)
    assert torch.equal(logits(model, "idefics2"), before)


def test_broken_files(bases: Any, good: Path, tmp_path: Path) -> None:
    def broken(name: str, content: bytes | None) -> Path:
        folder = shutil.copytree(good, tmp_path / f"{len(list(tmp_path.iterdir()))}")
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        return folder

    weights, config = (good / adapters.WEIGHTS).read_bytes(), (good / adapters.CONFIG).read_bytes()
    refused(bases, broken(adapters.WEIGHTS, weights[:-100]), "complete")
    refused(bases, broken(adapters.WEIGHTS, weights[:7]), "complete")
    refused(bases, broken(adapters.WEIGHTS, b""), "empty")
    refused(bases, broken(adapters.WEIGHTS, b"version https://git-lfs.github.com/spec/v1"), "LFS")
    refused(bases, broken(adapters.WEIGHTS, None), "copy the whole folder")
    refused(bases, broken(adapters.CONFIG, config[:50]), "JSON")
    refused(bases, broken(adapters.CONFIG, None), adapters.CONFIG)
    pickled = broken(adapters.WEIGHTS, None)
    (pickled / adapters.PICKLE).write_bytes(b"PK")
    refused(bases, pickled, "pickle")


def test_a_foreign_expression_cannot_hang(bases: Any, good: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("minivlm.training.targets.SECONDS", 1)
    folder = shutil.copytree(good, tmp_path / "adapter")
    change_config(folder, {"target_modules": r"([a-z_.0-9]+)+!"})
    refused(bases, folder, "1 s")


def test_unknown_fields_are_a_warning(bases: Any, good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "adapter")
    change_config(folder, {"something_new": 3, "something_off": False})
    with pytest.warns(UserWarning, match="something_new"):
        adapters.read(folder)


def test_sixteen_bits_and_a_missing_alpha(bases: Any, good: Path, tmp_path: Path) -> None:
    """Files of bf16 load into fp32 matrices; without lora_alpha it is 8."""
    reference, base = bases("idefics2")
    folder = shutil.copytree(good, tmp_path / "adapter")
    change_config(folder, {"lora_alpha": ...})
    tensors = {name: value.bfloat16() for name, value in load_file(folder / adapters.WEIGHTS).items()}
    save_file(tensors, folder / adapters.WEIGHTS)
    model = adapters.load(peft_side.ours(reference, base), folder)
    theirs = peft.PeftModel.from_pretrained(peft_side.reference("idefics2"), folder).eval()
    assert (logits(model, "idefics2") - logits(theirs, "idefics2")).abs().max() <= LOGITS
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}


def test_a_second_adapter_is_refused(bases: Any, good: Path) -> None:
    model = adapters.load(peft_side.ours(*bases("idefics2")), good)
    with pytest.raises(ValueError, match="already"):
        adapters.load(model, good)


@pytest.mark.parametrize("family", peft_side.FAMILIES)
@pytest.mark.parametrize("preset", ["text", "text+connector", "all"])
def test_presets_mean_the_same_to_peft(bases: Any, tmp_path: Path, family: str, preset: str) -> None:
    model = peft_side.ours(*bases(family))
    names = lora.apply(model, LoraConfig(target_modules=preset, r=2))
    parts = targets.trained(model)
    assert set(parts) == set(
        {"text": ["text"], "text+connector": ["text", "connector"]}.get(preset, ["text", "connector", "vision"])
    )
    adapters.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(peft_side.reference(family), tmp_path)
    assert len(theirs.base_model.targeted_module_names) == len(names)
    assert sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n) == sum(parts.values())


def test_targets_that_match_nothing_or_too_much(bases: Any) -> None:
    model = peft_side.ours(*bases("idefics2"))
    with pytest.raises(ValueError, match="matches no layer"):
        lora.apply(model, LoraConfig(target_modules=["qproj"]))
    with pytest.raises(ValueError, match="RMSNorm"):
        lora.apply(model, LoraConfig(target_modules=r".*input_layernorm"))
    with pytest.raises(ValueError, match="modules_to_save"):
        lora.apply(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_haed"]))
    for end in ("", "_proj"):  # PEFT compares ends of names
        with pytest.raises(ValueError, match=r"means .*q_proj too, which is a target"):
            lora.apply(model, LoraConfig(target_modules=["q_proj"], modules_to_save=[end]))


# ---- Loading -------------------------------------------------------------------------------------------------------


def test_from_pretrained_with_an_adapter(bases: Any, good: Path, tmp_path: Path) -> None:
    """Beside the base, or the adapter's folder alone; saved again it is the same adapter, and the base is named."""
    reference, base = bases("idefics2")
    plain = adapters.load(peft_side.ours(reference, base), good)
    expected = logits(plain, "idefics2")
    beside = type(plain).from_pretrained(base, adapter=good)
    assert torch.equal(logits(beside, "idefics2"), expected)
    assert not any(parameter.requires_grad for parameter in beside.parameters())

    beside.save_adapter(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / adapters.CONFIG).read_text())["base_model_name_or_path"] == str(base)
    alone = minivlm.AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(alone, "idefics2"), expected)
    assert alone.name_or_path == str(base)
    with pytest.raises(ValueError, match="save_adapter"):
        alone.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_an_adapter_that_does_not_fit_is_refused_before_weights_are_read(
    bases: Any, good: Path, tmp_path: Path
) -> None:
    _, base = bases("idefics2")
    folder = shutil.copytree(good, tmp_path / "adapter")
    change_tensors(folder, TENSORS["another width"][0])
    empty = shutil.copytree(base, tmp_path / "base")
    (empty / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="another shape"):
        minivlm.AutoModelForImageTextToText.from_pretrained(empty, adapter=folder)


@pytest.mark.parametrize("name", [None, "/no/such/folder"])
def test_an_adapter_without_its_base(good: Path, tmp_path: Path, name: str | None) -> None:
    folder = shutil.copytree(good, tmp_path / "adapter")
    change_config(folder, {"base_model_name_or_path": name})
    with pytest.raises(CheckpointError, match="adapter="):
        minivlm.AutoModelForImageTextToText.from_pretrained(folder)


def test_an_adapter_on_an_adapter(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "adapter")
    change_config(folder, {"base_model_name_or_path": str(folder)})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        minivlm.AutoModelForImageTextToText.from_pretrained(folder)
