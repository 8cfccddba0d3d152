"""LLaVA-NeXT, also LLaVA-1.6 (Liu et al. 2024, "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge").

    picture ─ squeezed into one tile ─┐
            └ enlarged, cut into tiles ┴ CLIP, its last block but one ─ two-layer projector ─ packing ─ 576 + … vectors
                                                                                                             │
    token ids ─ embedding ─ vectors take the places of the <image> tokens ◄──────────────────────────────────┘
                                              └─ Mistral, Llama or Qwen2 decoder ─ logits

What is special: a picture is seen twice ("anyres"), as a whole and in tiles of the same size, so CLIP, which takes
336x336 pixels, sees details of larger pictures. Packing puts the tiles' features together as the picture lies, cuts
the black borders off and ends every row with a learned "newline"; `modules/anyres.py` draws it step by step.

B batch, T tokens, N pictures in the batch, P patches of a tile, G patches along its side, Cv vision width, C text
width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minivlm.checkpoint import loading
from minivlm.generation import loop
from minivlm.models import common
from minivlm.modules import anyres
from minivlm.modules import config as hub_config
from minivlm.modules.cache import KVCache
from minivlm.modules.clip import ClipVisionTower
from minivlm.modules.decoder import Decoder, DecoderConfig
from minivlm.modules.layers import ACTIVATIONS, activation, initialize
from minivlm.modules.siglip import VisionConfig

# ---- Configuration ---------------------------------------------------------------------------------------------------

# What all released checkpoints share: ViT-L/14 at 336 pixels, and canvases of 2 to 4 tiles, (height, width).
VISION = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
# Llama's 32000 tokens, <image>, and room up to a multiple of 64.
TEXT = DecoderConfig.from_hub({"model_type": "llama", "vocab_size": 32064})


@dataclass(frozen=True)
class LlavaNextConfig:
    """The two parts, what is taken from the first, and the token whose places the pictures' vectors take."""

    model_type: ClassVar[str] = "llava_next"

    vision_config: VisionConfig = VISION
    text_config: DecoderConfig = TEXT
    image_token_index: int = 32000
    image_grid_pinpoints: list | tuple = PINPOINTS
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    vision_feature_layer: int | list | tuple = -2  # a hidden state of the tower, or several, joined channel by channel
    vision_feature_select_strategy: str = "default"  # without the class token
    tie_word_embeddings: bool = False
    dtype: str | None = None  # of the stored weights

    def __post_init__(self) -> None:
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=true is not supported: no released LLaVA-NeXT checkpoint ties them")
        if not 0 <= self.image_token_index < self.text_config.vocab_size:
            raise ValueError(
                f"image_token_index {self.image_token_index} is outside the vocabulary of {self.text_config.vocab_size}"
            )
        if self.vision_feature_select_strategy != "default":
            raise ValueError(
                f"vision_feature_select_strategy {self.vision_feature_select_strategy!r} is not supported: with the "
                'class token ("full") the features of a tile are no grid, and the reference fails too; use "default"'
            )
        hub_config.one_of(self, "projector_hidden_act", ACTIVATIONS)
        anyres.check_pinpoints(self.image_grid_pinpoints, self.vision_config.image_size)
        object.__setattr__(self, "image_grid_pinpoints", tuple(tuple(size) for size in self.image_grid_pinpoints))
        if not isinstance(self.vision_feature_layer, int):
            object.__setattr__(self, "vision_feature_layer", tuple(self.vision_feature_layer))
        most = self.vision_config.num_hidden_layers
        layers = self.feature_layers
        if not 1 <= len(layers) <= most + 1 or not all(
            type(layer) is int and -most - 1 <= layer <= most for layer in layers
        ):
            raise ValueError(
                f"vision_feature_layer should be one or more of the {most + 1} hidden states of a tower of {most} "
                f"layers, counted from 0 or from -1 down; found {self.vision_feature_layer!r}"
            )

    @classmethod
    def from_hub(cls, values: dict[str, Any]) -> "LlavaNextConfig":
        """Read a `config.json`. Raises ValueError that names a field of a wrong type or size."""
        values = {name: value for name, value in values.items() if value is not None}
        vision, text = (hub_config.section(values, name) for name in ("vision_config", "text_config"))
        if (kind := vision.get("model_type", "clip_vision_model")) != "clip_vision_model":
            raise ValueError(f"vision_config.model_type {kind!r:.80} is not supported; known: clip_vision_model")
        parts = {
            "vision_config": hub_config.from_hub(VisionConfig, vision) if "vision_config" in values else VISION,
            "text_config": DecoderConfig.from_hub({"model_type": "llama", **text}),
            "image_token_index": values.get("image_token_index", values.get("image_token_id", cls.image_token_index)),
            "dtype": values.get("dtype", values.get("torch_dtype")),
        }
        return hub_config.from_hub(cls, {**values, **parts})

    def to_hub(self) -> dict[str, Any]:
        """A `config.json` that spells every field out."""
        return {
            **vars(self),
            "vision_config": {**asdict(self.vision_config), "model_type": "clip_vision_model"},
            "text_config": self.text_config.to_hub(),
            "model_type": self.model_type,
            "architectures": ["LlavaNextForConditionalGeneration"],
        }

    @property
    def image_tokens(self) -> dict[str, int]:
        """Tokens of a picture in the prompt, for those that fit a canvas exactly: {"height×width": tokens}."""
        tile, patch = self.vision_config.image_size, self.vision_config.patch_size
        return {
            f"{size[0]}×{size[1]}": anyres.image_token_count(size, self.image_grid_pinpoints, tile, patch)
            for size in self.image_grid_pinpoints
        }

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The hidden states of the tower that are used, as a tuple also where it is one."""
        layer = self.vision_feature_layer
        return layer if isinstance(layer, tuple) else (layer,)


def _released(image_token: int, **text: Any) -> LlavaNextConfig:
    return LlavaNextConfig(text_config=DecoderConfig.from_hub(text), image_token_index=image_token, dtype="float16")


_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}
_VICUNA = {**_LLAMA, "vocab_size": 32064, "max_position_embeddings": 4096, "pad_token_id": 0}
_MISTRAL = {"model_type": "mistral", "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "rope_theta": 1e6}
_QWEN = {
    **{"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 8192, "num_hidden_layers": 80},
    **{"num_attention_heads": 64, "rope_theta": 1e6, "max_window_layers": 70},
    **{"bos_token_id": 151643, "eos_token_id": 151645},
}
_VICUNA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
_YI_34B = {
    **{"hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60, "num_attention_heads": 56},
    **{"num_key_value_heads": 8, "max_position_embeddings": 4096, "rope_theta": 5e6},
    **{"eos_token_id": 7, "pad_token_id": 0},
}
_LLAMA_3_8B = {
    **{"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 5e5},
    **{"bos_token_id": 128000, "eos_token_id": 128009},
}

PRESETS = {
    "llava-hf/llava-v1.6-mistral-7b-hf": _released(32000, **_MISTRAL, vocab_size=32064, sliding_window=None),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _released(32000, **_VICUNA),
    "llava-hf/llava-v1.6-vicuna-13b-hf": _released(32000, **_VICUNA, **_VICUNA_13B),
    "llava-hf/llava-v1.6-34b-hf": _released(64000, **_LLAMA, **_YI_34B, vocab_size=64064),
    "llava-hf/llama3-llava-next-8b-hf": _released(128256, **_LLAMA, **_LLAMA_3_8B, vocab_size=128320),
    "llava-hf/llava-next-72b-hf": _released(151646, **_QWEN, intermediate_size=24576, num_key_value_heads=64),
    "llava-hf/llava-next-110b-hf": _released(151646, **_QWEN, intermediate_size=49152, num_key_value_heads=8),
}

# ---- Model -----------------------------------------------------------------------------------------------------------


class Projector(nn.Module):
    """From vision width to text width: linear, GELU, linear."""

    def __init__(self, config: LlavaNextConfig) -> None:
        super().__init__()
        vision = config.vision_config.hidden_size * len(config.feature_layers)
        text, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(vision, text, bias=bias)
        self.linear_2 = nn.Linear(text, text, bias=bias)
        self.act = activation(config.projector_hidden_act)

    def forward(self, patches: Tensor) -> Tensor:
        """(…, Cv · layers) → (…, C)."""
        return self.linear_2(self.act(self.linear_1(patches)))


class LlavaNextModel(nn.Module):
    """Vision tower, projector, packing, merge, decoder: everything but the head that makes logits."""

    def __init__(self, config: LlavaNextConfig) -> None:
        super().__init__()
        self.config = config
        width = config.text_config.hidden_size
        self.vision_tower = ClipVisionTower(config.vision_config)
        self.multi_modal_projector = Projector(config)
        self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)
        self.language_model = Decoder(config.text_config)

    def get_image_features(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        image_sizes: Tensor,
        attn_implementation: str | None = None,
        slots: Tensor | None = None,
    ) -> list[Tensor]:
        """Each picture's vectors, (its number of image tokens, C), for the N pictures of the batch in a flat row.

        pixel_values: (N, most tiles, 3, S, S) or a list of (tiles, 3, S, S), the base first; tiles behind those that a
        picture has are filling and left out. Also all real tiles in a row, (tiles, 3, S, S).
        image_sizes: (N, 2), each picture's (height, width) in pixels as it came, from which the tiles' grid follows.
        slots: (B, T) bool, the places in the prompt, where it is known; they are counted before the tower runs.
        """
        sizes = _sizes(image_sizes)
        if not sizes and not len(pixel_values):
            return []
        grids = [self._tile_grid(size) for size in sizes]
        counts = [1 + rows * columns for rows, columns in grids]
        tiles = self._real_tiles(pixel_values, counts)  # (tiles of all pictures, 3, S, S)
        if slots is not None:
            self._check_places(slots, sizes)
        states = self.vision_tower(tiles, self.config.feature_layers, attn_implementation)  # (tiles, 1 + P, Cv) each
        # The class token goes, by a view as in the reference: in bf16 a linear map rounds otherwise on a copy.
        patches = torch.cat(states, dim=-1)[:, 1:]  # (tiles, P, Cv · layers)
        projected = self.multi_modal_projector(patches).split(counts)  # (tiles, P, C) each
        return [self.pack(*picture) for picture in zip(projected, sizes, grids, strict=True)]

    def _tile_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return anyres.tile_grid(size, self.config.image_grid_pinpoints, self.config.vision_config.image_size)

    def _real_tiles(self, pixel_values: Tensor | Sequence[Tensor], counts: list[int]) -> Tensor:
        """The first counts[i] tiles of picture i, for all pictures: (tiles, 3, S, S)."""
        vision, device = self.config.vision_config, self.image_newline.device
        if isinstance(pixel_values, Tensor) and pixel_values.ndim == 4:
            if len(pixel_values) != sum(counts):
                raise ValueError(
                    f"pixel_values has {len(pixel_values)} tiles, but pictures of these image_sizes have {counts}"
                )
            return pixel_values.to(device)
        if len(pixel_values) != len(counts):
            raise ValueError(
                f"pixel_values has {len(pixel_values)} pictures and image_sizes {len(counts)}; pass the processor's own"
            )
        tile = (vision.num_channels, vision.image_size, vision.image_size)
        for index, (picture, count) in enumerate(zip(pixel_values, counts, strict=True)):
            if picture.ndim != 4 or len(picture) < count or picture.shape[1:] != tile:
                raise ValueError(
                    f"picture {index} should be ({count} or more tiles, {', '.join(map(str, tile))}) with its "
                    f"image_sizes and this model's image_grid_pinpoints, found {tuple(picture.shape)}"
                )
        return torch.cat([picture[:count].to(device) for picture, count in zip(pixel_values, counts, strict=True)])

    def pack(self, tiles: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """The base's features as they are, then those of the other tiles, row by row of the whole picture.

        tiles: (1 + rows · columns, P, C), the base first; size: (height, width) in pixels; grid: (rows, columns).
        """
        side = self.config.vision_config.grid
        rows, columns = grid
        base, tiles = tiles[0], tiles[1:]
        canvas = tiles.unflatten(1, (side, side)).unflatten(0, grid)  # (rows, columns, G, G, C)
        canvas = canvas.transpose(1, 2).reshape(rows * side, columns * side, -1)
        top, left, height, width = anyres.unpadded_grid(size, canvas.shape[:2])
        kept = canvas[top : top + height, left : left + width]  # (h, w, C)
        lines = torch.cat([kept, self.image_newline.expand(height, 1, -1)], dim=1)  # (h, w + 1, C)
        return torch.cat([base, lines.flatten(0, 1)])

    def _check_places(self, slots: Tensor, sizes: list[tuple[int, int]]) -> None:
        """ValueError unless pictures of these sizes give as many vectors as there are places in slots (B, T)."""
        vision, pinpoints = self.config.vision_config, self.config.image_grid_pinpoints
        counts = [anyres.image_token_count(size, pinpoints, vision.image_size, vision.patch_size) for size in sizes]
        each = (f"{high}x{wide} pixels: {count}" for (high, wide), count in zip(sizes, counts, strict=True))
        common.check_places(slots, sum(counts), f"its pictures ({', '.join(each) or 'none'})")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_sizes: Tensor | None = None,
        *,
        image_hidden_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        attn_implementation: str | None = None,
        hidden_states: list[Tensor] | None = None,
        last: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """→ (final hidden states (B, T or last, C), picture vectors (image tokens, C) or None).

        input_ids: (B, T), or inputs_embeds: (B, T, C).  attention_mask: (B, cached + T), 1 = real token.
        pixel_values: (N, most tiles, 3, S, S), and image_sizes: (N, 2), see `get_image_features`; N counts the
        pictures of all rows.  image_hidden_states: (image tokens, C) from an earlier call, instead of pixels.
        position_ids: (B, T); None counts slots from the cache's length on, padding included, as the reference does.
        past_key_values: a cache from `new_cache`, extended in place.
        hidden_states: a list that receives the embeddings and every block's output, the last one normalised.
        last: only so many of the last tokens are wanted; 0 = all.

        Raises ValueError where the shapes do not fit, or pictures and image tokens do not match.
        """
        common.one_of(input_ids=input_ids, inputs_embeds=inputs_embeds)
        if pixel_values is not None and image_hidden_states is not None:
            raise ValueError("pass either pixel_values or image_hidden_states, and not both")
        if inputs_embeds is None:
            inputs_embeds = self.language_model.embed_tokens(input_ids)  # (B, T, C)
        if pixel_values is not None or image_hidden_states is not None:
            table, token = self.language_model.embed_tokens, self.config.image_token_index
            slots = common.image_slots(input_ids, inputs_embeds, table, token)  # (B, T)
            if pixel_values is not None:
                features = self.get_image_features(pixel_values, image_sizes, attn_implementation, slots)
                image_hidden_states = torch.cat([inputs_embeds.new_zeros(0, inputs_embeds.shape[-1]), *features])
            inputs_embeds = common.merge(slots, inputs_embeds, image_hidden_states, "its pictures")
        decoding = (attention_mask, position_ids, past_key_values, attn_implementation, hidden_states, last)
        x = self.language_model(inputs_embeds, *decoding)
        return x, image_hidden_states


def _sizes(image_sizes: Any) -> list[tuple[int, int]]:
    if image_sizes is None:
        raise ValueError("pixel_values need their image_sizes (pictures, 2); pass all that the processor returned")
    sizes = torch.as_tensor(image_sizes)
    if sizes.numel() and (sizes.ndim != 2 or sizes.shape[1] != 2):
        raise ValueError(f"image_sizes should be (pictures, 2): height and width, found shape {tuple(sizes.shape)}")
    return [tuple(size) for size in sizes.tolist()]


class LlavaNextForConditionalGeneration(nn.Module):
    """The model with its head: logits, loss, `generate`, `from_pretrained`, `save_pretrained`."""

    config_class = LlavaNextConfig
    # Prefixes of names in files → here. Each part's first spelling is the one we write, which every version reads.
    hub_prefixes: ClassVar[dict[str, str]] = {
        # on the Hub, and saved by transformers up to 4.51
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
        "vision_tower.vision_model.": "model.vision_tower.",
        # saved by transformers 5: the tower has lost a word. What it loads from elsewhere it saves as it found it
        "vision_tower.": "model.vision_tower.",
        # saved by transformers 4.52 to 4.57: names as here, but for the tower
        "model.vision_tower.vision_model.": "model.vision_tower.",
    }

    from_pretrained = classmethod(loading.from_pretrained)
    save_pretrained = loading.save_pretrained
    generate = loop.generate
    forward = common.forward
    device, dtype, new_cache = common.device, common.dtype, common.new_cache

    def __init__(self, config: LlavaNextConfig, attn_implementation: str | None = None) -> None:
        super().__init__()
        common.prepare(self, config, attn_implementation)
        self.model = LlavaNextModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        initialize(self, config.text_config.initializer_range)

    @property
    def decoder(self) -> Decoder:
        return self.model.language_model

    def head(self, x: Tensor) -> Tensor:
        """(B, T, C) → logits (B, T, V)."""
        return self.lm_head(x)
