"""Configs as scripts handle them: made without arguments or from dicts, written, read, set; as the reference's."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from minivlm import Idefics2Config, IdeficsConfig, LlavaNextConfig

PAIRS = [
    (Idefics2Config, transformers.Idefics2Config),
    (LlavaNextConfig, transformers.LlavaNextConfig),
    (IdeficsConfig, transformers.IdeficsConfig),
]
PARTS: dict[Any, dict[str, Any]] = {
    Idefics2Config: {
        "text_config": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32003},
        "vision_config": {"num_hidden_layers": 3},
        "perceiver_config": {"resampler_n_latents": 7},
    },
    LlavaNextConfig: {
        "text_config": {"model_type": "qwen2", "hidden_size": 64, "vocab_size": 40000},
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 448},
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": [[448, 896]],
    },
    IdeficsConfig: {"vision_config": {"image_size": 112}, "perceiver_config": {"resampler_n_latents": 7}},
}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda side: f"{side.__module__.split('.')[0]}")
@pytest.mark.parametrize("given", [False, True], ids=["defaults", "parts"])
def test_values(ours: Any, theirs: Any, given: bool, tmp_path: Path) -> None:
    """Ours is what the reference's file says; ours written and read by the reference is the reference's."""
    values = PARTS[ours] if given else {}
    config, reference = ours(**values), theirs(**values)
    if not given and ours is not IdeficsConfig:
        reference.text_config.vocab_size = config.text_config.vocab_size  # there without its image
    assert config == ours.from_dict(reference.to_dict())
    config.save_pretrained(tmp_path)
    assert ours.from_pretrained(tmp_path) == config
    assert ours.from_dict(json.loads(config.to_json_string())) == config
    again, expected = theirs.from_pretrained(tmp_path).to_dict(), reference.to_dict()
    kept = ours.from_dict(again)
    assert kept == config
    for part in ("text_config", "vision_config", "perceiver_config"):
        for name, value in expected.get(part, {}).items():
            if name in config.to_dict().get(part, {}) and name not in ("rope_scaling", "vision_use_head"):
                assert again[part][name] == value, f"{part}.{name}"


@pytest.mark.parametrize("ours", [pair[0] for pair in PAIRS])
def test_what_can_be_set(ours: Any) -> None:
    config = ours()
    config.use_cache = False
    config.pad_token_id = 5
    config.update({"output_attentions": False, "eos_token_id": 3})
    assert (config.use_cache, config.pad_token_id, config.eos_token_id) == (False, 5, 3)
    text = config.get_text_config()
    assert text is getattr(config, "text_config", config)
    assert text.hidden_size == 4096
    assert config.torch_dtype == config.dtype
    for change in ({"tie_word_embeddings": True}, {"vision_config": ours().vision_config.__class__(image_size=56)}):
        with pytest.raises(AttributeError, match="built into the model"):
            config.update(change)
    with pytest.raises(AttributeError, match="built into the model"):
        text.hidden_size = 1
