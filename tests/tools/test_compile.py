"""torch.compile without a graph break in the decoder, and torch.export of the text part, at any length."""

import copy
from pathlib import Path
from typing import Any

import oracle_peft
import pytest
import torch
from torch import Tensor

from minivlm import Int4Config
from minivlm.quantization import apply
from minivlm.training import adapters, lora

TIMED = ("input_ids", "attention_mask", "image_attention_mask")  # (B, T, …)


def make(family: str, folder: Path, layers: int) -> tuple[Any, dict, dict]:
    """(model, a batch with images, the same without towers: text alone, for IDEFICS with its images' vectors)."""
    model = oracle_peft.ours(oracle_peft.reference(family, layers=layers), folder)
    inputs = oracle_peft.inputs(family)
    text = {name: inputs[name] for name in TIMED if name in inputs}
    if family == "idefics":
        with torch.no_grad():
            text["perceiver_embeddings"] = model(**inputs).image_hidden_states
    return model, inputs, text


@pytest.fixture(scope="module", params=oracle_peft.FAMILIES)
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict, dict]:
    return make(request.param, tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def last(text: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    return {name: value[:, -tokens:] if name in TIMED else value for name, value in text.items()}


@pytest.mark.parametrize(("backend", "gradients"), [("sdpa", False), ("eager", True)])
def test_compiled_in_one_graph(given: Any, backend: str, gradients: bool) -> None:
    """With loss and hidden states; the numbers are those without."""
    model, _, text = given
    model.set_attn_implementation(backend)
    call = {**text, "labels": text["input_ids"], "output_hidden_states": True}
    with torch.set_grad_enabled(gradients):
        found = torch.compile(model.forward, fullgraph=True, backend="eager")(**call)
        expected = model(**call)
    assert found.keys() == expected.keys()
    for x, y in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_training(given: Any) -> None:
    """Through AOTAutograd: the gradients of the plain model."""
    model, _, text = given
    call = {**text, "labels": text["input_ids"]}
    found = []
    for forward in (model.forward, torch.compile(model.forward, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        forward(**call).loss.backward()
        found.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5), name


@pytest.mark.slow
@torch.no_grad()
def test_images_break_the_graph_and_nothing_else(given: Any) -> None:
    """How many images and tiles there are is known from numbers alone, so towers are compiled in pieces."""
    model, inputs, _ = given
    compiled = torch.compile(model.forward, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_exported(given: Any) -> None:
    """For any number of tokens; the exported program has the outputs of the model."""
    model, _, text = given
    tokens = torch.export.Dim("tokens", min=2, max=64)
    shapes = {name: {1: tokens} if name in TIMED else None for name in text}
    program = torch.export.export(model, (), text, dynamic_shapes=shapes, strict=False).module()
    for count in (text["input_ids"].shape[1], 7):
        call = last(text, count)
        found, expected = program(**call), model(**call)
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", oracle_peft.FAMILIES)
def test_changed_after_compiling(family: str, tmp_path: Path) -> None:
    """Adapters and quantisation know a compiled model's layers by the names that they have without the compiler."""
    model, _, text = make(family, tmp_path / "model", layers=1)  # it is compiled three times
    plain = copy.deepcopy(model)
    lora.apply(plain, lora.LoraConfig(init_lora_weights=False))
    adapters.save(plain, tmp_path / "plain")
    expected = plain(**text).logits

    def compiled(model: Any) -> Any:
        return torch.compile(copy.deepcopy(model), backend="eager")

    loaded = adapters.load(compiled(model), tmp_path / "plain")
    torch.testing.assert_close(loaded(**text).logits, expected, rtol=1e-5, atol=1e-5)
    adapters.save(compiled(plain), tmp_path / "compiled")
    again = adapters.load(copy.deepcopy(model), tmp_path / "compiled")
    torch.testing.assert_close(again(**text).logits, expected, rtol=1e-5, atol=1e-5)
    merged = lora.merge(loaded)
    torch.testing.assert_close(merged(**text).logits, lora.merge(plain)(**text).logits, rtol=1e-5, atol=1e-5)
    assert len(lora.apply(merged, lora.LoraConfig())) == len(lora.apply(plain, lora.LoraConfig()))

    config = Int4Config(32)
    quantised = apply.quantize(compiled(model), config)
    expected = apply.quantize(copy.deepcopy(model), config)
    assert len(apply.layers(quantised)) == len(apply.layers(expected)) > 0
    torch.testing.assert_close(quantised(**text).logits, expected(**text).logits, rtol=1e-5, atol=1e-5)
