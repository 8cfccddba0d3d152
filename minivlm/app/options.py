"""Options that several verbs share, and the processor, model and settings that they describe."""

import argparse
import json
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivlm.app import launch, terminal

DEFAULT_MODEL = "shapes-idefics2"
FORMATS = ["nf4", "fp4", "int4", "int8"]
DTYPES = ["auto", "float32", "bfloat16", "float16"]
ATTENTION = ["eager", "sdpa", "compiled", "triton"]
# They would change what `generate` returns, or are options of their own.
NOT_HERE = {
    "return_dict_in_generate": "the command line prints answers only",
    "output_scores": "the command line prints answers only",
    "output_logits": "the command line prints answers only",
    "num_return_sequences": "a question has one answer here",
    "max_length": "it counts the prompt too; use max_new_tokens",
}
WORDS = {"True": True, "False": False, "None": None}


class UsageError(Exception):
    """Options that argparse takes but that make no sense together: one line and exit code 2."""


# ---- The model


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options of every verb that runs a model."""
    group = parser.add_argument_group("the model")
    weights = "of the weights; auto (default): the checkpoint's own on a CPU, bfloat16 on a GPU"
    attention = "attention backend (default: best for the device); compiled is for a CPU, triton for a GPU"
    group.add_argument("--model", help=f"folder, built-in name or Hub id (default: {DEFAULT_MODEL}, which ships here)")
    add_adapter_option(group)
    group.add_argument("--dtype", choices=DTYPES, default="auto", help=weights)
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")
    group.add_argument("--attn", choices=ATTENTION, help=attention)
    group.add_argument("--quantize", choices=FORMATS, help="turn the weights into 4 or 8 bits as they are read")
    add_head_option(group)
    launch.add_option(group)
    group.add_argument("--no-split", action="store_true", help="send each image once, without its four quarters")
    group.add_argument(
        "--chat-template", metavar="NAME|FILE", help="of the prompt (default: the checkpoint's own); vicuna, mistral, …"
    )


def add_head_option(group: Any) -> None:
    text = "the output head too: faster and smaller, a little less exact"
    group.add_argument("--quantize-head", action="store_true", help=text)


def add_adapter_option(group: Any) -> None:
    text = "a LoRA adapter (PEFT's folder) to put on the model (default: the one that it was trained on)"
    group.add_argument("--adapter", metavar="DIR", help=text)


def model_name(arguments: argparse.Namespace) -> str:
    """`--model`, else the adapter's folder, else the default model, with a note."""
    if arguments.model is None and arguments.adapter is not None:
        return arguments.adapter  # its folder loads the model that it was trained on, with the adapter
    if arguments.model is None:
        terminal.note(f"no --model given, asking {DEFAULT_MODEL}, a small model of simple shapes")
    return arguments.model or DEFAULT_MODEL


def add_words(parser: argparse.ArgumentParser) -> None:
    """Images and the question about them, for verbs that take both."""
    images = "image files, URLs, base64, or - for stdin; then the question"
    parser.add_argument("words", nargs="+", metavar="IMAGE… QUESTION", help=images)


def images_and_question(words: list[str]) -> tuple[list[str], str]:
    """The words of `add_words`, told apart. UsageError if the last one cannot have been meant as the question."""
    from minivlm.app.images import looks_like_image

    *names, question = words
    if os.path.isfile(question):
        raise UsageError(f"the last argument is the question, but {question!r} is a file")
    if question == "-" or looks_like_image(question):
        raise UsageError(f"the last argument is the question, and {question!r} looks like an image")
    if not question.strip():
        raise UsageError("the question is empty")
    return names, terminal.typed(question)


def check_name(name: str) -> None:
    """ValueError with a suggestion for a name without a slash that is neither a folder nor built in."""
    from minivlm.checkpoint import hub

    built_in = hub.built_in()
    if not name or "/" in name or os.sep in name or name in built_in or Path(name).expanduser().exists():
        return
    raise ValueError(
        f"there is no folder {name} and no built-in model of that name ({', '.join(built_in)}). "
        f"{hub.suggestion(name) or 'A Hub id has the form owner/name'}"
    )


def load_processor(name: str, arguments: argparse.Namespace) -> Any:
    """The processor of a checkpoint. ValueError if it has no chat template and none is given."""
    check_name(name)

    from minivlm import AutoProcessor
    from minivlm.text.chat_template import KNOWN

    template = arguments.chat_template
    if template is not None and template not in KNOWN:
        if Path(template).is_file():
            template = Path(template).read_text(encoding="utf-8")
        elif "{" not in template:
            raise ValueError(f"--chat-template: no file {template!r}, and the known names are {', '.join(KNOWN)}")
    # What training has set for images and prompts lies beside the adapter
    trained = arguments.adapter is not None and (Path(arguments.adapter) / "preprocessor_config.json").is_file()
    processor = AutoProcessor.from_pretrained(arguments.adapter if trained else name, chat_template=template)
    if processor.chat_template is None:
        raise ValueError(
            f"{name} has no chat template (it is not tuned for chat); --chat-template takes a file or one of "
            f"{', '.join(KNOWN)}"
        )
    if arguments.no_split:
        if not hasattr(processor.image_processor, "do_image_splitting"):
            raise ValueError(f"--no-split: {name} does not split images")
        processor.image_processor.do_image_splitting = False
    return processor


@dataclass(frozen=True)
class Session:
    """Everything a verb needs except the weights: a bad option or image is found before these are loaded."""

    name: str
    arguments: argparse.Namespace
    device: str
    dtype: str | None
    processor: Any
    images: list[Any]  # PIL, RGB

    def model(self) -> Any:
        return load_model(self.name, self.arguments, self.device, self.dtype)


def prepared(arguments: argparse.Namespace, images: Sequence[str] = ()) -> Session:
    """The session that the options describe. images: as on the command line; ValueError, OSError for bad ones."""
    name = model_name(arguments)

    from minivlm.app.images import source
    from minivlm.processing.common import fetch_image

    device, dtype = device_and_dtype(arguments)
    processor = load_processor(name, arguments)
    fetched = [fetch_image(processor, source(image)) for image in images]
    return Session(name, arguments, device, dtype, processor, fetched)


def load_model(name: str, arguments: argparse.Namespace, device: str, dtype: str | None) -> Any:
    from minivlm import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        name,
        device_map=device,
        dtype=dtype,
        attn_implementation=arguments.attn,
        quantization_config=asked_quantization(arguments),
        adapter=arguments.adapter,
        tp_plan="auto" if arguments.gpus > 1 else None,
    )


def asked_quantization(arguments: argparse.Namespace) -> Any:
    """The configuration that `--quantize` and `--quantize-head` ask for; None without."""
    if arguments.quantize is not None:
        return quantization(arguments.quantize, head=arguments.quantize_head)
    if arguments.quantize_head:
        raise UsageError("--quantize-head goes with --quantize FORMAT")
    return None


def quantization(kind: str, group_size: int = 128, skip: list[str] | None = None, head: bool = False) -> Any:
    """The configuration of a `--quantize` or `--format`.  skip: modules that stay; head: the output head too."""
    from minivlm import BitsAndBytesConfig, Int4Config

    if kind == "int4":
        return Int4Config(group_size, skip or [], head)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip or None, quantize_head=head)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=skip or None,
        quantize_head=head,
    )


def device_and_dtype(arguments: argparse.Namespace) -> tuple[str, str | None]:
    """The device, and the dtype (None: the checkpoint's own). ValueError for a device that cannot be used."""
    import torch

    from minivlm.checkpoint.loading import wanted_device

    device = wanted_device(arguments.device or "auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: torch finds {torch.cuda.device_count()} CUDA devices; use --device cpu")
    check_attention(arguments.attn, device.type)
    if arguments.dtype != "auto":
        return str(device), arguments.dtype
    return str(device), "bfloat16" if device.type == "cuda" else None


def check_attention(attn: str | None, device: str) -> None:
    """ValueError for kernels that this kind of device cannot run."""
    if attn == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("the triton kernels need a GPU, and this runs on cpu; use sdpa, or leave it out")


# ---- Generation


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """The options of every verb that writes answers."""
    group = parser.add_argument_group(
        "the answer",
        "Greedy unless one of --temperature, --top-p, --top-k, --min-p is given. The rules apply in this order: "
        "repetition penalty, temperature, top-k (50 unless --top-k says otherwise; 0: off), top-p, min-p.",
    )
    group.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="cut the answer there")
    group.add_argument("--temperature", type=float, metavar="T", help="above 1 more varied, below 1 less; 0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that reach P together")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    group.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the likeliest")
    group.add_argument("--seed", type=int, metavar="N", help="of sampling: the same seed gives the same answer")
    group.add_argument("--num-beams", type=positive, metavar="N", help="follow N continuations, keep the likeliest")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1: fewer repeated words")
    stop, system = "end the answer with this text; may be repeated", "the system message, before the first question"
    group.add_argument("--stop", action="append", type=terminal.typed, metavar="TEXT", help=stop)
    group.add_argument("--system", type=terminal.typed, metavar="TEXT", help=system)
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another setting of generate; may be repeated",
    )
    group.add_argument("--verbose", action="store_true", help="tokens/s, time to the first token, memory; on stderr")


def positive(text: str) -> int:
    """A whole number above 0, for `type=`."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def layer_numbers(text: str | None) -> list[int] | None:
    """The numbers of `--layers`, None without; ValueError for anything but numbers with commas."""
    if text is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"--layers takes numbers such as 0,1,31, found {text!r}")
    return [int(number) for number in text.split(",")]


def generation_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as settings of `generate`, checked before any weight is read."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "num_beams", "repetition_penalty")
    settings = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.stop:
        settings["stop_strings"] = arguments.stop
    for setting in arguments.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set takes NAME=VALUE, found {setting!r}")
        settings[name.strip()] = parse_value(value.strip())
    settings = with_sampling(settings)
    check_settings(settings)
    return settings


def parse_value(text: str) -> Any:
    """JSON, Python's True, False and None, or else the text itself."""
    if text in WORDS:
        return WORDS[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def with_sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with sampling switched on if one of them is about it; a temperature of 0 switches it off."""
    from minivlm.generation.settings import SAMPLING

    if settings.get("temperature") == 0:
        return {name: value for name, value in settings.items() if name not in SAMPLING} | {"do_sample": False}
    if "do_sample" not in settings and any(name in settings for name in SAMPLING):
        return settings | {"do_sample": True}
    return settings


def check_settings(settings: dict[str, Any]) -> None:
    """ValueError for what `generate` would refuse later, and for what the command line has no use for."""
    from minivlm.generation.settings import GenerationConfig, check, is_whole, resolve

    for name, why in NOT_HERE.items():
        if name in settings:
            raise ValueError(f"{name} is not a setting here: {why}")
    given = {name: value for name, value in settings.items() if name != "seed"}
    typed = GenerationConfig.from_hub(GenerationConfig(**given).to_hub())
    with warnings.catch_warnings(action="ignore"):  # `generate` warns again
        resolve(GenerationConfig(), None, typed.to_hub())
    seed = settings.get("seed")
    check("seed", seed, seed is None or is_whole(seed), "an integer ≥ 0")
