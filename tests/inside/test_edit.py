"""Edits do what they say, and nothing else."""

import copy
from typing import Any

import pytest
import tiny_inside
import torch
from torch import Tensor

from minivlm import BitsAndBytesConfig, Chat
from minivlm.inside import add, block, edit, replace, stages, watch, zero
from minivlm.parity import drawn_image

LAYER = {"idefics2": "model.text_model.layers", "llava_next": "model.language_model.layers"}


def eager(name: str) -> tuple[Any, dict[str, Any]]:
    """Our tiny model with the formula that attention takes while its weights are looked at."""
    _, ours, inputs = tiny_inside.pair(name)
    ours.attn_implementation = "eager"
    return ours, inputs


@pytest.mark.parametrize("name", tiny_inside.NAMES)
@torch.no_grad()
def test_nothing_and_what_was_there_change_no_bit(name: str) -> None:
    ours, inputs = eager(name)
    plain = ours(**inputs).logits
    names = [stage for stage in stages(ours) if stage != "packed vectors"]
    with watch(ours, *names) as seen, edit(ours, dict.fromkeys(names, lambda x: x)):
        assert torch.equal(ours(**inputs).logits, plain)
    with edit(ours, {stage: replace(seen[stage]) for stage in names}):
        assert torch.equal(ours(**inputs).logits, plain)


@pytest.mark.parametrize("name", tiny_inside.NAMES)
@torch.no_grad()
def test_states_go_back_with_any_attention(name: str) -> None:
    """What is no attention weight leaves the attention backend as it is; several beams and steps too."""
    _, ours, inputs = tiny_inside.pair(name)
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    plain, ids = ours(**inputs).logits, ours.generate(**inputs, **options)
    names = [stage for stage in stages(ours) if stage != "packed vectors" and not stage.endswith("weights")]
    with watch(ours, *names) as seen:
        ours(**inputs)
    with edit(ours, {stage: replace(seen[stage]) for stage in names}):
        assert torch.equal(ours(**inputs).logits, plain)
    with edit(ours, dict.fromkeys(names, lambda x: x)):
        assert torch.equal(ours.generate(**inputs, **options), ids)


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}]
)
def test_half_precision_quantised_and_chat(options: Any) -> None:
    """A conversation whose image vectors are taken away answers as if it had none, and as before afterwards."""
    model, processor, _ = tiny_inside.asked("shapes-idefics2", **options)

    def answers() -> list[str]:
        chat = Chat(model, processor, max_new_tokens=24)
        return [chat.ask("Describe the picture.", [drawn_image()]), chat.ask("what colour is the square?")]

    plain = answers()
    names = ["merged embeddings", "decoder layer 1, attention heads", "vision layer 0"]
    with edit(model, dict.fromkeys(names, lambda x: x)):
        assert answers() == plain
    with edit(model, {"resampler norm": zero()}), watch(model, "resampler norm") as seen:
        assert answers() != plain
    assert not seen["resampler norm"].any()
    assert answers() == plain


@pytest.mark.parametrize("name", ["idefics2", "llava_next", "idefics"])
@torch.no_grad()
def test_without_its_heads_a_layer_has_no_output_projection(name: str) -> None:
    ours, inputs = eager(name)
    lamed = copy.deepcopy(ours)
    lamed.decoder.layers[1].self_attn.o_proj.weight.zero_()
    expected = lamed(**inputs).logits
    with edit(ours, {"decoder layer 1, attention heads": zero()}):
        assert torch.equal(ours(**inputs).logits, expected)
    with edit(ours, {"decoder layer 1, attention heads": zero(head=range(4))}):
        assert torch.equal(ours(**inputs).logits, expected)
    one = ours.decoder.layers[1].self_attn
    width = one.head_dim
    lamed = copy.deepcopy(ours)
    lamed.decoder.layers[1].self_attn.o_proj.weight[:, 2 * width : 3 * width] = 0
    with edit(ours, {"decoder layer 1, attention heads": zero(head=2)}), watch(ours, "decoder layer 1") as seen:
        ours(**inputs)
    with watch(lamed, "decoder layer 1") as there:
        lamed(**inputs)
    torch.testing.assert_close(seen["decoder layer 1"], there["decoder layer 1"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_steering_some_tokens() -> None:
    ours, inputs = eager("idefics2, no window")
    vector = torch.randn(64)
    with watch(ours, "decoder layer 1") as plain:
        ours(**inputs)
    with watch(ours, "decoder layer 1") as seen, edit(ours, {"decoder layer 1": add(vector, tokens=-1, scale=2)}):
        ours(**inputs)
    moved = seen["decoder layer 1"] - plain["decoder layer 1"]
    assert not moved[:, :-1].any()
    torch.testing.assert_close(moved[:, -1], 2 * vector.expand(4, -1), rtol=1e-4, atol=1e-4)
    with watch(ours, "decoder layer 1") as seen, edit(ours, {"decoder layer 1": zero(tokens=[3, 5])}):
        ours.generate(**inputs, max_new_tokens=3)
    gone = (seen["decoder layer 1"] == 0).all(-1).all(0)
    assert gone.nonzero()[:, 0].tolist() == [3, 5]


@torch.no_grad()
def test_steps_of_generation_can_be_patched() -> None:
    """From one run into another: what is beyond the recording stays."""
    _, ours, inputs = tiny_inside.pair("idefics2, no window")
    options = {"do_sample": False, "eos_token_id": None}
    with watch(ours, "decoder layer *", "logits") as seen:
        ids = ours.generate(**inputs, max_new_tokens=4, **options)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    with edit(ours, {"decoder layer 2": replace(seen["decoder layer 2"])}):
        patched = ours.generate(**other, max_new_tokens=6, **options)
    assert torch.equal(patched[:, : ids.shape[1]], ids)


@pytest.mark.parametrize("name", ["idefics2", "idefics2, no window", "llava_next"])
@torch.no_grad()
def test_blocked_attention_is_masked_attention(name: str) -> None:
    """No token attends to the first real ones of row 0: as if they were padding."""
    ours, inputs = eager(name)
    inputs = tiny_inside.row_of(inputs, name)
    keys = [0]
    masked = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    masked["attention_mask"][:, keys] = 0
    positions = torch.arange(masked["input_ids"].shape[1])[None]
    expected = ours(**masked, position_ids=positions).logits[:, 1:]
    with edit(ours, {"decoder layer *, attention weights": block(queries=slice(1, None), keys=keys)}):
        found = ours(**inputs).logits[:, 1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_blocking_images_blinds_the_model() -> None:
    """The answer no longer depends on the pixels."""
    ours, inputs = eager("idefics2, no window")
    inputs = tiny_inside.row_of(inputs, "idefics2")
    with watch(ours, "decoder layer 0") as seen:
        ours(**inputs)
    images = seen.images[0, :, 0] >= 0
    assert int(images.sum()) == 10
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    text = (~images).nonzero()[:, 0].tolist()
    with edit(ours, {"decoder layer *, attention weights": block(queries=text, keys=images)}):
        first, second = (ours(**each).logits[:, ~images] for each in (inputs, other))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)  # the weights that are left round differently
    assert (ours(**inputs).logits[:, -1] - ours(**other).logits[:, -1]).abs().max() > 0.01


def test_gradients_pass() -> None:
    ours, inputs = eager("idefics2")
    vector = torch.zeros(64, requires_grad=True)
    with edit(ours, {"decoder layer 0": add(vector)}):
        ours(**inputs).logits[:, -1].square().sum().backward()
    assert vector.grad.abs().sum() > 0


def test_errors_say_what_to_do() -> None:
    ours, inputs = eager("idefics2")

    def run(stage: str, change: Any) -> None:
        with edit(ours, {stage: change}):
            ours(**inputs)

    with pytest.raises(ValueError, match="found NoneType"):
        run("decoder layer 0", lambda x: None)
    with pytest.raises(ValueError, match="should return a tensor"):
        run("decoder layer 0", lambda x: x[:, :1])
    with pytest.raises(ValueError, match="has no heads"):
        run("decoder layer 0", zero(head=1))
    with pytest.raises(ValueError, match="heads 0 to 3"):
        run("decoder layer 0, attention heads", zero(head=4))
    with pytest.raises(ValueError, match="has no tokens"):
        run("vision layer 0", zero(tokens=1))
    with pytest.raises(ValueError, match="for attention weights"):
        run("decoder layer 0", block(keys=1))
    with pytest.raises(ValueError, match="no stage is called"):
        run("decoder layer 9", zero())
    llava, _ = eager("llava_next")
    with pytest.raises(ValueError, match="reports"), edit(llava, {"packed vectors": zero()}):
        pass


def test_a_function_may_write_into_what_it_gets() -> None:
    ours, inputs = eager("idefics2")
    with torch.no_grad():
        plain = ours(**inputs).logits

        def writes(x: Tensor) -> Tensor:
            x[:] = 0
            return x

        with edit(ours, {"decoder layer 1": writes}), watch(ours, "decoder layer 1", "decoder layer 0") as seen:
            ours(**inputs)
        assert not seen["decoder layer 1"].any()
        assert seen["decoder layer 0"].any()
        assert torch.equal(ours(**inputs).logits, plain)
