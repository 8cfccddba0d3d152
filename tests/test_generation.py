"""Generation against transformers on tiny random Idefics2 models, and every rule on tables worked out by hand."""

import copy
import warnings

import hypothesis.strategies as st
import pytest
import torch
import transformers
from hypothesis import given, settings
from transformers.generation import logits_process

from minivlm import generation, generation_config, sampling
from minivlm.generation_config import GenerationConfig
from minivlm.models.idefics2 import Idefics2ForConditionalGeneration

V, IMAGE, PAD, LATENTS, SIDE = 99, 98, 0, 2, 12
NEGATIVE = float("-inf")
EOS = [5, 7]


def oracle(sliding_window: int | None) -> transformers.Idefics2ForConditionalGeneration:
    """A reference model whose logits lie far enough apart that rounding cannot change a token."""
    torch.manual_seed(0)
    vision = {"image_size": SIDE, "patch_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2}
    perceiver = {"resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16, "num_key_value_heads": 1}
    text = {"model_type": "mistral", "vocab_size": V, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "sliding_window": sliding_window, "max_position_embeddings": 64}
    text |= {"eos_token_id": EOS, "bos_token_id": 1, "pad_token_id": PAD}
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    config = transformers.Idefics2Config(
        vision_config=vision | sizes,
        perceiver_config=perceiver | {"resampler_n_latents": LATENTS, "hidden_size": 32},
        text_config=text | sizes,
        image_token_id=IMAGE,
    )
    model = transformers.Idefics2ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module", params=[None, 4], ids=["full", "window"])
def pair(request, tmp_path_factory):
    """(reference, ours) with the same weights; the window of 4 is shorter than every prompt."""
    reference = oracle(request.param)
    folder = tmp_path_factory.mktemp("tiny")
    reference.save_pretrained(folder)
    return reference, Idefics2ForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Our model alone, for what needs no reference."""
    folder = tmp_path_factory.mktemp("alone")
    oracle(None).save_pretrained(folder)
    return Idefics2ForConditionalGeneration.from_pretrained(folder)


def batch(counts=(0, 1, 2, 3), lengths=(5, 3, 9, 4), seed=0):
    """Left-padded rows of `lengths` text tokens and `counts` images each, the rows' images padded as processors do."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for count, length in zip(counts, lengths, strict=True):
        text = torch.randint(8, 90, (length,), generator=random).tolist()
        rows.append([text[0], *([IMAGE] * LATENTS + [9]) * count, *text[1:]])
    longest = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }
    if max(counts):
        pixels = torch.randn(len(counts), max(counts), 3, SIDE, SIDE, generator=random)
        real = torch.arange(max(counts)) < torch.tensor(counts)[:, None]  # (B, N)
        inputs["pixel_values"] = pixels * real[:, :, None, None, None]
        inputs["pixel_attention_mask"] = real[:, :, None, None].expand(-1, -1, SIDE, SIDE).long()
    return inputs


def alone(inputs, row, counts=(0, 1, 2, 3)):
    """One row of a batch without its padding tokens and padding images."""
    real = inputs["attention_mask"][row].bool()
    single = {"input_ids": inputs["input_ids"][row][real][None], "attention_mask": real[real].long()[None]}
    if counts[row]:
        single |= {
            name: inputs[name][row : row + 1, : counts[row]] for name in ("pixel_values", "pixel_attention_mask")
        }
    return single


def both(pair, inputs, **kwargs):
    """Ids of the reference and ours, sampling from torch's own generator under the same seed."""
    outputs = []
    for model in pair:
        torch.manual_seed(1234)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs.append(model.generate(**inputs, **kwargs))
    return outputs


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


@settings(max_examples=40, deadline=None)
@given(scores_of, st.integers(1, V + 5), probability, probability, st.data())
def test_rules_equal_the_reference(scores, k, p, floor, data):
    assert torch.equal(sampling.top_k(scores, k), logits_process.TopKLogitsWarper(k)(None, scores))
    assert torch.equal(sampling.top_p(scores, p), logits_process.TopPLogitsWarper(p)(None, scores))
    assert torch.equal(sampling.min_p(scores, floor), logits_process.MinPLogitsWarper(floor)(None, scores))
    ids = torch.tensor([data.draw(st.lists(st.integers(0, V - 1), min_size=3, max_size=9))])
    padding = torch.tensor([data.draw(st.integers(0, 3))])
    penalty = data.draw(st.floats(0.1, 3))
    theirs = logits_process.RepetitionPenaltyLogitsProcessor(penalty, padding)(ids, scores.clone())
    assert torch.equal(sampling.repetition_penalty(scores, ids, penalty, padding), theirs)
    words = data.draw(st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=3), min_size=1, max_size=5))
    words.append([*ids[0, -2:].tolist(), 3])
    theirs = logits_process.NoBadWordsLogitsProcessor(words, [])(ids, scores)
    assert torch.equal(sampling.ban_words(scores, ids, [torch.tensor(word) for word in words]), theirs)


def test_positions_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert generation.positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


# ---- Whole answers, against the reference ----

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


@pytest.mark.parametrize("limit", [{"max_new_tokens": 6}, {"max_length": 12}, {}])
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


# ---- Twins: different ways to the same ids ----


@pytest.mark.parametrize("name", ["greedy", "penalty", "sample everything"])
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
        generation.prefill(model, inputs["input_ids"], cache, mask, **images)
        longer = torch.cat([mask, mask.new_ones(4, 1)], 1)
        cached = generation.decode_step(model, token, cache, generation.positions(longer)[:, -1], longer)
        ids = torch.cat([inputs["input_ids"], token[:, None]], 1)
        whole = generation.prefill(model, ids, None, longer, **images)
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


@pytest.mark.parametrize("name", ["greedy", "many eos", "sample everything"])
def test_streamed_equals_returned(pair, name):
    inputs = batch()
    returned = pair[1].generate(**inputs, **SETTINGS[name], seed=7 if "sample" in name else None)
    steps = list(generation.stream(pair[1], **inputs, **SETTINGS[name], seed=7 if "sample" in name else None))
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
    next(generation.stream(model, torch.tensor([[8, 9]]), max_new_tokens=3, past_key_values=cache))
    assert not cache.data.requires_grad
    assert torch.is_grad_enabled()


def test_scores_are_float32_whatever_the_model_computes_in(pair):
    model = copy.deepcopy(pair[1]).bfloat16()
    with torch.no_grad():
        assert generation.prefill(model, torch.tensor([[8, 9]])).dtype == torch.float32


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


def test_precedence_is_call_then_argument_then_checkpoint(model, monkeypatch):
    monkeypatch.setattr(model, "generation_config", GenerationConfig(max_new_tokens=2, eos_token_id=None))
    ids, argument = torch.tensor([[8, 9]]), GenerationConfig(max_new_tokens=3)
    assert model.generate(ids).shape == (1, 4)
    assert model.generate(ids, generation_config=argument).shape == (1, 5)
    assert model.generate(ids, generation_config=argument, max_new_tokens=4).shape == (1, 6)
    model.generation_config.max_new_tokens = 5
    assert model.generate(ids).shape == (1, 7)


def test_a_checkpoint_setting_we_lack_is_refused_when_used_and_can_be_overruled(model, monkeypatch):
    monkeypatch.setattr(model, "generation_config", GenerationConfig.from_hub({"num_beams": 4, "max_new_tokens": 2}))
    ids = torch.tensor([[8, 9]])
    with pytest.raises(ValueError, match="num_beams=4 is not supported"):
        model.generate(ids)
    assert model.generate(ids, num_beams=1).shape == (1, 4)


def test_settings_that_change_nothing_are_accepted(model):
    ids = torch.tensor([[8, 9]])
    neutral = {**generation_config.UNSUPPORTED, "synced_gpus": False, "early_stopping": True, "logits_processor": []}
    assert torch.equal(model.generate(ids, **neutral), model.generate(ids))


def test_sampling_settings_without_sampling_warn(model):
    with pytest.warns(UserWarning, match="top_p, min_p has no effect without do_sample=True"):
        model.generate(torch.tensor([[8, 9]]), max_new_tokens=1, top_p=0.9, min_p=0.1)


ERRORS = [
    ({"max_new_token": 3}, "unknown setting 'max_new_token'; did you mean 'max_new_tokens'"),
    ({"pixel_value": 3}, "did you mean 'pixel_values'"),
    ({"num_beams": 2}, "num_beams=2 is not supported"),
    ({"num_return_sequences": 2}, "num_return_sequences=2 is not supported"),
    ({"stop_strings": ["a"]}, "stop_strings=.* is not supported"),
    ({"output_hidden_states": True}, "output_hidden_states=True is not supported"),
    ({"max_new_tokens": 0}, "max_new_tokens should be an integer > 0, found 0"),
    ({"max_new_tokens": 2.5}, "max_new_tokens should be an integer"),
    ({"max_length": 2}, "max_length=2 includes the prompt's 2 tokens"),
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
@pytest.mark.parametrize("call", [generation.generate, generation.stream], ids=["generate", "stream"])
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(model, monkeypatch, value):
    def head(x):
        logits = torch.zeros(*x.shape[:2], V)
        logits[1, :, 3] = value
        return logits

    monkeypatch.setattr(model.lm_head, "forward", head)
    with pytest.raises(ValueError, match="logits of row 1 are not finite at new token 1"):
        model.generate(torch.tensor([[8, 9], [8, 9]]))
