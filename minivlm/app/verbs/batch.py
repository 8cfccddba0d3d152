"""Answer a file of questions; interrupted, the same command goes on."""

import argparse
from pathlib import Path

from minivlm.app import options, terminal

EXAMPLES = """\
minivlm batch questions.jsonl --out answers.jsonl
minivlm batch questions.jsonl --out answers.jsonl --model HuggingFaceM4/idefics2-8b --batch-size 16"""
FORMAT = """

One JSON object a line: {"question": "…", "images": ["path or URL", …]}, or {"messages": […]} as chat templates take
them; "id" is optional."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description += FORMAT
    parser.add_argument("prompts", type=Path, metavar="PROMPTS.jsonl", help="paths in it start from the current folder")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="ANSWERS.jsonl", help="a new file, in the same order"
    )
    parser.add_argument("--batch-size", type=options.positive, default=8, metavar="N", help="so many at once")
    options.add_model_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answer all lines. Return the number of failed ones."""
    name = options.model_name(arguments)

    from minivlm.app import batch

    batch.check_new(arguments.out)
    arguments.prompts.open("rb").close()  # before any weight is read
    device, dtype = options.device_and_dtype(arguments)
    processor = options.load_processor(name, arguments)
    model = options.load_model(name, arguments, device, dtype)
    settings = {"max_new_tokens": arguments.max_new_tokens}
    about = {"model": name, "dtype": dtype, "no_split": arguments.no_split, **settings}
    failed = batch.run(
        model, processor, arguments.prompts, arguments.out, batch_size=arguments.batch_size, about=about, **settings
    )
    if failed:
        terminal.note(f"{failed} of the lines failed; {arguments.out} says why")
    return failed
