"""Generation against transformers on tiny random Idefics2 models, and every rule on tables worked out by hand."""

import copy
import functools
import time

import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from oracle_generation import EOS, IMAGE, PAD, V, alone, batch, both, oracle, twins
from transformers.generation import logits_process, stopping_criteria

from minivlm.generation import loop, sampling, stopping
from minivlm.generation import settings as generation_config
from minivlm.generation.settings import GenerationConfig
from minivlm.generation.steps import decode_step, forward, positions
from minivlm.text.tokenizer import Tokenizer

NEGATIVE = float("-inf")


@pytest.fixture(scope="module", params=[None, 4], ids=["full", "window"])
def pair(request, tmp_path_factory):
    """(reference, ours) with the same weights; the window of 4 is shorter than every prompt."""
    return twins(oracle(request.param), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Our model alone, for what needs no reference."""
    return twins(oracle(None), tmp_path_factory.mktemp("alone"))[1]


# ---- The rules, by hand ----

LOG_PROBABILITIES = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()


@pytest.mark.parametrize(("p", "kept"), [(0.4, 1), (0.5, 2), (0.7, 2), (0.9, 3), (0.95, 4), (0.0, 1)])
def test_top_p_keeps_the_token_that_crosses_p(p, kept):
    scores = sampling.top_p(LOG_PROBABILITIES, p)
    assert torch.equal(scores[:, :kept], LOG_PROBABILITIES[:, :kept])
    assert (scores[:, kept:] == NEGATIVE).all()


def test_top_k_keeps_ties():
    scores = sampling.top_k(torch.tensor([[1.0, 1.0, 1.0, 0.0]]), 2)
    assert scores.tolist() == [[1, 1, 1, NEGATIVE]]


def test_top_k_larger_than_the_vocabulary_keeps_all():
    assert torch.equal(sampling.top_k(LOG_PROBABILITIES, 50), LOG_PROBABILITIES)


def test_min_p_measures_from_the_likeliest():
    assert (sampling.min_p(LOG_PROBABILITIES, 0.4) > NEGATIVE).tolist() == [[True, True, True, False]]
    assert (sampling.min_p(LOG_PROBABILITIES, 0.6) > NEGATIVE).tolist() == [[True, True, False, False]]
    assert (sampling.min_p(LOG_PROBABILITIES, 1.0) > NEGATIVE).tolist() == [[True, False, False, False]]


def test_repetition_penalty_divides_positive_and_multiplies_negative_scores_once():
    scores = sampling.repetition_penalty(torch.tensor([[2.0, -1.0, 3.0]]), torch.tensor([[0, 1, 1, 0]]), 2.0)
    assert scores.tolist() == [[1, -2, 3]]


def test_repetition_penalty_leaves_out_left_pads():
    ids = torch.tensor([[0, 0, 1, 3], [0, 2, 1, 3]])
    scores = sampling.repetition_penalty(torch.ones(2, 4), ids, 2.0, padding=torch.tensor([2, 0]))
    assert scores.tolist() == [[1, 0.5, 1, 0.5], [0.5, 0.5, 0.5, 0.5]]


def test_repetition_penalty_ignores_ids_that_have_no_score():
    assert sampling.repetition_penalty(torch.ones(1, 2), torch.tensor([[5, 0]]), 2.0).tolist() == [[0.5, 1]]


def test_bad_words_match_the_end_of_each_row():
    words = [torch.tensor(word) for word in ([3], [1, 4], [0, 1, 5], [2, 2, 2, 2])]
    scores = sampling.ban_words(torch.zeros(2, 6), torch.tensor([[0, 1], [1, 1]]), words)
    assert (scores == NEGATIVE).nonzero().tolist() == [[0, 3], [0, 4], [0, 5], [1, 3], [1, 4]]


def test_a_bad_word_longer_than_the_prompt_waits():
    assert not sampling.ban_words(torch.zeros(1, 4), torch.tensor([[2]]), [torch.tensor([2, 2, 3])]).any()


def test_typical_p_prefers_tokens_as_surprising_as_the_average():
    scores = sampling.typical_p(LOG_PROBABILITIES, 0.5)  # the entropy is 1.28, the surprises 0.92, 1.20, 1.61, 2.30
    assert (scores > NEGATIVE).tolist() == [[False, True, True, False]]


def test_epsilon_and_eta_cut_below_a_probability():
    assert (sampling.epsilon_cutoff(LOG_PROBABILITIES, 0.15) > NEGATIVE).tolist() == [[True, True, True, False]]
    # sqrt(0.5) · exp(-1.28) = 0.197
    assert (sampling.eta_cutoff(LOG_PROBABILITIES, 0.5) > NEGATIVE).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("rule", ["top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_k"])
def test_at_least_so_many_tokens_are_kept(rule):
    scores = getattr(sampling, rule)(torch.tensor([[4.0, 9.0, 3.0, 1.0]]), 1 if rule == "top_k" else 0.99, keep=3)
    assert (scores > NEGATIVE).sum() >= 3


def test_ngrams_are_not_repeated():
    ids = torch.tensor([[5, 1, 2, 3, 1], [1, 2, 1, 2, 1]])

    def banned(n):
        return (sampling.no_repeat_ngram(torch.zeros(2, 6), ids, n) == NEGATIVE).nonzero().tolist()

    assert banned(2) == [[0, 2], [1, 2]]
    assert banned(3) == [[1, 2]]
    assert banned(1) == [[0, 1], [0, 2], [0, 3], [0, 5], [1, 1], [1, 2]]
    assert banned(6) == []


def test_no_row_ends_early():
    ids = torch.tensor([[1, 2]])
    assert sampling.ban_early_end(torch.zeros(1, 3), ids, torch.tensor([0, 2]), 3).tolist() == [[NEGATIVE, 0, NEGATIVE]]
    assert sampling.ban_early_end(torch.zeros(1, 3), ids, torch.tensor([0, 2]), 2).tolist() == [[0, 0, 0]]


def test_rules_come_in_the_reference_order():
    everything = GenerationConfig(
        repetition_penalty=1.5, bad_words_ids=[[0]], do_sample=True, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1
    )
    scores, ids = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]]), torch.tensor([[1]])
    for rule in sampling.logits_rules(everything, 5, None, "cpu"):
        scores = rule(scores, ids)
    # 4 / 1.5; 5 banned; (2.67, 3, 2, 1) / 0.5; the top 3 have probabilities 0.31, 0.61, 0.08, and 0.08 is below 1 - p
    assert scores.tolist() == [[NEGATIVE, pytest.approx(16 / 3), 6, NEGATIVE, NEGATIVE]]


def test_greedy_search_has_no_sampling_rules():
    assert not sampling.logits_rules(GenerationConfig(temperature=0.5, top_k=3, top_p=0.5, min_p=0.5), 9, None, "cpu")


def test_a_bad_word_that_is_an_eos_id_is_not_banned():
    config = GenerationConfig(bad_words_ids=[[3], [4]], eos_token_id=[3, 8])
    (rule,) = sampling.logits_rules(config, 9, None, "cpu")
    assert (rule(torch.zeros(1, 9), torch.tensor([[1]])) == NEGATIVE).nonzero().tolist() == [[0, 4]]


scores_of = st.lists(st.integers(-8, 8), min_size=V, max_size=V).map(lambda row: torch.tensor([row]) / 2)  # many ties
probability = st.floats(0, 1).map(lambda x: round(x, 3))


inside = st.floats(0.001, 0.999)


@settings(max_examples=60, deadline=None)
@given(scores_of, st.integers(1, V + 5), probability, probability, inside, st.integers(1, 4), st.booleans())
def test_sampling_rules_equal_the_reference(scores, k, p, floor, cut, keep, banned):
    if banned:  # by an earlier rule
        scores[:, ::3] = NEGATIVE
    rules = [
        (sampling.top_k, logits_process.TopKLogitsWarper, k),
        (sampling.top_p, logits_process.TopPLogitsWarper, p),
        (sampling.min_p, logits_process.MinPLogitsWarper, floor),
        (sampling.typical_p, logits_process.TypicalLogitsWarper, cut),
        (sampling.epsilon_cutoff, logits_process.EpsilonLogitsWarper, cut),
        (sampling.eta_cutoff, logits_process.EtaLogitsWarper, cut),
    ]
    for ours, theirs, value in rules:
        expected = theirs(value, min_tokens_to_keep=keep)(None, scores)
        assert torch.equal(ours(scores, value, keep), expected), ours.__name__


@settings(max_examples=40, deadline=None)
@given(scores_of, st.data())
def test_rules_equal_the_reference(scores, data):
    ids = torch.tensor([data.draw(st.lists(st.integers(0, V - 1), min_size=3, max_size=9))])
    padding = torch.tensor([data.draw(st.integers(0, 3))])
    penalty = data.draw(st.floats(0.1, 3))
    theirs = logits_process.RepetitionPenaltyLogitsProcessor(penalty, padding)(ids, scores.clone())
    assert torch.equal(sampling.repetition_penalty(scores, ids, penalty, padding), theirs)
    words = data.draw(st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=3), min_size=1, max_size=5))
    words.append([*ids[0, -2:].tolist(), 3])
    theirs = logits_process.NoBadWordsLogitsProcessor(words, [])(ids, scores)
    assert torch.equal(sampling.ban_words(scores, ids, [torch.tensor(word) for word in words]), theirs)
    few = torch.tensor([data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=12))])
    n = data.draw(st.integers(1, 4))
    theirs = logits_process.NoRepeatNGramLogitsProcessor(n)(few, scores)
    assert torch.equal(sampling.no_repeat_ngram(scores, few, n), theirs)
    theirs = logits_process.MinLengthLogitsProcessor(n, [3, 5])(few, scores)
    assert torch.equal(sampling.ban_early_end(scores, few, torch.tensor([3, 5]), n), theirs)


def test_positions_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


# ---- The ends of answers ----

PIECES = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in "é€\na".encode()), *"▁stop.abcdefé€\n"]
PIECES += ["st", "op", "sto", "pper", "▁stop", "▁st", "opera", "top", "aa", "▁a", "abcdef"]
GPT_PIECES = ["<s>", "</s>", *"stopabcdefÃ©âĤ¬Ċ.", "Ġ", "st", "op", "Ġst", "opera", "Ã©", "Ċa", "abcdef"]
STRINGS = ["stop", " stop", "é", "é€", "op.", "aaa", "a a", "\n", "</s>", "pé"]


def tokenizer_of(pieces, decoder):
    """The same vocabulary for the reference and for us; the reference's rule wants to see "abcdef" in it."""
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.decoder = decoder
    backend.add_special_tokens(["<s>", "</s>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend), Tokenizer(backend)


def llama_tokenizers():
    parts = tokenizers.decoders
    decoder = [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    return tokenizer_of(PIECES, parts.Sequence(decoder))


def gpt_tokenizers():
    return tokenizer_of(GPT_PIECES, tokenizers.decoders.ByteLevel())


@pytest.mark.parametrize("make", [llama_tokenizers, gpt_tokenizers], ids=["llama", "gpt"])
def test_stop_strings_are_found_as_by_the_reference(make):
    """Across token borders, with bytes that are half a character, and running on behind the string."""
    theirs, ours = make()
    assert ours.decode([ours.backend.token_to_id(piece) for piece in ("a", "st", "op")]) == "astop"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(ours), (2000, 6), generator=generator)
    ids[:, 0] = 0  # <s>: at the very beginning decoders drop blanks, the reference's rule does not
    ids = ids[["\ufffd" not in text for text in ours.batch_decode(ids)]]  # it also finds strings in broken bytes
    found = 0
    for strings in [[string] for string in STRINGS] + [["stop", "é"]]:
        expected = stopping_criteria.StopStringCriteria(theirs, strings)(ids, None)
        assert torch.equal(stopping.at_strings(ids, strings, ours.decode), expected), strings
        found += expected.sum()
    assert found > 100


@pytest.mark.parametrize("strings", [["\n"], ["€\n", "aé"], ["éé"]], ids=ascii)
def test_stop_strings_are_found_in_text_of_single_bytes(strings):
    """As Llama's vocabulary writes whatever is not in it; a window may begin inside a character."""
    theirs, ours = llama_tokenizers()
    rule = stopping_criteria.StopStringCriteria(theirs, strings)
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        text = "".join("é€\na"[i] for i in torch.randint(4, (8,), generator=random))
        row = [0, *(ours.backend.token_to_id(f"<0x{byte:02X}>") for byte in text.encode())]
        for end in range(2, len(row) + 1):
            ids = torch.tensor([row[:end]])
            assert torch.equal(stopping.at_strings(ids, strings, ours.decode), rule(ids, None)), (text, end)


def test_stop_strings_end_rows_of_the_answer(pair):
    """Strings are cut out of what the model writes anyway; the third begins in the prompt. Ended rows are filled."""
    pieces = ["<s>", "</s>", *"abcdef", *(f"{chr(103 + i // 10)}{i % 10}" for i in range(V - 8))]
    theirs, ours = tokenizer_of(pieces, tokenizers.decoders.Fuse())
    inputs = batch()
    answer = pair[1].generate(**inputs, max_new_tokens=10)[:, inputs["input_ids"].shape[1] :]
    strings = [ours.decode(answer[0, 3:5])[1:], ours.decode(answer[2, 5]), ours.decode([inputs["input_ids"][1, -1]])]
    strings[2] += ours.decode(answer[1, 0])[:1]
    stop = {"stop_strings": strings, "max_new_tokens": 10}
    expected = pair[0].generate(**inputs, **stop, tokenizer=theirs)
    found = pair[1].generate(**inputs, **stop, tokenizer=ours)
    assert torch.equal(found, expected)
    new = found[:, inputs["input_ids"].shape[1] :]
    assert (new[0, 5:] == PAD).all()
    assert (new[1, 1:] == PAD).all()
    assert torch.equal(pair[1].generate(**inputs, **stop, tokenizer=theirs), found)  # any tokenizer that decodes
    expected = pair[0].generate(**inputs, **stop, tokenizer=theirs, eos_token_id=None)
    assert torch.equal(pair[1].generate(**inputs, **stop, tokenizer=ours, eos_token_id=None), expected)


def test_time_ends_an_answer_after_a_token_at_least(model):
    ids = torch.tensor([[8, 9]])
    assert model.generate(ids, max_time=0, eos_token_id=None).shape == (1, 3)
    assert model.generate(ids, max_time=1000, eos_token_id=None, max_new_tokens=5).shape == (1, 7)
    slow = [lambda ids, scores: time.sleep(0.05) or scores]
    assert model.generate(ids, max_time=0.12, logits_processor=slow, eos_token_id=None).shape[1] < 7


# ---- Whole answers, against the reference ----


def favour_sevens(ids, scores):
    return scores + 3 * (torch.arange(V) % 7 == 0) * (ids[:, -1:] % 2)


def few_allowed(row, ids):
    """By the row, the newest id and how far the text is."""
    return [7, 11, *range(20 + row, 60, 2 + int(ids[-1]) % 3)] if len(ids) % 4 else [30 + row, 5]


def ends_in_five(ids, scores):
    return ids[:, -1] % 5 == 0


SETTINGS = {
    "greedy": {"max_new_tokens": 16},
    "default limit": {},
    "max_length": {"max_length": 30},
    "both limits": {"max_length": 30, "max_new_tokens": 3},
    "penalty": {"max_new_tokens": 16, "repetition_penalty": 1.4},
    "reward": {"max_new_tokens": 16, "repetition_penalty": 0.8},
    "bad words": {"max_new_tokens": 16, "bad_words_ids": [[IMAGE], [21], [30, 2], [7]]},
    "one eos": {"max_new_tokens": 16, "eos_token_id": 11},
    "many eos": {"max_new_tokens": 16, "eos_token_id": list(range(10, 40))},
    "pad is eos": {"max_new_tokens": 16, "eos_token_id": list(range(10, 40)), "pad_token_id": None},
    "no eos": {"max_new_tokens": 16, "eos_token_id": None},
    "ngrams": {"max_new_tokens": 16, "no_repeat_ngram_size": 2},
    "unigrams": {"max_new_tokens": 16, "no_repeat_ngram_size": 1},
    "least new": {"max_new_tokens": 16, "min_new_tokens": 9, "eos_token_id": list(range(10, 60))},
    "least length": {"max_new_tokens": 16, "min_length": 24, "eos_token_id": list(range(10, 60))},
    "both least": {"max_new_tokens": 9, "min_length": 50, "min_new_tokens": 2, "eos_token_id": list(range(10, 60))},
    "own rule": {"max_new_tokens": 16, "logits_processor": [favour_sevens], "repetition_penalty": 1.2},
    "prefix": {"max_new_tokens": 16, "prefix_allowed_tokens_fn": few_allowed, "bad_words_ids": [[7], [21], [30], [5]]},
    "prefix, samples": {"do_sample": True, "num_return_sequences": 2, "prefix_allowed_tokens_fn": few_allowed},
    "no invalid": {"remove_invalid_values": True, "bad_words_ids": [[21], [30, 2]]},
    "own end": {"max_new_tokens": 16, "stopping_criteria": [ends_in_five]},
    "own end, no eos": {"max_new_tokens": 16, "stopping_criteria": [ends_in_five], "eos_token_id": None},
    "samples": {"max_new_tokens": 16, "do_sample": True, "num_return_sequences": 3, "repetition_penalty": 1.2},
    "sample typical": {"max_new_tokens": 16, "do_sample": True, "typical_p": 0.6, "temperature": 2.0, "top_k": 0},
    "sample epsilon": {"max_new_tokens": 16, "do_sample": True, "epsilon_cutoff": 0.03, "temperature": 3.0},
    "sample eta": {"max_new_tokens": 16, "do_sample": True, "eta_cutoff": 0.2, "temperature": 3.0},
    "sample": {"max_new_tokens": 16, "do_sample": True},
    "sample all": {"max_new_tokens": 16, "do_sample": True, "top_k": 0},
    "sample hot": {"max_new_tokens": 16, "do_sample": True, "temperature": 3.0, "top_k": None, "top_p": 0.9},
    "sample min_p": {"max_new_tokens": 16, "do_sample": True, "temperature": 2.0, "min_p": 0.05, "top_k": 20},
    "sample everything": {
        **{"max_new_tokens": 16, "do_sample": True, "temperature": 2.5, "top_k": 30, "top_p": 0.95, "min_p": 0.01},
        **{"repetition_penalty": 1.2, "bad_words_ids": [[IMAGE], [PAD]], "eos_token_id": list(range(10, 16))},
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_ids_equal_the_reference(pair, name):
    """Rows of different lengths with 0 to 3 images, greedy and sampled."""
    theirs, ours = both(pair, batch(), **SETTINGS[name])
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["greedy", "sample everything"])
def test_text_only_ids_equal_the_reference(pair, name):
    theirs, ours = both(pair, batch(counts=(0, 0), lengths=(9, 4)), **SETTINGS[name])
    assert torch.equal(ours, theirs)


def test_settings_of_a_config_equal_the_reference(pair):
    """A config argument fills what it leaves open from the checkpoint's: here the eos ids and the pad id."""
    given = {"max_new_tokens": 12, "repetition_penalty": 1.3}
    inputs = batch()
    theirs = pair[0].generate(**inputs, generation_config=transformers.GenerationConfig(**given))
    assert torch.equal(pair[1].generate(**inputs, generation_config=GenerationConfig(**given)), theirs)


@pytest.mark.parametrize(("eos", "pad"), [(EOS, PAD), (EOS, None), (None, PAD), ([PAD, 7], PAD)])
def test_a_missing_mask_is_inferred_as_by_the_reference(pair, eos, pad):
    ids = batch(counts=(0, 0), lengths=(9, 4))["input_ids"]
    theirs, ours = both(pair, {"input_ids": ids}, max_new_tokens=8, eos_token_id=eos, pad_token_id=pad)
    assert torch.equal(ours, theirs)


def test_a_lone_prompt_may_hold_the_pad_id(pair):
    theirs, ours = both(pair, {"input_ids": torch.tensor([[PAD, PAD, 1, 8, 9]])}, max_new_tokens=8)
    assert torch.equal(ours, theirs)


def test_prompts_padded_on_the_right_warn_and_equal_the_reference(pair):
    inputs = {
        "input_ids": torch.tensor([[8, 9, PAD], [8, 9, 10]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    }
    with pytest.warns(UserWarning, match="ends in padding"):
        ours = pair[1].generate(**inputs, max_new_tokens=8)
    assert torch.equal(ours, both(pair, inputs, max_new_tokens=8)[0])


def test_without_ids_the_answer_starts_from_bos(pair):
    theirs, ours = both(pair, {}, max_new_tokens=8)
    assert torch.equal(ours, theirs)
    assert ours[0, 0] == 1


EARLY = {"eos_token_id": list(range(10, 60))}
LIMITS = [{"max_new_tokens": 6}, {"max_length": 12}, {}, {"min_length": 14} | EARLY, {"min_new_tokens": 5} | EARLY]


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_embeddings_give_the_new_tokens_only(pair, limit):
    ids = batch(counts=(0,), lengths=(9,))["input_ids"]
    model = pair[1]
    embeds = model.model.text_model.embed_tokens(ids).detach()
    theirs, ours = both(pair, {"inputs_embeds": embeds}, **limit)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, model.generate(ids, **limit)[:, 9:])


def test_streamer_gets_what_the_reference_gives_it(pair):
    class Collect:
        def __init__(self):
            self.pieces = []

        def put(self, value):
            self.pieces.append(value.tolist())

        def end(self):
            self.pieces.append("end")

    collected = []
    for model in pair:
        collected.append(Collect())
        model.generate(**batch(), max_new_tokens=6, streamer=collected[-1])
    assert collected[1].pieces == collected[0].pieces


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 0}], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), NEGATIVE])
def test_invalid_values_are_removed_as_by_the_reference(pair, monkeypatch, value, search):
    for model in pair:
        head = model.lm_head.forward
        monkeypatch.setattr(
            model.lm_head, "forward", lambda x, head=head: head(x).index_fill(-1, torch.tensor([9, 40]), value)
        )
    kept = {"return_dict_in_generate": True, "output_scores": True}
    theirs, ours = both(pair, batch(), **search, **kept, remove_invalid_values=True, max_new_tokens=6)
    assert torch.equal(ours.sequences, theirs.sequences)
    for found, expected in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def model_and_twin(tmp_path_factory):
    return twins(oracle(None), tmp_path_factory.mktemp("layers"))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", ["greedy", "many eos", "samples", "sample everything"])
def test_transition_scores_equal_the_reference(model_and_twin, name, normalize):
    kept = {"return_dict_in_generate": True, "output_scores": True}
    scores = []
    for model, output in zip(model_and_twin, both(model_and_twin, batch(), **SETTINGS[name], **kept), strict=True):
        scores.append(model.compute_transition_scores(output.sequences, output.scores, normalize_logits=normalize))
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-4)


def test_an_output_is_also_a_tuple_and_a_dict(model):
    output = model.generate(torch.tensor([[8, 9]]), return_dict_in_generate=True, output_scores=True)
    assert output["sequences"] is output[0] is output.sequences
    assert output["scores"] is output[1] is output.scores


@pytest.mark.parametrize("name", ["greedy", "many eos", "samples", "sample everything", "own rule"])
def test_outputs_equal_the_reference(pair, name):
    """With names for the parts; 1e-5 of the largest logit is what float32 sums in another order come to."""
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    theirs, ours = both(pair, batch(), **SETTINGS[name], **wanted)
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        expected, found = getattr(theirs, name), getattr(ours, name)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a == NEGATIVE, b == NEGATIVE)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * theirs.logits[0].abs().max().item())
    assert ours.past_key_values.length == theirs.past_key_values.get_seq_length()
    assert ours.sequences_scores is ours.beam_indices is None


def test_outputs_hold_what_was_asked_for(model):
    output = model.generate(torch.tensor([[8, 9]]), return_dict_in_generate=True, max_new_tokens=3)
    assert output.sequences.shape == (1, 5)
    assert output.scores is output.logits is None


def test_own_functions_see_ids_and_scores(model):
    seen = []

    def rule(ids, scores):
        assert ids.shape == (2, 2 + len(seen))
        assert scores.dtype == torch.float32
        scores[:, 11:] = NEGATIVE  # in place, as many do; the logits stay as they were
        return scores

    def end(ids, scores):
        seen.append(None if scores is None else len(scores))
        return len(seen) == 3  # one answer for all rows

    kwargs = {"logits_processor": [rule], "stopping_criteria": [end], "eos_token_id": None}
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    output = model.generate(torch.tensor([[8, 9], [8, 10]]), **kwargs, **wanted)
    assert output.sequences.shape == (2, 5)
    assert (output.sequences[:, 2:] < 11).all()
    assert seen == [1, 2, 3]
    assert torch.stack(output.logits).isfinite().all()
    seen.clear()
    model.generate(torch.tensor([[8, 9], [8, 10]]), **kwargs)
    assert seen == [None] * 3


SEARCHES = [{}, {"do_sample": True, "num_return_sequences": 3, "seed": 2}, {"num_beams": 3, "num_return_sequences": 3}]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_rows_know_why_they_ended(model, search):
    """By an eos id, its last token; or cut at the limit, even if the text would have ended one token later."""
    inputs, ends = batch(), list(range(10, 30))
    output = model.generate(
        **inputs, **search, max_new_tokens=6, eos_token_id=ends, pad_token_id=PAD, return_dict_in_generate=True
    )
    new = output.sequences[:, inputs["input_ids"].shape[1] :]
    expected = ["stop" if set(row) & set(ends) else "length" for row in new.tolist()]
    assert output.finish_reasons == expected
    assert set(expected) == {"stop", "length"}
    if "num_beams" not in search:
        steps = loop.stream(model, **inputs, **search, max_new_tokens=6, eos_token_id=ends, pad_token_id=PAD)
        assert steps.finish_reasons == ["length"] * len(new)
        assert torch.equal(torch.stack(list(steps), 1), new)
        assert steps.finish_reasons == expected


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_time": 0}, "time"),
        ({"max_length": 3}, "length"),
        ({"max_new_tokens": 1, "eos_token_id": list(range(V))}, "stop"),  # at the limit, and ended all the same
        ({"stopping_criteria": [lambda ids, scores: ids.shape[1] >= 4]}, "stop"),
    ],
    ids=["time", "length", "both", "own"],
)
def test_limits_cut_and_rules_end(model, search, limits, reason):
    given = {"eos_token_id": None, "return_dict_in_generate": True, **limits}
    output = model.generate(torch.tensor([[8, 9]]), **search, **given)
    assert output.finish_reasons == [reason] * len(output.sequences)


# ---- Twins: different ways to the same ids ----


@pytest.mark.parametrize("name", ["greedy", "penalty", "sample everything", "samples"])
def test_cached_equals_uncached(pair, name):
    torch.manual_seed(3)
    cached = pair[1].generate(**batch(), **SETTINGS[name])
    torch.manual_seed(3)
    assert torch.equal(pair[1].generate(**batch(), **SETTINGS[name], use_cache=False), cached)


def test_cached_logits_equal_uncached_logits(pair):
    """Not only the ids: 2e-6 of the largest logit is a few float32 roundings of sums taken in another order."""
    model, inputs = pair[1], batch()
    mask, images = inputs["attention_mask"], {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask")}
    token = torch.tensor([8, 9, 10, 11])
    with torch.no_grad():
        cache = model.new_cache(4, mask.shape[1] + 1)
        forward(model, inputs["input_ids"], cache, mask, positions(mask), **images)
        longer = torch.cat([mask, mask.new_ones(4, 1)], 1)
        cached = decode_step(model, token, cache, positions(longer)[:, -1], longer).logits[:, -1]
        ids = torch.cat([inputs["input_ids"], token[:, None]], 1)
        whole = forward(model, ids, None, longer, positions(longer), **images).logits[:, -1]
    assert (cached - whole).abs().max() <= 2e-6 * whole.abs().max()


@pytest.mark.parametrize("name", ["greedy", "penalty", "bad words", "many eos"])
def test_batched_equals_one_by_one(pair, name):
    inputs = batch()
    together = pair[1].generate(**inputs, **SETTINGS[name])[:, inputs["input_ids"].shape[1] :]
    for row in range(4):
        single = alone(inputs, row)
        answer = pair[1].generate(**single, **SETTINGS[name])[0, single["input_ids"].shape[1] :]
        assert torch.equal(together[row, : len(answer)], answer)
        assert (together[row, len(answer) :] == PAD).all()


def test_samples_of_one_prompt_share_its_images_and_its_prefill(model, monkeypatch):
    inputs, runs = batch(), []
    forward = model.forward

    def counted(**kwargs):
        runs.append((kwargs["input_ids"].shape, "pixel_values" in kwargs))
        return forward(**kwargs)

    kwargs = {"do_sample": True, "seed": 1, "max_new_tokens": 3, "eos_token_id": None}
    monkeypatch.setattr(model, "forward", functools.wraps(forward)(counted))
    together = model.generate(**inputs, **kwargs, num_return_sequences=3)
    assert runs == [(inputs["input_ids"].shape, True), ((12, 1), False), ((12, 1), False)]
    many = {name: value.repeat_interleave(3, 0) for name, value in inputs.items()}
    assert torch.equal(model.generate(**many, **kwargs), together)


@pytest.mark.parametrize("name", ["greedy", "many eos", "sample everything", "samples", "own end"])
def test_streamed_equals_returned(pair, name):
    inputs = batch()
    returned = pair[1].generate(**inputs, **SETTINGS[name], seed=7 if "sample" in name else None)
    steps = list(loop.stream(pair[1], **inputs, **SETTINGS[name], seed=7 if "sample" in name else None))
    assert torch.equal(torch.stack(steps, 1), returned[:, inputs["input_ids"].shape[1] :])


def test_a_cache_goes_on_where_it_stopped(pair):
    """3 + 5 tokens over one cache are the 8 of one run."""
    model, inputs = pair[1], batch()
    P = inputs["input_ids"].shape[1]
    whole = model.generate(**inputs, max_new_tokens=8, eos_token_id=None)
    cache = model.new_cache(4, P + 8)
    first = model.generate(**inputs, past_key_values=cache, max_new_tokens=3, eos_token_id=None)
    assert cache.length == P + 2
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, 3, dtype=torch.long)], 1)
    again = model.generate(first, attention_mask=mask, past_key_values=cache, max_new_tokens=5, eos_token_id=None)
    assert torch.equal(again, whole)


def test_a_returned_cache_goes_on_for_one_token(model):
    """3 + 1 == 4. It was made for 3 new tokens, the last of which has not been run."""
    ids, kwargs = torch.tensor([[8, 9, 10]]), {"eos_token_id": None, "return_dict_in_generate": True}
    whole = model.generate(ids, max_new_tokens=4, **kwargs).sequences
    first = model.generate(ids, max_new_tokens=3, **kwargs)
    again = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=1, **kwargs)
    assert torch.equal(again.sequences, whole)


def test_own_positions_replace_those_of_the_mask(pair):
    ids = torch.tensor([[8, 9, 10, 11]])
    theirs, ours = both(pair, {"input_ids": ids, "position_ids": torch.tensor([[3, 4, 5, 9]])}, max_new_tokens=8)
    assert torch.equal(ours, theirs)


# ---- Randomness, limits, settings ----


def test_seeds_and_generators_are_reproducible_and_leave_torch_alone(model):
    ids, kwargs = torch.tensor([[8, 9, 10]]), {"do_sample": True, "max_new_tokens": 12, "temperature": 3.0}
    state = torch.random.get_rng_state()
    first = model.generate(ids, seed=1, **kwargs)
    assert torch.equal(model.generate(ids, seed=1, **kwargs), first)
    assert torch.equal(model.generate(ids, generator=torch.Generator().manual_seed(1), **kwargs), first)
    assert not torch.equal(model.generate(ids, seed=2, **kwargs), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(model.generate(ids, **kwargs), first)


def test_the_default_limit_stops_where_positions_do(model):
    ids = torch.randint(8, 90, (1, 60))
    assert model.generate(ids, eos_token_id=None).shape == (1, 64)


def test_left_pads_take_no_positions(model):
    ids = torch.cat([torch.zeros(1, 80, dtype=torch.long), torch.tensor([[8, 9, 10]])], 1)
    answer = model.generate(ids, max_new_tokens=4)[:, -4:]
    assert torch.equal(answer, model.generate(ids[:, 80:], max_new_tokens=4)[:, -4:])


def test_an_image_token_that_the_model_writes_is_just_a_token(model, monkeypatch):
    def head(x):
        return torch.nn.functional.one_hot(torch.full(x.shape[:2], IMAGE), V).float()

    monkeypatch.setattr(model.lm_head, "forward", head)
    assert (model.generate(**batch(), max_new_tokens=4)[:, -4:] == IMAGE).all()


def test_generated_ids_may_be_used_in_training(model):
    ids = model.generate(torch.tensor([[8, 9]]), max_new_tokens=3)
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None
    model.zero_grad()


def test_int32_ids_do_as_well(model):
    ids = torch.tensor([[8, 9]])
    assert torch.equal(model.generate(ids.int(), repetition_penalty=1.3), model.generate(ids, repetition_penalty=1.3))


def test_steps_record_no_gradients_and_abandoned_streams_leave_them_on(model):
    cache = model.new_cache(1, 5)
    next(loop.stream(model, torch.tensor([[8, 9]]), max_new_tokens=3, past_key_values=cache))
    assert not cache.data.requires_grad
    assert torch.is_grad_enabled()


def test_scores_are_float32_whatever_the_model_computes_in(pair):
    model = copy.deepcopy(pair[1]).bfloat16()
    with torch.no_grad():
        assert loop.stream(model, torch.tensor([[8, 9]])).next_logits().dtype == torch.float32


IDEFICS2 = {
    "_from_model_config": True,
    "bad_words_ids": [[32000], [32001]],
    "bos_token_id": 1,
    "eos_token_id": [2, 32002],
    "pad_token_id": 0,
    "transformers_version": "4.39.0.dev0",
}


def test_hub_config_is_read_and_written_back():
    config = GenerationConfig.from_hub(IDEFICS2)
    assert config.eos_ids == [2, 32002]
    assert config.bad_words_ids == [[32000], [32001]]
    assert config.to_hub() == IDEFICS2
    assert GenerationConfig.from_hub({"eos_token_id": 2}).eos_ids == [2]
    assert GenerationConfig.from_hub({}) == GenerationConfig()


def test_hub_config_of_a_wrong_type_is_an_error():
    with pytest.raises(ValueError, match=r"GenerationConfig\.top_k should be int or null, found 'many'"):
        GenerationConfig.from_hub({"top_k": "many"})


def test_config_from_a_model_config_takes_the_text_ids_as_the_reference_does(model):
    config = GenerationConfig.from_model_config(model.config)
    theirs = oracle(None).generation_config
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (EOS, 1, PAD)
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (EOS, 1, PAD)


def test_numbers_of_numpy_are_numbers(model, tmp_path):
    """As settings of a call and of a config, one by one and in lists; written and read back."""
    ids = torch.tensor([[8, 9], [8, 10]])
    plain = {"max_new_tokens": 5, "repetition_penalty": 1.5, "bad_words_ids": [[3], [7, 9]], "eos_token_id": [5, 7]}
    plain |= {"do_sample": True, "temperature": 0.5, "top_k": 7, "seed": 3, "num_return_sequences": 2}
    ours = {name: np.asarray(value) if type(value) in (int, bool) else value for name, value in plain.items()}
    ours |= {"max_new_tokens": np.int64(5), "repetition_penalty": np.float32(1.5), "temperature": np.float16(0.5)}
    ours |= {"bad_words_ids": [[np.int32(3)], np.array([7, 9])], "eos_token_id": np.array([5, 7]), "seed": np.int64(3)}
    expected = model.generate(ids, **plain)
    assert torch.equal(model.generate(ids, **ours), expected)
    seed, _ = ours.pop("seed"), plain.pop("seed")
    config = GenerationConfig(**ours)
    assert config == GenerationConfig(**plain)
    assert torch.equal(model.generate(ids, generation_config=config, seed=seed), expected)
    config.top_k = np.int64(7)  # set later
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == GenerationConfig(**plain)
    with pytest.raises(ValueError, match="max_new_tokens should be an integer"):
        model.generate(ids, max_new_tokens=np.bool_(True))


def test_special_ids_outside_the_vocabulary_do_no_harm(model):
    """They are never chosen; −1 is how some files say none. What would have to be embedded is an error."""
    ids = torch.tensor([[8, 9], [8, 10]])
    expected = model.generate(ids, eos_token_id=None, pad_token_id=None, max_new_tokens=6)
    for eos in (V, [V + 1, -1], -1):
        for search in ({}, {"min_new_tokens": 3}):
            given = {"eos_token_id": eos, "pad_token_id": -1, "max_new_tokens": 6, **search}
            assert torch.equal(model.generate(ids, **given), expected)
    ends = {"eos_token_id": [int(expected[0, 4]), V], "max_new_tokens": 6, "num_beams": 2}
    assert torch.equal(model.generate(ids, **ends, pad_token_id=-1), model.generate(ids, **ends, pad_token_id=None))
    with pytest.raises(ValueError, match="pad_token_id should be one of the 99 tokens"):
        model.generate(ids, pad_token_id=V)
    with pytest.raises(ValueError, match="bos_token_id should be one of the 99 tokens"):
        model.generate(bos_token_id=V)


def test_precedence_is_call_then_argument_then_checkpoint(model, monkeypatch):
    monkeypatch.setattr(model, "generation_config", GenerationConfig(max_new_tokens=2, eos_token_id=None))
    ids, argument = torch.tensor([[8, 9]]), GenerationConfig(max_new_tokens=3)
    assert model.generate(ids).shape == (1, 4)
    assert model.generate(ids, generation_config=argument).shape == (1, 5)
    assert model.generate(ids, generation_config=argument, max_new_tokens=4).shape == (1, 6)
    model.generation_config.max_new_tokens = 5
    assert model.generate(ids).shape == (1, 7)


def test_a_config_is_written_like_the_reference_and_read_back(tmp_path):
    ours = GenerationConfig(max_new_tokens=7, do_sample=True, top_p=0.8, eos_token_id=[2, 5], stop_strings=["a"])
    ours.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == ours
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert {name: getattr(theirs, name) for name in ours.to_hub()} == ours.to_hub()
    theirs.num_beams = 3
    theirs.save_pretrained(tmp_path / "more", config_file_name="other.json")
    read = GenerationConfig.from_pretrained(tmp_path / "more", "other.json")
    assert (read.num_beams, read.top_p, read.stop_strings) == (3, 0.8, ["a"])
    assert set(read.other) <= generation_config.HARMLESS
    with pytest.raises(OSError, match=r"has no generation_config\.json"):
        GenerationConfig.from_pretrained(tmp_path / "more")


def test_defaults_are_those_of_the_reference():
    theirs = transformers.GenerationConfig._get_default_generation_params()
    assert {name: theirs[name] for name in generation_config.DEFAULTS} == generation_config.DEFAULTS
    neutral = {name: value for name, value in generation_config.UNSUPPORTED.items() if name in theirs}
    assert {name: theirs[name] for name in neutral} == neutral


def test_every_setting_of_the_reference_is_known():
    """Each is obeyed, refused or harmless; a name that is none of these is a typing error."""
    for name in vars(transformers.GenerationConfig()):
        generation_config.check_known(name)
    assert not set(generation_config.SETTINGS) & {*generation_config.UNSUPPORTED, *generation_config.HARMLESS}
    assert not generation_config.UNSUPPORTED.keys() & generation_config.HARMLESS


def test_a_config_of_unknown_keywords_is_an_error():
    with pytest.raises(ValueError, match="unknown setting 'max_new_token'; did you mean 'max_new_tokens'"):
        GenerationConfig(max_new_token=5)
    assert GenerationConfig(guidance_scale=2.0, cache_implementation="dynamic").other["guidance_scale"] == 2


def test_a_checkpoint_setting_we_lack_is_refused_when_used_and_can_be_overruled(model, monkeypatch):
    stored = GenerationConfig.from_hub({"guidance_scale": 4, "max_new_tokens": 2})
    monkeypatch.setattr(model, "generation_config", stored)
    ids = torch.tensor([[8, 9]])
    with pytest.raises(ValueError, match="guidance_scale=4 is not supported"):
        model.generate(ids)
    assert model.generate(ids, guidance_scale=1).shape == (1, 4)


def test_settings_that_change_nothing_are_accepted(model):
    ids = torch.tensor([[8, 9]])
    neutral = {**generation_config.UNSUPPORTED, "synced_gpus": False, "logits_processor": [], "stop_strings": []}
    neutral |= dict.fromkeys(("num_beams", "num_return_sequences", "length_penalty", "early_stopping", "min_length"))
    assert torch.equal(model.generate(ids, **neutral), model.generate(ids))


UNUSED = [
    ({"top_p": 0.9, "min_p": 0.1}, "top_p, min_p has no effect without do_sample=True"),
    ({"typical_p": 0.5, "eta_cutoff": 0.1}, "typical_p, eta_cutoff has no effect without do_sample=True"),
    ({"early_stopping": True}, "early_stopping has no effect without num_beams above 1"),
    ({"length_penalty": 2.0}, "length_penalty has no effect without num_beams above 1"),
    ({"output_scores": True}, "output_scores has no effect without return_dict_in_generate=True"),
    ({"min_new_tokens": 2}, "the answer ends after 1 tokens, though it should have at least 2"),
]


@pytest.mark.parametrize(("kwargs", "message"), UNUSED, ids=[message[:20] for _, message in UNUSED])
def test_settings_that_do_nothing_warn_where_they_are_given(model, kwargs, message):
    with pytest.warns(UserWarning, match=message) as caught:
        model.generate(torch.tensor([[8, 9]]), max_new_tokens=1, **kwargs)
    assert caught[0].filename == __file__


ERRORS = [
    ({"max_new_token": 3}, "unknown setting 'max_new_token'; did you mean 'max_new_tokens'"),
    ({"pixel_value": 3}, "did you mean 'pixel_values'"),
    ({"guidance_scale": 2.0}, "guidance_scale=2.0 is not supported, leave it at 1"),
    ({"num_beams": 0}, "num_beams should be an integer > 0, found 0"),
    ({"num_beams": True}, "num_beams should be an integer > 0"),
    ({"num_beams": 2.0}, "num_beams should be an integer > 0"),
    ({"num_return_sequences": 0}, "num_return_sequences should be an integer > 0, found 0"),
    ({"num_return_sequences": 2}, "num_return_sequences=2: greedy search has one answer"),
    ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 is more than there are beams: num_beams=2"),
    ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping should be True, False or 'never', found 'soon'"),
    ({"num_beams": 2, "length_penalty": "long"}, "length_penalty should be a number from -10 to 10, found 'long'"),
    ({"stop_strings": ["a"]}, "stop_strings need a tokenizer"),
    (
        {"stop_strings": [""], "tokenizer": 1},
        "stop_strings should be a string or a list of strings, none of them empty",
    ),
    ({"stop_strings": 3}, "stop_strings should be a string or a list of strings"),
    ({"max_time": -1}, "max_time should be a number of seconds, found -1"),
    ({"max_time": "1 s"}, "max_time should be a number of seconds"),
    ({"min_new_tokens": -1}, "min_new_tokens should be an integer ≥ 0"),
    ({"min_length": 2.5}, "min_length should be an integer ≥ 0"),
    ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size should be an integer > 0"),
    ({"typical_p": 2.0, "do_sample": True}, "typical_p should be between 0 and 1"),
    ({"epsilon_cutoff": -1.0, "do_sample": True}, "epsilon_cutoff should be between 0 and 1"),
    ({"eta_cutoff": "a", "do_sample": True}, "eta_cutoff should be between 0 and 1"),
    ({"logits_processor": favour_sevens}, "logits_processor should be a list of functions"),
    ({"prefix_allowed_tokens_fn": [3]}, "prefix_allowed_tokens_fn should be a function"),
    ({"stopping_criteria": [3]}, "stopping_criteria should be a list of functions"),
    ({"generation_config": {"top_k": 3}}, "generation_config should be a minivlm.GenerationConfig"),
    ({"suppress_tokens": [3]}, r"suppress_tokens=\[3\] is not supported"),
    ({"max_new_tokens": 0}, "max_new_tokens should be an integer > 0, found 0"),
    ({"max_new_tokens": 2.5}, "max_new_tokens should be an integer"),
    ({"max_length": 2}, "max_length=2 includes the prompt's 2 tokens"),
    ({"max_length": 2.5}, "max_length should be an integer > 0"),
    ({"max_new_tokens": 63}, "need 65 positions, but this model has 64; pass max_new_tokens=62 or less"),
    ({"temperature": 0.0, "do_sample": True}, "temperature should be a float > 0"),
    ({"temperature": 2, "do_sample": True}, "temperature should be a float > 0"),
    ({"top_k": -1, "do_sample": True}, "top_k should be an integer > 0"),
    ({"top_p": 1.5, "do_sample": True}, "top_p should be between 0 and 1"),
    ({"min_p": -0.1, "do_sample": True}, "min_p should be between 0 and 1"),
    ({"repetition_penalty": -1.0}, "repetition_penalty should be a float > 0"),
    ({"repetition_penalty": 2}, "repetition_penalty should be a float > 0, such as 1.2, found 2"),
    ({"bad_words_ids": []}, "bad_words_ids should be a list of words"),
    ({"bad_words_ids": [5]}, "bad_words_ids should be a list of words"),
    ({"bad_words_ids": [[]]}, "bad_words_ids should be a list of words"),
    ({"bad_words_ids": [[-1]]}, "bad_words_ids should be a list of words"),
    ({"bad_words_ids": [[3, V]]}, "bad_words_ids has the id 99, but the vocabulary has 99 tokens"),
    ({"attention_mask": torch.ones(1, 3)}, r"attention_mask should have one entry per prompt token, \(1, 2\)"),
    ({"input_ids": torch.tensor([8, 9])}, r"input_ids should be integers \(B, P\)"),
    (
        {"input_ids": {"input_ids": [[8, 9]]}},
        r"input_ids should be a tensor .*, found dict; write generate\(\*\*inputs",
    ),
    ({"input_ids": torch.rand(1, 2)}, r"input_ids should be integers \(B, P\)"),
    ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, r"input_ids should be integers \(B, P\)"),
    ({"input_ids": None, "bos_token_id": None}, "nothing to continue"),
    (
        {"input_ids": torch.ones(1, 64, dtype=torch.long)},
        "the prompt has 64 tokens, but this model has positions for 64",
    ),
    ({"seed": 1, "generator": torch.Generator()}, "pass seed or generator, not both"),
]


@pytest.mark.parametrize(("kwargs", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
@pytest.mark.parametrize("call", [loop.generate, loop.stream], ids=["generate", "stream"])
def test_errors_come_before_any_work(model, monkeypatch, call, kwargs, message):
    """`stream` too raises when called, not when first read."""
    monkeypatch.setattr(model.model, "forward", None)
    with pytest.raises(ValueError, match=message):
        call(model, **{"input_ids": torch.tensor([[8, 9]]), **kwargs})


def test_a_cache_without_room_or_news_is_an_error(model):
    ids = torch.tensor([[8, 9, 10]])
    with pytest.raises(ValueError, match="do not fit"):
        model.generate(ids, past_key_values=model.new_cache(1, 4), max_new_tokens=4, eos_token_id=None)
    cache = model.new_cache(1, 9)
    model.generate(ids, past_key_values=cache, max_new_tokens=2, eos_token_id=None)
    with pytest.raises(ValueError, match="past_key_values holds 4 tokens, input_ids only 3"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="past_key_values has 2 rows, the prompt 1"):
        model.generate(ids, past_key_values=model.new_cache(2, 9), max_new_tokens=2)


def test_a_cache_of_transformers_is_refused_in_one_sentence(model):
    with pytest.raises(ValueError, match=r"model\.new_cache\(rows, slots\), found a DynamicCache of transformers"):
        model.generate(torch.tensor([[8, 9]]), past_key_values=transformers.DynamicCache())


@pytest.mark.parametrize("allowed", [[], [V], [-1]], ids=str)
def test_allowed_tokens_that_are_none_are_an_error(model, allowed):
    with pytest.raises(ValueError, match=r"prefix_allowed_tokens_fn should return .* for prompt 1"):
        model.generate(torch.tensor([[8, 9], [8, 9]]), prefix_allowed_tokens_fn=lambda row, _: allowed if row else [3])


def test_a_rule_that_returns_nothing_is_an_error(model):
    with pytest.raises(ValueError, match=r"a logits_processor should return scores of shape \(1, 99\), found None"):
        model.generate(torch.tensor([[8, 9]]), logits_processor=[lambda ids, scores: None])


def test_streams_know_no_beams_and_streamers_neither(model):
    ids = torch.tensor([[8, 9]])
    with pytest.raises(ValueError, match="a stream has neither"):
        loop.stream(model, ids, num_beams=2)
    with pytest.raises(ValueError, match="a streamer cannot follow beams"):
        model.generate(ids, num_beams=2, streamer=object())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(model, monkeypatch, value):
    def head(x):
        logits = torch.zeros(*x.shape[:2], V)
        logits[1, :, 3] = value
        return logits

    monkeypatch.setattr(model.lm_head, "forward", head)
    with pytest.raises(ValueError, match="logits of row 1 are not finite at new token 1"):
        model.generate(torch.tensor([[8, 9], [8, 9]]))
