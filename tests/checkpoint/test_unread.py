"""Entries of config.json that no config reads: they pass, are refused, or are told and kept."""

import dataclasses
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import oracle
import oracle_idefics
import oracle_llava
import pytest
from committed import HUB, LLAVA

sys.path.insert(0, str(Path(__file__).parents[1] / "hostile"))
import breaker

from minivlm import AutoModelForImageTextToText as Auto
from minivlm.auto import family
from minivlm.checkpoint import hub, loading, unread
from minivlm.checkpoint.hub import BUILT_IN, CheckpointError
from minivlm.modules.rope_scaling import RopeScaling

REAL = sorted([*HUB.glob("*/config.json"), *LLAVA.glob("*/config.json"), *BUILT_IN.glob("*/config.json")])
THEIRS = [oracle.idefics2_config(), oracle_llava.llava_config(), oracle_idefics.idefics_config()]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("good")
    return {name: breaker.write_good(name, home / name) for name in breaker.CONFIGS}


def read(folder: Path) -> Any:
    files = hub.source(folder)
    return loading.read_config(files, family(files.json("config.json")["model_type"]).model_class.config_class)


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.parent.name)
def test_released_configs_say_nothing_unread(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(path.parent).unread == {}


@pytest.mark.parametrize("config", THEIRS, ids=lambda config: config.model_type)
@pytest.mark.parametrize("whole", [False, True])
def test_configs_of_the_reference_say_nothing_unread(config: Any, whole: bool, tmp_path: Path) -> None:
    """As it saves them, and with everything that they hold."""
    config.save_pretrained(tmp_path)
    if whole:
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path).unread == {}


def test_all_rope_entries_are_known() -> None:
    fields = {item.name for item in dataclasses.fields(RopeScaling)}
    assert fields <= set(unread.ROPE.split())


REFUSED = [
    ("idefics2", "text_config.attn_logit_softcapping", 50.0, "attn_logit_softcapping is 50.0"),
    ("idefics2", "text_config.query_pre_attn_scalar", 224, "query_pre_attn_scalar"),
    ("idefics2", "text_config.sliding_window_pattern", 6, "sliding_window_pattern"),
    ("idefics2", "text_config.layer_types", ["full_attention", "sliding_attention"], "layer_types"),
    ("idefics2", "text_config.num_local_experts", 8, "num_local_experts"),
    ("idefics2", "text_config.rope_local_base_freq", 1e4, "rope_local_base_freq"),
    ("idefics2", "text_config.rope_scaling", {"type": "linear", "factor": 2, "mrope_section": [1]}, "mrope_section"),
    ("idefics2", "text_config.rope_parameters", {"rope_type": "default", "spin": 2}, "rope_parameters.spin"),
    ("idefics2", "perceiver_config.resampler_n_latent", 3, "did you mean resampler_n_latents"),
    ("idefics2", "perceiver_config.qk_layer_norms", True, "perceiver_config.qk_layer_norms"),
    ("idefics2", "resampler_n_latents", 3, "resampler_n_latents is 3, but .* the model uses 2"),
    ("idefics2", "resampler_n_latent", 3, "did you mean resampler_n_latents"),
    ("idefics2", "vision_config.num_hidden_layer", 3, "did you mean num_hidden_layers"),
    ("llava_next", "text_config.final_logit_softcapping", 30.0, "final_logit_softcapping"),
    ("llava_next", "text_config.embedding_multiplier", 12.0, "embedding_multiplier"),
    ("llava_next", "hidden_size", 17, "hidden_size is 17"),
    ("idefics", "attn_logit_softcapping", 50.0, "attn_logit_softcapping"),
    ("idefics", "num_key_value_heads", 1, "num_key_value_heads is 1, but .* the model uses 2"),
    ("idefics", "sliding_window", 16, "sliding_window"),
    ("idefics", "attention_bias", True, "attention_bias"),
    ("idefics", "rms_norm_epsilon", 1e-5, "did you mean rms_norm_eps"),
]


@pytest.mark.parametrize(("name", "where", "value", "words"), REFUSED, ids=lambda item: str(item)[:40])
def test_another_network_is_refused(
    name: str, where: str, value: Any, words: str, good: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(good[name], tmp_path / "copy")
    breaker.entry("config.json", where, value)(folder)
    with pytest.raises(CheckpointError, match=words):
        Auto.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "where", "value"),
    [
        ("idefics2", "text_config.attn_logit_softcapping", None),
        ("idefics2", "text_config.final_logit_softcapping", 0),
        ("idefics2", "hidden_size", 16),  # as DeepSpeed wants it
        ("idefics2", "text_config.attention_dropout", 0.1),
        ("idefics2", "vision_config.num_labels", 3),
        ("idefics", "num_key_value_heads", 2),
        ("idefics", "head_dim", 8),
        ("idefics", "sliding_window", None),
        ("idefics", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("llava_next", "ignore_index", -100),
        ("llava_next", "text_config.layer_types", ["full_attention", "full_attention"]),
        ("llava_next", "text_config.max_length", 4096),
    ],
)
def test_what_changes_nothing_passes(name: str, where: str, value: Any, good: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(good[name], tmp_path / "copy")
    breaker.entry("config.json", where, value)(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(folder).unread == {}


@pytest.mark.parametrize("name", breaker.CONFIGS)
def test_anything_else_is_told_and_kept(name: str, good: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(good[name], tmp_path / "copy")
    breaker.entry("config.json", "favourite_colour", "blue")(folder)
    breaker.entry("config.json", "vision_config.trained_on", {"name": "cats", "year": 2020})(folder)
    with pytest.warns(UserWarning, match=r"favourite_colour='blue', vision_config.trained_on.name='cats'") as told:
        model = Auto.from_pretrained(folder)
    assert len(told) == 1
    model.save_pretrained(tmp_path / "again")
    values = json.loads((tmp_path / "again" / "config.json").read_text())
    assert values["favourite_colour"] == "blue"
    assert values["vision_config"]["trained_on"] == {"name": "cats", "year": 2020}
    assert values["vision_config"]["patch_size"] == 14


# ---- Ids, formats and tensors that nobody asked for ------------------------------------------------------------------


@pytest.mark.parametrize("value", [500, [2, 500]])
def test_ids_beyond_the_vocabulary_are_told(value: Any, good: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(good["idefics"], tmp_path / "copy")
    breaker.entry("generation_config.json", "eos_token_id", value)(folder)
    with pytest.warns(UserWarning, match="eos_token_id 500, but the vocabulary has 102 tokens"):
        Auto.from_pretrained(folder)


def test_another_framework_is_told(good: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(good["idefics2"], tmp_path / "copy")
    breaker.header(lambda values: values.update(__metadata__={"format": "mlx"}))(folder)
    with pytest.warns(UserWarning, match="written for 'mlx'"):
        Auto.from_pretrained(folder)


def test_tensors_that_the_index_leaves_out_are_told(good: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(good["idefics2"], tmp_path / "copy")
    breaker.sharded(lambda weight_map, _: weight_map.pop("lm_head.weight"))(folder)
    with pytest.warns(UserWarning, match="does not list 1 of the tensors in its files: lm_head.weight"):
        Auto.from_pretrained(folder)
