"""A fourth family in a few lines: patches go through one linear map straight into the text, as in Fuyu.

Its config, prompts and decoder are Idefics2's; its images are squares of SIDE pixels in patches of PATCH.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.families import Family, Rows, Stage
from minivlm.families.record import decoder_layers
from minivlm.models.idefics2 import Idefics2Config, Idefics2ForConditionalGeneration, Idefics2Model, PerceiverConfig
from minivlm.modules.decoder import DecoderConfig
from minivlm.modules.siglip import SiglipVisionConfig
from minivlm.processing.idefics2 import Idefics2Processor

SIDE, PATCH, PATCHES = 28, 14, 4


class ToyConfig(Idefics2Config):
    model_type: ClassVar[str] = "toy"


class ToyModel(Idefics2Model):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        del self.vision_model, self.connector
        self.patches = nn.Linear(3 * PATCH**2, config.text_config.hidden_size)

    def encode_images(self, pixel_values: Tensor, *_: Any, **__: Any) -> Tensor:
        """(B, N, 3, SIDE, SIDE) → (B·N, PATCHES, C)."""
        pixels = pixel_values.flatten(0, 1).to(self.patches.weight.dtype)
        return self.patches(F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2))


class ToyForConditionalGeneration(Idefics2ForConditionalGeneration):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig, attn_implementation: str | None = None) -> None:
        super().__init__(config, attn_implementation)
        self.model = ToyModel(config)


def stages(config: ToyConfig) -> list[Stage]:
    return [
        Stage("patch embedding", "patches", "model.patches"),
        Stage("merged embeddings", "tokens", "model.text_model.layers.0", take="input", blame="model"),
        *decoder_layers(config.text_config.num_hidden_layers, "model.text_model"),
        Stage("logits", "tokens", "", take="logits"),
    ]


def image_rows(inputs: dict[str, Any], config: ToyConfig) -> dict[str, Rows]:
    images = torch.arange(inputs["pixel_values"].shape[:2].numel())
    return {"patches": Rows({"minivlm": [...], "transformers": [...]}, ("image", "patch"), images)}


def new_images(inputs: dict[str, Any], kept: int, old: int, images: int) -> tuple[int, dict[str, Any]]:
    return 0, {} if old == images else {"pixel_values": inputs["pixel_values"][:, old:]}


TOY = Family(
    model_type="toy",
    model="toy_family:ToyForConditionalGeneration",
    processor="minivlm.processing.idefics2:Idefics2Processor",
    quantised=("model.text_model.layers",),
    kept={"lm_head": "as elsewhere", "model.patches": "the only map of the images"},
    stages=stages,
    image_rows=image_rows,
    new_images=new_images,
)


def write(folder: Path) -> Path:
    """A checkpoint with random weights and the tokenizer of a built-in one."""
    size = {"longest_edge": SIDE, "shortest_edge": SIDE}
    processor = Idefics2Processor.from_pretrained("shapes-idefics2", size=size, image_seq_len=PATCHES)
    processor.image_processor.do_image_splitting = False
    vocabulary = len(processor.tokenizer)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ToyConfig(
        vision_config=SiglipVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=PATCH),
        perceiver_config=PerceiverConfig(resampler_n_latents=PATCHES),
        text_config=DecoderConfig(vocab_size=vocabulary, num_key_value_heads=2, **sizes),
        image_token_id=processor.image_token_id,
    )
    torch.manual_seed(0)
    ToyForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
