"""Adapted models against PEFT: gradients, loss, optimiser steps, merging, quantised bases."""

from pathlib import Path
from typing import Any

import oracle
import oracle_idefics
import oracle_peft as peft_side
import peft
import pytest
import torch
from torch import nn

from minivlm import BitsAndBytesConfig
from minivlm.models.idefics import IdeficsForVisionText2Text
from minivlm.training import adapters, lora
from minivlm.training.loss import IGNORED, token_loss
from minivlm.training.targets import LoraConfig

Pair = tuple[Any, Any, dict[str, torch.Tensor]]
OPTIONS = {
    "plain": {"r": 4, "target_modules": "all-linear"},
    "dora, whole head": {"r": 4, "target_modules": ["q_proj", "fc2"], "use_dora": True, "modules_to_save": ["lm_head"]},
}


@pytest.fixture
def pair(bases: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Pair:
    """PEFT's model, ours with the same adapter, and a batch with labels; of (family, options)."""
    family, options = request.param
    reference, folder = bases(family)
    theirs = peft_side.adapted(reference, **options)
    ours = adapters.load(peft_side.ours(reference, folder), peft_side.saved(theirs, tmp_path), trainable=True)
    inputs = peft_side.inputs(family)
    return theirs, ours, inputs | {"labels": oracle.labels(inputs)}


def cases(*names: str) -> Any:
    values = [(family, OPTIONS[name]) for family in peft_side.FAMILIES for name in names]
    ids = [f"{family}, {name}" for family in peft_side.FAMILIES for name in names]
    return pytest.mark.parametrize("pair", values, ids=ids, indirect=True)


def named(model: Any, theirs: bool) -> dict[str, nn.Parameter]:
    """What is trained, by the names that PEFT's file has."""
    if not theirs:
        table = lora.targets.generations(model)[0]
        spelled = {}
        for name, parameter in model.named_parameters():
            owner, _, leaf = name.rpartition(".")
            key = lora.targets.spelled(f"{owner}.", table) + adapters.LEAVES.get(leaf, leaf)
            spelled[key] = parameter
    else:
        spelled = {}
        for name, parameter in model.base_model.model.named_parameters():
            name = name.replace(".default", "").replace(".modules_to_save", "")
            spelled[name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = parameter
    return {name: parameter for name, parameter in spelled.items() if parameter.requires_grad}


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of real tokens."""
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def mean_loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    total, count = token_loss(model, inputs)
    return total / count


@cases("plain", "dora, whole head")
def test_loss_and_gradients(pair: Pair) -> None:
    theirs, ours, inputs = pair
    expected, found = theirs(**inputs).loss, mean_loss(ours, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    expected.backward()
    found.backward()
    parameters = named(theirs, theirs=True)
    assert named(ours, theirs=False).keys() == parameters.keys()
    rounding = 1e-6 * max(parameter.grad.norm() for parameter in parameters.values() if parameter.grad is not None)
    for name, parameter in named(ours, theirs=False).items():
        wanted = parameters[name].grad
        assert (parameter.grad is None) == (wanted is None), name
        if wanted is not None:
            assert (parameter.grad - wanted).norm() <= 1e-3 * wanted.norm() + rounding, name


@cases("plain", "dora, whole head")
def test_five_steps_of_adamw(pair: Pair) -> None:
    theirs, ours, inputs = pair
    losses: dict[str, list[float]] = {"theirs": [], "ours": []}
    sides = {"theirs": (theirs, lambda: theirs(**inputs).loss), "ours": (ours, lambda: mean_loss(ours, inputs))}
    for side, (model, loss_of) in sides.items():
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
        for _ in range(6):
            loss = loss_of()
            losses[side].append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert losses["ours"][-1] < 0.9 * losses["ours"][0]
    torch.testing.assert_close(losses["ours"], losses["theirs"], rtol=2e-3, atol=0)


@torch.no_grad()
@cases("plain", "dora, whole head")
def test_merged(pair: Pair, tmp_path: Path) -> None:
    """Logits after merging are PEFT's, and the saved folder is a plain checkpoint."""
    theirs, ours, inputs = pair
    del inputs["labels"]
    expected = logits(theirs.merge_and_unload(), inputs)
    lora.merge(ours)
    assert not any(isinstance(module, lora.ADAPTED) for module in ours.modules())
    assert (logits(ours, inputs) - expected).abs().max() <= 2e-4
    ours.save_pretrained(tmp_path / "merged")
    again = type(ours).from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, inputs), logits(ours, inputs))


@pytest.mark.parametrize("family", peft_side.FAMILIES)
def test_dropout_is_that_of_peft(bases: Any, tmp_path: Path, family: str) -> None:
    """With the same seed the same numbers are dropped, as long as the layers run in the same order."""
    reference, folder = bases(family)
    text = r".*(text_model|language_model|model)\.layers.*down_proj"  # pictures run in another order
    theirs = peft_side.adapted(reference, target_modules=text, lora_dropout=0.5).train()
    ours = adapters.load(peft_side.ours(reference, folder), peft_side.saved(theirs, tmp_path), trainable=True).train()
    inputs = peft_side.inputs(family)
    found = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        found.append(logits(model, inputs))
    plain = logits(theirs.eval(), inputs)
    assert (found[0] - found[1]).abs().max() <= 2e-4 < (found[0] - plain).abs().max()


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_random_beginnings(bases: Any, init: bool | str) -> None:
    """The spread of A and B, and that a fresh adapter changes nothing where B is zero."""
    model, inputs = peft_side.ours(*bases("idefics2")), peft_side.inputs("idefics2")
    before = logits(model, inputs)
    torch.manual_seed(0)
    lora.apply(model, LoraConfig(r=16, target_modules="all", init_lora_weights=init, use_dora=True))
    layer = model.get_submodule("model.text_model.layers.0.mlp.down_proj")  # 96 inputs
    spread = 1 / 16 if init == "gaussian" else 96**-0.5 / 3**0.5  # of a uniform ±1/sqrt(96)
    assert layer.lora_A.std().item() == pytest.approx(spread, rel=0.1)
    assert (layer.lora_B.std() == 0) == (init is not False)
    if init is not False:
        torch.testing.assert_close(logits(model, inputs), before, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", peft_side.FAMILIES)
def test_qlora(bases: Any, tmp_path: Path, family: str) -> None:
    """Loss, gradients and merging over a four-bit base are those over the same base dequantised."""
    reference, folder = bases(family)
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    theirs = peft_side.adapted(reference, r=4, target_modules="all-linear")
    adapter = peft_side.saved(theirs, tmp_path / "adapter")
    quantised = peft_side.ours(reference, folder, quantization_config=BitsAndBytesConfig(**options))
    adapters.load(quantised, adapter, trainable=True)
    plain = peft_side.ours(reference, folder, quantization_config=BitsAndBytesConfig(**options))
    adapters.load(lora.merge(plain), adapter, trainable=True)  # nothing to merge, but all weights are plain now
    inputs = peft_side.inputs(family)
    inputs |= {"labels": oracle.labels(inputs)}
    losses = [mean_loss(model, inputs) for model in (quantised, plain)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    for loss in losses:
        loss.backward()
    expected = named(plain, theirs=False)
    for name, parameter in named(quantised, theirs=False).items():
        wanted = expected[name].grad
        if wanted is not None:  # LLaVA-NeXT does not use its tower's last layer
            assert (parameter.grad - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6, name
    merged = [mean_loss(lora.merge(model), inputs) for model in (quantised, plain)]
    assert quantised.quantization_config is None
    torch.testing.assert_close(merged[0], losses[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(merged[1], merged[0], rtol=1e-4, atol=0)


def test_bf16_base_keeps_an_adapter_in_fp32(bases: Any, tmp_path: Path) -> None:
    """Compared by the error against fp32: ours may be off by as much as PEFT's, and half as much again."""
    reference, folder = bases("idefics2")
    theirs = peft_side.adapted(reference, target_modules="all-linear")
    adapter = peft_side.saved(theirs, tmp_path / "adapter")
    inputs = peft_side.inputs("idefics2")
    exact = logits(theirs, inputs)
    half = type(reference).from_pretrained(folder, dtype=torch.bfloat16)
    theirs = peft.PeftModel.from_pretrained(half, adapter).eval()
    ours = adapters.load(peft_side.ours(reference, folder, dtype=torch.bfloat16), adapter)
    assert {p.dtype for n, p in ours.named_parameters() if "lora_" in n} == {torch.float32}
    errors = [(logits(model, inputs).float() - exact).norm() for model in (ours, theirs)]
    assert errors[0] <= 1.5 * errors[1]


def test_added_tokens_of_idefics(tmp_path: Path) -> None:
    """Trained whole, its table and head include those of added tokens, under the names that the reference has."""
    config = oracle_idefics.idefics_config(added=3)
    reference = oracle_idefics.random_reference(config)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    theirs = peft_side.adapted(reference, **options)
    model = peft_side.ours(reference, tmp_path / "base")
    assert isinstance(model, IdeficsForVisionText2Text)
    lora.apply(model, LoraConfig(**options))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"model.additional_embedding.weight", "additional_fc.weight"} <= trained
    adapters.save(model, tmp_path / "ours")
    found, expected = adapters.read(tmp_path / "ours"), adapters.read(peft_side.saved(theirs, tmp_path / "theirs"))
    assert {name: value.shape for name, value in found.tensors.items()} == {
        name: value.shape for name, value in expected.tensors.items()
    }
    inputs = oracle_idefics.random_inputs((1, 0), added=3)
    loss, count = token_loss(model, inputs | {"labels": oracle.labels(inputs)})
    logits = model(**inputs, labels=oracle.labels(inputs))
    torch.testing.assert_close(loss / count, logits.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", peft_side.FAMILIES)
def test_the_head_in_pieces(bases: Any, monkeypatch: Any, family: str) -> None:
    """Loss and gradients do not depend on how many logits exist at once."""
    inputs = peft_side.inputs(family)
    inputs |= {"labels": oracle.labels(inputs)}
    found = []
    for most in (2**23, 300):  # all at once; three tokens at a time
        monkeypatch.setattr("minivlm.training.loss.LOGITS", most)
        model = peft_side.ours(*bases(family))
        loss = mean_loss(model, inputs)
        loss.backward()
        found.append((loss, model.lm_head.weight.grad, model.decoder.embed_tokens.weight.grad))
        torch.testing.assert_close(loss, model(**inputs).loss, rtol=1e-5, atol=0)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_quantised_module_is_not_trained_whole(bases: Any) -> None:
    reference, folder = bases("idefics2")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = peft_side.ours(reference, folder, quantization_config=four_bits)
    with pytest.raises(ValueError, match=r"down_proj.*weights to train"):
        lora.apply(model, LoraConfig(target_modules="text", modules_to_save=("lm_head", "down_proj")))


def test_rows_without_learned_tokens_count_nothing(bases: Any) -> None:
    model, inputs = peft_side.ours(*bases("idefics2")), peft_side.inputs("idefics2")
    loss, count = token_loss(model, inputs | {"labels": torch.full_like(inputs["input_ids"], IGNORED)})
    assert (loss.item(), count) == (0.0, 0)
