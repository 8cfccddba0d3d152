"""Hidden states and attention weights of every step, nested as the reference's and equal to them."""

import oracle
import oracle_idefics
import oracle_llava
import pytest
import torch
from oracle_generation import both, twins

from minivlm.models.idefics import IdeficsForVisionText2Text
from minivlm.models.idefics2 import Idefics2ForConditionalGeneration
from minivlm.models.llava_next import LlavaNextForConditionalGeneration

WANTED = {"return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True}
WANTED |= {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}


def idefics2():
    reference = oracle.random_reference(oracle.idefics2_config(window=None))
    return reference, Idefics2ForConditionalGeneration, oracle.random_inputs((2, 0, 1), 4)


def llava_next():
    reference = oracle_llava.random_llava(oracle_llava.llava_config())
    inputs = oracle_llava.llava_inputs([[(30, 50)], [], [(12, 12)]], reference.config)
    return reference, LlavaNextForConditionalGeneration, inputs


def idefics():
    reference = oracle_idefics.random_reference(oracle_idefics.idefics_config(interval=2))
    return reference, IdeficsForVisionText2Text, oracle_idefics.random_inputs((2, 0, 1))


@pytest.fixture(scope="module", params=[idefics2, llava_next, idefics], ids=lambda family: family.__name__)
def family(request, tmp_path_factory):
    """((reference, ours), inputs of three left-padded prompts with images); attention weights come from eager code."""
    reference, ours, inputs = request.param()
    pair = twins(reference, tmp_path_factory.mktemp("layers"), ours)
    pair[0].set_attn_implementation("eager")
    return pair, inputs


def assert_same(found, expected, mask):
    """Step by step and layer by layer, at the queries (B, T) that are real: what pads compute, nobody uses.

    1e-5 of the largest is what float32 sums in another order come to.
    """
    assert len(found) == len(expected)
    for step, (layers, theirs) in enumerate(zip(found, expected, strict=True)):
        assert len(layers) == len(theirs)
        for x, y in zip(layers, theirs, strict=True):
            assert x.shape == y.shape
            x, y = (each.transpose(1, 2) if each.ndim == 4 else each for each in (x, y))  # (B, T, …)
            real = torch.ones(x.shape[:2], dtype=torch.bool)
            if step == 0 or x.shape[1] > 1:
                real[:, : mask.shape[1]] = mask.repeat_interleave(len(x) // len(mask), 0).bool()
            torch.testing.assert_close(x[real], y[real], rtol=0, atol=1e-5 * y[real].abs().max().item())


SEARCHES = [{}, {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 3}]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_layers_equal_the_reference(family, search):
    pair, inputs = family
    theirs, ours = both(pair, inputs, **search, **WANTED)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_same(ours.hidden_states, theirs.hidden_states, inputs["attention_mask"])
    assert_same(ours.attentions, theirs.attentions, inputs["attention_mask"])


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_without_a_cache_every_step_has_the_whole_text(family, search):
    (_, model), inputs = family
    given = {**WANTED, **search, "bad_words_ids": [[oracle.IMAGE]]}  # uncached, it would want an image
    (cached,), (whole,) = both([model], inputs, **given), both([model], inputs, **given, use_cache=False)
    assert torch.equal(whole.sequences, cached.sequences)
    for step, (narrow, wide) in enumerate(zip(cached.hidden_states, whole.hidden_states, strict=True)):
        for x, y in zip(narrow, wide, strict=True):
            assert y.shape[1] == inputs["input_ids"].shape[1] + step
            torch.testing.assert_close(y[:, -1], x[:, -1], rtol=0, atol=1e-5 * x.abs().max().item())


def test_only_what_is_asked_for_is_kept(family):
    pair, inputs = family
    output = pair[1].generate(**inputs, max_new_tokens=2, return_dict_in_generate=True, output_attentions=True)
    assert output.hidden_states is output.scores is None
    assert all(row.sum(-1).allclose(torch.ones(1)) for row in output.attentions[1])
    with pytest.warns(UserWarning, match="output_attentions has no effect without return_dict_in_generate=True"):
        pair[1].generate(**inputs, max_new_tokens=1, output_attentions=True)
