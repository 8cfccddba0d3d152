"""Logit lens and attribution."""

from typing import Any

import pytest
import tiny_inside
import torch
from PIL import Image, ImageDraw

from minivlm import BitsAndBytesConfig
from minivlm.inside import attribute, logit_lens, to_image, watch
from minivlm.modules.attention import attention_taps

NAMES = ["shapes-idefics2", "shapes-llava-next", "shapes-idefics"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_lens_ends_in_what_the_model_says(name: str) -> None:
    model, _, inputs = tiny_inside.asked(name)
    with watch(model, "decoder layer *", "logits") as seen:
        ids = model.generate(**inputs, max_new_tokens=4)
    lens = logit_lens(model, seen)
    answer = ids[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(lens.tokens, answer)
    layers = model.decoder.config.num_hidden_layers
    assert lens.layers == [f"decoder layer {layer}" for layer in range(layers)]
    assert lens.probability.shape == (layers, 1, answer.shape[1])
    last = seen["logits"].softmax(-1)[:, [*[step - 1 for step in seen.steps[1:]], -1]]
    torch.testing.assert_close(lens.probability[-1], last.gather(-1, answer[..., None])[..., 0], rtol=1e-4, atol=1e-6)
    assert torch.equal(lens.top_ids[-1, 0, :, 0], answer[0])
    other = logit_lens(model, seen, tokens=torch.zeros_like(answer), top=2)
    assert (other.probability[-1] < 0.5).all()
    assert other.top.shape[-1] == 2


def test_the_lens_needs_layers() -> None:
    model, _, inputs = tiny_inside.asked(NAMES[0])
    with watch(model, "logits") as seen:
        model(**inputs)
    with pytest.raises(ValueError, match="decoder layer"):
        logit_lens(model, seen)
    with watch(model, "decoder layer 0") as seen:
        model(**inputs)
    with pytest.raises(ValueError, match="1 positions"):
        logit_lens(model, seen, tokens=torch.zeros(1, 3, dtype=torch.long))


def star() -> tuple[Image.Image, tuple[int, int, int, int]]:
    """An image with one red disc at the right, and the box around it."""
    image, box = Image.new("RGB", (320, 240), (200, 205, 210)), (200, 60, 290, 150)
    ImageDraw.Draw(image).ellipse(box, fill=(214, 38, 38))
    return image, box


@pytest.mark.parametrize("method", ["relevance", "attention", "occlusion"])
@pytest.mark.parametrize("name", NAMES)
def test_the_disc_is_what_counts(name: str, method: str) -> None:
    image, box = star()
    model, processor, inputs = tiny_inside.asked(name, "what colour is the circle?", [image])
    found = attribute(model, inputs, method=method)
    assert processor.decode([found.token]).strip() == "red"
    assert found.probability > 0.5
    heat = to_image(found, found.patches, image, processor)
    assert heat.shape == (240, 320)
    left, top, right, bottom = box
    share = heat[top - 40 : bottom + 40, left - 40 : right + 30].clamp(min=0).sum() / heat.clamp(min=0).sum()
    assert share > 0.5, share  # of 40 % of the area
    assert (found.tokens is None) == (method == "occlusion")
    assert not attention_taps
    other = attribute(model, inputs, token=5, method=method)
    assert other.token == 5


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}]
)
def test_relevance_of_quantised_and_frozen_models(options: Any) -> None:
    image, _ = star()
    model, _, inputs = tiny_inside.asked(NAMES[0], "what colour is the circle?", [image], **options)
    model.requires_grad_(False)
    found = attribute(model, inputs)
    assert torch.isfinite(found.patches[0][0]).all()
    assert found.patches[0][0].sum() > 0


def test_what_attribution_is_not_for() -> None:
    _, ours, inputs = tiny_inside.pair("idefics2")
    with pytest.raises(ValueError, match="4 rows"):
        attribute(ours, inputs)
    model, _, inputs = tiny_inside.asked(NAMES[0])
    with pytest.raises(ValueError, match="relevance, attention, occlusion"):
        attribute(model, inputs, method="magic")
    with pytest.raises(ValueError, match="had an image"):
        attribute(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})
