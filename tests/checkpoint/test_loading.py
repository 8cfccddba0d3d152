"""From folder to model and back: exact round trips, memory-mapped tensors. Broken folders: `hostile/`."""

import json
import shutil
from pathlib import Path
from typing import Any

import oracle
import oracle_idefics
import oracle_llava
import pytest
import torch
import transformers
from safetensors.torch import load_file

from minivlm import AutoModelForImageTextToText, Idefics2Config, Idefics2ForConditionalGeneration
from minivlm.auto import family
from minivlm.checkpoint.loading import wanted_device, wanted_dtype
from minivlm.checkpoint.names import WEIGHTS

Model = Idefics2ForConditionalGeneration


@pytest.fixture(scope="module")
def reference() -> Any:
    return oracle.random_reference(oracle.idefics2_config())


@pytest.fixture(scope="module")
def saved(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers 5 wrote."""
    return oracle.save(reference, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def same_weights(model: Any, reference: Any, dtype: torch.dtype = torch.float32) -> bool:
    theirs = reference.state_dict()
    return all(torch.equal(value, theirs[name].to(dtype)) for name, value in model.state_dict().items())


def test_single_and_sharded_files(reference: Any, saved: Path, tmp_path: Path) -> None:
    sharded = oracle.save(reference, tmp_path, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    for folder in (saved, sharded, str(saved)):
        model = AutoModelForImageTextToText.from_pretrained(folder)
        assert isinstance(model, Model)
        assert not model.training
        assert same_weights(model, reference)


@torch.no_grad()
@pytest.mark.parametrize("size", ["5GB", "100KB", 150_000])
def test_what_we_save_transformers_loads(saved: Path, tmp_path: Path, size: str | int) -> None:
    ours = Model.from_pretrained(saved, attn_implementation="sdpa")
    ours.save_pretrained(tmp_path, max_shard_size=size)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="sdpa")
    again = Model.from_pretrained(tmp_path, attn_implementation="sdpa")
    original = transformers.AutoModelForImageTextToText.from_pretrained(saved, attn_implementation="sdpa")
    inputs = oracle.random_inputs((1,), 4)
    assert torch.equal(theirs(**inputs).logits, original(**inputs).logits)
    assert torch.equal(again(**inputs).logits, ours(**inputs).logits)
    assert again.config.text_config == ours.config.text_config


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "config",
    [
        oracle.idefics2_config(),
        oracle_llava.llava_config(),
        oracle_idefics.idefics_config(),
    ],
    ids=lambda config: config.model_type,
)
def test_rope_scaling_survives_saving(config: Any, tmp_path: Path) -> None:
    """A null that we write is no default there: `truncate: null` once moved yarn's frequencies in transformers."""
    values = config.to_dict()
    values.get("text_config", values)["rope_parameters"] = YARN
    ours = AutoModelForImageTextToText.from_config(family(config.model_type).model_class.config_class.from_hub(values))
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert getattr(theirs, "text_config", theirs).rope_parameters == YARN


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, "bfloat16", "torch.float16", "auto", None]
)
def test_dtypes(reference: Any, saved: Path, dtype: Any) -> None:
    expected = {"bfloat16": torch.bfloat16, "torch.float16": torch.float16, "auto": torch.float32, None: torch.float32}
    model = Model.from_pretrained(saved, torch_dtype=dtype)
    assert model.dtype == expected.get(dtype, dtype)
    assert same_weights(model, reference, model.dtype)


def test_stored_dtype_is_kept(reference: Any, tmp_path: Path) -> None:
    """Without dtype=, config.json decides (as the reference); where it is silent, each tensor keeps its own."""
    Model.from_pretrained(oracle.save(reference, tmp_path / "a")).to(torch.bfloat16).save_pretrained(tmp_path / "b")
    assert Model.from_pretrained(tmp_path / "b").dtype == torch.bfloat16
    config = json.loads((tmp_path / "b/config.json").read_text())
    (tmp_path / "b/config.json").write_text(json.dumps({**config, "dtype": None, "torch_dtype": None}))
    assert Model.from_pretrained(tmp_path / "b").dtype == torch.bfloat16
    (tmp_path / "b/config.json").write_text(json.dumps({**config, "dtype": "float32", "torch_dtype": "float32"}))
    assert Model.from_pretrained(tmp_path / "b").dtype == torch.float32


def test_tensors_of_the_right_dtype_stay_mapped(tmp_path: Path) -> None:
    """Every tensor's memory lies inside a mapping of the file; a cast copies."""
    Model(Idefics2Config.from_hub(oracle.idefics2_config().to_dict())).save_pretrained(tmp_path)
    mapped = Model.from_pretrained(tmp_path)
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc to see what is mapped")
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(tmp_path) in line:
            start, end = line.split()[0].split("-")
            ranges.append((int(start, 16), int(end, 16)))
    for name, value in mapped.named_parameters():
        assert any(start <= value.data_ptr() < end for start, end in ranges), name
    cast = Model.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not any(start <= cast.lm_head.weight.data_ptr() < end for start, end in ranges)


def test_mapped_weights_can_be_trained_and_saved_onto_themselves(folder: Path) -> None:
    """Writing to a mapped tensor changes memory, never the file; saving replaces the file in one step."""
    model = Model.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight += 1
    changed = model.lm_head.weight.clone()
    assert not torch.equal(load_file(folder / WEIGHTS)["lm_head.weight"], changed)
    model.save_pretrained(folder)
    assert torch.equal(load_file(folder / WEIGHTS)["lm_head.weight"], changed)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert not (folder / WEIGHTS).exists()  # or transformers would prefer it to the new shards
    assert torch.equal(Model.from_pretrained(folder).lm_head.weight, changed)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_random_weights_from_a_config() -> None:
    config = Idefics2Config.from_hub(oracle.idefics2_config().to_dict())
    model = AutoModelForImageTextToText.from_config(config)
    assert abs(model.lm_head.weight.std() - 0.02) < 0.002
    assert not model.model.vision_model.encoder.layers[0].mlp.fc1.bias.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "dtype 'int3' is not supported"),
        ({"dtype": torch.int8}, "not supported"),
        ({"device_map": {"": "cpu", "model.text_model.layers.1": "cuda:99"}}, "cuda:99, and torch finds"),
        ({"device_map": {"model.vision_model": "cpu"}}, "does not say where"),
        ({"device_map": "disk"}, "not a device"),
        ({"device_map": "auto", "max_memory": {"cpu": "much"}}, "20GiB"),
        ({"attn_implementation": "paged"}, "known: eager"),
        ({"quantization_config": object()}, "quantization_config"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, saved: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Model.from_pretrained(saved, **options)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (3, TypeError, "string or path"),
        ("", OSError, "no such folder"),
        ("/no/such/folder", OSError, "no such folder"),
        ("./here", OSError, "no such folder"),
        ("not-cached/model", OSError, "not in the local cache"),
        ("bad id!", OSError, "neither a folder"),
    ],
)
def test_bad_names(name: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AutoModelForImageTextToText.from_pretrained(name)


def test_file_instead_of_folder(saved: Path) -> None:
    with pytest.raises(OSError, match="is a file; pass the folder"):
        Model.from_pretrained(saved / WEIGHTS)


def test_settings_are_read_as_the_reference_reads_them() -> None:
    assert wanted_dtype(None, "bfloat16") == torch.bfloat16
    assert wanted_dtype("auto", None) is None
    assert wanted_dtype(torch.float16, "bfloat16") == torch.float16
    assert wanted_device(None) == wanted_device({"": "cpu"}) == torch.device("cpu")
    assert wanted_device("cuda:1") == torch.device("cuda:1")
