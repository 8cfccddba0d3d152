"""What is watched equals what transformers reports; and nothing of the watching stays behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import oracle
import pytest
import tiny_inside
import torch
from torch import Tensor

from minivlm import BitsAndBytesConfig, Chat
from minivlm.inside import edit, stages, watch
from minivlm.modules.attention import attention_taps
from minivlm.parity import drawn_image


@contextmanager
def reference_weights(reference: Any) -> Iterator[dict[str, list[Tensor]]]:
    """Module → the attention weights of each of its calls; "softmax": all softmaxes, for IDEFICS' resampler, whose
    attention returns none."""
    found: dict[str, list[Tensor]] = {"softmax": []}
    original = Tensor.softmax

    def softmax(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found["softmax"].append(original(x, *args, **kwargs))
        return found["softmax"][-1]

    def keep(name: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            if isinstance(output, tuple) and output[1] is not None:
                found.setdefault(name, []).append(output[1])

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in reference.named_modules()
        if name.endswith(("self_attn", "cross_attn"))
    ]
    Tensor.softmax = softmax
    yield found
    Tensor.softmax = original
    for handle in handles:
        handle.remove()


# ---- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny_inside.NAMES)
@torch.no_grad()
def test_hidden_states_are_the_references(name: str) -> None:
    reference, ours, inputs = tiny_inside.pair(name)
    real = inputs["attention_mask"].bool()
    eager, sdpa = oracle.both(reference, lambda model: model(**inputs, output_hidden_states=True))
    with watch(ours, "decoder layer *", "final norm", "logits") as seen:
        ours(**inputs, logits_to_keep=1)  # which is not what is watched
    count = ours.decoder.config.num_hidden_layers
    for layer in range(count - 1):
        theirs = (output.hidden_states[layer + 1][real] for output in (eager, sdpa))
        oracle.assert_close(seen[f"decoder layer {layer}"][real], *theirs, f"decoder layer {layer}")
    theirs = (output.hidden_states[-1][real] for output in (eager, sdpa))
    oracle.assert_close(seen["final norm"][real], *theirs, "final norm")
    oracle.assert_close(seen["logits"][real], eager.logits[real], sdpa.logits[real], "logits")


PATHS = {  # of attention in the reference
    "idefics2": {
        "vision layer": "model.vision_model.encoder.layers.{}.self_attn",
        "resampler layer": "model.connector.perceiver_resampler.layers.{}.self_attn",
        "decoder layer": "model.text_model.layers.{}.self_attn",
    },
    "llava_next": {
        "vision layer": "model.vision_tower.encoder.layers.{}.self_attn",
        "decoder layer": "model.language_model.layers.{}.self_attn",
    },
    "idefics": {
        "vision layer": "model.vision_model.encoder.layers.{}.self_attn",
        "gated block": "model.gated_cross_attn_layers.{}.cross_attn",
        "decoder layer": "model.layers.{}.self_attn",
    },
}


@pytest.mark.parametrize("name", tiny_inside.NAMES)
@torch.no_grad()
def test_attention_weights_are_the_references(name: str) -> None:
    """Of every attention. Weights of padding are left out, and where a token sees no image."""
    reference, ours, inputs = tiny_inside.pair(name)
    family = name.split(",")[0]
    reference.set_attn_implementation("eager")
    with reference_weights(reference) as theirs:
        reference(**inputs)
    with watch(ours, "*, attention weights") as seen:
        ours(**inputs)
    compared = 0
    for stage in seen:
        if stage.startswith("resampler") and family == "idefics":
            continue
        kind, number = stage.split(",")[0].rsplit(" ", 1)
        (expected,) = theirs[PATHS[family][kind].format(number)]
        assert_weights(family, stage, seen[stage], expected, inputs)
        compared += 1
    assert compared >= 6


def assert_weights(family: str, stage: str, found: Tensor, expected: Tensor, inputs: dict[str, Any]) -> None:
    assert found.shape == expected.shape, stage
    if stage.startswith(("decoder", "gated")):
        real = inputs["attention_mask"].bool()  # (B, T)
        if stage.startswith("gated"):
            real = real & inputs["image_attention_mask"].bool().any(2)
        found, expected = found.transpose(1, 2)[real], expected.transpose(1, 2)[real]
    elif family == "idefics":  # images that nobody sees do not run here
        used = inputs["image_attention_mask"].bool().any(1).flatten()
        assert not found[~used].any()
        found, expected = found[used], expected[used]
    elif family == "idefics2":  # rows of padding patches do not run here; nobody attends to them
        rows = found.sum(-1) > 0
        assert torch.equal(rows.all(1), rows.any(1))
        found, expected = found[rows], expected[rows]
    oracle.assert_close(found, expected, expected, stage)


@torch.no_grad()
def test_weights_of_the_idefics_resampler() -> None:
    """The reference returns none: they are its softmaxes with as many queries as latents."""
    reference, ours, inputs = tiny_inside.pair("idefics")
    used = inputs["image_attention_mask"].bool().any(1).flatten()
    with reference_weights(reference) as theirs:
        reference(**inputs)
    with watch(ours, "resampler layer *, attention weights") as seen:
        ours(**inputs)
    latents = ours.config.perceiver_config.resampler_n_latents
    expected = [weights for weights in theirs["softmax"] if weights.ndim == 4 and weights.shape[2] == latents]
    for stage, weights in zip(seen, expected[:2], strict=True):
        oracle.assert_close(seen[stage][used], weights[used], weights[used], stage)


@pytest.mark.parametrize("name", tiny_inside.NAMES)
@torch.no_grad()
def test_vision_layers_have_the_references_shape(name: str) -> None:
    """With padding between the images; what did not run is 0."""
    reference, ours, inputs = tiny_inside.pair(name)
    family = name.split(",")[0]
    path = PATHS[family]["vision layer"].removesuffix(".self_attn").format(1)
    held: list[Tensor] = []
    handle = reference.get_submodule(path).register_forward_hook(
        lambda _, __, output: held.append(output[0] if isinstance(output, tuple) else output)
    )
    both = oracle.both(reference, lambda model: model(**inputs) and held.pop())
    handle.remove()
    with watch(ours, "vision layer 1", "vision layer 1, attention heads") as seen:
        ours(**inputs)
    found, heads = seen["vision layer 1"], seen["vision layer 1, attention heads"]
    assert found.shape == both[0].shape
    assert heads.flatten(2).shape == both[0].shape
    ran = found.any(-1)
    oracle.assert_close(found[ran], both[0][ran], both[1][ran], "vision layer 1")
    if family == "idefics2":
        assert 0 < int(ran.sum()) < ran.numel()


@pytest.mark.parametrize("name", tiny_inside.NAMES)
@torch.no_grad()
def test_decode_steps_go_on_where_the_prompt_ended(name: str) -> None:
    """Prompt and steps together are what one pass over the whole text holds."""
    _, ours, inputs = tiny_inside.pair(name)
    inputs = tiny_inside.row_of(inputs, name)
    names = ("decoder layer 1", "decoder layer 1, attention weights", "*, attention weights")
    with watch(ours, *names) as seen:
        ids = ours.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    length, total = inputs["input_ids"].shape[1], ids.shape[1]
    assert seen.steps == [0, *range(length, total - 1)]
    assert torch.equal(seen.tokens, ids[:, :-1])
    assert seen.positions == list(range(total - 1))
    more = {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
    if "image_attention_mask" in inputs:
        mask = inputs["image_attention_mask"]
        more["image_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, total - 1 - length, -1)], 1)
    with watch(ours, *names) as whole:
        ours(**{**inputs, **more})
    for stage in seen:
        if stage.startswith("gated") and not inputs["image_attention_mask"].any(2).all():
            sees = more["image_attention_mask"].bool().any(2)[0]
            torch.testing.assert_close(seen[stage][:, :, sees], whole[stage][:, :, sees], rtol=1e-4, atol=1e-5)
            continue
        torch.testing.assert_close(seen[stage], whole[stage], rtol=1e-4, atol=1e-4)


# ---- Ways to run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shapes-idefics2", "shapes-llava-next", "shapes-idefics"])
def test_every_stage_has_the_shape_that_is_listed(name: str) -> None:
    model, _, inputs = tiny_inside.asked(name)
    listed = stages(model)
    plain = model.generate(**inputs, max_new_tokens=4)
    with watch(model, *listed) as seen:
        assert torch.equal(model.generate(**inputs, max_new_tokens=4), plain)
    for stage, shape in listed.items():
        found = seen[stage].shape
        assert len(found) == len(shape), stage
        assert all(isinstance(size, str) or size == size_found for size, size_found in zip(shape, found, strict=True))


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}]
)
def test_half_precision_and_quantised(options: Any) -> None:
    model, _, inputs = tiny_inside.asked("shapes-idefics2", **options)
    plain = model(**inputs).logits
    with watch(model, "decoder layer *", "decoder layer *, attention heads", "logits") as seen:
        assert torch.equal(model(**inputs).logits, plain)
    assert seen["decoder layer 0"].dtype == model.dtype
    assert torch.equal(seen["logits"], plain)


def test_beams_batches_and_no_cache() -> None:
    _, ours, inputs = tiny_inside.pair("idefics2")
    plain = ours.generate(**inputs, max_new_tokens=4, num_beams=3)
    with watch(ours, "decoder layer 0", "decoder layer 0, attention weights") as seen:
        assert torch.equal(ours.generate(**inputs, max_new_tokens=4, num_beams=3), plain)
    rows, length = inputs["input_ids"].shape
    assert seen["decoder layer 0"].shape == (3 * rows, length + 3, 64)
    assert seen["decoder layer 0, attention weights"].shape == (3 * rows, 4, length + 3, length + 3)
    with watch(ours, "decoder layer 0") as seen:
        ours.generate(**inputs, max_new_tokens=3, use_cache=False)
    assert seen.steps == [0, length, 2 * length + 1]


def test_chat() -> None:
    """A second turn runs its own tokens only: they follow in the text."""
    model, processor, _ = tiny_inside.asked("shapes-idefics2")
    chat = Chat(model, processor, max_new_tokens=6)
    with watch(model, "decoder layer 0", "vision layer 0") as seen:
        chat.ask("what is this?", [drawn_image()])
        first = seen.tokens.shape[1]
        chat.ask("and what colour is it?")
    assert seen.tokens.shape[1] > first
    assert seen["decoder layer 0"].shape[1] == len(seen.positions)
    assert len(seen.views()) == 1
    assert (seen.images[0, :, 0] >= 0).sum() == processor.image_seq_len


def test_less_of_it() -> None:
    model, _, inputs = tiny_inside.asked("shapes-idefics2")
    with watch(model, "decoder layer 2", "decoder layer 2, attention weights") as whole:
        model.generate(**inputs, max_new_tokens=3)
    with watch(model, *whole, last=1, to="cpu", dtype=torch.float16) as seen:
        model.generate(**inputs, max_new_tokens=3)
    length = inputs["input_ids"].shape[1]
    assert seen.positions == list(range(length - 1, length + 2))
    assert seen.steps == [0, 1, 2]
    assert torch.equal(seen["decoder layer 2"], whole["decoder layer 2"][:, length - 1 :].half())
    weights = "decoder layer 2, attention weights"
    assert torch.equal(seen[weights], whole[weights][:, :, length - 1 :].half())


# ---- Nothing is left -------------------------------------------------------------------------------------------------


def hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("stage", ["decoder layer 1", "decoder layer 1, attention weights", "logits"])
def test_nothing_is_left_after_an_error(stage: str) -> None:
    model, _, inputs = tiny_inside.asked("shapes-idefics2")
    plain = model(**inputs).logits

    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("as planned")

    with pytest.raises(RuntimeError, match="as planned"), watch(model, stage), edit(model, {stage: fails}):
        model(**inputs)
    assert hooks(model) == 0
    assert not attention_taps
    with watch(model, stage):
        pass
    assert torch.equal(model(**inputs).logits, plain)


def test_taps_hear_their_own_thread_only() -> None:
    """Another model that runs at the same time is not recorded."""
    (model, _, inputs), (other, _, _) = tiny_inside.asked("shapes-idefics2"), tiny_inside.asked("shapes-idefics2")
    stage = "decoder layer 0, attention weights"
    calls = []

    def meanwhile(weights: Tensor) -> Tensor:
        calls.append(weights)
        thread = Thread(target=lambda: other(**inputs))
        thread.start()
        thread.join()
        return weights

    with edit(model, {stage: meanwhile}):
        model(**inputs)
    assert len(calls) == 1


def test_names_are_checked() -> None:
    model, *_ = tiny_inside.asked("shapes-idefics2")
    with pytest.raises(ValueError, match="decoder layer 3"), watch(model, "decoder layr 3"):
        pass
    with watch(model, "decoder layer *", "vision layer 0") as seen:
        pass
    assert "decoder layer 0, q_proj" not in seen  # parts are not layers
    with pytest.raises(ValueError, match="has not run"):
        seen["decoder layer 0"]
    with pytest.raises(KeyError, match="not watched"):
        seen["logits"]
    with watch(model, "vision layer 0") as seen:
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="none with an image"):
        seen["vision layer 0"]
