"""Add an adapter to the weights of its model: a plain checkpoint that needs no adapter."""

import argparse
from pathlib import Path

from minivlm.app import options

EXAMPLES = """\
minivlm merge HuggingFaceM4/idefics2-8b runs/invoices idefics2-invoices
minivlm merge idefics2-nf4 runs/invoices idefics2-invoices --dtype bfloat16"""
ABOUT = """

A model in four or eight bits is turned into 16 bits first: the adapter was trained on these values. Rounding the sum
to four bits again loses most of the adapter; --format does it anyway and prints how much is lost."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description += ABOUT
    parser.add_argument("model", help="folder, built-in name or Hub id")
    parser.add_argument("adapter", help="folder or Hub id of a LoRA adapter")
    parser.add_argument("out", type=Path, help="a new folder")
    weights = "of the weights; auto: as stored, at least 16 bits"
    parser.add_argument("--dtype", choices=options.DTYPES, default="auto", help=weights)
    parser.add_argument("--format", choices=options.FORMATS, help="quantise the sum, and print what that loses")


def run(arguments: argparse.Namespace) -> None:
    """Load both, merge, write the weights and the processor."""
    from minivlm import AutoModelForImageTextToText, AutoProcessor
    from minivlm.app import lock
    from minivlm.checkpoint.files import saving
    from minivlm.training import lora

    out = arguments.out
    options.check_name(arguments.model)
    processor = AutoProcessor.from_pretrained(arguments.model)
    with lock.new_folder(out):
        model = AutoModelForImageTextToText.from_pretrained(
            arguments.model, adapter=arguments.adapter, dtype=arguments.dtype, fast_cpu=False
        )
        layers = sum(isinstance(module, lora.ADAPTED) for module in model.modules())
        lost = None
        if arguments.format is not None:
            lost = lora.merge_quantised(model, options.quantization(arguments.format))
        else:
            lora.merge(model)
        with saving():
            model.save_pretrained(out)
            processor.save_pretrained(out)
    print(f"{out}: {layers} layers changed, {model.dtype}".replace("torch.", ""))
    if lost is not None:
        print(f"rounding to {arguments.format} lost {lost:.0%} of the change that the adapter makes")
