"""Guessed tokens change how often the model runs, and nothing else: not ids, scores, caches or finish reasons."""

import oracle
import oracle_idefics
import oracle_llava
import pytest
import torch
from oracle_generation import IMAGE, V, alone, batch, both, twins
from oracle_generation import oracle as reference
from tiny_chat import random_model

from minivlm.generation import loop
from minivlm.generation.speculation import look_up
from minivlm.models.idefics import IdeficsForVisionText2Text
from minivlm.models.idefics2 import Idefics2ForConditionalGeneration
from minivlm.models.llava_next import LlavaNextForConditionalGeneration

LOOKUP = {"prompt_lookup_num_tokens": 4}


@pytest.fixture(scope="module", params=[None, 4], ids=["full", "window"])
def pair(request, tmp_path_factory):
    return twins(reference(request.param), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(pair):
    return pair[1]


@pytest.fixture
def runs(model, monkeypatch):
    """How many tokens each forward pass of the model ran."""
    seen, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **given: seen.append(given["input_ids"].shape[1]) or forward(**given))
    return seen


def repeating(period=3):
    """A rule that makes any model repeat itself: of a text of many tokens, most can be guessed."""

    def rule(ids, scores):
        return scores.index_add(1, ids[0, -period:][:1], torch.tensor([[60.0]]))

    return {"logits_processor": [rule]}


CASES = {
    "plain": {},
    "repeating": repeating(),
    "longer": repeating(5) | {"max_matching_ngram_size": 4, "prompt_lookup_num_tokens": 9},
    "penalty": {"repetition_penalty": 1.3},
    "eos": {"eos_token_id": list(range(10, 40))} | repeating(),
    "sampled": {"do_sample": True, "temperature": 0.2, "seed": 3} | repeating(),
    "sampled hot": {"do_sample": True, "temperature": 2.0, "seed": 4},
    "bad words": {"bad_words_ids": [[IMAGE], [21], [30, 2]]},
    "least": {"min_new_tokens": 9, "eos_token_id": list(range(10, 60))},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("row", range(4))
def test_looked_up_equals_plain(model, name, row):
    """Prompts with 0 to 3 images; with what is returned beside the ids."""
    given = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "eos_token_id": None}
    given |= {"max_new_tokens": 20} | CASES[name]
    lookup = LOOKUP | {key: given.pop(key) for key in ("prompt_lookup_num_tokens",) if key in given}
    inputs = alone(batch(), row)
    expected, found = model.generate(**inputs, **given), model.generate(**inputs, **given, **lookup)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.finish_reasons == expected.finish_reasons
    assert found.past_key_values.length == expected.past_key_values.length
    for ours, plain in [(found.scores, expected.scores), (found.logits, expected.logits)]:
        largest = max(step[step.isfinite()].abs().max().item() for step in plain)
        # 1e-5 of the largest: sums over several tokens at once are taken in another order
        torch.testing.assert_close(torch.stack(ours), torch.stack(plain), rtol=0, atol=1e-5 * largest)


def test_text_that_repeats_itself_takes_few_passes(model, runs):
    ids = torch.tensor([[8, 9, 10, 11, 8, 9]])
    given = {"max_new_tokens": 40, "eos_token_id": None} | repeating(4)
    model.generate(ids, **given)
    plain = len(runs)
    runs.clear()
    model.generate(ids, **given, prompt_lookup_num_tokens=9)
    assert plain == 40
    assert len(runs) <= 8
    assert sum(runs[1:]) < 60  # and no more is run than is guessed


def test_guesses_equal_those_of_the_reference(pair):
    """Ids as by the reference with the same settings."""
    for name in ("plain", "penalty", "bad words"):
        inputs = alone(batch(), 2)
        theirs, ours = both(pair, inputs, **LOOKUP, **CASES[name], max_new_tokens=20, eos_token_id=None)
        assert torch.equal(ours, theirs)


FAMILIES = {
    "idefics2": lambda: (Idefics2ForConditionalGeneration, oracle.idefics2_config(), oracle.random_inputs((2,), 4)),
    "llava_next": lambda: (
        LlavaNextForConditionalGeneration,
        oracle_llava.llava_config(),
        oracle_llava.llava_inputs([[(30, 50)]], oracle_llava.llava_config()),
    ),
    "idefics": lambda: (
        IdeficsForVisionText2Text,
        oracle_idefics.idefics_config(),
        oracle_idefics.random_inputs((2,)),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_guesses(family):
    """By lookup, and by an assistant that sees the images too: the model itself (always right), and another one."""
    kind, config, inputs = FAMILIES[family]()
    torch.manual_seed(0)
    model, other = random_model(kind, config), random_model(kind, config)
    with torch.no_grad():
        other.lm_head.weight.add_(0.05 * torch.randn_like(other.lm_head.weight))
    given = {"max_new_tokens": 24, "eos_token_id": None} | repeating()
    expected = model.generate(**inputs, **given)
    for guess in (LOOKUP, {"assistant_model": model}, {"assistant_model": other, "num_assistant_tokens": 3}):
        assert torch.equal(model.generate(**inputs, **given, **guess), expected)


def test_an_assistant_that_is_right_saves_passes(model, runs):
    ids, given = torch.tensor([[8, 9, 10]]), {"max_new_tokens": 21, "eos_token_id": None}
    expected = model.generate(ids, **given)
    runs.clear()
    guesses = {"num_assistant_tokens": 4, "assistant_confidence_threshold": 0.0}
    assert torch.equal(model.generate(ids, **given, assistant_model=model, **guesses), expected)
    assert runs.count(5) == 4  # the newest token and 4 guesses, all right, and a token from the last one's logits
    runs.clear()
    guesses["assistant_confidence_threshold"] = 1.0  # never sure: one guess at a time
    assert torch.equal(model.generate(ids, **given, assistant_model=model, **guesses), expected)
    assert max(runs[2:]) == 2


def test_left_padding_and_embeddings(model):
    inputs = {"input_ids": torch.tensor([[0, 0, 8, 9, 8, 9]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])}
    given = {"max_new_tokens": 20, "eos_token_id": None} | repeating(2)
    expected = model.generate(**inputs, **given)
    for guess in (LOOKUP, {"assistant_model": model}):
        assert torch.equal(model.generate(**inputs, **given, **guess), expected)
    embeds = {"inputs_embeds": model.model.text_model.embed_tokens(torch.tensor([[8, 9, 8]])).detach()}
    expected = model.generate(**embeds, max_new_tokens=20, eos_token_id=None)
    assert torch.equal(model.generate(**embeds, max_new_tokens=20, eos_token_id=None, **LOOKUP), expected)


def test_a_stream_that_is_abandoned_leaves_a_true_cache(model):
    """Guesses that the loop has not chosen do not count, so another call goes on from there."""
    ids, given = torch.tensor([[8, 9, 8, 9]]), {"eos_token_id": None} | repeating(2)
    whole = model.generate(ids, max_new_tokens=12, **given)
    cache = model.new_cache(1, 16)
    steps = loop.stream(model, ids, max_new_tokens=12, past_key_values=cache, **LOOKUP, **given)
    first = torch.stack([next(steps) for _ in range(6)], 1)
    assert cache.length == 4 + 5
    again = torch.cat([ids, first], 1)
    assert torch.equal(model.generate(again, max_new_tokens=6, past_key_values=cache, **LOOKUP, **given), whole)


def test_rope_that_depends_on_the_length_takes_no_guesses():
    """A guess would lengthen the text, and so change the frequencies of its real tokens."""
    config = oracle_llava.llava_config(text={"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})
    model = random_model(LlavaNextForConditionalGeneration, config)
    ids, given = torch.arange(8, 20)[None], {"max_new_tokens": 20, "eos_token_id": None} | repeating()
    assert torch.equal(model.generate(ids, **given, **LOOKUP), model.generate(ids, **given))


def test_look_up():
    assert look_up([1, 2, 3, 9, 1, 2], 2, 2) == [3, 9]
    assert look_up([1, 2, 3, 9, 1, 2], 9, 2) == [3, 9, 1, 2]
    assert look_up([2, 5, 1, 2, 7, 1, 2], 1, 2) == [7]  # two ids before one
    assert look_up([2, 5, 1, 2, 7, 1, 2], 1, 1) == [5]
    assert look_up([4, 4], 3, 2) == [4]
    assert look_up([1, 2, 3], 3, 2) == look_up([1], 3, 2) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": torch.tensor([[8, 9], [8, 9]])}, "prompt_lookup_num_tokens guesses for one row"),
        ({"num_beams": 2}, "one row"),
        ({"do_sample": True, "num_return_sequences": 2}, "one row"),
        ({"use_cache": False}, "prompt_lookup_num_tokens needs use_cache=True"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "goes without .* output_hidden_states"),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens should be an integer > 0"),
        ({"max_matching_ngram_size": 0}, "max_matching_ngram_size should be an integer > 0"),
    ],
    ids=str,
)
def test_refusals(model, given, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"input_ids": torch.tensor([[8, 9]]), **LOOKUP, **given})


def test_an_assistant_needs_the_same_vocabulary(model):
    other = random_model(Idefics2ForConditionalGeneration, oracle.idefics2_config())
    assert other.config.text_config.vocab_size != V
    with pytest.raises(ValueError, match="same vocabulary"):
        model.generate(torch.tensor([[8, 9]]), assistant_model=other)
    with pytest.raises(ValueError, match="assistant_model should be a model"):
        model.generate(torch.tensor([[8, 9]]), assistant_model="small")
