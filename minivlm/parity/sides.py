"""One side of a comparison: which code runs which weights, and how. Only this file calls transformers.

    side = Side("shapes-idefics2", "transformers", dtype="float32")
    model, inputs = load(side), encode(side, [image], "what is this?")
    forward(model, stages, inputs, sink)

calls sink(stage, call, output) for every stage as its module runs, for the first, second, … time.
"""

import contextlib
import copy
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import minivlm
from minivlm import auto
from minivlm.checkpoint import hub, loading
from minivlm.devices import memory
from minivlm.families import Stage
from minivlm.inside.hooks import code_of, hooked, path_of
from minivlm.modules.attention import check_implementation
from minivlm.modules.inputs import Inputs
from minivlm.quantization.config import BitsAndBytesConfig, Int4Config

Sink = Callable[[Stage, int, Tensor], None]

CODES = ("minivlm", "transformers")
# For `quantize`: the configuration, and the approximate bytes per weight with scales and 16-bit embeddings included.
QUANTIZED: dict[str, tuple[Any, float]] = {
    "nf4": (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 0.6),
    "fp4": (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"), 0.6),
    "int8": (BitsAndBytesConfig(load_in_8bit=True), 1.1),
    "int4": (Int4Config(), 0.6),
}
# The processor outputs that models take (transformers 4 adds token_type_ids) → their names in reports, in their order.
INPUTS = {
    "pixel_values": "pixels",
    "pixel_attention_mask": "pixel mask",
    "image_sizes": "image sizes",
    "input_ids": "token ids",
    "attention_mask": "attention mask",
    "image_attention_mask": "image mask",
}


@dataclass(frozen=True)
class Side:
    """model: a folder, a built-in name, a Hub id, or a loaded model of either code, which fixes all but the dtype.

    code: "minivlm" or "transformers".  dtype: of the weights; None keeps theirs.  attn: the attention backend;
    None leaves it to the code.  quantize: None or one of QUANTIZED, with minivlm only.  device: None is the CPU.
    adapter: None or a LoRA adapter's folder, which transformers loads by PEFT.
    """

    model: Any
    code: str = "minivlm"
    dtype: str | None = None
    attn: str | None = None
    quantize: str | None = None
    device: str | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.model, nn.Module):
            object.__setattr__(self, "code", code_of(self.model))
            object.__setattr__(self, "dtype", self.dtype or str(self.model.dtype).removeprefix("torch."))
            object.__setattr__(self, "attn", backend(self.model))
        if self.code not in CODES:
            raise ValueError(f"a side runs {' or '.join(CODES)}, found {self.code!r}")
        if self.quantize is not None and self.quantize not in QUANTIZED:
            raise ValueError(f"quantize is one of {', '.join(QUANTIZED)}, found {self.quantize!r}")
        if self.quantize is not None and self.code != "minivlm":
            raise ValueError(
                f"quantize={self.quantize} works only in sides that minivlm runs, and this one runs {self.code}"
            )
        if self.code == "minivlm" and self.attn is not None:
            check_implementation(self.attn)

    def words(self, attn: str | None) -> str:
        """A description of the side, with the attention backend its model has chosen (None: one for each call)."""
        settings = (self.dtype or "dtype as stored", attn or "best attention", self.quantize, self.device)
        return ", ".join([self.version, *filter(None, settings)])

    @property
    def version(self) -> str:
        version = minivlm.__version__ if self.code == "minivlm" else transformers().__version__
        return f"{self.code} {version}"


def transformers() -> Any:
    """Import transformers. OSError, with alternatives, if it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise OSError(
            f"transformers cannot be imported ({error}); install it with pip install 'minivlm[parity]', or avoid it: "
            "--against a recording, or --reference minivlm"
        ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence transformers' progress bars and warnings (it warns about parts without a backend at every change)."""
    logging = transformers().utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# ---- Loading ---------------------------------------------------------------------------------------------------------


def config_of(side: Side) -> Any:
    """The model's configuration in minivlm's classes, whichever code runs it. ValueError for an unknown family."""
    if isinstance(side.model, nn.Module):
        config = side.model.config
        if side.code == "minivlm":
            return config
        return auto.family(config.model_type, "the model").model_class.config_class.from_hub(config.to_dict())
    return auto.config_of(side.model)


def _folder(side: Side) -> Any:
    """The folder or name under which transformers finds the checkpoint."""
    return hub.source(side.model).folder or side.model


def load(side: Side) -> nn.Module:
    """The side's model, in eval mode. A loaded model is copied only to change its dtype.

    Raises MemoryError, with figures, before loading anything that does not fit, and OSError for checkpoints that
    transformers cannot load.
    """
    if isinstance(side.model, nn.Module):
        wanted = loading.DTYPES[side.dtype]
        return side.model if side.model.dtype == wanted else copy.deepcopy(side.model).to(wanted)
    foresee(side)
    options = {"dtype": side.dtype or "auto", "attn_implementation": side.attn}
    model_class = auto.family(config_of(side).model_type).model_class
    if side.code == "minivlm":
        config = QUANTIZED[side.quantize][0] if side.quantize else None
        options |= {"device_map": side.device, "quantization_config": config, "adapter": side.adapter}
        return model_class.from_pretrained(side.model, **options)
    try:
        with _quietly():
            model = getattr(transformers(), model_class.__name__).from_pretrained(_folder(side), **options)
            if side.adapter is not None:  # PEFT replaces layers inside this same model
                importlib.import_module("peft").PeftModel.from_pretrained(model, side.adapter)
    except Exception as error:  # of many kinds: a truncated file raises SafetensorError
        raise OSError(f"{side.version} cannot load {side.model}: {error}") from error
    return model.to(side.device or "cpu").eval()


def foresee(side: Side) -> None:
    """MemoryError if the weights, and logits for a thousand tokens, do not fit into the device's free memory.

    Raises ValueError for a device that does not exist.
    """
    if isinstance(side.model, nn.Module):
        return
    config, stored = config_of(side), hub.source(side.model).json("config.json").get("quantization_config")
    model = auto.skeleton(config)
    weights = model.num_parameters()
    dtype = loading.DTYPES.get(side.dtype or config.dtype, torch.float32)
    quantize = side.quantize or (stored and ("int8" if stored.get("load_in_8bit") else "nf4"))  # or about as small
    size = QUANTIZED[quantize][1] if quantize else dtype.itemsize
    needed, free = weights * size + 1000 * model.lm_head.out_features * dtype.itemsize, available(side.device)
    if free is not None and needed > free:
        raise MemoryError(
            f"{side.model} in {quantize or dtype} takes {needed / 2**30:.1f} GiB ({weights / 1e9:.2f} billion "
            f"weights), and {free / 2**30:.1f} GiB are free on {side.device or 'cpu'}; take a smaller dtype, or record "
            "one side on a larger machine and compare with --against"
        )


def available(device: str | None) -> int | None:
    """Free bytes of a device; None where the system does not report them. ValueError if there is no such device."""
    wanted = loading.wanted_device(device)
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} does not exist: torch {torch.__version__} finds no GPU; pass cpu")
    return memory.free(wanted)


def backend(model: nn.Module) -> str | None:
    """A model's attention backend."""
    return model.attn_implementation if code_of(model) == "minivlm" else model.config._attn_implementation


@contextlib.contextmanager
def other_backend(model: nn.Module) -> Iterator[None]:
    """Within the block, the model uses its other backend: eager, or if it is eager already, sdpa."""
    before = backend(model)
    _set_backend(model, "sdpa" if before == "eager" else "eager")
    try:
        yield
    finally:
        _set_backend(model, before)


def _set_backend(model: nn.Module, name: str | None) -> None:
    if code_of(model) == "minivlm":
        model.attn_implementation = name
        return
    with _quietly():
        model.set_attn_implementation(name)


# ---- Inputs ----------------------------------------------------------------------------------------------------------


def processor_of(side: Side) -> Any:
    """The side's processor; transformers' with its Pillow image backend, which gives equal pixels everywhere."""
    if isinstance(side.model, nn.Module):
        raise ValueError("a loaded model has no processor; pass `inputs`, or give the checkpoint's name as the model")
    if side.code == "minivlm":
        return auto.AutoProcessor.from_pretrained(side.model)
    with _quietly():
        processor = transformers().AutoProcessor.from_pretrained(_folder(side))
        processor.image_processor = _pillow(config_of(side).model_type).from_pretrained(_folder(side))
    return processor


def _pillow(model_type: str) -> Any:
    """transformers' Pillow-based image processor: a separate class since version 5, before that the only one."""
    package = f"transformers.models.{model_type}.image_processing"
    name = auto.family(model_type).processor_class.__name__.removesuffix("Processor") + "ImageProcessor"
    try:
        return getattr(importlib.import_module(f"{package}_pil_{model_type}"), f"{name}Pil")
    except ImportError:
        return getattr(importlib.import_module(f"{package}_{model_type}"), name)


def encode(side: Side, images: list[Any], prompt: str) -> dict[str, Any]:
    """The inputs that the side's processor returns for a question about images: a dict of tensors.

    Both sides get the same prompt, rendered here by the checkpoint's chat template if it has one. IDEFICS's processor
    in transformers takes no such text, so there the prompt is the one of the model's documentation.
    """
    processor, options = processor_of(side), {"return_tensors": "pt"}
    if auto.family(config_of(side).model_type).takes_items:
        found = processor(text=[["User:", *images, f"{prompt}\nAssistant:"]], **options)
    else:
        options |= {"images": [images]} if images else {}
        found = processor(text=[_rendered(side, len(images), prompt)], **options)
    return {name: found[name] for name in INPUTS if name in found}


def _rendered(side: Side, images: int, prompt: str) -> str:
    template = auto.AutoProcessor.from_pretrained(side.model)
    if not template.chat_template:
        return "<image>" * images + prompt
    content = [*[{"type": "image"}] * images, {"type": "text", "text": prompt}]
    return template.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


# ---- Running ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def forward(model: nn.Module, stages: list[Stage], inputs: dict[str, Any], sink: Sink) -> None:
    """Run the prompt once; read-only hooks pass every stage's tensor to `sink`, with the number of its call."""
    calls = dict.fromkeys(stages, 0)

    def watch(stage: Stage, value: Tensor) -> None:
        calls[stage] += 1
        sink(stage, calls[stage] - 1, value.detach())

    with hooked(model, dict.fromkeys(stages, watch)):
        model(**Inputs(inputs).to(model.device))


@torch.no_grad()
def greedy(model: nn.Module, inputs: dict[str, Any], tokens: int) -> dict[str, Tensor]:
    """At most `tokens` new tokens (B, N), and the scores each was chosen by, (B, N, V) in the model's dtype."""
    options = {"max_new_tokens": tokens, "do_sample": False, "num_beams": 1}
    with _quietly() if code_of(model) == "transformers" else contextlib.nullcontext():
        found = model.generate(
            **Inputs(inputs).to(model.device), **options, return_dict_in_generate=True, output_scores=True
        )
    scores = torch.stack(found.scores, dim=1).to(model.dtype).cpu()
    return {"tokens": found.sequences[:, -scores.shape[1] :].cpu(), "scores": scores}


# ---- Where the code is -----------------------------------------------------------------------------------------------


@functools.cache  # finding a class parses its whole file
def code_at(thing: Any) -> str:
    """A class or function as "minivlm/modules/vision.py:64 VisionBlock"."""
    file = inspect.getsourcefile(thing)
    top = sys.modules[thing.__module__.split(".")[0]].__file__
    if file is None or top is None:
        return thing.__qualname__
    with contextlib.suppress(ValueError):
        file = Path(file).relative_to(Path(top).parents[1]).as_posix()
    return f"{file}:{inspect.getsourcelines(thing)[1]} {thing.__qualname__}"


def blamed(model: nn.Module, stage: Stage) -> tuple[str, str]:
    """(path, code) of the module that computes a stage, and of up to two modules around it: an edit may be in their
    forward pass. torch's own modules are skipped, and so are missing ones."""
    modules = dict(model.named_modules())
    path = stage.blame or path_of(model, stage) or stage.ours
    around = [path.rsplit(".", n)[0] for n in range(path.count(".") + 1)]
    known = [each for each in [*around, ""] if each in modules and type(modules[each]).__module__[:6] != "torch."]
    named = path if path in modules else known[0]
    return named or "the model", ", in ".join(code_at(type(modules[each])) for each in known[:3])
