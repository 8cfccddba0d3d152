"""PEFT on our models, unmodified: the losses of the reference under the same adapter, saving, loading, merging."""

import copy
import warnings
from pathlib import Path
from typing import Any

import oracle
import oracle_peft
import peft
import pytest
import torch
from torch import Tensor, nn

from minivlm import Int4Config
from minivlm.quantization import apply
from minivlm.quantization.linear import QuantizedLinear
from minivlm.training import adapters, lora

FAMILIES = oracle_peft.FAMILIES
TARGETS = ["q_proj", "v_proj", "down_proj", "fc1"]  # of the decoder and of the tower
CLOSE = {"rtol": 1e-4, "atol": 2e-4}  # of logits of about ±10, in fp32


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """PEFT warns of much; of keys that have no place it must not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Found missing adapter keys")
        yield


def config(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options))


def losses(model: Any, family: str) -> list[float]:
    """Of three steps of AdamW."""
    inputs, found = oracle_peft.inputs(family), []
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = model(**inputs, labels=oracle.labels(inputs)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@torch.no_grad()
def logits(model: Any, family: str) -> Tensor:
    inputs = oracle_peft.inputs(family)
    return model.eval()(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Family → (reference, folder with its weights)."""
    made = {}
    for family in FAMILIES:
        made[family] = oracle_peft.reference(family), tmp_path_factory.mktemp(family)
        oracle_peft.ours(*made[family])
    return made


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("family", FAMILIES)
def test_train_save_load_merge(folders: Any, family: str, task_type: str | None, tmp_path: Path) -> None:
    """From an adapter of transformers' model, to the losses of that model; then through PEFT's files and into the
    weights, which both sides load."""
    reference, folder = folders[family]
    theirs = peft.get_peft_model(copy.deepcopy(reference), config(task_type=task_type, init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "start")
    model = oracle_peft.ours(reference, folder)
    ours = peft.PeftModel.from_pretrained(model, tmp_path / "start", is_trainable=True)
    torch.testing.assert_close(logits(ours, family), logits(theirs, family), **CLOSE)
    assert losses(ours, family) == pytest.approx(losses(theirs, family), rel=1e-3)

    ours.save_pretrained(tmp_path / "adapter")
    expected = logits(ours, family)
    again = peft.PeftModel.from_pretrained(oracle_peft.ours(reference, folder), tmp_path / "adapter")
    assert torch.equal(logits(again, family), expected)
    own = adapters.load(oracle_peft.ours(reference, folder), tmp_path / "adapter")  # without PEFT
    torch.testing.assert_close(logits(own, family), expected, **CLOSE)

    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged, family), expected, **CLOSE)
    merged.save_pretrained(tmp_path / "merged")
    for side in (type(model), type(reference)):
        torch.testing.assert_close(logits(side.from_pretrained(tmp_path / "merged"), family), expected, **CLOSE)


@pytest.mark.parametrize("family", ["idefics2", "llava_next"])
def test_transformers_reads_adapters_that_peft_saved_of_ours(folders: Any, family: str, tmp_path: Path) -> None:
    """IDEFICS' decoder has other names there; `save_adapter` writes those, see the next test."""
    reference, folder = folders[family]
    ours = peft.get_peft_model(oracle_peft.ours(reference, folder), config(init_lora_weights=False))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path)
    torch.testing.assert_close(logits(ours, family), logits(theirs, family), **CLOSE)


def test_names_of_idefics(folders: Any, tmp_path: Path) -> None:
    reference, folder = folders["idefics"]
    ours = peft.get_peft_model(oracle_peft.ours(reference, folder), config(init_lora_weights=False))
    ours.save_pretrained(tmp_path / "peft")
    own = adapters.load(oracle_peft.ours(reference, folder), tmp_path / "peft")
    own.save_adapter(tmp_path / "own")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "own")
    torch.testing.assert_close(logits(ours, "idefics"), logits(theirs, "idefics"), **CLOSE)


def test_what_cannot_be_done_with_layers_inside_of_peft(folders: Any, tmp_path: Path) -> None:
    """Each did nothing, or wrote a checkpoint that nothing loads."""
    for options in ({}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}):
        wrapped = peft.get_peft_model(oracle_peft.ours(*folders["idefics2"]), config(**options))
        with pytest.raises(ValueError, match="an adapter is around a layer"):
            wrapped.base_model.model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="nothing to merge"):
            lora.merge(wrapped)
        with pytest.raises(ValueError, match="no layer is to be quantised"):
            apply.quantize(wrapped, Int4Config())
    assert not list(tmp_path.iterdir())
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, "idefics2"), logits(merged, "idefics2"), rtol=0, atol=0)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generating_with_an_adapter(folders: Any, family: str, task_type: str | None) -> None:
    """The ids of the base, where B is zero; others where the adapter acts."""
    reference, folder = folders[family]
    base, inputs = oracle_peft.ours(reference, folder), oracle_peft.inputs(family)
    expected = base.generate(**inputs, max_new_tokens=8)
    ours = peft.get_peft_model(base, config(task_type=task_type)).eval()
    assert torch.equal(ours.generate(**inputs, max_new_tokens=8), expected)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert not torch.equal(ours.generate(**inputs, max_new_tokens=8), expected)
    with ours.disable_adapter():
        assert torch.equal(ours.generate(**inputs, max_new_tokens=8), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_under_an_adapter(folders: Any, family: str) -> None:
    """`prepare_model_for_kbit_training` freezes, checkpoints and makes the embeddings' output require gradients."""
    reference, folder = folders[family]
    found = []
    for prepared in (False, True):
        model = oracle_peft.ours(reference, folder, load_in_4bit=True)
        assert model.is_loaded_in_4bit
        assert not model.is_loaded_in_8bit
        if prepared:
            model = peft.prepare_model_for_kbit_training(model)
            assert model.is_gradient_checkpointing
        torch.manual_seed(0)
        found.append(losses(peft.get_peft_model(model, config()), family))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def linear_names(model: nn.Module) -> list[str]:
    """As scripts for QLoRA write it."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found.add(name.split(".")[-1])
    return sorted(found - {"lm_head"})


@pytest.mark.parametrize("targets", ["names", "all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_four_bits(folders: Any, family: str, targets: str, tmp_path: Path) -> None:
    """Every quantised layer takes an adapter; the losses are those of our own LoRA on the same base."""
    reference, folder = folders[family]
    plain = oracle_peft.ours(reference, folder)
    model = oracle_peft.ours(reference, folder, load_in_4bit=True)
    assert linear_names(model) == linear_names(plain)
    prepared = peft.prepare_model_for_kbit_training(model)
    wanted = linear_names(model) if targets == "names" else targets
    torch.manual_seed(0)
    ours = peft.get_peft_model(prepared, config(target_modules=wanted, init_lora_weights=False))
    bases = [module.base_layer for module in ours.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    quantised = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert quantised
    assert set(map(id, quantised)) <= set(map(id, bases))
    ours.save_pretrained(tmp_path / "start")
    own = adapters.load(oracle_peft.ours(reference, folder, load_in_4bit=True), tmp_path / "start", trainable=True)
    found = losses(ours, family)
    assert found[2] < found[0]
    assert found == pytest.approx(losses(own, family), rel=1e-3)

    ours.save_pretrained(tmp_path / "adapter")
    again = oracle_peft.ours(reference, folder, load_in_4bit=True)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(logits(again, family), logits(ours, family))
    with pytest.raises(ValueError, match="16-bit"):
        again.merge_and_unload()
