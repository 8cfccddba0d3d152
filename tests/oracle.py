"""Tiny random reference models, and how far ours may be from them.

The yardstick of every comparison is measured, not typed in: how far the reference's own two attention backends are
apart on the same input. We allow twice that, with a floor of 1e-5 of the largest value.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from minivlm.checkpoint.names import local_name

IMAGE = 99  # image token of the tiny vocabularies
LATENTS = 5


def idefics2_config(
    *,
    heads: tuple[int, int] = (4, 2),
    perceiver_heads: tuple[int, int] = (4, 2),
    depth: int = 2,
    window: int | None = 7,
    image_size: int = 28,
    patch_size: int = 4,
    text_width: int = 64,
) -> Any:
    """A reference configuration, small in every dimension. Window 7 is shorter than the prompts below."""
    return transformers.Idefics2Config(
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": image_size,
            "patch_size": patch_size,
        },
        perceiver_config={
            "hidden_size": text_width,
            "resampler_n_latents": LATENTS,
            "resampler_depth": depth,
            "resampler_n_heads": perceiver_heads[0],
            "num_key_value_heads": perceiver_heads[1],
            "resampler_head_dim": 12,
        },
        text_config={
            "model_type": "mistral",
            "vocab_size": 100,
            "hidden_size": text_width,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "sliding_window": window,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_id=IMAGE,
    )


@torch.no_grad()
def random_reference(config: Any, seed: int = 0) -> Any:
    """A reference Idefics2 whose weights are large enough for errors to show: no near-zero branches, no unit norms."""
    torch.manual_seed(seed)
    model = transformers.Idefics2ForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.endswith("latents"):
            parameter += 0.2 * torch.randn_like(parameter)
        else:
            parameter *= 4
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Write a reference model to `folder`, without its progress bar."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, **options)
    return folder


def random_inputs(images: tuple[int, ...], patch: int, seed: int = 1, text: int = 6) -> dict[str, Tensor]:
    """A left-padded batch: row r holds images[r] pictures of LATENTS tokens each, of odd sizes, padded to one size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = itertools.cycle([(6 * patch + 2, 5 * patch + 1), (3 * patch, 6 * patch), (5 * patch + 3, 2 * patch + 1)])
    longest = max(images) * (LATENTS + 1) + text + len(images)
    rows, most = len(images), max(1, *images) if len(images) > 1 else max(1, images[0])
    ids = torch.zeros(rows, longest, dtype=torch.long)
    mask = torch.zeros(rows, longest, dtype=torch.long)
    pixels = torch.zeros(rows, most, 3, 6 * patch + 2, 6 * patch + 1)
    pixel_mask = torch.zeros(rows, most, 6 * patch + 2, 6 * patch + 1, dtype=torch.long)
    for row, count in enumerate(images):
        content = [1]
        for index in range(count):
            high, wide = next(sizes)
            pixels[row, index, :, :high, :wide] = torch.randn(3, high, wide, generator=generator)
            pixel_mask[row, index, :high, :wide] = 1
            content += [IMAGE] * LATENTS + [3]
        content += torch.randint(4, 90, (text + row - 1,), generator=generator).tolist()
        ids[row, longest - len(content) :] = torch.tensor(content)
        mask[row, longest - len(content) :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if any(images):
        inputs |= {"pixel_values": pixels, "pixel_attention_mask": pixel_mask}
    return inputs


def labels(inputs: dict[str, Tensor]) -> Tensor:
    """The ids, padding left out; the first real token too, for a padding slot would have to predict it."""
    real = inputs["attention_mask"].bool()
    predicted = real.roll(1, dims=1) & real
    predicted[:, 0] = False
    return inputs["input_ids"].masked_fill(~predicted, -100)


def assert_close(ours: Tensor, eager: Tensor, sdpa: Tensor, what: str) -> None:
    """|ours − sdpa| ≤ 2·|eager − sdpa|, floor 1e-5 of the largest value; the message says by how much and where not."""
    assert ours.shape == sdpa.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(sdpa.shape)}"
    ours, eager, sdpa = ours.double(), eager.double(), sdpa.double()
    bound = max(2 * (eager - sdpa).abs().max().item(), 1e-5 * sdpa.abs().max().item())
    error = (ours - sdpa).abs()
    worst = error.max().item()
    where = tuple(int(index) for index in torch.unravel_index(error.argmax(), error.shape))
    assert worst <= bound, f"{what}: |Δ| {worst:.3g} at {where} (mean {error.mean():.3g}), allowed {bound:.3g}"


def both(reference: Any, call: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What `call` gives for the reference with each of its two attention backends: (eager, sdpa)."""
    transformers.utils.logging.set_verbosity_error()  # it warns at every change, of parts that have no backend
    results = []
    for implementation in ("eager", "sdpa"):
        reference.set_attn_implementation(implementation)
        results.append(call(reference))
    return results[0], results[1]


# ---- What holds for every family -------------------------------------------------------------------------------------


@torch.no_grad()
def assert_states(reference: Any, ours: Any, inputs: dict[str, Any], backend: str | None) -> tuple[Any, Any, Any]:
    """Hidden states, logits and loss of one pass; returns the outputs (ours, eager, sdpa).

    The reference has no loss for added tokens, which it counts on fewer logits than there are.
    """
    real = inputs["attention_mask"].bool()  # what a padding slot computes is nobody's business
    expected = labels(inputs)
    comparable = {} if getattr(ours.config, "additional_vocab_size", 0) else {"labels": expected}
    eager, sdpa = both(reference, lambda model: model(**inputs, **comparable, output_hidden_states=True))
    ours.attn_implementation = backend
    found = ours(**inputs, labels=expected, output_hidden_states=True)
    for layer, states in enumerate(zip(found.hidden_states, eager.hidden_states, sdpa.hidden_states, strict=True)):
        assert_close(*(state[real] for state in states), f"decoder layer {layer}")
    assert_close(found.logits[real], eager.logits[real], sdpa.logits[real], "logits")
    if comparable:
        assert_close(found.loss, eager.loss, sdpa.loss, "loss")
    return found, eager, sdpa


@torch.no_grad()
def assert_logits(reference: Any, ours: Any, inputs: dict[str, Any]) -> None:
    """Logits of one pass, with the backend that ours takes by itself."""
    real = inputs["attention_mask"].bool()
    ours.attn_implementation = None
    eager, sdpa = both(reference, lambda model: model(**inputs).logits[real])
    assert_close(ours(**inputs).logits[real], eager, sdpa, "logits")


@torch.no_grad()
def assert_cached_equals_uncached(ours: Any, inputs: dict[str, Any], pictures: dict[str, Any]) -> None:
    """A prompt with its pictures, two tokens at once, then one at a time, with left padding and positions as in
    generation."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = ours(**inputs, position_ids=positions).logits
    cache, parts, tokens = ours.new_cache(*ids.shape), [], ids.shape[1]
    for start, stop in itertools.pairwise([0, tokens - 5, tokens - 3, tokens - 2, tokens - 1, tokens]):
        more = {"position_ids": positions[:, start:stop], "past_key_values": cache, **({} if start else pictures)}
        output = ours(ids[:, start:stop], mask[:, :stop], **more)
        assert (output.image_hidden_states is None) == (start > 0)
        parts.append(output.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=1e-4, atol=1e-4)


def assert_bad_config(model_class: Any, values: dict[str, Any], change: dict[str, Any], message: str) -> None:
    """ValueError for a config.json with `change` in it, parts changed entry by entry."""
    for key, value in change.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        model_class(model_class.config_class.from_hub(values))


@torch.no_grad()
def assert_half_precision(reference: Any, model_class: Any, inputs: dict[str, Any], dtype: Any, folder: Path) -> None:
    """Logits of both our backends, loaded in `dtype`; the yardstick is the reference's in the same `dtype`."""
    save(reference, folder)
    half = type(reference).from_pretrained(folder, dtype=dtype)
    real = inputs["attention_mask"].bool()
    eager, sdpa = both(half, lambda model: model(**inputs).logits[real])
    ours = model_class.from_pretrained(folder, dtype=dtype)
    assert ours.dtype == dtype
    for backend in ("eager", "sdpa"):
        ours.attn_implementation = backend
        assert_close(ours(**inputs).logits[real], eager, sdpa, f"{dtype} logits, {backend}")


def assert_gradients(ours: Any, reference: Any, inputs: dict[str, Any]) -> None:
    """The same parameters have gradients, which differ by at most 1e-4 of their size.

    Of cross entropy over all logits: the reference's own loss fails where tokens are added.
    """
    target = labels(inputs)[:, 1:].flatten()
    reference.set_attn_implementation("sdpa")
    ours.attn_implementation = "sdpa"
    for model in (reference, ours):
        model.zero_grad()
        F.cross_entropy(model(**inputs).logits[:, :-1].flatten(0, 1), target).backward()
    expected = {
        local_name(name, ours.hub_prefixes): parameter.grad
        for name, parameter in reference.named_parameters()
        if parameter.grad is not None
    }
    found = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    rounding = 1e-6 * max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        # A bias of a vision tower's keys moves all scores of a query alike: its gradient is nothing but rounding.
        slack = rounding if name.endswith("k_proj.bias") else 1e-8
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + slack, name
