"""Beam search and beam sampling against transformers: ids, scores and beam indices, and every tie among them."""

import functools
import itertools

import hypothesis.strategies as st
import oracle_idefics
import oracle_llava
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from oracle_generation import EOS, IMAGE, PAD, V, alone, batch, both, oracle, twins

from minivlm.generation import loop
from minivlm.models.idefics import IdeficsForVisionText2Text
from minivlm.models.llava_next import LlavaNextForConditionalGeneration
from minivlm.modules.cache import KVCache
from minivlm.text.tokenizer import Tokenizer

EVERYTHING = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
MANY = list(range(10, 40))  # eos ids, so that beams end at all lengths


@pytest.fixture(scope="module", params=[None, 4], ids=["full", "window"])
def pair(request, tmp_path_factory):
    """(reference, ours) with the same weights; the window of 4 is shorter than every prompt."""
    return twins(oracle(request.param), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(pair):
    return pair[1]


def assert_same(theirs, ours):
    """Ids and beam indices equal; 1e-5 of the largest is what sums in another order and their differences come to."""
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.beam_indices, theirs.beam_indices)
    assert ours.beam_indices.dtype == theirs.beam_indices.dtype
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-5, atol=1e-5)
    for name in ("scores", "logits"):
        expected, found = getattr(theirs, name), getattr(ours, name)
        assert len(found) == len(expected)
        largest = max(a.abs()[a.isfinite()].max().item() for a in expected)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * largest)


# ---- Against the reference ----

GRID = list(itertools.product((2, 3, 4, 5), (True, False, "never")))
PENALTIES = itertools.cycle([1.0, 0.0, 2.0, -1.0, 0.6])


@pytest.mark.parametrize(("beams", "early", "penalty"), [(*sizes, next(PENALTIES)) for sizes in GRID])
def test_beams_equal_the_reference(pair, beams, early, penalty):
    """Rows of different lengths with 0 to 3 images; as many sequences as there are beams."""
    search = {"num_beams": beams, "early_stopping": early, "length_penalty": penalty, "num_return_sequences": beams}
    for eos in (EOS, MANY):
        assert_same(*both(pair, batch(), **search, **EVERYTHING, max_new_tokens=10, eos_token_id=eos))


def no_threes(ids, scores):
    return scores - 2.0 * (torch.arange(V) % 3 == 0)


def few_allowed(prompt, ids):
    """By the prompt, the newest id and how far the text is."""
    return [7, 11, *range(20 + prompt, 60, 2 + int(ids[-1]) % 3)] if len(ids) % 4 else [30 + prompt, 5]


def ends_in_five(ids, scores):
    return ids[:, -1] % 5 == 0


SETTINGS = {
    "defaults": {"max_new_tokens": 12},
    "one token": {"max_new_tokens": 1, "num_return_sequences": 2},
    "max_length": {"max_length": 24, "early_stopping": True},
    "default limit": {},
    "one eos": {"max_new_tokens": 12, "eos_token_id": 11},
    "no eos": {"max_new_tokens": 12, "eos_token_id": None},
    "least": {"max_new_tokens": 12, "eos_token_id": MANY, "min_new_tokens": 4},
    "least length": {"max_new_tokens": 12, "eos_token_id": MANY, "min_length": 20},
    "penalty": {"max_new_tokens": 12, "repetition_penalty": 1.4, "eos_token_id": MANY},
    "ngrams": {"max_new_tokens": 12, "no_repeat_ngram_size": 2, "bad_words_ids": [[98], [21], [30, 2], [7]]},
    "prefix": {"max_new_tokens": 12, "prefix_allowed_tokens_fn": few_allowed, "num_return_sequences": 3},
    "prefix, stuck": {"prefix_allowed_tokens_fn": few_allowed, "bad_words_ids": [[30], [31], [5], [32], [7, 11]]},
    "own rule": {"max_new_tokens": 12, "logits_processor": [no_threes]},
    "own end": {"max_new_tokens": 12, "stopping_criteria": [ends_in_five], "num_return_sequences": 3},
    "sample": {"max_new_tokens": 12, "do_sample": True, "num_return_sequences": 2},
    "sample hot": {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0, "top_k": 0, "eos_token_id": MANY},
    "sample few": {"max_new_tokens": 12, "do_sample": True, "top_k": 1, "top_p": 0.3, "min_p": 0.9},
    "sample typical": {"max_new_tokens": 12, "do_sample": True, "typical_p": 0.3, "temperature": 2.0},
    "sample cutoffs": {"max_new_tokens": 12, "do_sample": True, "epsilon_cutoff": 0.2, "eta_cutoff": 0.2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_equal_the_reference(pair, name):
    """Sampling draws from torch's own generator under the same seed."""
    assert_same(*both(pair, batch(), **{"num_beams": 3, **SETTINGS[name]}, **EVERYTHING))


@pytest.mark.parametrize("pad", [PAD, 3, None])
def test_filling_equals_the_reference(pair, pad):
    """A pad id of 0 is taken for none, and so the first eos id fills."""
    search = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12, "eos_token_id": MANY}
    theirs, ours = both(pair, batch(), **search, pad_token_id=pad)
    assert torch.equal(ours, theirs)
    assert (ours[:, -1] == (pad or MANY[0])).any()


@pytest.mark.parametrize("kwargs", [{}, {"num_return_sequences": 3, "early_stopping": True}])
def test_text_and_lone_prompts_equal_the_reference(pair, kwargs):
    search = {"num_beams": 4, "max_new_tokens": 10, **kwargs}
    for inputs in (batch((0, 0), (9, 4)), batch((0,), (5,)), batch((2,), (3,)), {}):
        theirs, ours = both(pair, inputs, **search)
        assert torch.equal(ours, theirs)


def test_embeddings_equal_the_reference(pair):
    ids = batch((0,), (9,))["input_ids"]
    embeds = pair[1].model.text_model.embed_tokens(ids).detach()
    search = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8, "eos_token_id": MANY}
    theirs, ours = both(pair, {"inputs_embeds": embeds}, **search)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, pair[1].generate(ids, **search)[:, 9:])


def test_stop_strings_equal_the_reference(pair):
    pieces = {piece: i for i, piece in enumerate(["<s>", "</s>", *"abcdef", *(f"x{i}" for i in range(V - 8))])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, []))
    backend.decoder = tokenizers.decoders.Fuse()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    search = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 10, "stop_strings": ["1x", "7", "x3"]}
    expected = pair[0].generate(**batch(), **search, tokenizer=theirs)
    assert torch.equal(pair[1].generate(**batch(), **search, tokenizer=Tokenizer(backend)), expected)


# Logits of a table, the same for both sides, and so coarse that ties decide: nothing is left to rounding.
COARSE = st.lists(st.sampled_from([-8.0, -2.0, -1.5, -1.0, -0.5, float("-inf")]), min_size=V, max_size=V)


@settings(max_examples=30, deadline=None)
@given(st.lists(COARSE, min_size=1, max_size=3), st.data())
def test_ties_are_broken_as_by_the_reference(tied, rows, data):
    table = torch.tensor(rows)
    table[:, 8] = -3.0  # no row is all −inf
    beams = data.draw(st.integers(2, 5))
    search = {
        "num_beams": beams,
        "num_return_sequences": data.draw(st.integers(1, beams)),
        "early_stopping": data.draw(st.sampled_from([True, False, "never"])),
        "length_penalty": data.draw(st.sampled_from([1.0, 0.0, 2.0, -0.5])),
        "do_sample": data.draw(st.booleans()),
        "eos_token_id": data.draw(st.sampled_from([[9], [9, 11, 20], MANY])),
        "max_new_tokens": data.draw(st.integers(1, 6)),
        "logits_processor": [lambda ids, scores: table[ids[:, -1] % len(table)].clone()],
        "top_k": 0,
    }
    inputs = {"input_ids": torch.tensor([[8, 9, 10], [8, 12, 13]])}
    theirs, ours = both(tied, inputs, **search, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.sequences_scores, theirs.sequences_scores)
    assert torch.equal(ours.beam_indices, theirs.beam_indices)
    assert len(ours.scores) == len(theirs.scores)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return twins(oracle(None), tmp_path_factory.mktemp("tied"))


FAMILIES = {
    "llava": lambda: (
        oracle_llava.random_llava(oracle_llava.llava_config()),
        LlavaNextForConditionalGeneration,
        oracle_llava.llava_inputs([[(30, 50)], [(12, 12), (100, 33)], []], oracle_llava.llava_config()),
    ),
    "idefics": lambda: (
        oracle_idefics.random_reference(oracle_idefics.idefics_config()),
        IdeficsForVisionText2Text,
        oracle_idefics.random_inputs((1, 0, 3)),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_equal_the_reference(family, tmp_path):
    """Their pictures are flat over the rows (LLaVA-NeXT), or stay in the cache beside the tokens (IDEFICS)."""
    reference, ours, inputs = FAMILIES[family]()
    pair = twins(reference, tmp_path, ours)
    search = {"max_new_tokens": 8, "eos_token_id": list(range(10, 20)), "pad_token_id": PAD, "bad_words_ids": [[99]]}
    for kwargs in (
        {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.5, "early_stopping": True},
        {"num_beams": 2, "do_sample": True, "no_repeat_ngram_size": 2},
        {"num_return_sequences": 3, "do_sample": True},
    ):
        theirs, found = both(pair, inputs, **search, **kwargs)
        assert torch.equal(found, theirs)
    assert torch.equal(both(pair[1:], inputs, **search, **kwargs, use_cache=False)[0], found)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", ["defaults", "least", "sample hot"])
def test_transition_scores_equal_the_reference(pair, name, normalize):
    scores = []
    for model, output in zip(
        pair, both(pair, batch(), num_return_sequences=3, num_beams=3, **SETTINGS[name], **EVERYTHING), strict=True
    ):
        given = (output.sequences, output.scores, output.beam_indices)
        scores.append(model.compute_transition_scores(*given, normalize_logits=normalize))
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-4)


# ---- Twins: different ways to the same ids ----


@pytest.mark.parametrize("name", ["defaults", "penalty", "sample hot"])
def test_cached_equals_uncached(model, name):
    search = {"num_beams": 3, "bad_words_ids": [[IMAGE]], **SETTINGS[name]}  # uncached, it would want a picture
    cached = both([model], batch(), **search)[0]
    assert torch.equal(both([model], batch(), **search, use_cache=False)[0], cached)


def test_batched_equals_one_by_one(model):
    inputs, search = batch(), {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 10, "eos_token_id": MANY}
    together = model.generate(**inputs, **search)[:, inputs["input_ids"].shape[1] :]
    for row in range(4):
        single = alone(inputs, row)
        answers = model.generate(**single, **search)[:, single["input_ids"].shape[1] :]
        assert torch.equal(together[2 * row : 2 * row + 2, : answers.shape[1]], answers)
        assert (together[2 * row : 2 * row + 2, answers.shape[1] :] == MANY[0]).all()


def test_one_beam_is_greedy_search(model):
    assert torch.equal(model.generate(**batch(), num_beams=1), model.generate(**batch()))


def test_scores_are_what_the_model_gives_the_sequences(model):
    """log P of the new tokens in one pass over each whole sequence, divided by their number ** length_penalty."""
    inputs, penalty = batch((2,), (5,)), 0.7
    P = inputs["input_ids"].shape[1]
    search = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": penalty, "eos_token_id": MANY}
    output = model.generate(**inputs, **search, **EVERYTHING)
    for ids, indices, score in zip(output.sequences, output.beam_indices, output.sequences_scores, strict=True):
        length = int((indices >= 0).sum())
        images = {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask")}
        with torch.no_grad():
            logits = model(input_ids=ids[None, : P + length], **images).logits[0, P - 1 : -1]
        tokens = logits.log_softmax(-1).gather(1, ids[P : P + length, None])
        torch.testing.assert_close(tokens.sum() / length**penalty, score, rtol=1e-5, atol=1e-5)
        found = [output.scores[step][row, ids[P + step]] for step, row in enumerate(indices[:length])]
        torch.testing.assert_close(torch.stack(found), tokens[:, 0], rtol=1e-4, atol=1e-4)
    assert (output.sequences_scores.diff() <= 0).all()


# ---- What is run, and what is kept ----


def test_images_and_prompt_are_run_once_for_each_row(model, monkeypatch):
    inputs, runs, tower = batch(), [], []
    forward, see = model.forward, model.model.vision_model.forward

    def counted(**kwargs):
        runs.append((kwargs["input_ids"].shape, "pixel_values" in kwargs))
        return forward(**kwargs)

    def counted_tower(pixels, *args):
        tower.append(len(pixels))
        return see(pixels, *args)

    monkeypatch.setattr(model, "forward", functools.wraps(forward)(counted))
    monkeypatch.setattr(model.model.vision_model, "forward", counted_tower)
    model.generate(**inputs, num_beams=5, max_new_tokens=4, eos_token_id=None)
    assert runs == [(inputs["input_ids"].shape, True), *[((20, 1), False)] * 3]
    assert tower == [6]  # 0 + 1 + 2 + 3 pictures


def test_a_cache_of_the_callers_keeps_the_prompt_for_more(model):
    """The beams go on in a copy: the same cache serves the next call, which has nothing to run but one token."""
    inputs = batch()
    P = inputs["input_ids"].shape[1]
    search = {"num_beams": 3, "max_new_tokens": 6}
    expected = model.generate(**inputs, **search)
    cache = model.new_cache(4, P)
    output = model.generate(**inputs, **search, past_key_values=cache, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert (cache.batch, cache.length) == (4, P)
    assert (output.past_key_values.batch, output.past_key_values.slots) == (12, P + 6)
    cache.crop(P - 1)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(**text, **search, past_key_values=cache), expected)


def filled() -> KVCache:
    cache = KVCache(layers=2, batch=2, heads=3, slots=5, width=4)
    cache.data.fill_(-1)  # fresh memory may hold NaN, which equals nothing
    for layer in range(2):
        k = torch.randn(2, 3, 4, 4)
        cache.update(layer, k, -k)
    cache.advance(4)
    cache.cross = [(torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 4))]
    cache.cross_seen = torch.tensor([[[True, False]], [[True, True]]])
    return cache


def test_an_expanded_cache_holds_each_row_several_times():
    cache = filled()
    before, seen = cache.data.clone(), cache.cross_seen
    wide = cache.expand(3, slots=9)
    assert (wide.batch, wide.slots, wide.length) == (6, 9, 4)
    for row in range(6):
        assert torch.equal(wide.data[:, :, row, :, :4], before[:, :, row // 3, :, :4])
        assert torch.equal(wide.cross[0][1][row], cache.cross[0][1][row // 3])
        assert torch.equal(wide.cross_seen[row], seen[row // 3])
    wide.update(0, torch.ones(6, 3, 5, 4), torch.ones(6, 3, 5, 4))
    assert torch.equal(cache.data, before)
    assert (cache.batch, cache.length, cache.cross_seen) == (2, 4, seen)


def test_a_reordered_cache_leaves_what_is_shared():
    cache, rows = filled(), torch.tensor([1, 0])
    before, pictures = cache.data.clone(), cache.cross[0][0]
    cache.reorder(rows, shared=3)
    assert torch.equal(cache.data[..., :3, :], before[..., :3, :])
    assert torch.equal(cache.data[..., 3:4, :], before[:, :, rows, :, 3:4])
    assert cache.cross[0][0] is pictures
    cache.reorder(rows)
    assert torch.equal(cache.data[..., :3, :], before[:, :, rows, :, :3])
    assert torch.equal(cache.cross[0][0], pictures[rows])
    assert cache.cross_seen.tolist() == [[[True, True]], [[True, False]]]


def test_beams_record_no_gradients(model):
    output = model.generate(**batch(), num_beams=2, max_new_tokens=2, **EVERYTHING)
    assert not output.sequences_scores.requires_grad
    assert not output.past_key_values.data.requires_grad
    assert torch.is_grad_enabled()


def test_seeds_draw_beams_too(model):
    search = {"num_beams": 3, "do_sample": True, "max_new_tokens": 8, "temperature": 3.0}
    first = model.generate(**batch(), **search, seed=1)
    assert torch.equal(model.generate(**batch(), **search, seed=1), first)
    assert not torch.equal(model.generate(**batch(), **search, seed=2), first)


def test_without_eos_ids_the_pad_id_fills(model):
    """Only rules of the caller's end a beam then. The reference writes −1 here, which no tokenizer decodes."""
    search = {"num_beams": 3, "num_return_sequences": 3, "eos_token_id": None, "stopping_criteria": [ends_in_five]}
    output = model.generate(**batch(), **search, max_new_tokens=12, return_dict_in_generate=True)
    new = output.sequences[:, -output.beam_indices.shape[1] :]
    assert (output.beam_indices < 0).any()
    assert (new[output.beam_indices < 0] == PAD).all()


def test_time_ends_beams(model):
    answer = model.generate(torch.tensor([[8, 9]]), num_beams=3, max_time=0, eos_token_id=None)
    assert answer.shape == (1, 3)


def test_logits_that_are_not_finite_name_the_prompt(model, monkeypatch):
    head = model.lm_head.forward

    def broken(x):
        logits = head(x)
        if len(x) == 6:
            logits[5] = float("nan")
        return logits

    monkeypatch.setattr(model.lm_head, "forward", broken)
    with pytest.raises(ValueError, match="logits of row 1 are not finite at new token 2"):
        model.generate(torch.tensor([[8, 9], [8, 9]]), num_beams=3, eos_token_id=None)


def test_beams_cannot_be_streamed(model):
    with pytest.raises(ValueError, match="a stream has neither"):
        loop.stream(model, torch.tensor([[8, 9]]), num_beams=2)
