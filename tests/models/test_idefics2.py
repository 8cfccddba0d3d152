"""Idefics2 against the reference: hidden states, logits, loss, gradients, on tiny random models."""

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

from minivlm import Idefics2Config, Idefics2ForConditionalGeneration
from minivlm.checkpoint import hub
from minivlm.models.presets import IDEFICS2 as PRESETS
from minivlm.modules.siglip import position_buckets

# What varies: GQA ratios, windows (shorter than the prompt, off), patch grids, resampler depth and heads.
CONFIGS = {
    "grouped heads, short window": {},
    "no grouping, no window": {"heads": (4, 4), "window": None, "perceiver_heads": (4, 4)},
    "one key head, 1 layer": {"heads": (4, 1), "window": 16, "perceiver_heads": (6, 1), "depth": 1},
    "odd grid, 3 layers": {"image_size": 35, "patch_size": 5, "depth": 3},
    "grid without rest, wide text": {"image_size": 30, "patch_size": 4, "text_width": 96, "heads": (6, 3)},
}
IMAGES = (2, 0, 3, 1)  # images in each row of the batch


@pytest.fixture(scope="module", params=CONFIGS, ids=CONFIGS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any, dict[str, Tensor]]:
    """(reference, ours with the same weights, a batch)."""
    config = oracle.idefics2_config(**CONFIGS[request.param])
    reference = oracle.random_reference(config)
    folder = oracle.save(reference, tmp_path_factory.mktemp("reference"))
    ours = Idefics2ForConditionalGeneration.from_pretrained(folder)
    return reference, ours, oracle.random_inputs(IMAGES, config.vision_config.patch_size)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_hidden_states_logits_and_loss(pair: Any, backend: str) -> None:
    features = [output.image_hidden_states for output in oracle.assert_states(*pair, backend)]
    oracle.assert_close(features[0].flatten(0, 1), *features[1:], "features")


@torch.no_grad()
def test_vision_layers_with_patch_masks(pair: Any) -> None:
    """The padded tower, mask in every layer: the slow twin of grouping images by size."""
    reference, ours, inputs = pair
    patch = ours.config.vision_config.patch_size
    pixels = inputs["pixel_values"].flatten(0, 1)
    masks = ours.model._patch_masks(pixels, inputs["pixel_attention_mask"], patch)
    real = masks.flatten(1).any(1)
    pixels, masks = pixels[real], masks[real]
    valid = masks.flatten(1)

    def layers(tower: Any, **mask: Tensor) -> list[Tensor]:
        seen: list[Tensor] = []
        modules = [tower.embeddings, *tower.encoder.layers, tower.post_layernorm]
        hooks = [module.register_forward_hook(lambda _m, _i, out: seen.append(out)) for module in modules]
        tower(pixels, **mask)
        for hook in hooks:
            hook.remove()
        return seen

    eager, sdpa = oracle.both(reference, lambda model: layers(model.model.vision_model, patch_attention_mask=masks))
    found = layers(ours.model.vision_model, patch_mask=masks)
    for layer, states in enumerate(zip(found, eager, sdpa, strict=True)):
        oracle.assert_close(*(state[valid] for state in states), f"vision layer {layer}")
    grouped = ours.model.encode_images(inputs["pixel_values"], inputs["pixel_attention_mask"])
    padded = ours.model.connector(found[-1], valid)
    torch.testing.assert_close(grouped, padded, rtol=1e-5, atol=1e-5)  # fp32 sums in another order


def test_gradients(pair: Any) -> None:
    reference, ours, inputs = pair
    oracle.assert_gradients(ours, reference, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    reference, _, inputs = pair
    oracle.assert_half_precision(reference, Idefics2ForConditionalGeneration, inputs, dtype, tmp_path)


@pytest.mark.parametrize("images", [(0, 0), (1,), (3, 3)])
def test_batches_of_other_kinds(pair: Any, images: tuple[int, ...]) -> None:
    reference, ours, _ = pair
    inputs = oracle.random_inputs(images, ours.config.vision_config.patch_size, seed=3)
    oracle.assert_logits(reference, ours, inputs)


def test_cached_equals_uncached(pair: Any) -> None:
    _, ours, inputs = pair
    images = {key: value for key, value in inputs.items() if key.startswith("pixel")}
    oracle.assert_cached_equals_uncached(ours, inputs, images)


@torch.no_grad()
def test_embeddings_instead_of_ids(pair: Any) -> None:
    _, ours, inputs = pair
    embeddings = ours.model.text_model.embed_tokens(inputs["input_ids"])
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    assert torch.equal(ours(**inputs).logits, ours(inputs_embeds=embeddings, **rest).logits)
    # The last block runs one row then instead of many, and matrix products of other sizes round differently.
    torch.testing.assert_close(
        ours(**inputs, logits_to_keep=1).logits, ours(**inputs).logits[:, -1:], rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_casting_a_loaded_model_keeps_rotary_frequencies(pair: Any, tmp_path: Path) -> None:
    """The reference's `.to(bfloat16)` rounds its inv_freq buffer and moves logits; ours equals loading in bfloat16."""
    reference, _, inputs = pair
    folder = oracle.save(reference, tmp_path)
    cast = Idefics2ForConditionalGeneration.from_pretrained(folder).to(torch.bfloat16)
    loaded = Idefics2ForConditionalGeneration.from_pretrained(folder, dtype="bfloat16")
    assert torch.equal(cast(**inputs).logits, loaded(**inputs).logits)


@torch.no_grad()
def test_features_can_be_reused_and_the_picture_matters(pair: Any) -> None:
    _, ours, inputs = pair
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    once = ours(**inputs)
    assert torch.equal(ours(**text, image_hidden_states=once.image_hidden_states).logits, once.logits)
    swapped = ours(**{**inputs, "pixel_values": inputs["pixel_values"].flip(1)}, output_hidden_states=False)
    assert (swapped.logits - once.logits).abs().max() > 1e-2


@torch.no_grad()
def test_picture_of_zeros_is_a_picture() -> None:
    """The reference drops a image whose pixels are all exactly 0 and then fails; our mask says that it is there."""
    config = oracle.idefics2_config()
    ours = Idefics2ForConditionalGeneration(Idefics2Config.from_hub(config.to_dict()))
    pixels, mask = torch.zeros(1, 1, 3, 12, 12), torch.ones(1, 1, 12, 12, dtype=torch.long)
    assert ours.model.encode_images(pixels, mask).shape == (1, oracle.LATENTS, 64)
    assert ours.model.encode_images(pixels).shape[0] == 0  # without a mask, zeros are filling


def test_position_buckets_follow_the_reference() -> None:
    """Every number of patches a side can have, as ids that the reference really looks up."""
    config = oracle.idefics2_config(image_size=980, patch_size=14).vision_config
    config.num_hidden_layers = 1
    tower = oracle.transformers.models.idefics2.modeling_idefics2.Idefics2VisionEmbeddings(config)
    seen: list[Tensor] = []
    tower.position_embedding.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    for patches in range(1, 71):
        tower(torch.zeros(1, 3, patches * 14, 14), torch.ones(1, patches, 1, dtype=torch.bool))
        ours = position_buckets(torch.tensor([patches]), patches, 70)
        assert torch.equal(ours * 70, seen[-1]), patches
    exact = {
        n: {i for i in range(n) if position_buckets(torch.tensor([n]), n, 70)[0, i] != i * 70 // n}
        for n in range(1, 71)
    }
    assert {n: rows for n, rows in exact.items() if rows} == {
        25: {5, 10, 15, 20},
        49: {7, 14, 28, 35},
        50: {5, 10, 15, 20, 30, 40},
        55: {11, 22, 33, 44},
    }


@pytest.mark.parametrize("name", PRESETS)
def test_released_tensor_lists_map_completely(name: str, data: Path) -> None:
    """Names and shapes of the real checkpoints, against a meta-device model of the preset: nothing left over."""
    keys = hub.read_json(data / "hub" / name / "keys.json")
    with torch.device("meta"):
        model = Idefics2ForConditionalGeneration(PRESETS[name])
    assert {key: tuple(value[1]) for key, value in keys.items()} == {
        key: tuple(value.shape) for key, value in model.named_parameters()
    }


@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_the_released_config(name: str, data: Path) -> None:
    values = hub.read_json(data / "hub" / name / "config.json")
    config = Idefics2Config.from_hub(values)
    assert config == PRESETS[name]
    reference = oracle.transformers.Idefics2Config(**values)
    for part in ("vision_config", "perceiver_config", "text_config"):
        theirs = getattr(reference, part).to_dict()
        theirs |= theirs.get("rope_parameters") or {}
        for field, value in config.to_hub()[part].items():
            assert theirs.get(field, value) == value, f"{part}.{field}"


BAD_CALLS = {
    "images of 4 dimensions": (lambda i: {"pixel_values": i["pixel_values"][0]}, "batch, images, channels"),
    "one image fewer": (lambda i: {"pixel_values": i["pixel_values"][:, :2]}, "image tokens, but"),
    "ids and embeddings": (lambda i: {"inputs_embeds": torch.zeros(4, 3, 64)}, "either input_ids or inputs_embeds"),
    "neither": (lambda i: {"input_ids": None}, "either input_ids or inputs_embeds"),
    "short mask": (lambda i: {"attention_mask": i["attention_mask"][:, :4]}, "attention_mask should be"),
    "labels of another length": (lambda i: {"labels": i["input_ids"][:, :3]}, "labels should be"),
    "too many tokens for the cache": (lambda i: {"past_key_values": "cache"}, "do not fit"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case: str) -> None:
    change, message = BAD_CALLS[case]
    ours = Idefics2ForConditionalGeneration(Idefics2Config.from_hub(oracle.idefics2_config().to_dict()))
    inputs = oracle.random_inputs(IMAGES, 4)
    inputs |= change(inputs)
    if inputs["pixel_values"].shape[1] == 2:
        inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"][:, :2]
    if "past_key_values" in inputs:
        inputs["past_key_values"] = ours.new_cache(4, 5)
    with pytest.raises(ValueError, match=message):
        ours(**inputs)


BAD_CONFIGS = {
    "image token outside the vocabulary": ({"image_token_id": 100}, "outside the vocabulary"),
    "width as a string": ({"vision_config": {"hidden_size": "big"}}, "VisionConfig.hidden_size"),
    "heads that do not divide": ({"vision_config": {"hidden_size": 50}}, "multiple of"),
    "more key heads than heads": ({"perceiver_config": {"num_key_value_heads": 32}}, "multiple of"),
    "unknown decoder": ({"text_config": {"model_type": "gpt2"}}, "'gpt2' is not supported"),
    "unknown activation": ({"text_config": {"hidden_act": "swish9"}}, "swish9"),
    "no layers": ({"text_config": {"num_hidden_layers": 0}}, "must be positive"),
    "rope of another kind": ({"text_config": {"rope_parameters": {"rope_type": "mrope", "factor": 2.0}}}, "mrope"),
    "a list for a part": ({"vision_config": [1]}, "JSON object"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs(case: str) -> None:
    values = oracle.idefics2_config().to_dict()
    oracle.assert_bad_config(Idefics2ForConditionalGeneration, values, *BAD_CONFIGS[case])
