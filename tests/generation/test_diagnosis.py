"""Logits that are not finite stop generation, and the error names what first made them so."""

from dataclasses import replace

import oracle
import pytest
import torch

from minivlm import Idefics2Config, Idefics2ForConditionalGeneration
from minivlm.generation.diagnosis import first_not_finite
from minivlm.generation.loop import stream

IDS = torch.tensor([[1, 8, 9], [1, 5, 7]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = Idefics2Config.from_hub(oracle.idefics2_config(window=None).to_dict())
    return Idefics2ForConditionalGeneration(config).eval()


def overflow(model, name, factor):
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(factor)


def test_an_overflow_of_float16_names_the_layer_and_the_way_out(model):
    model.half()
    overflow(model, "model.text_model.layers.1.mlp.up_proj", 3e4)
    overflow(model, "model.text_model.layers.1.mlp.gate_proj", 3e4)
    words = r"float16 ends at 65,504.*overflows at model.text_model.layers.1.mlp.\w+, .*load with dtype=torch.bfloat16"
    with pytest.raises(ValueError, match=words):
        model.generate(IDS)
    model.bfloat16()
    assert model.generate(IDS, max_new_tokens=2).shape == (2, 5)


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"num_beams": 2}, {"use_cache": False}])
def test_damaged_weights_are_named_however_one_searches(model, settings):
    with torch.no_grad():
        model.model.text_model.layers[2].mlp.down_proj.weight[3, 5] = float("nan")
    words = "row 0 are not finite at new token 1: the weights of model.text_model.layers.2.mlp.down_proj hold NaN"
    with pytest.raises(ValueError, match=words):
        model.generate(IDS, **settings)


def test_inputs_are_blamed_before_the_model(model):
    inputs = oracle.random_inputs((1,), 4)
    inputs["pixel_values"][0, 0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="pixel_values holds NaN"):
        model.generate(**inputs)


def test_negative_infinity_is_an_overflow_too(model, monkeypatch):
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: head(x).index_fill(-1, torch.tensor([7]), -torch.inf))
    with pytest.raises(ValueError, match="comes from lm_head"):
        model.generate(IDS)


def test_a_later_token_of_one_row(model):
    """A token's own embedding is damaged: all is well until it is chosen."""
    tokens = model.generate(IDS, max_new_tokens=4, eos_token_id=None)[1, 3:].tolist()
    assert tokens[0] not in IDS
    with torch.no_grad():
        model.model.text_model.embed_tokens.weight[tokens[0], 0] = torch.inf
    first = "model.text_model.embed_tokens hold"
    with pytest.raises(ValueError, match=rf"row \d are not finite at new token 2: the weights of {first}"):
        model.generate(IDS, max_new_tokens=4, eos_token_id=None)


def test_where_looking_waits_it_is_done_with_what_waits_anyway(model):
    """On a GPU, only the first step waits; what has gone wrong since is found when the ended rows are counted."""
    decoding = stream(model, IDS)
    decoding.finite[1] = False
    with pytest.raises(ValueError, match="row 1 are not finite at new token 3: weights or activations overflow"):
        decoding.check_finite(2)


def test_nothing_is_left_behind(model):
    before = model(IDS).logits
    assert first_not_finite(model, lambda: model(IDS)) is None
    assert first_not_finite(model, lambda: model(IDS[0])) is None  # cannot be run: not a reason for another error
    assert not any(part._forward_hooks for part in model.modules())
    assert torch.equal(model(IDS).logits, before)


def test_ids_beyond_the_vocabulary(model):
    with pytest.raises(ValueError, match="the id 100, but the vocabulary has 100 tokens; is the tokenizer of another"):
        model.generate(torch.tensor([[1, 100]]))
    with pytest.raises(ValueError, match="input_ids has the id -1"):
        model.generate(torch.tensor([[1, -1]]))
    with pytest.raises(ValueError, match="pad_token_id should be one of the 100 tokens"):
        model.generate(IDS, pad_token_id=100)


def test_a_cache_that_does_not_fit_is_an_error_of_memory(model):
    text = replace(model.config.text_config, max_position_embeddings=2**24)
    model.config = replace(model.config, text_config=text)
    model.new_cache = lambda rows, slots: torch.empty(2**60)
    with pytest.raises(MemoryError, match="a cache of 2 rows of 16,000,003 tokens does not fit"):
        model.generate(IDS, max_new_tokens=16_000_000)
