"""Options that several verbs share, and the processor and model that they describe."""

import argparse
from typing import Any

from minivlm.app import terminal

DEFAULT_MODEL = "shapes-idefics2"


class UsageError(Exception):
    """Options that argparse takes but that make no sense together: one line and exit code 2."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options of every verb that runs a model."""
    weights = "of the weights; auto (default): the checkpoint's own on a CPU, bfloat16 on a GPU"
    parser.add_argument("--model", help=f"folder, built-in name or Hub id (default: {DEFAULT_MODEL}, which ships here)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help=weights)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")
    parser.add_argument(
        "--attn", choices=["eager", "sdpa", "triton"], help="attention backend (default: best for both)"
    )
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="stop there")
    parser.add_argument("--no-split", action="store_true", help="send each image once, without its four quarters")


def positive(text: str) -> int:
    """A whole number above 0, for `type=`."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def model_name(arguments: argparse.Namespace) -> str:
    """The model asked for, or the default one, with a note that says so."""
    if arguments.model is None:
        terminal.note(f"no --model given, asking {DEFAULT_MODEL}, a small model that knows simple shapes")
    return arguments.model or DEFAULT_MODEL


def load_processor(name: str, arguments: argparse.Namespace) -> Any:
    from minivlm import AutoProcessor

    processor = AutoProcessor.from_pretrained(name)
    if arguments.no_split:
        if not hasattr(processor.image_processor, "do_image_splitting"):
            raise ValueError(f"--no-split: {name} does not split images")
        processor.image_processor.do_image_splitting = False
    return processor


def load_model(name: str, arguments: argparse.Namespace, device: str, dtype: str | None) -> Any:
    from minivlm import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        name, device_map=device, dtype=dtype, attn_implementation=arguments.attn
    )


def device_and_dtype(arguments: argparse.Namespace) -> tuple[str, str | None]:
    """Where to run, and in what; None keeps the checkpoint's own dtype. ValueError for a device that is not there."""
    import torch

    from minivlm.checkpoint.loading import wanted_device

    device = wanted_device(arguments.device or "auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: torch finds {torch.cuda.device_count()} CUDA devices; use --device cpu")
    if arguments.dtype != "auto":
        return str(device), arguments.dtype
    return str(device), "bfloat16" if device.type == "cuda" else None
