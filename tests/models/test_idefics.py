"""IDEFICS against the reference: hidden states, logits, loss, gradients, ids, names, on tiny random models."""

import copy
import math
from pathlib import Path
from typing import Any

import oracle
import oracle_idefics as tiny
import pytest
import torch
import transformers
from oracle_idefics import SIZE, VOCABULARY
from safetensors.torch import load_file, save_file
from torch import Tensor

from minivlm import AutoModelForImageTextToText, IdeficsConfig, IdeficsForVisionText2Text
from minivlm.checkpoint import hub
from minivlm.checkpoint.names import WEIGHTS, is_ignored, local_name
from minivlm.models.presets import IDEFICS as PRESETS
from minivlm.modules.attention import Mask, attention

Model = IdeficsForVisionText2Text

# What varies: resampler, norms of queries and keys in both places, interval of gated blocks, added tokens, gates.
CONFIGS: dict[str, dict[str, Any]] = {
    "every block gated, 2 added tokens": {},
    "no resampler, every 2nd, 3 added tokens": {"resampler": False, "interval": 2, "added": 3},
    "no norms, every 3rd, nothing added": {
        **{"qk_norms": False, "perceiver_norms": False},
        **{"interval": 3, "layers": 3, "added": 0},
    },
    "every 4th, as released": {"interval": 4, "layers": 8, "rms_norm_eps": 1e-5},
    "no norms, no resampler, a gate for every channel": {
        **{"qk_norms": False, "resampler": False},
        **{"interval": 2, "added": 0, "alpha_type": "vector"},
    },
}
IMAGES = (2, 0, 3, 1)  # images in each row of the batch


@pytest.fixture(scope="module", params=CONFIGS, ids=CONFIGS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any, dict[str, Tensor]]:
    """(reference, ours with the same weights, a batch)."""
    config = tiny.idefics_config(**CONFIGS[request.param])
    reference = tiny.random_reference(config)
    folder = oracle.save(reference, tmp_path_factory.mktemp("reference"))
    return reference, Model.from_pretrained(folder), tiny.random_inputs(IMAGES, config.additional_vocab_size)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, Tensor]]:
    """The first of these pairs, for what does not depend on the configuration."""
    reference = tiny.random_reference(tiny.idefics_config())
    folder = oracle.save(reference, tmp_path_factory.mktemp("plain"))
    return reference, Model.from_pretrained(folder), tiny.random_inputs(IMAGES)


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy over all V + A logits, written out: −log softmax at each label, then the mean."""
    terms = [
        -logits[row, slot].double().log_softmax(-1)[labels[row, slot + 1]]
        for row, slot in (labels[:, 1:] != -100).nonzero().tolist()
    ]
    return torch.stack(terms).mean()


# ---- One pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "sdpa", None])
@torch.no_grad()
def test_hidden_states_logits_and_loss(pair: Any, backend: str | None) -> None:
    reference, ours, inputs = pair
    found, eager, sdpa = oracle.assert_states(*pair, backend)
    used = inputs["image_attention_mask"].any(1)  # we do not look at images that nobody sees
    features = (output.image_hidden_states[used] for output in (found, eager, sdpa))
    oracle.assert_close(*features, "image vectors")
    assert not found.image_hidden_states[~used].any()
    labels = oracle.labels(inputs)
    torch.testing.assert_close(found.loss.double(), plain_loss(found.logits, labels), rtol=1e-6, atol=0)
    if ours.config.additional_vocab_size:  # the reference counts on V logits where there are V + A
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            reference(**inputs, labels=labels)


def test_gradients(pair: Any) -> None:
    reference, ours, inputs = pair
    oracle.assert_gradients(ours, reference, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pair: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    reference, _, inputs = pair
    oracle.assert_half_precision(reference, Model, inputs, dtype, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_resampler_in_the_dtype_of_the_model(plain: Any, dtype: torch.dtype) -> None:
    """To the bit: its softmax is not in fp32. On copies, so that no other test sees the dtype."""
    reference, ours, _ = plain
    theirs, mine = (copy.deepcopy(model.model.perceiver_resampler).to(dtype) for model in (reference, ours))
    patches = torch.randn(3, 10, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(mine(patches), theirs(patches))


@pytest.mark.parametrize("images", [(0,), (0, 0), (1,), (4,), (3, 3)])
def test_batches_of_other_kinds(pair: Any, images: tuple[int, ...]) -> None:
    reference, ours, _ = pair
    oracle.assert_logits(reference, ours, tiny.random_inputs(images, ours.config.additional_vocab_size, seed=3))


@torch.no_grad()
def test_masks_that_no_processor_makes(plain: Any) -> None:
    """Tokens that see several images, all, or images behind them: the mask is the caller's."""
    reference, ours, inputs = plain
    torch.manual_seed(0)
    inputs = {**inputs, "image_attention_mask": torch.randint(2, inputs["image_attention_mask"].shape)}
    real = inputs["attention_mask"].bool()
    eager, sdpa = oracle.both(reference, lambda model: model(**inputs).logits[real])
    oracle.assert_close(ours(**inputs).logits[real], eager, sdpa, "logits")
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(ours.generate(**inputs, **greedy), reference.generate(**inputs, **greedy))


@torch.no_grad()
def test_the_mask_is_what_counts(plain: Any) -> None:
    """A token that sees no image is the same whatever the images; one that sees a image is not."""
    _, ours, inputs = plain
    seen = inputs["image_attention_mask"].any(2)
    real = inputs["attention_mask"].bool()
    once = ours(**inputs).logits
    other = ours(**{**inputs, "pixel_values": torch.randn_like(inputs["pixel_values"])}).logits
    first = seen.cumsum(1) == 0  # before the first image of its row
    assert torch.equal(once[first & real], other[first & real])
    assert ((once - other)[seen].abs().amax(-1) > 1e-2).all()
    none = {"image_attention_mask": torch.zeros_like(inputs["image_attention_mask"])}
    text = ours(**{**inputs, **none}).logits
    assert (text - once)[seen].abs().max() > 1e-2
    nothing = {"pixel_values": torch.full_like(inputs["pixel_values"], torch.nan)}  # never looked at
    assert torch.equal(ours(**{**inputs, **none, **nothing}).logits, text)


@torch.no_grad()
def test_the_dense_half_of_a_gated_block_needs_no_picture(plain: Any) -> None:
    _, ours, _ = plain
    inputs = tiny.random_inputs((0, 0))
    before = ours(**inputs).logits
    gates = [block.alpha_dense for block in ours.model.gated_cross_attn_layers]
    values = [gate.clone() for gate in gates]
    for gate in gates:
        gate.zero_()
    assert (ours(**inputs).logits - before).abs().max() > 1e-2
    for gate, value in zip(gates, values, strict=True):
        gate.copy_(value)


@torch.no_grad()
def test_embeddings_instead_of_ids_and_images(pair: Any) -> None:
    reference, ours, inputs = pair
    ours.attn_implementation = None
    whole = ours(**inputs)
    embedded = {**inputs, "inputs_embeds": ours.model.embed(inputs["input_ids"])}
    del embedded["input_ids"]
    assert torch.equal(ours(**embedded).logits, whole.logits)
    # The last block runs one row then instead of many, and matrix products of other sizes round differently.
    torch.testing.assert_close(ours(**inputs, logits_to_keep=1).logits, whole.logits[:, -1:], rtol=1e-5, atol=1e-5)
    pixels = inputs.pop("pixel_values")
    states = ours.model.vision_model(pixels.flatten(0, 1))[0].unflatten(0, pixels.shape[:2])
    torch.testing.assert_close(ours(**inputs, image_encoder_embeddings=states).logits, whole.logits)
    expected = reference(**inputs, image_encoder_embeddings=states).image_hidden_states
    if ours.config.use_resampler:
        again = ours(**inputs, perceiver_embeddings=whole.image_hidden_states)
        assert torch.equal(again.logits, whole.logits)
        assert torch.equal(again.image_hidden_states, whole.image_hidden_states)
    used = inputs["image_attention_mask"].any(1)
    torch.testing.assert_close(whole.image_hidden_states[used], expected[used], rtol=1e-4, atol=1e-5)
    inputs["pixel_values"] = pixels


@pytest.mark.parametrize("size", [(SIZE, SIZE), (14, 14), (16, 12), (9, 30), (8, 18), (20, 21)])
@torch.no_grad()
def test_images_of_other_sizes(plain: Any, size: tuple[int, int]) -> None:
    """Positions stretched to odd sizes, to less, to the same number of patches lying otherwise."""
    reference, ours, inputs = plain
    torch.manual_seed(0)
    inputs = {**inputs, "pixel_values": torch.randn(4, 3, 3, *size), "interpolate_pos_encoding": True}
    real = inputs["attention_mask"].bool()
    eager, sdpa = oracle.both(reference, lambda model: model(**inputs).logits[real])
    oracle.assert_close(ours(**inputs).logits[real], eager, sdpa, "logits")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_stretched_positions_in_half_precision(plain: Any, dtype: torch.dtype) -> None:
    """Interpolated in fp32. In fp16 the reference interpolates fp16 numbers: off by a last place of those up to 0.5."""
    reference, ours, _ = plain
    theirs = reference.model.vision_model.embeddings
    mine = ours.model.vision_model.embeddings
    for model in (theirs, mine):
        model.to(dtype)
    expected = theirs.interpolate_pos_encoding(torch.zeros(1, 21, 48, dtype=dtype), 16, 20)[0]
    found = mine.positions(16, 20)
    for model in (theirs, mine):
        model.to(torch.float32)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if dtype == torch.bfloat16 else 2**-12)


@torch.no_grad()
def test_positions_follow_the_padding_mask(plain: Any) -> None:
    """Without position_ids, as this family's reference alone does: left padding changes nothing."""
    _, ours, inputs = plain
    row = {name: value[1:2] for name, value in inputs.items()}
    start = int(row["attention_mask"].argmax())
    assert start > 0
    short = {name: value if name == "pixel_values" else value[:, start:] for name, value in row.items()}
    torch.testing.assert_close(ours(**row).logits[:, start:], ours(**short).logits, rtol=1e-4, atol=1e-5)
    del short["attention_mask"]
    torch.testing.assert_close(ours(**row).logits[:, start:], ours(**short).logits, rtol=1e-4, atol=1e-5)


# ---- Cache and generation --------------------------------------------------------------------------------------------


def test_cached_equals_uncached(pair: Any) -> None:
    """New tokens without a word about images."""
    _, ours, inputs = pair
    ours.attn_implementation = None
    prompt, seen = inputs["input_ids"].shape[1] - 5, inputs["image_attention_mask"]
    assert torch.equal(seen[:, prompt:], seen[:, prompt - 1 : prompt].expand(-1, 5, -1))  # as the cache assumes
    images = {"pixel_values": inputs["pixel_values"], "image_attention_mask": seen[:, :prompt]}
    oracle.assert_cached_equals_uncached(ours, inputs, images)


@torch.no_grad()
def test_images_can_come_again_with_later_tokens(plain: Any) -> None:
    """With a mask for the new tokens alone, or for all of them, or for all up to some: the last row holds for more."""
    _, ours, inputs = plain
    ids, mask, seen = inputs["input_ids"], inputs["attention_mask"], inputs["image_attention_mask"]
    whole, tokens = ours(**inputs).logits, ids.shape[1]
    short = ours(**{**inputs, "image_attention_mask": seen[:, : tokens - 3]}).logits
    assert torch.equal(short, whole)
    for rows in (seen[:, 9:], seen, seen[:, : tokens - 3]):
        cache = ours.new_cache(len(ids), tokens)
        first = {"pixel_values": inputs["pixel_values"], "image_attention_mask": seen[:, :9]}
        ours(ids[:, :9], mask[:, :9], **first, past_key_values=cache)
        later = {"pixel_values": inputs["pixel_values"], "image_attention_mask": rows}
        found = ours(ids[:, 9:], mask, **later, past_key_values=cache).logits
        real = mask[:, 9:].bool()
        torch.testing.assert_close(found[real], whole[:, 9:][real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("images", [IMAGES, (0, 0), (4,)])
@torch.no_grad()
def test_greedy_ids(pair: Any, images: tuple[int, ...], use_cache: bool) -> None:
    reference, ours, _ = pair
    ours.attn_implementation = None
    inputs = tiny.random_inputs(images, ours.config.additional_vocab_size, seed=5)
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache}
    expected = reference.generate(**inputs, **options)
    assert torch.equal(ours.generate(**inputs, **options), expected)


@torch.no_grad()
def test_greedy_ids_from_embeddings_and_from_nothing(plain: Any) -> None:
    reference, ours, inputs = plain
    options = {"max_new_tokens": 6, "do_sample": False}
    ids = ours.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    embedded = {**inputs, "inputs_embeds": ours.model.embed(inputs["input_ids"])}
    del embedded["input_ids"]
    assert torch.equal(ours.generate(**embedded, **options), ids)
    images = {"pixel_values": inputs["pixel_values"], "image_attention_mask": torch.ones(4, 1, 3, dtype=torch.long)}
    expected = reference.generate(**images, **options, bos_token_id=1)
    assert torch.equal(ours.generate(**images, **options), expected)


@torch.no_grad()
def test_an_answer_after_eos_sees_no_picture(plain: Any) -> None:
    """The last row of the mask holds for the answer, also where it is empty (the processor's rule after an eos)."""
    reference, ours, inputs = plain
    inputs = {**inputs, "image_attention_mask": inputs["image_attention_mask"].clone()}
    inputs["image_attention_mask"][2:, -2:] = 0
    options = {"max_new_tokens": 8, "do_sample": False}
    found = ours.generate(**inputs, **options)
    assert torch.equal(found, reference.generate(**inputs, **options))
    cache = ours.new_cache(4, found.shape[1])
    ours.generate(**inputs, **options, past_key_values=cache)
    assert cache.cross_seen[:, 0].tolist() == [[True], [False], [False], [False]]


@torch.no_grad()
def test_images_are_looked_at_once(pair: Any) -> None:
    """The tower, the resampler, keys and values run once for a whole answer; what is kept is one image a row."""
    _, ours, inputs = pair
    calls: dict[str, int] = {}

    def counter(name: str) -> Any:
        return lambda *_: calls.update({name: calls.get(name, 0) + 1})

    gated = ours.model.gated_cross_attn_layers
    watched = {"tower": ours.model.vision_model}
    watched |= {f"{name} {i}": getattr(block.cross_attn, name) for i, block in enumerate(gated) for name in PROJECTIONS}
    if ours.config.use_resampler:
        watched["resampler"] = ours.model.perceiver_resampler
    hooks = [module.register_forward_hook(counter(name)) for name, module in watched.items()]
    cache = ours.new_cache(len(IMAGES), inputs["input_ids"].shape[1] + 8)
    ours.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, past_key_values=cache)
    for hook in hooks:
        hook.remove()
    expected = {name: 8 if name.startswith(("q_proj", "o_proj")) else 1 for name in watched}
    assert calls == expected
    vectors = 5 if ours.config.use_resampler else 10  # the latents, or 3x3 patches and the class token
    assert len(cache.cross) == len(gated)
    assert all(keys.shape == values.shape == (4, 4, vectors, 16) for keys, values in cache.cross)


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@torch.no_grad()
def test_beams_take_their_pictures_along(plain: Any) -> None:
    reference, ours, inputs = plain
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    assert torch.equal(ours.generate(**inputs, **options), reference.generate(**inputs, **options))


@torch.no_grad()
def test_reordered_rows_take_their_pictures_along(plain: Any) -> None:
    """As beam search does: rows swap places, one twice, and every next token sees what its new row saw."""
    _, ours, inputs = plain
    rows = torch.tensor([3, 0, 2, 2])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    next_ids = torch.tensor([[5], [6], [7], [8]])
    longer = torch.cat([mask, mask.new_ones(4, 1)], 1)

    def step(order: Tensor, prompt: dict[str, Tensor], reordered: bool) -> Tensor:
        cache = ours.new_cache(4, ids.shape[1] + 1)
        ours(**prompt, past_key_values=cache)
        if reordered:
            cache.reorder(order)
        return ours(next_ids, longer[order], past_key_values=cache).logits

    found = step(rows, inputs, True)
    expected = step(rows, {name: value[rows] for name, value in inputs.items()}, False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_attention_with_a_mask_for_every_query() -> None:
    """(B, T, S) masks on every path."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
    valid = torch.rand(2, 7, 9) < 0.5
    valid[:, :, 0] = True
    scores = (q.double() @ k.double().mT * 0.4).masked_fill(~valid[:, None], -math.inf)
    expected = (scores.softmax(-1) @ v.double()).float()
    for backend in ("eager", "sdpa", None):
        found = attention(q, k, v, Mask(7, 9, valid=valid), scale=0.4, attn_implementation=backend)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ---- Configurations, names and files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_released_tensor_lists_map_completely(name: str, data: Path) -> None:
    """Names and shapes of the real checkpoints, against a meta-device model of the preset: nothing left over."""
    shapes = tiny.released_tensors(name, data)
    with torch.device("meta"):
        model = Model(PRESETS[name])
    old = {key for key in shapes if is_ignored(key, model)}
    assert {local_name(key, model.hub_prefixes): tuple(shape) for key, shape in shapes.items() if key not in old} == {
        key: tuple(value.shape) for key, value in model.named_parameters()
    }
    blocks = model.config.num_hidden_layers
    assert len(old) == 1 + blocks + blocks // 4  # position_ids, and inv_freq of all attention
    assert all(key.endswith(("inv_freq", "position_ids")) for key in old)
    assert len(shapes) == {32: 1056, 80: 1704}[blocks]
    assert sum(value.numel() for value in model.parameters()) == PARAMETERS[name]


PARAMETERS = {
    "HuggingFaceM4/idefics-9b": 8_929_679_632,
    "HuggingFaceM4/idefics-9b-instruct": 8_929_687_824,
    "HuggingFaceM4/idefics-80b": 79_967_843_624,
    "HuggingFaceM4/idefics-80b-instruct": 79_967_860_008,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_the_released_config(name: str, data: Path) -> None:
    values = hub.read_json(data / "hub" / name / "config.json")
    config = IdeficsConfig.from_hub(values)
    assert config == PRESETS[name]
    assert_reads_alike(config, transformers.IdeficsConfig(**values))


def assert_reads_alike(ours: IdeficsConfig, reference: Any) -> None:
    """Every field that both know has the same value."""
    theirs = reference.to_dict()
    theirs |= theirs["rope_parameters"]
    found = ours.to_hub()
    for name in ("vision_config", "perceiver_config"):
        for field, value in found.pop(name).items():
            assert theirs[name][field] == value, f"{name}.{field}"
    for field, value in found.items():
        if field not in ("dtype", "architectures", "rope_scaling"):
            expected = theirs[field]
            assert (tuple(expected) if isinstance(expected, list) else expected) == value, field


CONFIG_FILES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "empty parts": {"vision_config": None, "perceiver_config": None},
    "no special ids": {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
    "width as hidden_size": {"vision_config": {"hidden_size": 64}},
    "sizes of the parts at the top, which count for nothing": {
        **{"vision_embed_dim": 1280, "embed_dim": 1280, "image_size": 280, "patch_size": 20},
        **{"resampler_depth": 3, "qk_layer_norms_perceiver": True},
    },
    "theta of its own": {"rope_theta": 5e5},
    "theta as transformers 5 writes it": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "a resampler in the wrong place": {"perceiver_config": {"use_resampler": True}},
}


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_config_files_read_as_by_the_reference(case: str) -> None:
    config = IdeficsConfig.from_hub(CONFIG_FILES[case])
    assert_reads_alike(config, transformers.IdeficsConfig(**CONFIG_FILES[case]))
    assert config.use_resampler is False


@torch.no_grad()
def test_stretched_rope(tmp_path: Path) -> None:
    """The decoder is the shared one, so its rope types work here too."""
    config = tiny.idefics_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0})
    reference = tiny.random_reference(config)
    ours = Model.from_pretrained(oracle.save(reference, tmp_path))
    inputs = tiny.random_inputs(IMAGES)
    real = inputs["attention_mask"].bool()
    eager, sdpa = oracle.both(reference, lambda model: model(**inputs).logits[real])
    oracle.assert_close(ours(**inputs).logits[real], eager, sdpa, "logits")
    ours.save_pretrained(tmp_path)
    again = type(reference).from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, sdpa_logits(reference, inputs))


def sdpa_logits(reference: Any, inputs: dict[str, Tensor]) -> Tensor:
    reference.set_attn_implementation("sdpa")
    return reference(**inputs).logits


@torch.no_grad()
def test_saved_models_load_on_both_sides(pair: Any, tmp_path: Path) -> None:
    reference, ours, inputs = pair
    ours.attn_implementation = None
    ours.save_pretrained(tmp_path)
    theirs = type(reference).from_pretrained(tmp_path)
    assert torch.equal(sdpa_logits(theirs, inputs), sdpa_logits(reference, inputs))
    assert set(load_file(tmp_path / WEIGHTS)) == set(reference.state_dict())
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is Model
    assert again.config.to_hub() == {**ours.config.to_hub(), "dtype": "float32"}
    assert torch.equal(again(**inputs).logits, ours(**inputs).logits)


@torch.no_grad()
def test_old_buffers_are_ignored_by_name_and_nothing_else_is(plain: Any, tmp_path: Path) -> None:
    _, ours, inputs = plain
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.gated_cross_attn_layers.3.cross_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.vision_model.embeddings.position_ids": torch.arange(10)[None],
    }
    save_file({**tensors, **old}, tmp_path / WEIGHTS)
    assert torch.equal(Model.from_pretrained(tmp_path)(**inputs).logits, ours(**inputs).logits)
    save_file({**tensors, **old, "model.layers.0.self_attn.rotary_emb.inv_freq_2": torch.ones(8)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"1 tensors unexpected:\n    model.layers.0.self_attn.rotary_emb.inv_freq_2"):
        Model.from_pretrained(tmp_path)


# ---- Training --------------------------------------------------------------------------------------------------------

FREEZING: dict[str, dict[str, Any]] = {
    "class defaults": {"freeze_text_layers": True, "freeze_vision_layers": True},
    "nothing": {},
    "text but for its linear layers": {
        "freeze_text_layers": True,
        "freeze_text_module_exceptions": ["Linear", "Embedding"],
    },
    "tower but for norms and tables": {
        "freeze_vision_layers": True,
        "freeze_vision_module_exceptions": ["LayerNorm", "Embedding"],
    },
    "text and head": {"freeze_text_layers": True, "freeze_lm_head": True},
}


@pytest.mark.parametrize("case", FREEZING)
def test_freezing(case: str, tmp_path: Path) -> None:
    """The same parameters are trained as by the reference, also after loading."""
    reference = transformers.IdeficsForVisionText2Text(tiny.idefics_config(layers=2, **FREEZING[case]))
    ours = Model.from_pretrained(oracle.save(reference, tmp_path))
    expected = {
        local_name(name, ours.hub_prefixes): value.requires_grad for name, value in reference.named_parameters()
    }
    assert {name: value.requires_grad for name, value in ours.named_parameters()} == expected
    fresh = Model(ours.config)
    assert {name: value.requires_grad for name, value in fresh.named_parameters()} == expected


@pytest.mark.parametrize("kind", ["float", "vector"])
@pytest.mark.parametrize("start", ["zeros", "ones", "normal", "gaussian", "random"])
def test_gates_start_as_configured(kind: str, start: str) -> None:
    changes = {"alpha_type": kind, "alpha_initializer": start, "alphas_initializer_range": 0.5, "layers": 2}
    config = tiny.idefics_config(**changes)
    ours = Model(IdeficsConfig.from_hub(config.to_dict()))
    found = [getattr(block, name) for block in ours.model.gated_cross_attn_layers for name in GATES]
    if kind == "float" and start not in ("zeros", "ones"):
        with pytest.raises(TypeError, match=r"normal\(\) received an invalid"):  # which we understand nevertheless
            transformers.IdeficsForVisionText2Text(config)
    else:
        reference = transformers.IdeficsForVisionText2Text(config)
        theirs = [getattr(block, name) for block in reference.model.gated_cross_attn_layers for name in GATES]
        assert [value.shape for value in found] == [value.shape for value in theirs]
        if start in ("zeros", "ones"):
            assert all(torch.equal(*values) for values in zip(found, theirs, strict=True))
    if start not in ("zeros", "ones"):
        assert all(value.any() and value.std(correction=0) < 1 for value in found)


GATES = ("alpha_cross_attn", "alpha_dense")


# ---- Bad input -------------------------------------------------------------------------------------------------------

BAD_CALLS = {
    "no images": ({"pixel_values": None}, "exactly one of pixel_values.*found none"),
    "no images in an empty cache": ({"pixel_values": None, "past_key_values": (4, 40)}, "found none"),
    "images twice": ({"perceiver_embeddings": torch.zeros(4, 3, 5, 48)}, "found pixel_values, perceiver_embeddings"),
    "images of 4 dimensions": (
        {"pixel_values": torch.zeros(3, 3, SIZE, SIZE)},
        r"pixel_values should be \(batch = 4",
    ),
    "images of fewer rows": ({"pixel_values": torch.zeros(3, 3, 3, SIZE, SIZE)}, r"should be \(batch = 4"),
    "rows without room for images": ({"pixel_values": torch.zeros(4, 0, 3, SIZE, SIZE)}, "found .4, 0, 3"),
    "images of another size": (
        {"pixel_values": torch.zeros(4, 3, 3, 14, 14)},
        r"takes images of \(3, 12, 12\), found \(3, 14, 14\); .*interpolate_pos_encoding=True",
    ),
    "four channels": (
        {"pixel_values": torch.zeros(4, 3, 4, SIZE, SIZE), "interpolate_pos_encoding": True},
        r"found \(4, 12, 12\)",
    ),
    "images smaller than a patch": (
        {"pixel_values": torch.zeros(4, 3, 3, 3, SIZE), "interpolate_pos_encoding": True},
        r"found \(3, 3, 12\)",
    ),
    "vectors of another width": (
        {"pixel_values": None, "perceiver_embeddings": torch.zeros(4, 3, 5, 64)},
        r"perceiver_embeddings should be \(batch = 4, images, vectors, 48\), found \(4, 3, 5, 64\)",
    ),
    "no image mask": ({"image_attention_mask": None}, r"\(batch, tokens, images\) = \(4, 19, 3\), found None"),
    "image mask for fewer images": ({"image_attention_mask": torch.ones(4, 19, 2)}, r"found \(4, 19, 2\)"),
    "image mask for fewer rows": ({"image_attention_mask": torch.ones(2, 19, 3)}, r"found \(2, 19, 3\)"),
    "image mask for more tokens": ({"image_attention_mask": torch.ones(4, 20, 3)}, r"found \(4, 20, 3\)"),
    "image mask without tokens": ({"image_attention_mask": torch.ones(4, 0, 3)}, r"found \(4, 0, 3\)"),
    "image mask of 2 dimensions": ({"image_attention_mask": torch.ones(4, 19)}, r"found \(4, 19\)"),
    "ids and embeddings": ({"inputs_embeds": torch.zeros(4, 19, 64)}, "either input_ids or inputs_embeds"),
    "neither": ({"input_ids": None}, "either input_ids or inputs_embeds"),
    "short mask": ({"attention_mask": torch.ones(4, 4)}, "attention_mask should be"),
    "labels of another length": ({"labels": torch.zeros(4, 3, dtype=torch.long)}, "labels should be"),
    "too many tokens for the cache": ({"past_key_values": (4, 5)}, "do not fit"),
    "a cache of fewer rows": ({"past_key_values": (2, 40)}, "the cache holds 2 rows, found 4"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(plain: Any, case: str) -> None:
    _, ours, inputs = plain
    change, message = BAD_CALLS[case]
    inputs = {**inputs, **change}
    if "past_key_values" in inputs:
        inputs["past_key_values"] = ours.new_cache(*inputs["past_key_values"])
    with pytest.raises(ValueError, match=message):
        ours(**inputs)


def test_more_bad_calls(plain: Any) -> None:
    _, ours, inputs = plain
    with pytest.raises(IndexError):
        ours(**{**inputs, "input_ids": torch.full_like(inputs["input_ids"], VOCABULARY + 2)})
    bare = Model(IdeficsConfig.from_hub(tiny.idefics_config(resampler=False, layers=2).to_dict()))
    vectors = {"pixel_values": None, "perceiver_embeddings": torch.zeros(4, 3, 5, 48)}
    with pytest.raises(ValueError, match="use_resampler=false"):
        bare(**{**inputs, **vectors})
    cache = ours.new_cache(4, 40)
    ours(**inputs, past_key_values=cache)
    late = {"input_ids": inputs["input_ids"][:, :2], "attention_mask": torch.ones(4, 21, dtype=torch.long)}
    for rows in (1, 19, 22):  # neither the 2 new tokens nor anything that reaches them
        mask = {"image_attention_mask": inputs["image_attention_mask"][:, :1].expand(-1, rows, -1)}
        with pytest.raises(ValueError, match=rf"= \(4, 21, 3\), found \(4, {rows}, 3\)"):
            ours(**{**inputs, **late, **mask}, past_key_values=cache)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "blocks that the interval does not divide": ({"cross_layer_interval": 3}, "multiple of cross_layer_interval"),
    "more blocks between gates than there are": ({"cross_layer_interval": 8}, "multiple of cross_layer_interval"),
    "interval of 0": ({"cross_layer_interval": 0}, "cross_layer_interval must be positive"),
    "heads that do not divide": ({"num_attention_heads": 5}, "multiple of num_attention_heads"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers must be positive"),
    "fewer than no tokens": ({"additional_vocab_size": -1}, "from 0 to .*found -1"),
    "unknown gate": ({"alpha_type": "matrix"}, "alpha_type should be one of float, vector"),
    "unknown start of the gates": ({"alpha_initializer": "twos"}, "alpha_initializer should be one of zeros"),
    "unknown exception": ({"freeze_text_module_exceptions": ["RMSNorm"]}, "knows LayerNorm, Linear, Embedding"),
    "width as a string": ({"vision_config": {"embed_dim": "big"}}, "VisionConfig.hidden_size should be int"),
    "no latents": ({"perceiver_config": {"resampler_n_latents": 0}}, "resampler_n_latents must be positive"),
    "unknown activation": ({"hidden_act": "swish9"}, "swish9"),
    "unknown rope": ({"rope_parameters": {"rope_type": "spiral"}}, "spiral"),
    "a list for a part": ({"vision_config": [1]}, "JSON object"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs(case: str) -> None:
    oracle.assert_bad_config(Model, tiny.idefics_config().to_dict(), *BAD_CONFIGS[case])
