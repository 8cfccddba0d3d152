"""Answer a file of questions, or one question about a folder; interrupted, the same command goes on."""

import argparse
import sys
from pathlib import Path
from typing import Any

from minivlm.app import options, terminal
from minivlm.app.options import UsageError

RUNS_ON_GPUS = True  # --gpus: see `minivlm.app.launch`
EXAMPLES = """\
minivlm batch questions.jsonl --out answers.jsonl
minivlm batch photos/ --question "Describe the image." --out captions.jsonl --batch-size 16
cat questions.jsonl | minivlm batch - --out - --model HuggingFaceM4/idefics2-8b > answers.jsonl"""
ABOUT = """

A line of the file is a JSON object: {"question": "…", "images": ["path or URL", …]}, or {"messages": […]} as chat
templates take them; "id" is optional. LLaVA's {"question_id": …, "image": "…", "text": "…"} is read too. An answer is
{"line": 1, "id": …, "answer": "…", "finish_reason": "stop"} ("length" if it was cut), or {"line": 1, "error": "…"}."""
SHOWN = 10  # bad lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description += ABOUT
    parser.add_argument(
        "questions", type=Path, metavar="QUESTIONS", help="a file of JSON lines, - for stdin, or a folder of images"
    )
    parser.add_argument("--question", metavar="TEXT", help="the question about each image of a folder")
    out = "a new file, in the order of the questions, or - for stdout"
    parser.add_argument("--out", type=Path, required=True, metavar="ANSWERS.jsonl", help=out)
    start = "where relative image paths start (default: the current folder)"
    parser.add_argument("--image-folder", type=Path, metavar="DIR", help=start)
    parser.add_argument("--batch-size", type=options.positive, default=8, metavar="N", help="so many at once")
    options.add_model_options(parser)
    options.add_generation_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answer all lines. Return the number of failed ones."""
    out = arguments.out
    if arguments.questions.is_dir() != (arguments.question is not None):
        raise UsageError("--question and a folder of images go together")
    settings = options.generation_settings(arguments)
    name = options.model_name(arguments)
    if str(out) == "-":
        return _run(arguments, name, settings)

    from minivlm.app import batch, lock

    batch.check_new(out)
    with lock.held(out.with_name(out.name + ".lock")):
        return _run(arguments, name, settings)


def _run(arguments: argparse.Namespace, name: str, settings: dict[str, Any]) -> int:
    from minivlm.app import batch, questions

    if arguments.question is not None:
        text = questions.about_folder(arguments.questions, arguments.question)
    else:
        text = questions.read_file(arguments.questions)
    _tell_bad(questions.bad_lines(text, arguments.image_folder))
    device, dtype = options.device_and_dtype(arguments)
    processor = options.load_processor(name, arguments)
    model = options.load_model(name, arguments, device, dtype)
    job = batch.Job(
        model, processor, settings, arguments.batch_size, arguments.system, arguments.image_folder, arguments.verbose
    )
    if str(arguments.out) == "-":
        summary = batch.run_to(job, text, _to_stdout)
    else:
        about = {"model": name, "dtype": dtype, "no_split": arguments.no_split, "quantize": arguments.quantize}
        about |= {"chat_template": arguments.chat_template, "system": arguments.system, **settings}
        summary = batch.run(job, text, arguments.out, about)
    terminal.note(f"{summary}; {arguments.out}" if str(arguments.out) != "-" else f"{summary}")
    if arguments.verbose:
        _tell_speed(summary, device)
    return summary.failed


def _to_stdout(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()


def _tell_bad(bad: dict[int, str]) -> None:
    for number, why in list(bad.items())[:SHOWN]:
        terminal.note(f"line {number}: {why}")
    if len(bad) > SHOWN:
        terminal.note(f"and {len(bad) - SHOWN:,} more lines cannot be answered")


def _tell_speed(summary: Any, device: str) -> None:
    from minivlm.app.answer import peak_memory
    from minivlm.app.inspection import memory

    first = sorted(summary.first_tokens)
    middle = f", first token after {first[len(first) // 2]:.2f} s (median batch)" if first else ""
    peak = peak_memory(device)
    held = "" if peak is None else f", peak memory {memory(peak)}"
    terminal.note(f"{summary.tokens:,} new tokens in {summary.seconds:.1f} s{middle}{held}")
