"""Each family's processor with its real template, and a tiny random model that goes with it: enough to talk to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import oracle_idefics
import oracle_llava
import tiny_idefics
import torch

from minivlm.models.idefics import IdeficsForVisionText2Text
from minivlm.models.idefics2 import Idefics2ForConditionalGeneration
from minivlm.models.llava_next import LlavaNextForConditionalGeneration
from minivlm.processing.idefics import IdeficsProcessor
from minivlm.processing.idefics2 import Idefics2Processor
from minivlm.processing.llava_next import LlavaNextProcessor


@torch.no_grad()
def random_model(model_class: Any, config: Any, seed: int = 0) -> Any:
    """Random weights large enough that every token counts; gates (alpha) are open."""
    torch.manual_seed(seed)
    model = model_class(model_class.config_class.from_hub(config.to_dict())).eval()
    for name, parameter in model.named_parameters():
        parameter.add_(0.2 * torch.randn_like(parameter)) if parameter.ndim == 1 else parameter.mul_(4)
        if "alpha" in name:
            parameter.fill_(0.5)
    return model


def idefics2(files: Path, splitting: bool = True, window: int | None = None, **text: Any) -> tuple[Any, Any]:
    """Pictures of at most 28 pixels, 5 vectors each, five times over when split."""
    config = oracle.idefics2_config(window=window)
    config.text_config.vocab_size, config.image_token_id = 32003, 32001
    config.text_config.update(text)
    size = {"longest_edge": 28, "shortest_edge": 14}
    changes = {"image_seq_len": oracle.LATENTS, "do_image_splitting": splitting, "size": size}
    return random_model(Idefics2ForConditionalGeneration, config), Idefics2Processor.from_pretrained(files, **changes)


def llava(files: Path) -> tuple[Any, Any]:
    """Tiles of 12 pixels; pictures of different sizes take different numbers of places."""
    config = oracle_llava.llava_config(text={"vocab_size": 32064})
    config.image_token_index = config.image_token_id = 32000
    side = {"height": oracle_llava.TILE, "width": oracle_llava.TILE}
    changes = {"size": side, "crop_size": side, "image_grid_pinpoints": oracle_llava.PINPOINTS, "patch_size": 4}
    return random_model(LlavaNextForConditionalGeneration, config), LlavaNextProcessor.from_pretrained(files, **changes)


def idefics(folder: Path, template: str) -> tuple[Any, Any]:
    """Letters as vocabulary, and Idefics2's template: the released checkpoints have none."""
    config = oracle_idefics.idefics_config(vocab_size=110)
    files = tiny_idefics.write_small(folder)
    processor = IdeficsProcessor.from_pretrained(files, image_size=oracle_idefics.SIZE, chat_template=template)
    return random_model(IdeficsForVisionText2Text, config), processor


def families(
    checkpoint: Callable[[str], Path], released_llava: Callable[[str], Path], folder: Path
) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Name → how to make (model, processor)."""
    files = checkpoint("idefics2-8b")
    return {
        "idefics2": lambda: idefics2(files),
        "idefics2, whole pictures, window 7": lambda: idefics2(files, splitting=False, window=7),
        "llava_next": lambda: llava(released_llava("llava-v1.6-mistral-7b-hf")),
        "idefics": lambda: idefics(folder / "idefics", Idefics2Processor.from_pretrained(files).chat_template),
    }


class Counter:
    """What has run since the last look: pictures (crops, tiles) through the tower, ids through the decoder."""

    def __init__(self, model: Any) -> None:
        self.pictures = self.ids = 0
        tower = getattr(model.model, "vision_model", None) or model.model.vision_tower
        text = getattr(model.model, "text_model", None) or model.model.language_model
        tower.register_forward_pre_hook(lambda _, inputs: self._add(pictures=len(inputs[0])))
        text.layers[0].register_forward_pre_hook(lambda _, inputs: self._add(ids=inputs[0].shape[1]))

    def _add(self, pictures: int = 0, ids: int = 0) -> None:
        self.pictures += pictures
        self.ids += ids

    def look(self) -> tuple[int, int]:
        """(pictures, ids) since the last look."""
        found = self.pictures, self.ids
        self.pictures = self.ids = 0
        return found
