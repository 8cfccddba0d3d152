"""minivlm: Idefics2, LLaVA-NeXT and IDEFICS from scratch in PyTorch, under the names that `transformers` users know.

Names are looked up when they are first used, so that `import minivlm` costs next to nothing. Editors and type checkers
read the imports below.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minivlm.app.chat import Chat
    from minivlm.auto import AutoModelForImageTextToText, AutoProcessor
    from minivlm.checkpoint.hub import CheckpointError
    from minivlm.generation.settings import GenerationConfig
    from minivlm.models.idefics import IdeficsConfig, IdeficsForVisionText2Text, IdeficsModel
    from minivlm.models.idefics2 import Idefics2Config, Idefics2ForConditionalGeneration, Idefics2Model
    from minivlm.models.llava_next import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextModel
    from minivlm.modules.cache import KVCache
    from minivlm.processing.idefics import IdeficsImageProcessor, IdeficsProcessor
    from minivlm.processing.idefics2 import Idefics2ImageProcessor, Idefics2Processor
    from minivlm.processing.llava_next import LlavaNextImageProcessor, LlavaNextProcessor
    from minivlm.quantization.config import BitsAndBytesConfig, Int4Config

__version__ = "0.1.0"

__all__ = [
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "BitsAndBytesConfig",
    "Chat",
    "CheckpointError",
    "GenerationConfig",
    "Idefics2Config",
    "Idefics2ForConditionalGeneration",
    "Idefics2ImageProcessor",
    "Idefics2Model",
    "Idefics2Processor",
    "IdeficsConfig",
    "IdeficsForVisionText2Text",
    "IdeficsImageProcessor",
    "IdeficsModel",
    "IdeficsProcessor",
    "Int4Config",
    "KVCache",
    "LlavaNextConfig",
    "LlavaNextForConditionalGeneration",
    "LlavaNextImageProcessor",
    "LlavaNextModel",
    "LlavaNextProcessor",
]

# module → the names it holds
_HOME = {
    "minivlm.app.chat": ("Chat",),
    "minivlm.auto": ("AutoModelForImageTextToText", "AutoProcessor"),
    "minivlm.checkpoint.hub": ("CheckpointError",),
    "minivlm.generation.settings": ("GenerationConfig",),
    "minivlm.models.idefics": ("IdeficsConfig", "IdeficsForVisionText2Text", "IdeficsModel"),
    "minivlm.models.idefics2": ("Idefics2Config", "Idefics2ForConditionalGeneration", "Idefics2Model"),
    "minivlm.models.llava_next": ("LlavaNextConfig", "LlavaNextForConditionalGeneration", "LlavaNextModel"),
    "minivlm.modules.cache": ("KVCache",),
    "minivlm.processing.idefics": ("IdeficsImageProcessor", "IdeficsProcessor"),
    "minivlm.processing.idefics2": ("Idefics2ImageProcessor", "Idefics2Processor"),
    "minivlm.processing.llava_next": ("LlavaNextImageProcessor", "LlavaNextProcessor"),
    "minivlm.quantization.config": ("BitsAndBytesConfig", "Int4Config"),
}
# names of transformers that have another one here, or none → what to use
_INSTEAD = {
    "AutoConfig": "AutoModelForImageTextToText.from_pretrained(…).config, or a config class such as Idefics2Config",
    "AutoImageProcessor": "AutoProcessor.from_pretrained(…).image_processor",
    "AutoModel": "AutoModelForImageTextToText; its `.model` is the part without the head",
    "AutoModelForCausalLM": "AutoModelForImageTextToText",
    "AutoModelForPreTraining": "AutoModelForImageTextToText",
    "AutoModelForVision2Seq": "AutoModelForImageTextToText, the newer name of that class",
    "AutoTokenizer": "AutoProcessor.from_pretrained(…).tokenizer",
    "AwqConfig": "nothing: AWQ checkpoints load as they are",
    "GPTQConfig": "nothing: GPTQ checkpoints load as they are",
    "Idefics2ImageProcessorFast": "Idefics2ImageProcessor",
    "IdeficsForCausalLM": "IdeficsForVisionText2Text",
    "LlavaForConditionalGeneration": "LlavaNextForConditionalGeneration, for LLaVA-NeXT (1.6); LLaVA 1.5 is not here",
    "LlavaNextImageProcessorFast": "LlavaNextImageProcessor",
    "LlavaProcessor": "LlavaNextProcessor, for LLaVA-NeXT (1.6); LLaVA 1.5 is not here",
    "LogitsProcessor": "a function (ids, scores) → scores in generate(logits_processor=[…])",
    "LogitsProcessorList": "a list of functions in generate(logits_processor=[…])",
    "StoppingCriteria": "a function (ids, scores) → bool in generate(stopping_criteria=[…])",
    "StoppingCriteriaList": "a list of functions in generate(stopping_criteria=[…])",
    "TextIteratorStreamer": "Chat(model, processor).stream(…), which yields pieces of text",
    "TextStreamer": "Chat(model, processor).stream(…), or any object with put and end in generate(streamer=…)",
    "Trainer": "the one of minivlm.trainer",
    "pipeline": "Chat(model, processor).ask(text, images)",
    "set_seed": "generate(seed=…), or torch.manual_seed",
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    if name in _INSTEAD:  # an AttributeError would not reach those who write `from minivlm import …`
        raise ImportError(f"minivlm has no {name}; use {_INSTEAD[name]}")
    raise AttributeError(f"module 'minivlm' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
