"""LLaVA-NeXT against the reference: states, logits, loss, gradients, greedy ids, names, on tiny random models."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import oracle_llava as tiny
import pytest
import torch
import transformers
from oracle_llava import IMAGE, SIZES
from safetensors.torch import load_file, save_file
from torch import Tensor

from minivlm import AutoModelForImageTextToText, LlavaNextConfig, LlavaNextForConditionalGeneration
from minivlm.checkpoint import hub
from minivlm.checkpoint.names import WEIGHTS, local_name
from minivlm.models.presets import LLAVA_NEXT as PRESETS
from minivlm.modules.anyres import image_token_count

Model = LlavaNextForConditionalGeneration

MISTRAL = {"model_type": "mistral"}
QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-5}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
SIGLIP = {
    "vision": {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"},
    "vision_feature_select_strategy": "full",
}
# What varies: the decoder and its settings, GQA ratios, layers of the tower that are used, canvases, patch grids.
CONFIGS: dict[str, dict[str, Any]] = {
    "mistral": {"text": {**MISTRAL, "sliding_window": None}},
    "mistral, short window, odd canvases": {
        "text": {**MISTRAL, "sliding_window": 7},
        "pinpoints": [[12, 12], [36, 48], [24, 36]],
    },
    "llama, two states of the tower": {"layers": [-2, 1], "heads": (4, 4)},
    "llama 3, last state, pixels left over": {
        "text": {"rope_parameters": {**LLAMA_3, "original_max_position_embeddings": 64}},
        "layers": -1,
        "tile": 14,
        "pinpoints": [[14, 28], [28, 14], [28, 28]],
    },
    "qwen2": {"text": QWEN, "heads": (6, 2), "layers": 2},
    "qwen2, windows from layer 1 on, no biases": {
        "text": {**QWEN, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu_pytorch_tanh",
    },
    "SigLIP, as fine-tunes have it": {**SIGLIP, "text": QWEN},
    "SigLIP, three states, the last one too, biases": {
        **SIGLIP,
        "layers": [-1, 1, -2],
        "text": {"attention_bias": True, "mlp_bias": True, "head_dim": 20},
    },
}
ROWS = (SIZES[:2], [], SIZES[2:6], SIZES[6:])  # images of each row of the batch


@pytest.fixture(scope="module", params=CONFIGS, ids=CONFIGS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any, dict[str, Tensor]]:
    """(reference, ours with the same weights, a batch)."""
    config = tiny.llava_config(**CONFIGS[request.param])
    reference = tiny.random_llava(config)
    folder = oracle.save(reference, tmp_path_factory.mktemp("reference"))
    ours = Model.from_pretrained(folder)
    return reference, ours, tiny.llava_inputs(ROWS, config)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_hidden_states_logits_and_loss(pair: Any, backend: str) -> None:
    oracle.assert_close(*(output.image_hidden_states for output in oracle.assert_states(*pair, backend)), "features")


def test_gradients(pair: Any) -> None:
    """Of every parameter, and none for what is behind the last state of the tower that is used."""
    reference, ours, inputs = pair
    oracle.assert_gradients(ours, reference, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    reference, _, inputs = pair
    oracle.assert_half_precision(reference, Model, inputs, dtype, tmp_path)


@pytest.mark.parametrize("rows", [([], []), (SIZES[:1],), (SIZES[3:5], SIZES[3:5])])
def test_batches_of_other_kinds(pair: Any, rows: Any) -> None:
    reference, ours, _ = pair
    oracle.assert_logits(reference, ours, tiny.llava_inputs(rows, reference.config, seed=3))


@torch.no_grad()
def test_greedy_ids(pair: Any) -> None:
    """Equal to the reference's, with and without a cache (as the 34B checkpoint asks for)."""
    reference, ours, inputs = pair
    settings = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    expected = reference.generate(**inputs, **settings)
    assert torch.equal(ours.generate(**inputs, **settings), expected)
    assert torch.equal(ours.generate(**inputs, **settings, use_cache=False), expected)


def test_cached_equals_uncached(pair: Any) -> None:
    _, ours, inputs = pair
    oracle.assert_cached_equals_uncached(ours, inputs, {key: inputs[key] for key in ("pixel_values", "image_sizes")})


@torch.no_grad()
def test_equal_calls(pair: Any) -> None:
    """Embeddings for ids, features for pixels, and every form that pixels may have."""
    _, ours, inputs = pair
    whole = ours(**inputs)
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    embeddings = ours.model.language_model.embed_tokens(inputs["input_ids"])
    assert torch.equal(ours(inputs_embeds=embeddings, **rest).logits, whole.logits)
    # The last block runs one row then instead of many, and matrix products of other sizes round differently.
    torch.testing.assert_close(ours(**inputs, logits_to_keep=1).logits, whole.logits[:, -1:], rtol=1e-5, atol=1e-5)
    no_images = {"pixel_values": inputs["pixel_values"][:0], "image_sizes": inputs["image_sizes"][:0]}
    assert torch.isfinite(ours(torch.tensor([[1, 2, 3]]), **no_images).logits).all()
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(ours(**text, image_hidden_states=whole.image_hidden_states).logits, whole.logits)

    grids = [ours.model._tile_grid(tuple(size)) for size in inputs["image_sizes"].tolist()]
    tiles = [pixels[: 1 + high * wide] for pixels, (high, wide) in zip(inputs["pixel_values"], grids, strict=True)]
    unfilled = inputs["pixel_values"].clone()
    for pixels, real in zip(unfilled, tiles, strict=True):
        pixels[len(real) :] = torch.nan  # the filling is never looked at
    for form in (tiles, torch.cat(tiles), unfilled):
        assert torch.equal(ours(**{**inputs, "pixel_values": form}).logits, whole.logits)
    sizes = [tuple(size) for size in inputs["image_sizes"].tolist()]
    assert torch.equal(ours(**{**inputs, "image_sizes": sizes}).logits, whole.logits)


@torch.no_grad()
def test_images_and_their_order_matter(pair: Any) -> None:
    reference, ours, _ = pair
    inputs = tiny.llava_inputs([[(30, 50), (30, 50)]], reference.config)
    once = ours(**inputs).logits
    swapped = ours(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).logits
    assert (swapped - once).abs().max() > 1e-2


# ---- Packing ---------------------------------------------------------------------------------------------------------


def test_packing_at_the_released_sizes() -> None:
    """Which feature goes where, for sizes of every kind, against the reference: features are counted, so all differ."""
    text = {"num_hidden_layers": 1, "hidden_size": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    vision = {"num_hidden_layers": 1, "hidden_size": 2, "num_attention_heads": 1, "image_size": 336, "patch_size": 14}
    config = transformers.LlavaNextConfig(
        text_config={"model_type": "llama", **text, "vocab_size": 100, "intermediate_size": 2},
        vision_config={"model_type": "clip_vision_model", **vision, "intermediate_size": 2},
        image_token_index=IMAGE,
    )
    reference = transformers.LlavaNextForConditionalGeneration(config)
    ours = Model(LlavaNextConfig.from_hub(config.to_dict()))
    ours.model.image_newline = reference.model.image_newline
    rng = random.Random(0)
    sizes = [(rng.randint(1, 1500), rng.randint(1, 1500)) for _ in range(60)]
    sizes += [(110, 352), (1080, 1920), (328, 205), (1, 1000), (336, 336), (899, 1024)]
    for size in sizes:
        grid = ours.model._tile_grid(size)
        features = torch.arange((1 + grid[0] * grid[1]) * 576 * 2.0).view(-1, 576, 2)
        found = ours.model.pack(features, size, grid)
        expected = reference.model.pack_image_features([features], [size], "default", reference.model.image_newline)
        assert torch.equal(found, expected[0][0]), size
        assert len(found) == image_token_count(size, config.image_grid_pinpoints, 336, 14), size


def test_the_reference_cannot_pack_class_tokens_either() -> None:
    """Why `vision_feature_select_strategy="full"` is refused when the config is read, and not when a image comes."""
    reference = tiny.random_llava(tiny.llava_config(vision_feature_select_strategy="full"))
    inputs = tiny.llava_inputs([[(30, 50)]], reference.config)
    with pytest.raises(RuntimeError, match=r"invalid for input of size|must match"):
        reference(**inputs)


# ---- Names and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_released_tensor_lists_map_completely(name: str, data: Path) -> None:
    """Names and shapes of the real checkpoints, however spelled, against a meta-device model: nothing left over."""
    keys = tiny.tensor_list(data / "hub" / name / "keys.json")
    with torch.device("meta"):
        model = Model(PRESETS[name])
    expected = {key: tuple(value.shape) for key, value in model.named_parameters()}
    for spelling, spell in tiny.SPELLINGS.items():
        found = {local_name(spell(key), model.hub_prefixes): shape for key, shape in keys.items()}
        assert found == expected, spelling


@pytest.mark.parametrize("spelling", tiny.SPELLINGS)
@torch.no_grad()
def test_every_spelling_loads_here_and_there(spelling: str, tmp_path: Path) -> None:
    """What we save has the released names; respelled, both libraries load it, with equal logits."""
    ours = Model(LlavaNextConfig.from_hub(tiny.llava_config(text=QWEN).to_dict()))
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert {name.split(".")[0] for name in tensors} == {
        *("language_model", "multi_modal_projector", "vision_tower", "image_newline"),
    }
    spell = tiny.SPELLINGS[spelling]
    save_file({spell(name): value for name, value in tensors.items()}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="sdpa")
    theirs, report = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in again.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    inputs = tiny.llava_inputs([SIZES[:2]], theirs.config)
    oracle.assert_close(again(**inputs).logits, *oracle.both(theirs, lambda model: model(**inputs).logits), "logits")


@pytest.mark.parametrize("case", CONFIGS)
@torch.no_grad()
def test_what_we_save_transformers_loads(case: str, tmp_path: Path) -> None:
    """Weights, and every setting that changes a number: identical logits before and after."""
    original = tiny.random_llava(tiny.llava_config(**CONFIGS[case]))
    folder = oracle.save(original, tmp_path / "theirs")
    ours = Model.from_pretrained(folder)
    ours.save_pretrained(tmp_path / "ours")
    spell = tiny.SPELLINGS["5, a new model"]
    needed = {name for name in load_file(folder / WEIGHTS) if ".head." not in name}  # SigLIP's pooling, used nowhere
    assert {spell(name) for name in load_file(tmp_path / "ours" / WEIGHTS)} == needed
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    inputs = tiny.llava_inputs([SIZES[:2]], original.config)
    assert torch.equal(theirs(**inputs).logits, original(**inputs).logits)
    again = Model.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(**inputs).logits, ours(**inputs).logits)
    assert again.config == ours.config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_the_released_config(name: str, data: Path) -> None:
    values = hub.read_json(data / "hub" / name / "config.json")
    config = LlavaNextConfig.from_hub(values)
    assert config == PRESETS[name]
    assert LlavaNextConfig.from_hub(config.to_hub()) == config
    reference = transformers.LlavaNextConfig(**values)
    for part in ("vision_config", "text_config"):
        theirs = getattr(reference, part).to_dict()
        theirs |= theirs.get("rope_parameters") or {}
        ours = config.to_hub()[part]
        assert {"hidden_size", "num_hidden_layers", "num_attention_heads"} <= ours.keys() & theirs.keys()
        for field, value in ours.items():
            assert theirs.get(field, value) == value, f"{part}.{field}"
    for field in ("vision_feature_layer", "image_token_index", "projector_hidden_act", "multimodal_projector_bias"):
        assert getattr(config, field) == getattr(reference, field), field
    assert [list(size) for size in config.image_grid_pinpoints] == reference.image_grid_pinpoints


def test_defaults_are_those_of_the_reference() -> None:
    """An empty config.json, and one that spells a token or its canvases in another way; only the vocabulary is ours."""
    theirs = transformers.LlavaNextConfig(text_config={"model_type": "llama", "vocab_size": 32064})
    ours = LlavaNextConfig()
    assert ours == LlavaNextConfig.from_hub(theirs.to_dict())
    assert ours == LlavaNextConfig.from_hub({"image_grid_pinpoints": None, "text_config": {"vocab_size": 32064}})
    assert LlavaNextConfig.from_hub({"image_token_id": 7}).image_token_index == 7
    assert LlavaNextConfig(vision_feature_layer=[-2, 3]).feature_layers == (-2, 3)


# ---- What does not fit -----------------------------------------------------------------------------------------------

BAD_CALLS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "no sizes": (lambda i: {"image_sizes": None}, "need their image_sizes"),
    "one size fewer": (lambda i: {"image_sizes": i["image_sizes"][1:]}, "7 images and image_sizes 6"),
    "no size at all": (lambda i: {"image_sizes": i["image_sizes"][:0]}, "7 images and image_sizes 0"),
    "one image fewer": (lambda i: {"pixel_values": i["pixel_values"][1:]}, "6 images and image_sizes 7"),
    "fewer images than the prompt has": (
        lambda i: {"pixel_values": i["pixel_values"][1:], "image_sizes": i["image_sizes"][1:]},
        r"the prompt has \d+ image tokens, but its images \(100x33 pixels: 45, 12x12 .*\) give 179 vectors",
    ),
    "images for a text": (lambda i: {"input_ids": i["input_ids"].clamp(max=50)}, "has 0 image tokens, but"),
    "a size the other way round": (
        lambda i: {"image_sizes": torch.cat([i["image_sizes"][:1].flip(1), i["image_sizes"][1:]])},
        r"image tokens, but its images \(50x30 pixels: ",
    ),
    "flat sizes": (lambda i: {"image_sizes": i["image_sizes"].flatten()}, r"should be \(images, 2\)"),
    "sizes of nothing": (lambda i: {"image_sizes": i["image_sizes"] * 0}, "whole numbers from 1"),
    "sizes that are no numbers of pixels": (lambda i: {"image_sizes": i["image_sizes"] / 2}, "whole numbers from 1"),
    "fewer tiles than the size implies": (lambda i: {"pixel_values": i["pixel_values"][:, :3]}, "or more tiles"),
    "fewer tiles in a row": (lambda i: {"pixel_values": i["pixel_values"][:, 0]}, "7 tiles, but image_sizes"),
    "images of another side": (lambda i: {"pixel_values": i["pixel_values"][..., :8]}, r"3, 12, 12\)"),
    "a row of tiles of another side": (
        lambda i: {
            **{"input_ids": torch.tensor([[1] + 24 * [tiny.IMAGE]]), "attention_mask": None},
            **{"pixel_values": torch.zeros(3, 3, 8, 8), "image_sizes": [(12, 12)]},
        },
        r"takes images of \(3, 12, 12\), found \(3, 8, 8\)",
    ),
    "one image without its tiles": (lambda i: {"pixel_values": i["pixel_values"][0, 0]}, "3 images and"),
    "ids and embeddings": (lambda i: {"inputs_embeds": torch.zeros(4, 3, 64)}, "either input_ids or inputs_embeds"),
    "neither": (lambda i: {"input_ids": None}, "either input_ids or inputs_embeds"),
    "features of another image": (
        lambda i: {"pixel_values": None, "image_hidden_states": torch.zeros(3, 64)},
        "its images give 3 vectors",
    ),
    "pixels and features": (lambda i: {"image_hidden_states": torch.zeros(1, 64)}, "either pixel_values or"),
    "short mask": (lambda i: {"attention_mask": i["attention_mask"][:, :4]}, "attention_mask should be"),
    "labels of another length": (lambda i: {"labels": i["input_ids"][:, :3]}, "labels should be"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case: str) -> None:
    change, message = BAD_CALLS[case]
    config = tiny.llava_config()
    ours = Model(LlavaNextConfig.from_hub(config.to_dict()))
    inputs = tiny.llava_inputs(ROWS, config)
    with pytest.raises(ValueError, match=message):
        ours(**{**inputs, **change(inputs)})


@torch.no_grad()
def test_image_tokens_are_counted_before_the_tower_runs() -> None:
    config = tiny.llava_config()
    ours = Model(LlavaNextConfig.from_hub(config.to_dict()))
    inputs = tiny.llava_inputs(ROWS, config)
    ours.model.vision_tower.forward = lambda *_: pytest.fail("the tower ran")
    with pytest.raises(ValueError, match="image tokens, but"):
        ours(**inputs | {"input_ids": inputs["input_ids"].clamp(max=50)})


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "image token outside the vocabulary": ({"image_token_index": 100}, "outside the vocabulary"),
    "canvas that is no whole tiles": ({"image_grid_pinpoints": [[12, 30]]}, r"multiples of the tile's side of 12"),
    "no canvas": ({"image_grid_pinpoints": []}, "at least one"),
    "canvases in one row": ({"image_grid_pinpoints": [12, 24]}, "image_grid_pinpoints"),
    "class tokens": ({"vision_feature_select_strategy": "full"}, "not a grid, and the reference fails too"),
    "unknown strategy": ({"vision_feature_select_strategy": "cls"}, "'cls' is not supported"),
    "layer below the tower": ({"vision_feature_layer": -6}, "5 hidden states of a tower of 4 layers"),
    "layer above the tower": ({"vision_feature_layer": [1, 5]}, "5 hidden states of a tower of 4 layers"),
    "no layer": ({"vision_feature_layer": []}, "one or more"),
    "layer as text": ({"vision_feature_layer": "last"}, "LlavaNextConfig.vision_feature_layer"),
    "another tower": ({"vision_config": {"model_type": "vit"}}, "'vit' is not supp"),
    "width as a string": ({"vision_config": {"hidden_size": "big"}}, "VisionConfig.hidden_size"),
    "heads that do not divide": ({"vision_config": {"hidden_size": 50}}, "multiple of"),
    "patch larger than a tile": ({"vision_config": {"patch_size": 13}}, "smaller than one patch"),
    "unknown decoder": ({"text_config": {"model_type": "gpt2"}}, "'gpt2' is not supported"),
    "unknown activation": ({"projector_hidden_act": "swish9"}, "swish9"),
    "a list for a part": ({"vision_config": [1]}, "JSON object"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs(case: str) -> None:
    oracle.assert_bad_config(Model, tiny.llava_config().to_dict(), *BAD_CONFIGS[case])


def test_layers_are_part_of_the_weights(tmp_path: Path) -> None:
    """A config that joins two states of the tower, and weights made for one."""
    Model(LlavaNextConfig.from_hub(tiny.llava_config().to_dict())).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"vision_feature_layer": -2', '"vision_feature_layer": [-2, 1]'))
    with pytest.raises(ValueError, match=r"linear_1.weight \[64, 48\], expected \[64, 96\]"):
        Model.from_pretrained(tmp_path)
