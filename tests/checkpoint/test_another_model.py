"""Trained weights in a model that is not quite theirs: another config, parameters that are new, tensors left over; and
options that scripts pass."""

import dataclasses
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "hostile"))
import breaker

from minivlm import AutoModelForImageTextToText as Auto
from minivlm import AutoProcessor, BitsAndBytesConfig, GenerationConfig
from minivlm import Idefics2ForConditionalGeneration as Model
from minivlm.checkpoint import options
from minivlm.checkpoint.fresh import random_values
from minivlm.checkpoint.hub import CheckpointError

LATENTS = "model.connector.perceiver_resampler.latents"
PROJECTION = "model.connector.modality_projection.gate_proj.weight"
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("good")
    return {name: breaker.write_good(name, home / name) for name in breaker.CONFIGS}


@pytest.fixture
def folder(good: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(good["idefics2"], tmp_path / "copy"))


def more_latents(folder: Path) -> Any:
    """Its config, but for a resampler of 5 latents instead of 2."""
    config = Model.from_pretrained(folder).config
    perceiver = dataclasses.replace(config.perceiver_config, resampler_n_latents=5)
    return dataclasses.replace(config, perceiver_config=perceiver)


@pytest.mark.parametrize("allow", [{"new": LATENTS}, {"new": ["*.latents"]}, {"ignore_mismatched_sizes": True}])
def test_another_config(allow: dict[str, Any], folder: Path) -> None:
    config = more_latents(folder)
    with pytest.raises(CheckpointError, match=r"latents \[2, 16\], expected \[5, 16\]"):
        Model.from_pretrained(folder, config=config)
    with pytest.warns(UserWarning, match=r"1 tensors new, with random values:\n +" + LATENTS) as told:
        model = Auto.from_pretrained(folder, config=config, **allow)
    assert len(told) == 1
    assert model.config is config
    old = Model.from_pretrained(folder).state_dict()
    found = model.state_dict()
    assert found[LATENTS].shape == (5, 16)
    assert 0.5 < found[LATENTS].std() < 1.5
    assert all(torch.equal(value, old[name]) for name, value in found.items() if name != LATENTS)


def test_new_parameters_and_stored_ones_left_over(folder: Path) -> None:
    """A new name for a part: what was stored under the old one is named too."""
    breaker.tensors(lambda parts: parts.update(old_gate=parts.pop(PROJECTION), extra=("F32", [1], bytes(4))))(folder)
    for strict in ({}, {"new": "model.connector.*"}, {"unused": ["old_*", "extra"]}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(CheckpointError, match=r"missing|unexpected"):
            Model.from_pretrained(folder, **strict)
    with pytest.warns(UserWarning, match="new, with random values") as told:
        model = Model.from_pretrained(folder, new="model.connector.*", unused=["old_*", "extra"])
    text = str(told[0].message)
    assert len(told) == 1
    assert PROJECTION in text
    assert "2 tensors in the files and not used" in text
    weight = model.state_dict()[PROJECTION]
    assert 0.01 < weight.std() < 0.03  # as the config's initializer_range has it
    assert not weight.is_meta


def test_without_need_nothing_is_new(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Model.from_pretrained(folder, new="model.connector.*", unused="*")
    old = Model.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())


def test_a_pattern_that_fits_nothing(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"new='model.conector.\*': no parameter"):
        Model.from_pretrained(folder, new="model.conector.*")


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.filterwarnings("ignore:of the weights")
def test_new_parameters_of_quantised_models(stored: bool, folder: Path) -> None:
    """Quantised as it is read; or stored so, where the new layer stays as it is."""
    if stored:
        Model.from_pretrained(folder, quantization_config=NF4).save_pretrained(folder)
        gone = [PROJECTION + end for end in ("", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4")]
        breaker.tensors(lambda parts: [parts.pop(name) for name in gone])(folder)
        model = Model.from_pretrained(folder, new=PROJECTION)
    else:
        breaker.tensors(lambda parts: parts.pop(PROJECTION))(folder)
        model = Model.from_pretrained(folder, new=PROJECTION, quantization_config=NF4)
    layer = model.get_submodule(PROJECTION.removesuffix(".weight"))
    assert type(layer).__name__ == ("FastLinear" if stored else "QuantizedLinear")
    assert layer(torch.ones(1, 16)).isfinite().all()


@pytest.mark.filterwarnings("ignore:of the weights")
def test_new_parameters_take_the_dtype(folder: Path) -> None:
    Model.from_pretrained(folder, dtype="bfloat16").save_pretrained(folder)
    breaker.entry("config.json", "dtype", None)(folder)
    breaker.entry("config.json", "torch_dtype", None)(folder)
    breaker.tensors(lambda parts: parts.pop("lm_head.weight"))(folder)
    assert {p.dtype for p in Model.from_pretrained(folder, new="lm_head*").parameters()} == {torch.bfloat16}


def test_a_config_of_another_class(good: dict[str, Path]) -> None:
    other = Auto.from_pretrained(good["llava_next"]).config
    with pytest.raises(ValueError, match="config should be of type Idefics2Config, found LlavaNextConfig"):
        Model.from_pretrained(good["idefics2"], config=other)


@pytest.mark.parametrize("name", breaker.CONFIGS)
def test_random_values_are_those_of_the_constructor(name: str) -> None:
    """All parameters are made; of some, only those."""
    model_class, config_class = breaker.MODELS[name]

    def build() -> Any:
        return model_class(config_class.from_hub(breaker.CONFIGS[name]))

    torch.manual_seed(3)
    plain = dict(build().named_parameters())
    torch.manual_seed(3)
    drawn = random_values(build, plain)
    assert drawn.keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in drawn.items())
    norm = next(name for name in plain if name.endswith("norm.weight"))
    assert random_values(build, {norm}).keys() == {norm}


def test_a_large_epsilon(folder: Path) -> None:
    breaker.entry("config.json", "text_config.rms_norm_eps", 0.5)(folder)
    assert Model.from_pretrained(folder).config.text_config.rms_norm_eps == 0.5


# ---- Options that scripts pass ---------------------------------------------------------------------------------------


def test_options_that_change_nothing(folder: Path) -> None:
    given = {name: allowed[-1] for name, (allowed, _) in options.LOADING.items()}
    model = Auto.from_pretrained(folder, **given, use_auth_token=None, _attn_implementation="eager", subfolder="")
    assert model.attn_implementation == "eager"


def test_options_that_mean_something(folder: Path, tmp_path: Path) -> None:
    assert Auto.from_pretrained(folder, load_in_4bit=True).quantization_config.bnb_4bit_quant_type == "fp4"
    assert Auto.from_pretrained(folder, load_in_8bit=True).quantization_config.load_in_8bit
    settings = GenerationConfig(max_new_tokens=3)
    assert Auto.from_pretrained(folder, generation_config=settings).generation_config is settings
    shutil.move(folder, tmp_path / "outer" / "inner" / "model")
    assert isinstance(Auto.from_pretrained(tmp_path / "outer", subfolder="inner/model"), Model)
    inner = AutoProcessor.from_pretrained(tmp_path / "outer", subfolder="inner/model", trust_remote_code=True)
    assert inner.image_seq_len == 2


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"use_safetensors": False}, ValueError, "use_safetensors=False .* pickled"),
        ({"variant": "fp16"}, ValueError, "variant='fp16' .* model.safetensors"),
        ({"gguf_file": "a.gguf"}, ValueError, "gguf_file='a.gguf'"),
        ({"from_tf": 1}, ValueError, "from_tf=1"),
        ({"device_mapp": "auto"}, TypeError, "unknown option 'device_mapp'; did you mean 'device_map'"),
        ({"token": "a", "use_auth_token": "b"}, ValueError, "token and use_auth_token"),
        ({"dtype": "float16", "torch_dtype": "float32"}, ValueError, "dtype and torch_dtype"),
        ({"load_in_4bit": True, "load_in_8bit": True}, ValueError, "one of load_in_4bit and load_in_8bit"),
        ({"subfolder": "../other"}, ValueError, "subfolder should be a path inside"),
        ({"subfolder": "none"}, OSError, "has no folder none; found"),
        ({"subfolder": "/etc"}, ValueError, "subfolder should be a path inside"),
    ],
)
def test_options_that_are_refused(
    given: dict[str, Any], error: type[Exception], words: str, good: dict[str, Path]
) -> None:
    with pytest.raises(error, match=words):
        Auto.from_pretrained(good["idefics2"], **given)


# ---- Folders that hold no model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["HuggingFaceM4/idefics2-8b", None, 7])
def test_an_adapter_is_no_model(base: Any, tmp_path: Path) -> None:
    breaker.write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": base})
    with pytest.raises(CheckpointError, match="holds an adapter") as found:
        Auto.from_pretrained(tmp_path)
    assert ("HuggingFaceM4" in str(found.value)) == isinstance(base, str)
