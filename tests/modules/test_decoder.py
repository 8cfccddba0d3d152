"""The decoder against the reference's three classes: defaults, biases, windows by layer, stretched positions."""

from typing import Any

import oracle
import pytest
import torch
import transformers

from minivlm.checkpoint.config_file import DECODERS, read_decoder, to_hub
from minivlm.modules.decoder import Decoder

SIZES = {
    **{"vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 24},
}
LONGROPE = {
    "short_factor": [1 + 0.1 * pair for pair in range(8)],
    "long_factor": [1 + 0.7 * pair for pair in range(8)],
}
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 12}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, heads of their own width": {"model_type": "llama", "head_dim": 24, "num_key_value_heads": None},
    "llama ignores windows": {"model_type": "llama", "sliding_window": 4},
    "llama, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2, a window that is off": {"model_type": "qwen2", "sliding_window": 5},
    "qwen2, windows in the upper layers": {
        **{"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2},
    },
    "qwen2, windows everywhere": {
        **{"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0},
    },
    "linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama3": {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", **LLAMA_3}},
    "yarn": {"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 2.0}},
    "longrope": {"model_type": "mistral", "rope_scaling": {"type": "longrope", "factor": 2.0, **LONGROPE}},
}


def pair(case: str) -> tuple[Any, Decoder]:
    """(reference, ours with the same weights), large enough for errors to show; the biases too."""
    values = {**SIZES, **CONFIGS[case]}
    torch.manual_seed(0)
    reference = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**values)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter)) if parameter.ndim == 1 else parameter.mul_(4)
    ours = Decoder(read_decoder(values))
    ours.load_state_dict(reference.state_dict())
    return reference, ours


@pytest.mark.parametrize("tokens", [11, 40])
@pytest.mark.parametrize("case", CONFIGS)
@torch.no_grad()
def test_hidden_states(case: str, tokens: int) -> None:
    """Shorter and longer than windows and the 24 positions of the training."""
    reference, ours = pair(case)
    ids = torch.randint(0, 60, (2, tokens))
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[0, :3] = 0
    call = {"attention_mask": mask, "output_hidden_states": True}
    eager, sdpa = oracle.both(reference, lambda model: model(ids, **call).hidden_states)
    for backend in ("eager", "sdpa"):
        found: list[torch.Tensor] = []
        ours(ours.embed_tokens(ids), mask, attn_implementation=backend, hidden_states=found)
        for layer, states in enumerate(zip(found, eager, sdpa, strict=True)):
            oracle.assert_close(*(state[mask.bool()] for state in states), f"layer {layer}, {backend}")


@pytest.mark.parametrize("case", CONFIGS)
@torch.no_grad()
def test_the_last_block_answers_for_what_is_wanted(case: str) -> None:
    _, ours = pair(case)
    x = ours.embed_tokens(torch.randint(0, 60, (2, 20)))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :3] = 0
    rows: list[int] = []
    ours.layers[-1].mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    whole = ours(x, mask)
    for last in (1, 3, 20, 99):
        torch.testing.assert_close(ours(x, mask, logits_to_keep=last), whole[:, -last:], rtol=1e-5, atol=1e-5)
    assert rows == [20, 1, 3, 20, 20]


# The reference's cache, unlike its model, obeys a window that a Llama config has by mistake.
@pytest.mark.parametrize("case", [case for case in CONFIGS if case != "llama ignores windows"])
@torch.no_grad()
def test_cached_as_the_reference(case: str) -> None:
    """A prompt of 20, then one token at a time past the 24 positions: keys keep the rotation they were cached with."""
    reference, ours = pair(case)
    ids = torch.randint(0, 60, (1, 30))
    steps = [ids[:, :20], *ids[:, 20:].split(1, dim=1)]

    def run(model: Any) -> torch.Tensor:
        cache = transformers.DynamicCache(config=model.config)
        return torch.cat([model(step, past_key_values=cache).last_hidden_state for step in steps], dim=1)

    eager = oracle.both(reference, run)[0]
    reference, _ = pair(case)  # dynamic frequencies remember the longest text: start again
    reference.set_attn_implementation("sdpa")
    sdpa = run(reference)
    cache = ours.new_cache(1, 30, torch.device("cpu"), torch.float32)
    found = torch.cat([ours(ours.embed_tokens(step), cache=cache) for step in steps], dim=1)
    oracle.assert_close(found, eager, sdpa, "cached states")


@torch.no_grad()
def test_dynamic_frequencies_forget_a_longer_text() -> None:
    """The reference's stay stretched until a text fits the training; ours depend on the text alone."""
    _, ours = pair("dynamic")
    short, long = torch.randint(0, 60, (1, 30)), torch.randint(0, 60, (1, 60))
    before = ours(ours.embed_tokens(short))
    ours(ours.embed_tokens(long))
    assert torch.equal(ours(ours.embed_tokens(short)), before)


@pytest.mark.parametrize("kind", DECODERS)
def test_defaults_are_those_of_the_reference(kind: str) -> None:
    theirs = transformers.AutoConfig.for_model(kind)
    ours = read_decoder({"model_type": kind})
    values = {**theirs.to_dict(), **theirs.rope_parameters}
    compared = {name: value for name, value in to_hub(ours).items() if name in values}
    assert compared == {name: values[name] for name in compared}
    assert len(compared) >= 14
    assert read_decoder(theirs.to_dict()) == ours
    assert transformers.AutoConfig.for_model(**to_hub(ours)).rope_parameters == theirs.rope_parameters


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown decoder": ({"model_type": "gpt2"}, "'gpt2' is not supported; known: mistral, llama, qwen2"),
    "biases of another family": ({"model_type": "mistral", "attention_bias": True}, "settings of Llama"),
    "window of nothing": ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be positive"),
    "windows by a list": (
        {"model_type": "qwen2", "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
        "layer_types should follow",
    ),
    "odd heads": ({"model_type": "llama", "head_dim": 5}, "even head_dim"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs(case: str) -> None:
    values, message = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=message):
        read_decoder(values)
