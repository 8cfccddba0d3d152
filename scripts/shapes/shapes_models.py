"""The small models of the shapes task: their words, their configurations and the files of their checkpoints.

    family = FAMILIES["llava_next"]
    model = family.model(family.config())
    write_processor(family, folder)        the processor's files alone
    save_package(family, model, folder)    the whole checkpoint, weights in half precision

All see images of up to 64×64 pixels in patches of 8. The Idefics2 takes such an image as it is. The LLaVA-NeXT's
tower takes squares of 32: the base image, in which the smallest digits are 5 pixels high, and up to four tiles. The
IDEFICS squeezes every image into a square of 64.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from idefics_tasks import (
    caption_prompt,
    classification_prompt,
    conversation_prompt,
    few_shot_prompt,
    prompted_caption_prompt,
    question_prompt,
    story_prompt,
)
from shapes import EXAMPLE, story, vocabulary
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from minivlm import Idefics2Config, Idefics2ForConditionalGeneration, Idefics2Processor
from minivlm.models.idefics import IdeficsConfig, IdeficsForVisionText2Text
from minivlm.models.llava_next import LlavaNextConfig, LlavaNextForConditionalGeneration
from minivlm.processing.idefics import IdeficsProcessor
from minivlm.processing.llava_next import LlavaNextProcessor

SPECIAL = ["<unk>", "<s>", "</s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
IMAGE = SPECIAL.index("<image>")
LATENTS = 16
AND_THAT = "And what is in that?"  # of a second image
PATCH, TILE = 8, 32
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{message['role'].capitalize()}}{% if message['content'][0]['type'] == 'image' %}"
    "{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


# ----------------------------------------------------------------------------------------------------- words


def build_tokenizer(decoupled: bool = False) -> Tokenizer:
    """The task's words, and letters to spell all others with; capitals do not count.

    `decoupled`: with the words of the IDEFICS guide's prompts, and the three tokens that IDEFICS adds after the rest.
    """
    letters = string.ascii_lowercase + string.digits
    tokens = [*SPECIAL, "user", "assistant", *string.punctuation, *letters, *("##" + letter for letter in letters)]
    tokens += [word for word in vocabulary() if word not in tokens]
    if decoupled:
        tokens = [token for token in [*tokens, *guide_words()] if token not in SPECIAL[3:]] + SPECIAL[3:]
        tokens = list(dict.fromkeys(tokens))
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>", continuing_subword_prefix="##"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece("##", cleanup=True), decoders.Replace(" :", ":")])
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def guide_words() -> list[str]:
    """Every word of the prompts of the IDEFICS guide, and of the stories, sorted."""
    prompts = [
        caption_prompt(""),
        prompted_caption_prompt(""),
        few_shot_prompt([], ""),
        question_prompt("", ""),
        classification_prompt("", []),
        story_prompt(""),
        conversation_prompt("", "", "", AND_THAT),
        [story(EXAMPLE), story(replace(EXAMPLE, shapes=()))],
    ]
    written = " ".join(text for prompt in prompts for text in prompt).replace(SPECIAL[-1], " ")
    return sorted(set(re.findall("[a-z]+", written.lower())))


# ------------------------------------------------------------------------------------------------- the models

SIZE = {"hidden_size": 128, "initializer_range": 0.05}
VISION = {**SIZE, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": PATCH}
TEXT = {
    **SIZE,
    "model_type": "mistral",
    "max_position_embeddings": 2048,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "intermediate_size": 288,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def idefics2_config() -> Idefics2Config:
    """A real Idefics2, small in every dimension: 1.94 million parameters, 3.9 MB in half precision."""
    resampler = {"resampler_n_latents": LATENTS, "resampler_depth": 2, "resampler_n_heads": 4}
    resampler |= {"resampler_head_dim": 32, "num_key_value_heads": 2, "hidden_size": 128, "rms_norm_eps": 1e-5}
    return Idefics2Config.from_hub(
        {
            "model_type": "idefics2",
            "image_token_id": IMAGE,
            "vision_config": {**VISION, "image_size": 64, "model_type": "idefics2"},
            "perceiver_config": {**resampler, "model_type": "idefics2"},
            "text_config": {**TEXT, "num_hidden_layers": 4, "vocab_size": build_tokenizer().get_vocab_size()},
        }
    )


def llava_next_config() -> LlavaNextConfig:
    """A real LLaVA-NeXT with the tower and decoder of the Idefics2 above: 1.5 million parameters, 3.1 MB.

    It uses the tower's last hidden state, not the last but one: of four layers none can be spared.
    """
    return LlavaNextConfig.from_hub(
        {
            "model_type": "llava_next",
            "image_token_index": IMAGE,
            "image_grid_pinpoints": PINPOINTS,
            "vision_feature_layer": -1,
            "vision_config": {
                **VISION,
                "image_size": TILE,
                "model_type": "clip_vision_model",
                # SigLIP's, whose weights it starts with
                "hidden_act": "gelu_pytorch_tanh",
                "layer_norm_eps": 1e-6,
            },
            "text_config": {**TEXT, "num_hidden_layers": 5, "vocab_size": build_tokenizer().get_vocab_size()},
        }
    )


def idefics_config() -> IdeficsConfig:
    """A real IDEFICS with the tower and the decoder of the Idefics2 above: 1.96 million parameters, 3.9 MB.

    Its decoder knows no shared key heads. A gated block stands before the first layer and before the third. Gates start
    open, but a block adds nothing at first, see `idefics_start`.
    """
    resampler = {"resampler_n_latents": LATENTS, "resampler_depth": 1, "resampler_n_heads": 4}
    resampler |= {"resampler_head_dim": 32, "qk_layer_norms_perceiver": True}
    vision = {**VISION, "image_size": 64, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    vision["embed_dim"] = vision.pop("hidden_size")
    names = ("hidden_size", "initializer_range", "intermediate_size", "num_attention_heads", "rms_norm_eps")
    names += ("max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    return IdeficsConfig.from_hub(
        {
            **{name: TEXT[name] for name in names},
            "model_type": "idefics",
            "vision_config": vision,
            "perceiver_config": resampler,
            "num_hidden_layers": 4,
            "cross_layer_interval": 2,
            "alpha_initializer": "ones",
            "use_resampler": True,
            "qk_layer_norms": True,
            "freeze_text_layers": False,
            "freeze_vision_layers": False,
            "vocab_size": build_tokenizer(decoupled=True).get_vocab_size() - len(SPECIAL[3:]),
            "additional_vocab_size": len(SPECIAL[3:]),
        }
    )


# ------------------------------------------------------------------------- parts of a small Idefics2 to start from

# What a block adds to the residual stream comes out of these.
ADDING = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
CROSSING = ("cross_attn.o_proj.weight", "mlp.down_proj.weight")


def start_from_idefics2(family: Family, model: nn.Module, folder: Path) -> None:
    """Copy what `family.start` makes of the weights of a trained small Idefics2; all else stays new."""
    old = Idefics2ForConditionalGeneration.from_pretrained(folder).float().state_dict()
    state = model.state_dict()
    taken = {name: value for name, value in family.start(old, state).items() if name in state}
    model.load_state_dict(state | taken)


def as_clip(old: dict[str, Tensor], tower: str, grid: slice) -> dict[str, Tensor]:
    """The tower of an Idefics2 as a CLIP of this name, with the positions of a part of its grid of 8 × 8.

    SigLIP has no norm before its layers, so as a CLIP the tower is only nearly what it was: the norm gets the spread
    that embedded patches had, about 0.5.
    """
    prefix = "model.vision_model."
    new = {f"model.{tower}.{name.removeprefix(prefix)}": value for name, value in old.items() if prefix in name}
    places = old[prefix + "embeddings.position_embedding.weight"].unflatten(0, (8, 8))[grid, grid].flatten(0, 1)
    places = places + old[prefix + "embeddings.patch_embedding.bias"]  # CLIP's patches have no bias
    new[f"model.{tower}.embeddings.position_embedding.weight"] = torch.cat([torch.zeros_like(places[:1]), places])
    new[f"model.{tower}.pre_layrnorm.weight"] = torch.full_like(places[0], 0.5)
    return new


def llava_next_start(old: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tower, decoder and head; the decoder's first layer is new and adds nothing at first.

    A tile's positions are the middle of the grid.
    """
    new = as_clip(old, "vision_tower", slice(2, 6)) | {"lm_head.weight": old["lm_head.weight"]}
    for name, value in old.items():
        name = name.replace("model.text_model.", "model.language_model.")
        for layer in reversed(range(4)):
            name = name.replace(f".language_model.layers.{layer}.", f".language_model.layers.{layer + 1}.")
        new[name] = value
    first = "model.language_model.layers.0."
    return new | {first + name: torch.zeros_like(state[first + name]) for name in ADDING}


def idefics_start(old: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tower, decoder, embeddings and head; the gated blocks are new and add nothing at first.

    Key heads that two query heads shared are doubled. Tokens are found by their names: three of them moved after the
    vocabulary, into tables of their own.
    """
    new = as_clip(old, "vision_model", slice(0, 8))
    for name, value in old.items():
        if "text_model.layers." in name:
            shared = "k_proj" in name or "v_proj" in name
            doubled = value.unflatten(0, (-1, 32)).repeat_interleave(2, dim=0).flatten(0, 1) if shared else value
            new[name] = doubled
    new["model.text_model.norm.weight"] = old["model.text_model.norm.weight"]
    places, vocabulary = build_tokenizer().get_vocab(), build_tokenizer(decoupled=True).get_vocab()
    pairs = [(vocabulary[token], place) for token, place in places.items()]
    tables = {"model.text_model.embed_tokens": "model.additional_embedding", "lm_head": "additional_fc"}
    for table, added in tables.items():
        rows = torch.cat([state[f"{table}.weight"], state[f"{added}.weight"]])
        now, before = torch.tensor(pairs).T
        rows[now] = old[f"{table}.weight"][before]
        new[f"{table}.weight"], new[f"{added}.weight"] = rows.split([len(rows) - len(SPECIAL[3:]), len(SPECIAL[3:])])
    for block in range(2):
        names = [f"model.gated_cross_attn_layers.{block}.{name}" for name in CROSSING]
        new |= {name: torch.zeros_like(state[name]) for name in names}
    return new


# --------------------------------------------------------------------------- a tower's input, and its labels


def whole(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Images as they are (B, 3, h, w), and one label for each patch (B, P, 1, 6)."""
    return images, labels.flatten(1, 2).unsqueeze(2)


def centres_in_sixteenths(labels: Tensor) -> Tensor:
    """Labels of patches (…, rows, columns, 6) whose x and y count in 16ths of the image, not in steps of 4 units."""
    size = torch.tensor(labels.shape[-2:-4:-1])  # (columns, rows)
    place = labels[..., 2:4]
    place = ((4 * place - 2) * 2 // size + 1) * (place > 0)
    return torch.cat([labels[..., :2], place, labels[..., 4:]], dim=-1)


def squares(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Base images and tiles (N, 3, 32, 32) as the processor cuts them, and four labels for each of their patches.

    images (B, 3, h, w) and labels of patches of 8 pixels (B, h / 8, w / 8, 6) → labels (N, 16, 4, 6). In a tile the
    four are alike, and centres count in steps of 4 pixels from 16 pixels outside of it.
    """
    height, width = images.shape[2:]
    down, across = -height % TILE // 2, -width % TILE // 2  # the black bands of the canvas
    canvas = F.pad(images, (across, across, down, down), value=-1.0)
    tiles = canvas.unfold(2, TILE, TILE).unfold(3, TILE, TILE).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    base = F.interpolate(images, (TILE, TILE), mode="bilinear", antialias=True)

    spread = F.pad(labels, (0, 0, across // PATCH, across // PATCH, down // PATCH, down // PATCH))
    row, column = (torch.arange(n) // 4 * 8 for n in spread.shape[1:3])  # where a patch's tile begins
    corner = torch.stack(torch.meshgrid(column, row, indexing="xy"), dim=-1) - torch.tensor([across, down]) // 4
    spread[..., 2:4] = ((spread[..., 2:4] - corner).clamp(-3, 12) + 4) * (spread[..., 2:4] > 0)
    of_tiles = spread.unfold(1, 4, 4).unfold(2, 4, 4).permute(0, 1, 2, 4, 5, 3).flatten(0, 2)  # (tiles, 4, 4, 6)
    of_tiles = of_tiles.flatten(1, 2).unsqueeze(2).expand(-1, -1, 4, -1)
    return torch.cat([base, tiles]), torch.cat([base_labels(labels), of_tiles])


def base_labels(labels: Tensor) -> Tensor:
    """Labels of the quarters of the base's 16 patches: (B, h / 8, w / 8, 6) → (B, 16, 4, 6)."""
    rows, columns = (torch.arange(8) * size // 8 for size in labels.shape[1:3])
    return fours(centres_in_sixteenths(labels)[:, rows][:, :, columns])


def fours(labels: Tensor) -> Tensor:
    """Labels of 8 × 8 patches by squares of four: (B, 8, 8, 6) → (B, 16, 4, 6)."""
    return labels.unflatten(2, (4, 2)).unflatten(1, (4, 2)).transpose(2, 3).reshape(-1, 16, 4, 6)


# What is labelled in stage 2: (outputs of the module, the model's inputs, labels of the batch's images) → vectors
# (n, C) and their labels (n, labels, 6), -1 where there is nothing to learn.


def projected_patches(outputs: list[Tensor], _: Any, labels: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Idefics2's patches after the projection: (n, P, C) for each size of image, as sizes first appear."""
    groups: dict[torch.Size, list[Tensor]] = {}
    for each in labels:
        groups.setdefault(each.shape, []).append(each.reshape(-1, 1, 6))
    ordered = torch.cat([each for group in groups.values() for each in group])
    return torch.cat([output.flatten(0, 1) for output in outputs]), ordered


def image_tokens(outputs: list[Tensor], inputs: Any, labels: list[Tensor]) -> tuple[Tensor, Tensor]:
    """LLaVA-NeXT's base and rows of patches as the decoder gets them (B, T, C), in the order of the image."""
    slots, targets = inputs["input_ids"] == IMAGE, []
    for each, count in zip(labels, slots.sum(dim=1).tolist(), strict=True):
        base, rows = base_labels(each[None])[0], centres_in_sixteenths(each)
        rows = F.pad(rows, (0, 0, 0, 1), value=-1).flatten(0, 1).unsqueeze(1).expand(-1, 4, -1)  # with newlines
        if len(base) + len(rows) != count:  # the tile of `base_alone`
            rows = torch.full((count - len(base), 4, 6), -1)
        targets += [base, rows]
    return outputs[0][slots], torch.cat(targets)


def latents(outputs: list[Tensor], _: Any, labels: list[Tensor]) -> tuple[Tensor, Tensor]:
    """IDEFICS's latents (n, Q, C) of the images in the order of the rows; each answers for four patches."""
    return outputs[0].flatten(0, 1), fours(torch.stack(labels)).flatten(0, 1)


@contextmanager
def base_alone(model: nn.Module, processor: LlavaNextProcessor) -> Iterator[None]:
    """Within it a LLaVA-NeXT has one canvas, of one tile: it gets images at the base's size only.

    It is the same model and still cuts images into tiles, but the one tile shows nothing that the base does not.
    """
    config, pinpoints = model.config, processor.image_processor.image_grid_pinpoints
    try:
        model.config = model.model.config = replace(config, image_grid_pinpoints=[[TILE, TILE]])
        processor.image_processor.image_grid_pinpoints = [[TILE, TILE]]
        yield
    finally:
        model.config = model.model.config = config
        processor.image_processor.image_grid_pinpoints = pinpoints


# ------------------------------------------------------------------------------------------------ the families


@dataclass(frozen=True)
class Family:
    """All that differs between the models."""

    model: type[nn.Module]
    processor: type
    config: Callable[[], Any]
    preprocessor: dict[str, Any]  # preprocessor_config.json, but for what is common
    settings: dict[str, Any]  # processor_config.json
    view: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # images and labels → the tower's input and its labels
    seeing: Callable[[nn.Module], nn.Module]  # model → what stage 1 trains
    features: Callable[[nn.Module, Tensor], Tensor]  # that, its input → vectors (N, P or Q, C)
    labels: int  # for each of these vectors
    middle: Callable[[nn.Module], nn.Module]  # whose outputs are labelled in stage 2
    labelled: Callable[[list[Tensor], Any, list[Tensor]], tuple[Tensor, Tensor]]
    start: Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]] | None = None  # see start_from_idefics2
    square: bool = False  # images are squeezed into squares
    decoupled: bool = False  # see build_tokenizer


FAMILIES = {
    "idefics2": Family(
        model=Idefics2ForConditionalGeneration,
        processor=Idefics2Processor,
        config=idefics2_config,
        preprocessor={"do_image_splitting": False, "size": {"longest_edge": 64, "shortest_edge": 32}},
        settings={"image_seq_len": LATENTS},
        view=whole,
        seeing=lambda model: model.model.vision_model,
        features=lambda tower, images: tower(images),
        labels=1,
        middle=lambda model: model.model.connector.modality_projection,
        labelled=projected_patches,
    ),
    "llava_next": Family(
        model=LlavaNextForConditionalGeneration,
        processor=LlavaNextProcessor,
        config=llava_next_config,
        preprocessor={
            "do_center_crop": True,
            "crop_size": {"height": TILE, "width": TILE},
            "size": {"shortest_edge": TILE},
            "image_grid_pinpoints": PINPOINTS,
        },
        settings={
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
        },
        view=squares,
        seeing=lambda model: model.model.vision_tower,
        features=lambda tower, tiles: tower(tiles)[0][:, 1:],
        labels=4,
        middle=lambda model: model.model.language_model.layers[2],
        labelled=image_tokens,
        start=llava_next_start,
    ),
    "idefics": Family(
        model=IdeficsForVisionText2Text,
        processor=IdeficsProcessor,
        config=idefics_config,
        preprocessor={"image_size": 64, "image_num_channels": 3, "resample": 3},
        settings={},
        view=lambda images, labels: (images, fours(labels)),
        seeing=lambda model: nn.ModuleList([model.model.vision_model, model.model.perceiver_resampler]),
        features=lambda parts, images: parts[1](parts[0](images)[0]),
        labels=4,
        middle=lambda model: model.model.perceiver_resampler,
        labelled=latents,
        start=idefics_start,
        square=True,
        decoupled=True,
    ),
}


def write_processor(family: Family, folder: Path) -> None:
    """Everything but weights and their configuration, in the files that the Hub's checkpoints have."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(family.decoupled).save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    names["additional_special_tokens"] = SPECIAL[3:]
    processor_class = {"processor_class": family.processor.__name__}
    preprocessor = {
        **dict.fromkeys(("do_convert_rgb", "do_normalize", "do_pad", "do_rescale", "do_resize"), True),
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": family.processor.__name__.replace("Processor", "ImageProcessor"),
        "resample": 2,
        "rescale_factor": 1 / 255,
    }
    files = {
        "special_tokens_map.json": names,
        "tokenizer_config.json": {
            **names,
            **processor_class,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
            "padding_side": "left",
            "tokenizer_class": "PreTrainedTokenizerFast",  # so that transformers takes tokenizer.json as it is
        },
        "preprocessor_config.json": {**preprocessor, **family.preprocessor, **processor_class},
        "processor_config.json": {**family.settings, **processor_class},
    }
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_package(family: Family, model: nn.Module, folder: Path) -> None:
    """The checkpoint that ships: weights in half precision, to be computed with in float32."""
    write_processor(family, folder)
    half = family.model(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": "float32", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    fake, image, end = map(build_tokenizer(family.decoupled).token_to_id, SPECIAL[3:])
    generation = {"bad_words_ids": [[fake], [image]], "bos_token_id": 1, "eos_token_id": [2, end], "pad_token_id": 0}
    generation["max_new_tokens"] = 64
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
