"""What tools ask of a model gives the values that the reference gives: embeddings, attention weights, features."""

import copy
import warnings
from pathlib import Path
from typing import Any

import oracle
import oracle_idefics
import oracle_peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minivlm.models.idefics import IdeficsForVisionText2Text

FAMILIES = oracle_peft.FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, Any]]:
    """(reference, ours with the same weights, a batch). The released IDEFICS have added tokens, so has this one."""
    if request.param == "idefics":
        theirs = oracle_idefics.random_reference(oracle_idefics.idefics_config(added=2))
        inputs = oracle_idefics.random_inputs((2, 0, 1), added=2)
    else:
        theirs, inputs = oracle_peft.reference(request.param), oracle_peft.inputs(request.param)
    return theirs, oracle_peft.ours(theirs, tmp_path_factory.mktemp(request.param)), inputs


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def close(found: Tensor, expected: Tensor) -> None:
    """1e-5 of the largest is what float32 sums in another order come to."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# ---- Attention weights and hidden states in one pass -----------------------------------------------------------------


@torch.no_grad()
def test_one_pass_gives_everything(pair: Any) -> None:
    """Attention weights and hidden states at real queries, features; as a tuple too."""
    theirs, ours, inputs = pair
    theirs = copy.deepcopy(theirs)
    theirs.set_attn_implementation("eager")
    asked = {"output_attentions": True, "output_hidden_states": True}
    expected, found = theirs(**inputs, **asked), ours(**inputs, **asked)
    real = inputs["attention_mask"].bool()
    assert len(found.attentions) == len(expected.attentions)
    assert len(found.hidden_states) == len(expected.hidden_states)
    for x, y in zip(found.attentions, expected.attentions, strict=True):
        assert x.shape == y.shape
        close(x.transpose(1, 2)[real], y.transpose(1, 2)[real])
    for x, y in zip(found.hidden_states, expected.hidden_states, strict=True):
        close(x[real], y[real])
    values = ours(**inputs, **asked, return_dict=False)
    assert isinstance(values, tuple)
    assert torch.equal(values[0], found["logits"])
    assert torch.equal(found[0], found.logits)
    assert [type(value) for value in values] == [type(value) for value in found.to_tuple()]


@torch.no_grad()
def test_another_implementation(pair: Any, tmp_path: Path) -> None:
    theirs, ours, inputs = pair
    for name in ("eager", "sdpa"):
        ours.set_attn_implementation(name)
        assert ours.config._attn_implementation == name
        close(logits(ours, inputs), logits(theirs, inputs))
    with pytest.raises(ValueError, match="known: eager"):
        ours.set_attn_implementation("flex")
    assert ours.config._attn_implementation == "sdpa"
    ours.save_pretrained(tmp_path)
    for name in ("eager", "flash_attention_2"):
        again = type(ours).from_pretrained(tmp_path, attn_implementation=name)
        assert again.config._attn_implementation == name
        close(logits(again, inputs), logits(theirs, inputs))


@torch.no_grad()
def test_labels_come_first(pair: Any) -> None:
    _, ours, inputs = pair
    output = ours(**inputs, labels=oracle.labels(inputs))
    loss, scores = output[:2]
    assert output["loss"] is output.loss is loss
    assert output["logits"] is scores
    assert next(iter(output)) == "loss"
    assert torch.equal(ours(**inputs, labels=oracle.labels(inputs), return_dict=False)[0], loss)


@torch.no_grad()
def test_logits_of_chosen_tokens(pair: Any) -> None:
    theirs, ours, inputs = pair
    for kept, tokens in ((2, [-2, -1]), (torch.tensor([3, 0, -1]), [3, 0, -1])):
        expected, found = (model(**inputs, logits_to_keep=kept).logits for model in (theirs, ours))
        real = inputs["attention_mask"].bool()[:, tokens]
        assert found.shape == expected.shape
        close(found[real], expected[real])
    for kept in (-1, slice(-2, None), torch.tensor(2)):
        with pytest.raises(ValueError, match="logits_to_keep should be a number"):
            ours(**inputs, logits_to_keep=kept)


@torch.no_grad()
def test_image_features(pair: Any) -> None:
    theirs, ours, inputs = pair
    if not hasattr(theirs, "get_image_features"):
        pytest.skip("the reference's IDEFICS has no such method")
    names = {"pixel_values", "pixel_attention_mask", "image_sizes"} & inputs.keys()
    given = {name: inputs[name] for name in names}
    expected, found = theirs.get_image_features(**given), ours.get_image_features(**given)
    assert [len(x) for x in found.pooler_output] == [len(x) for x in expected.pooler_output]
    close(torch.cat(list(found.pooler_output)), torch.cat(expected.pooler_output))


@torch.no_grad()
def test_a_model_without_a_head(pair: Any, tmp_path: Path) -> None:
    theirs, ours, inputs = pair
    real = inputs["attention_mask"].bool()
    expected = theirs.model(**inputs).last_hidden_state[real]
    close(ours.base_model(**inputs).last_hidden_state[real], expected)
    ours.base_model.save_pretrained(tmp_path)
    again = type(ours.base_model).from_pretrained(tmp_path)
    close(again(**inputs)[0][real], expected)


# ---- Embeddings ------------------------------------------------------------------------------------------------------


def text(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch that needs none of the ids from 98 on, nor images among its tokens."""
    given = {name: value for name, value in inputs.items() if "pixel" not in name and name != "image_sizes"}
    if "image_attention_mask" in inputs:
        given["pixel_values"] = inputs["pixel_values"]
    return given | {"input_ids": inputs["input_ids"].clamp(max=97)}


@pytest.mark.parametrize("multiple", [None, 64])
def test_resizing(pair: Any, multiple: int | None, tmp_path: Path) -> None:
    """Old rows stay, new ones are the mean of them; what is saved loads on both sides; and the way back."""
    theirs, ours = (copy.deepcopy(model) for model in pair[:2])
    inputs = text(pair[2])
    before = logits(ours, inputs)
    vocabulary = before.shape[-1]
    rows = vocabulary + 3 if multiple is None else 128
    table = ours.resize_token_embeddings(vocabulary + 3, pad_to_multiple_of=multiple)
    assert table is ours.get_input_embeddings()
    after = logits(ours, inputs)
    assert after.shape[-1] == rows
    close(after[:, :vocabulary], before)
    if isinstance(ours, IdeficsForVisionText2Text):  # whose two tables the reference replaces by one, and then fails
        assert ours.config.additional_vocab_size == rows - 100
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs.resize_token_embeddings(vocabulary + 3, pad_to_multiple_of=multiple)
        assert ours.config.text_config.vocab_size == theirs.config.text_config.vocab_size == rows
        torch.testing.assert_close(after, logits(theirs, inputs), rtol=0, atol=0.02)  # it draws around the mean
    ours.save_pretrained(tmp_path)
    for model_class in (type(ours), type(theirs)):
        close(logits(model_class.from_pretrained(tmp_path), inputs), after)
    ours.resize_token_embeddings(vocabulary)
    close(logits(ours, inputs), before)


def test_sizes_that_cannot_be(pair: Any) -> None:
    ours = copy.deepcopy(pair[1])
    with pytest.raises(ValueError, match=r"keeps its vocabulary|image_token"):
        ours.resize_token_embeddings(98)
    assert logits(ours, pair[2]).equal(logits(pair[1], pair[2]))


def test_random_new_rows(pair: Any) -> None:
    ours = copy.deepcopy(pair[1])
    size = 102 if isinstance(ours, IdeficsForVisionText2Text) else 100
    torch.manual_seed(0)
    ours.resize_token_embeddings(size + 300, mean_resizing=False)
    after = logits(ours, pair[2])
    close(after[:, :size], logits(pair[1], pair[2]))
    heads = [part for part in (ours.lm_head, getattr(ours, "additional_fc", None)) if part is not None]
    new = torch.cat([head.weight for head in heads])[size:]
    std = getattr(ours.config, "initializer_range", None) or ours.config.text_config.initializer_range
    assert new.std().item() == pytest.approx(std, rel=0.05)
    assert new.mean(0).abs().max() < std


def test_new_rows_learn(pair: Any) -> None:
    """After resizing, a step moves new rows and old ones."""
    ours = copy.deepcopy(pair[1])
    flat = isinstance(ours, IdeficsForVisionText2Text)
    size = 102 if flat else 100
    ours.resize_token_embeddings(size + 4)
    inputs = {**pair[2], "input_ids": pair[2]["input_ids"].clone()}
    inputs["input_ids"][:, -2] = size + 3
    ours(**inputs, labels=oracle.labels(inputs)).loss.backward()
    table = ours.model.additional_embedding if flat else ours.get_input_embeddings()
    assert table.weight.grad[-1].abs().max() > 0


# ---- Tied tables -----------------------------------------------------------------------------------------------------


def test_tied_tables(pair: Any, tmp_path: Path) -> None:
    """Values and gradients of the reference; resized and quantised they are still one tensor."""
    theirs = copy.deepcopy(pair[0])
    for config in (theirs.config, theirs.config.get_text_config()):
        config.tie_word_embeddings = True
    theirs.tie_weights()
    ours, inputs = oracle_peft.ours(theirs, tmp_path / "tied"), pair[2]
    assert ours.lm_head.weight is ours.get_input_embeddings().weight
    oracle.assert_logits(theirs, ours, inputs)
    oracle.assert_gradients(ours, theirs, inputs)
    small = type(ours).from_pretrained(tmp_path / "tied", load_in_4bit=True)
    assert small.lm_head.weight is small.get_input_embeddings().weight
    small.save_pretrained(tmp_path / "small")
    again = type(ours).from_pretrained(tmp_path / "small")
    assert torch.equal(logits(again, inputs), logits(small, inputs))
    ours.resize_token_embeddings(logits(ours, inputs).shape[-1] + 5)
    assert ours.lm_head.weight is ours.get_input_embeddings().weight
    ours.save_pretrained(tmp_path / "larger")
    for model_class in (type(ours), type(theirs)):
        close(logits(model_class.from_pretrained(tmp_path / "larger"), inputs), logits(ours, inputs))


# ---- Names of tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [True, False])
def test_names_of_files_load_as_a_state(pair: Any, head: bool, tmp_path: Path) -> None:
    """`load_state_dict` takes what `save_pretrained` wrote, and what `state_dict` gives, and nothing else."""
    ours = pair[1] if head else pair[1].base_model
    ours.save_pretrained(tmp_path)
    for state in (load_file(tmp_path / "model.safetensors"), ours.state_dict()):
        fresh = type(ours)(ours.config)
        assert fresh.load_state_dict(state, strict=True) == ([], [])
        for name, value in fresh.state_dict().items():
            assert torch.equal(value, ours.state_dict()[name]), name
    with pytest.raises(RuntimeError, match="Unexpected"):
        ours.load_state_dict({**ours.state_dict(), "another.weight": torch.zeros(1)})
