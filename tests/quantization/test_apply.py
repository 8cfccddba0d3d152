"""Which layers are quantised, beside what transformers' bitsandbytes integration converts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import oracle_idefics
import oracle_llava
import pytest
import torch
import transformers
from torch import nn
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from minivlm import AutoModelForImageTextToText, BitsAndBytesConfig, Int4Config
from minivlm.auto import PRESETS, family
from minivlm.checkpoint.names import local_name
from minivlm.checkpoint.saving import kept_modules
from minivlm.quantization import apply
from minivlm.quantization.linear import QuantizedLinear

CONFIGS: dict[str, Callable[[], Any]] = {
    "idefics2": oracle.idefics2_config,
    "llava_next": oracle_llava.llava_config,
    "idefics": oracle_idefics.idefics_config,
}


def ours(config: Any) -> nn.Module:
    model_class = family(config.model_type).model_class
    with torch.device("meta"):
        return model_class(model_class.config_class.from_hub(config.to_dict()))


def converted(config: Any, kept: list[str] | None) -> set[str]:
    """Our names of the layers that transformers' integration converts; kept None: what it keeps by itself."""
    with torch.device("meta"):
        reference = transformers.AutoModelForImageTextToText.from_config(config)
    kept = get_keys_to_not_convert(reference) if kept is None else kept
    reference = replace_with_bnb_linear(reference, kept, transformers.BitsAndBytesConfig(load_in_4bit=True))
    prefixes = family(config.model_type).model_class.hub_prefixes
    names = [name for name, module in reference.named_modules() if type(module).__name__ == "Linear4bit"]
    return {local_name(f"{name}.", prefixes).rstrip(".") for name in names}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_is_what_bitsandbytes_would_convert(name: str) -> None:
    config = CONFIGS[name]()
    model = ours(config)
    assert len(apply.selected(model)) > 20
    assert set(apply.selected(model)) == converted(config, None)


@pytest.mark.parametrize("name", CONFIGS)
def test_skipped_modules_are_spelled_so_that_transformers_skips_them(name: str) -> None:
    config, skip = CONFIGS[name](), ["q_proj", "vision_tower" if name == "llava_next" else "vision_model"]
    model = ours(config)
    asked = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip)
    layers = apply.replace(model, apply.selected(model, skip), asked)
    assert layers.keys() == converted(config, asked.to_hub(kept_modules(model))["llm_int8_skip_modules"])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantised_head_is_asked_for(name: str) -> None:
    config = CONFIGS[name]()
    model = ours(config)
    heads = set(apply.selected(model, head=True)) - set(apply.selected(model))
    assert heads == set(family(config.model_type).kept) & set(apply.kept(model))
    assert "lm_head" not in apply.selected(model, ["lm_head"], head=True)
    asked = BitsAndBytesConfig(load_in_4bit=True, quantize_head=True)
    layers = apply.replace(model, apply.selected(model, head=True), asked)
    theirs = converted(config, asked.to_hub(kept_modules(model))["llm_int8_skip_modules"])
    assert layers.keys() - theirs == ({"lm_head"} if name == "idefics" else set())  # theirs is a class of its own
    assert "quantize_head" not in BitsAndBytesConfig(load_in_4bit=True).to_hub([])
    with pytest.raises(TypeError, match="quantize_head"):
        Int4Config(quantize_head="yes")


def test_a_head_that_is_the_embedding_table_stays() -> None:
    config = oracle.idefics2_config()
    config.tie_word_embeddings = True
    model_class = family("idefics2").model_class
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_hub(config.to_dict()))
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        apply.selected(model, head=True)


@pytest.mark.parametrize("name", ["shapes-idefics2", "shapes-idefics"])
@pytest.mark.parametrize(
    "asked",
    [
        Int4Config(64, quantize_head=True),
        BitsAndBytesConfig(load_in_8bit=True, quantize_head=True),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", quantize_head=True),
    ],
    ids=["int4", "int8", "nf4"],
)
def test_a_quantised_head_is_saved_and_loaded(name: str, asked: Any, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(name, dtype="bfloat16", quantization_config=asked)
    assert isinstance(model.lm_head, QuantizedLinear)
    plain = AutoModelForImageTextToText.from_pretrained(name, dtype="bfloat16")
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    x = torch.randn(1, 3, model.lm_head.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model.head(x)
        assert torch.equal(again.head(x), expected)
        assert not torch.equal(plain.head(x), expected)
    assert again.quantization_config.quantize_head
    with pytest.raises(ValueError, match="quantised already"):
        AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=replace(asked, quantize_head=False))


RELEASED = ("HuggingFaceM4/idefics2-8b", "llava-hf/llava-v1.6-mistral-7b-hf", "HuggingFaceM4/idefics-9b")


@pytest.mark.parametrize("name", RELEASED)
def test_every_linear_layer_is_either_quantised_or_kept_for_a_reason(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(PRESETS[name])
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = linears - set(apply.selected(model))
    assert kept == set(family(model.config.model_type).kept)


def test_skipping() -> None:
    model = ours(oracle.idefics2_config())
    everything = apply.selected(model)
    assert not [name for name in apply.selected(model, ["vision_model"]) if "vision" in name]
    without = set(everything) - set(apply.selected(model, ["text_model.layers.1", "q_proj"]))
    assert all("text_model.layers.1." in name or name.endswith("q_proj") for name in without)
    assert len(without) == 7 + len([name for name in everything if name.endswith("q_proj")]) - 1
    with pytest.raises(ValueError, match="no module to skip is called 'vision'"):
        apply.selected(model, ["vision"])


def test_quantising_a_model_that_holds_its_weights() -> None:
    torch.manual_seed(0)
    config = oracle.idefics2_config()
    model_class = family("idefics2").model_class
    model = model_class(model_class.config_class.from_hub(config.to_dict()))
    weight = model.model.text_model.layers[0].mlp.up_proj.weight.detach().clone()
    apply.quantize(model, Int4Config(64))
    layer = model.model.text_model.layers[0].mlp.up_proj
    assert apply.layers(model).keys() == set(apply.selected(ours(config)))
    assert (layer.dequantize() - weight).abs().max() < 0.01
    assert isinstance(model.lm_head, nn.Linear)
    assert "int4 in groups of 64" in repr(layer)
    for other in (Int4Config(32), BitsAndBytesConfig(load_in_8bit=True)):  # one file says one format
        with pytest.raises(ValueError, match="quantised already, as int4 in groups of 64"):
            apply.quantize(model, other)
    apply.quantize(model, Int4Config(64, quantize_head=True))
    assert isinstance(model.lm_head, QuantizedLinear)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "set one of load_in_4bit and load_in_8bit"),
        ({"load_in_4bit": True, "load_in_8bit": True}, ValueError, "not both"),
        ({"load_in_4bit": 1}, TypeError, "load_in_4bit should be True or False"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, ValueError, '"nf4" or "fp4", found \'nf3\''),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}, ValueError, "bnb_4bit_compute_dtype"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "complex"}, ValueError, "bnb_4bit_quant_storage"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, ValueError, "llm_int8_has_fp16_weight=True"),
        ({"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True}, ValueError, "one device"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": "lm_head"}, TypeError, "list of module names"),
        ({"load_in_3bit": True}, TypeError, "load_in_3bit"),
    ],
)
def test_configs_that_cannot_be_honoured(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BitsAndBytesConfig(**options)


def test_int4_config() -> None:
    assert Int4Config().group_size == 128
    for options in ({"group_size": 100}, {"group_size": None}):
        with pytest.raises(ValueError, match="32, 64, 128"):
            Int4Config(**options)
    with pytest.raises(TypeError, match="list of module names"):
        Int4Config(skip_modules="lm_head")


def test_the_documentation_s_defaults() -> None:
    """The names and defaults of the reference's class, but for compute_dtype, which it turns into a dtype at once."""
    theirs = transformers.BitsAndBytesConfig(load_in_4bit=True).to_dict()
    found = BitsAndBytesConfig(load_in_4bit=True).to_hub([])
    assert found == {name: value for name, value in theirs.items() if not name.startswith("_")}
