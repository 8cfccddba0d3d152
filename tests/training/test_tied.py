"""Adapters of models whose head is their embedding table: as in PEFT, one can be trained without the other."""

from pathlib import Path
from typing import Any

import oracle
import oracle_idefics
import oracle_llava
import oracle_peft as peft_side
import pytest
import torch
from safetensors.torch import load_file

from minivlm.training import adapters, lora
from minivlm.training.loss import token_loss
from minivlm.training.targets import LoraConfig

WAYS: dict[str, dict[str, Any]] = {
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "low-rank head": {"target_modules": ["q_proj", "lm_head"]},
    "low-rank table": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.fixture(scope="module", params=peft_side.FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, str]:
    """A reference with one table for both, a folder with its weights, and its family."""
    made = {
        "idefics2": lambda: (oracle.idefics2_config(), oracle.random_reference),
        "llava_next": lambda: (oracle_llava.llava_config(), oracle_llava.random_llava),
        "idefics": lambda: (oracle_idefics.idefics_config(added=0), oracle_idefics.random_reference),
    }
    config, make = made[request.param]()
    config.tie_word_embeddings = True
    reference, folder = make(config, 0), tmp_path_factory.mktemp(request.param)
    assert reference.get_output_embeddings().weight is reference.get_input_embeddings().weight
    peft_side.ours(reference, folder)
    return reference, folder, request.param


@torch.no_grad()
def logits(model: Any, family: str) -> torch.Tensor:
    inputs = peft_side.inputs(family)
    return model(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("way", WAYS)
def test_as_in_peft_and_merged(base: Any, tmp_path: Path, way: str) -> None:
    """Loaded, saved, and merged into a checkpoint that writes head and table apart."""
    reference, folder, family = base
    theirs = peft_side.adapted(reference, **WAYS[way])
    expected = logits(theirs, family)
    saved = peft_side.saved(theirs, tmp_path / "theirs")
    model = adapters.load(peft_side.ours(reference, folder), saved)
    assert (logits(model, family) - expected).abs().max() <= 2e-4
    adapters.save(model, tmp_path / "ours")
    found, wanted = (load_file(tmp_path / side / adapters.WEIGHTS) for side in ("ours", "theirs"))
    assert found.keys() == {name for name in wanted if "base_layer" not in name}
    lora.merge(model).save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged")
    assert (logits(again, family) - expected).abs().max() <= 2e-4
    assert not again.config.tie_word_embeddings
    assert (logits(type(model).from_pretrained(folder), family) - expected).abs().max() > 1e-2  # it did change


@pytest.mark.parametrize("way", WAYS)
def test_what_is_trained(base: Any, way: str) -> None:
    """Each has a gradient of its own, and the other stays as it was."""
    reference, folder, family = base
    model = peft_side.ours(reference, folder)
    lora.apply(model, LoraConfig(**{name: tuple(value) for name, value in WAYS[way].items()}))
    inputs = peft_side.inputs(family)
    token_loss(model, inputs | {"labels": oracle.labels(inputs)})[0].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(name.startswith("lm_head") for name in trained) == ("head" in way or "both" in way)
    assert any("embed_tokens" in name for name in trained) == ("table" in way or "both" in way)
    for name, parameter in model.named_parameters():
        if "vision_tower.encoder.layers.3." not in name:  # LLaVA-NeXT stops before its tower's last layer
            assert (parameter.grad is not None) == (name in trained), name
