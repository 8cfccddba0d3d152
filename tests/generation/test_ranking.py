"""Candidates scored against one shared prefill equal those scored by a run of their own, ours and the reference's."""

from dataclasses import replace

import numpy as np
import oracle
import oracle_idefics
import oracle_llava
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlm.generation.ranking import rank
from minivlm.generation.steps import positions
from minivlm.models.idefics import IdeficsForVisionText2Text
from minivlm.models.idefics2 import Idefics2ForConditionalGeneration
from minivlm.models.llava_next import LlavaNextForConditionalGeneration

# alike at the beginning, one inside another, twice the same, one token alone
CANDIDATES = [[7, 8, 9], [7, 8, 10], [7, 8], [5], [7, 8, 9], [6, 5, 4, 3, 5, 6, 7], [9], [7, 8, 9, 11, 12]]


def idefics2(images):
    reference = oracle.random_reference(oracle.idefics2_config())
    return Idefics2ForConditionalGeneration, reference, oracle.random_inputs(images, 4)


def llava_next(images):
    reference = oracle_llava.random_llava(oracle_llava.llava_config())
    sizes = [[(30, 50), (12, 12), (7, 90)][:count] for count in images]
    return LlavaNextForConditionalGeneration, reference, oracle_llava.llava_inputs(sizes, reference.config)


def idefics(images):
    reference = oracle_idefics.random_reference(oracle_idefics.idefics_config(interval=2))
    return IdeficsForVisionText2Text, reference, oracle_idefics.random_inputs(images)


@pytest.fixture(params=[idefics2, llava_next, idefics], ids=lambda family: family.__name__, scope="module")
def family(request, tmp_path_factory):
    """(ours, reference, inputs of three left-padded prompts with 2, 0 and 1 pictures)."""
    ours, reference, inputs = request.param((2, 0, 1))
    folder = oracle.save(reference, tmp_path_factory.mktemp("ranking"))
    return ours.from_pretrained(folder), reference, inputs


@torch.no_grad()
def from_scratch(model, inputs, candidate):
    """Sum of log-probabilities (B,) of a candidate, from one run over prompt and candidate together."""
    ids, B = inputs["input_ids"], len(inputs["input_ids"])
    P, n = ids.shape[1], len(candidate)
    mask = torch.cat([inputs["attention_mask"], torch.ones(B, n, dtype=torch.long)], 1)
    whole = inputs | {"input_ids": torch.cat([ids, torch.tensor(candidate).expand(B, n)], 1), "attention_mask": mask}
    if "image_attention_mask" in inputs:  # a new token sees what the last one of the prompt sees
        seen = inputs["image_attention_mask"]
        whole["image_attention_mask"] = torch.cat([seen, seen[:, -1:].expand(-1, n, -1)], 1)
    logits = model(**whole, position_ids=positions(mask)).logits[:, P - 1 : -1]  # (B, n, V)
    return logits.double().log_softmax(-1)[:, range(n), candidate].sum(1)


def test_equals_runs_from_scratch(family):
    ours, reference, inputs = family
    scores = rank(ours, inputs, CANDIDATES)
    assert scores.shape == (3, len(CANDIDATES))
    assert scores.dtype == torch.float32
    for model in (ours, reference):
        expected = torch.stack([from_scratch(model, inputs, candidate) for candidate in CANDIDATES], 1)
        # sums of up to 7 log-probabilities of fp32 logits, of the size of 10
        assert torch.allclose(scores.double(), expected, atol=1e-4, rtol=1e-5), (scores - expected).abs().max()
    assert torch.equal(scores[:, 0], scores[:, 4])
    lengths = torch.tensor([len(candidate) for candidate in CANDIDATES])
    assert torch.equal(rank(ours, inputs, CANDIDATES, mean=True), scores / lengths)


def test_order_and_batch_do_not_matter(family):
    ours, _, inputs = family
    scores = rank(ours, inputs, CANDIDATES)
    back = rank(ours, inputs, CANDIDATES[::-1])
    assert torch.allclose(back.flip(1), scores, atol=1e-5)
    one_by_one = torch.cat([rank(ours, inputs, [candidate]) for candidate in CANDIDATES], 1)
    assert torch.allclose(one_by_one, scores, atol=1e-5)


def test_the_prompt_runs_once_and_shared_beginnings_too(family, monkeypatch):
    ours, _, inputs = family
    runs = []
    forward = ours.forward
    monkeypatch.setattr(
        ours,
        "forward",
        lambda **given: runs.append((given["input_ids"].shape[1], "pixel_values" in given)) or forward(**given),
    )
    rank(ours, inputs, CANDIDATES)
    # sorted: 5 | 6 5 4 3 5 6 7 | 7 8 | 7 8 9 | 7 8 9 | 7 8 9 11 12 | 7 8 10 | 9
    assert runs == [(inputs["input_ids"].shape[1], True), (6, False), (1, False), (1, False), (2, False)]
    runs.clear()
    rank(ours, inputs, [[3], [4], [3]])
    assert len(runs) == 1


@given(st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=4), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_any_candidates(made_once, candidates):
    ours, inputs = made_once
    expected = torch.stack([from_scratch(ours, inputs, candidate) for candidate in candidates], 1)
    assert torch.allclose(rank(ours, inputs, candidates).double(), expected, atol=1e-4, rtol=1e-5)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    ours, reference, inputs = idefics2((1,))
    return ours.from_pretrained(oracle.save(reference, tmp_path_factory.mktemp("ranking"))), inputs


def test_one_token_candidates_are_the_next_token_distribution(made_once):
    ours, inputs = made_once
    scores = rank(ours, inputs, [[i] for i in range(100)])
    assert scores.exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert scores.argmax(1).tolist() == ours.generate(**inputs, max_new_tokens=1)[:, -1].tolist()


def test_candidates_of_numpy(made_once):
    ours, inputs = made_once
    candidates = [np.array([7, 8, 9]), [np.int64(5)]]
    assert torch.equal(rank(ours, inputs, candidates), rank(ours, inputs, [[7, 8, 9], [5]]))


def test_without_a_mask_and_without_pictures(made_once):
    ours, _ = made_once
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
    with_mask = text | {"attention_mask": torch.ones(1, 4, dtype=torch.long)}
    assert torch.equal(rank(ours, text, CANDIDATES), rank(ours, with_mask, CANDIDATES))
    assert set(text) == {"input_ids"}  # the caller's inputs are left as they are


@pytest.mark.parametrize(
    ("change", "candidates", "message"),
    [
        ({}, [], "lists of token ids"),
        ({}, [[]], "lists of token ids"),
        ({}, [[3], []], "lists of token ids"),
        ({}, [3, 4], "lists of token ids"),
        ({}, "cat", "lists of token ids"),
        ({}, ["cat"], "lists of token ids"),
        ({}, [["cat"]], "lists of token ids"),
        ({}, [[3], [-1]], "lists of token ids"),
        ({}, [[3], [4, 100]], "the id 100, but the vocabulary has 100"),
        ({}, [[3], [100, 4]], "the id 100, but the vocabulary has 100"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, [[3]], "ends in padding"),
    ],
    ids=str,
)
def test_refusals(made_once, change, candidates, message):
    with pytest.raises(ValueError, match=message):
        rank(made_once[0], {"input_ids": torch.tensor([[1, 5, 6, 7]])} | change, candidates)


def test_prompts_that_do_not_fit(made_once, monkeypatch):
    ours, _ = made_once
    short = replace(ours.config.text_config, max_position_embeddings=6)
    monkeypatch.setattr(ours, "config", replace(ours.config, text_config=short))
    prompt = {"input_ids": torch.tensor([[0, 1, 5, 6, 7]]), "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}
    assert rank(ours, prompt, [[3, 4, 5]]).shape == (1, 1)  # the last token takes no position, nor does the padding
    with pytest.raises(ValueError, match="have 7 tokens, this model has positions for 6"):
        rank(ours, prompt, [[3, 4, 5, 6]])


def test_scores_that_are_not_finite(made_once):
    ours, inputs = made_once
    broken = inputs | {"pixel_values": torch.full_like(inputs["pixel_values"], torch.nan)}
    with pytest.raises(ValueError, match="not finite"):
        rank(ours, broken, CANDIDATES)
