"""Rotary positions: recorded values, the reference's own functions, and what a config may say about them."""

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minivlm.checkpoint.config_file import read_decoder, read_rope, to_hub
from minivlm.modules.decoder import rotary_cos_sin, rotary_powers, rotate
from minivlm.modules.rope_scaling import RopeScaling

LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
PAIRS = 16  # of the longrope lists below: a head of 32
LONGROPE = {
    "short_factor": [1 + 0.1 * pair for pair in range(PAIRS)],
    "long_factor": [1 + 0.7 * pair for pair in range(PAIRS)],
    "original_max_position_embeddings": 100,
    "factor": 4.0,
}
# Pairs 1, 2, 32 and 63 of a head of 128, theta 10000, recorded from transformers 5.23.
RECORDED: dict[str, tuple[dict[str, Any] | None, list[float]]] = {
    "default": (None, [0.865964, 0.749894, 0.01, 1.15478e-4]),
    "linear": ({"factor": 2.0}, [0.432982, 0.374947, 0.005, 5.7739e-5]),
    "dynamic": ({"factor": 2.0}, [0.850994, 0.724191, 5.72338e-3, 3.84927e-5]),
    "llama3": (LLAMA_3, [0.865964, 0.749894, 0.01, 1.44348e-5]),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 2048},
        [0.865964, 0.749894, 5.2e-3, 2.88695e-5],
    ),
}


def frequencies(positions: Tensor, head_dim: int, theta: float, scaling: Any = None, trained: int = 0) -> Tensor:
    """As `Decoder.rotations` has them."""
    if scaling is None:
        return 1.0 / rotary_powers(head_dim, theta, positions.device)
    return scaling.frequencies(positions, head_dim, theta, trained)


@pytest.mark.parametrize("kind", RECORDED)
def test_recorded_values(kind: str) -> None:
    """The dynamic ones are for a text of 4096 tokens and a model trained on 2048."""
    entries, expected = RECORDED[kind]
    scaling = None if entries is None else RopeScaling(kind, **entries)
    found = frequencies(torch.tensor([[4095]]), 128, 10000.0, scaling, trained=2048)
    torch.testing.assert_close(found[[1, 2, 32, 63]], torch.tensor(expected), rtol=1e-5, atol=0)
    if kind == "yarn":
        assert abs(scaling.attention_scale - 1.138629) < 1e-6


# Everything that a config of each type may say, and the lengths of text to try.
VARIANTS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.5},
    {"rope_type": "llama3", **LLAMA_3, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "truncate": False, "beta_fast": 8.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 7, "beta_slow": 4.0, "beta_fast": 4.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "mscale": 0.7, "mscale_all_dim": 1.1},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "attention_factor": 0.5},
    {"rope_type": "yarn", "factor": 1.0},
    {"rope_type": "longrope", **LONGROPE},
    {"rope_type": "longrope", **LONGROPE, "attention_factor": 1.25},
    {"rope_type": "longrope", **LONGROPE, "factor": 1.0},
]


@pytest.mark.parametrize("length", [1, 99, 100, 101, 333])
@pytest.mark.parametrize("entries", VARIANTS, ids=lambda entries: "-".join(map(str, entries.values()))[:40])
def test_frequencies_equal_the_reference(entries: dict[str, Any], length: int) -> None:
    """Bit for bit, for texts shorter and longer than the 100 tokens of the training; attention scale as well."""
    theirs = transformers.LlamaConfig(
        **{"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 100},
        rope_parameters={"rope_theta": 5000.0, **entries},
    )
    ours = read_decoder(theirs.to_dict())
    compute = ROPE_INIT_FUNCTIONS[entries["rope_type"]]
    expected, scale = compute(theirs, torch.device("cpu"), seq_len=torch.tensor(length))
    positions = torch.arange(length)[None]
    found = frequencies(positions, ours.head_dim, ours.rope_theta, ours.rope_scaling, 100)
    assert torch.equal(found, expected)
    assert ours.rope_scaling.attention_scale == pytest.approx(scale, rel=1e-12)


def turn(x: Tensor, place: int) -> Tensor:
    positions = torch.tensor([[place]])
    return rotate(x, *rotary_cos_sin(positions, frequencies(positions, 8, 100.0), torch.float32))


def test_rotation() -> None:
    """Halves of a head turn against each other, and a score depends only on how far apart two tokens are."""
    first = torch.eye(8)[0].view(1, 1, 1, 8)
    expected = torch.zeros(8)
    expected[0], expected[4] = math.cos(5), math.sin(5)
    torch.testing.assert_close(turn(first, 5).flatten(), expected)
    q, k = torch.randn(2, 1, 1, 1, 8).unbind()
    near, far = (turn(q, 7) * turn(k, 3)).sum(), (turn(q, 104) * turn(k, 100)).sum()
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)  # fp32 angles of 100 turn less exactly


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}
SPELLINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {"rope_scaling": None}),
    "theta": ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5, "rope_scaling": None}),
    "theta in rope_parameters": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": None},
    ),
    "old word": ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": RopeScaling("linear", 2.0)}),
    "theta outside": (
        {"rope_theta": 7.0, "rope_scaling": YARN},
        {"rope_theta": 7.0, "rope_scaling": RopeScaling(**YARN)},
    ),
    "all in rope_parameters": (
        {"rope_parameters": {**YARN, "rope_theta": 7.0}},
        {"rope_theta": 7.0, "rope_scaling": RopeScaling(**YARN)},
    ),
    "trained length left out": (
        {"rope_scaling": {"rope_type": "llama3", **{**LLAMA_3, "original_max_position_embeddings": None}}},
        {"rope_scaling": RopeScaling("llama3", **{**LLAMA_3, "original_max_position_embeddings": 100})},
    ),
    "factor left out": (
        {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 25}},
        {"rope_scaling": RopeScaling("yarn", 4.0, 25)},
    ),
    "entries that change nothing": (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "finetuned": True}, "partial_rotary_factor": 1.0},
        {"rope_scaling": RopeScaling("linear", 2.0)},
    ),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_spellings(case: str) -> None:
    values, expected = SPELLINGS[case]
    assert read_rope({"max_position_embeddings": 100, **values}) == expected
    config = read_decoder({"model_type": "llama", "max_position_embeddings": 100, **values})
    assert read_decoder(to_hub(config)) == config
    theirs = transformers.LlamaConfig(**to_hub(config)).rope_parameters
    assert theirs["rope_theta"] == config.rope_theta
    assert {"rope_type": theirs["rope_type"]}.items() <= (
        config.rope_scaling.to_hub() if config.rope_scaling else {"rope_type": "default"}
    ).items()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown type": ({"rope_type": "mrope", "mrope_section": [1, 2]}, "'mrope' is not supported; known: default, lin"),
    "no factor": ({"rope_type": "linear"}, "'linear' needs factor"),
    "several missing": ({"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor, high_freq_factor"),
    "factor of nothing": ({"rope_type": "dynamic", "factor": 0}, "RopeScaling.factor must be positive"),
    "factor as text": ({"rope_type": "linear", "factor": "2"}, "RopeScaling.factor should be float"),
    "bands the other way round": ({"rope_type": "llama3", **LLAMA_3, "low_freq_factor": 5.0}, "should be below"),
    "lists for another head": ({"rope_type": "longrope", **LONGROPE}, "short_factor should have head_dim / 2 = 64"),
    "heads turned in part": ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "trained on nothing": ({"rope_type": "yarn", "original_max_position_embeddings": 0}, "needs factor"),
    "theta of nothing": ({"rope_type": "default", "rope_theta": 0}, "rope_theta must be positive"),
    "a kind for each layer": ({"full_attention": {"rope_type": "default"}}, "plain values"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configs(case: str) -> None:
    entries, message = BAD[case]
    for name in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ValueError, match=message):
            read_decoder({"model_type": "llama", name: entries})
