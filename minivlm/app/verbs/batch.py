"""Answer a file of questions, or one question about a folder; interrupted, the same command goes on."""

import argparse
import os
from functools import partial
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
        "questions", type=Path, metavar="QUESTIONS", help="JSON lines, - for stdin, parquet, or a folder of images"
    )
    about = "the question about each image of a folder or parquet file"
    parser.add_argument("--question", type=terminal.typed, metavar="TEXT", help=about)
    out = "a new file, in the order of the questions, or - for stdout"
    parser.add_argument("--out", type=Path, required=True, metavar="ANSWERS.jsonl", help=out)
    start = "where relative image paths start (default: the current folder)"
    parser.add_argument("--image-folder", type=Path, metavar="DIR", help=start)
    text = "answer questions R, R + N, … of N processes, R from 0 (default: RANK/WORLD_SIZE where these are set)"
    parser.add_argument("--shard", metavar="R/N", help=text)
    parser.add_argument("--batch-size", type=options.positive, default=8, metavar="N", help="so many at once")
    options.add_model_options(parser)
    options.add_generation_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answer all lines. Return the number of failed ones."""
    out = arguments.out
    folder, table = arguments.questions.is_dir(), arguments.questions.suffix == ".parquet"
    asked = arguments.question is not None
    if (folder and not asked) or (asked and not folder and not table):
        raise UsageError("--question and a folder (or parquet file) of images go together")
    if asked and not arguments.question.strip():
        raise UsageError("the question is empty")
    settings = options.generation_settings(arguments)

    from minivlm.app import launch, lock, parts

    started = launch.MARK in os.environ  # then RANK numbers the GPUs of one model
    shard = parts.Shard.parse(arguments.shard) if arguments.shard else parts.ALL if started else parts.Shard.here()
    if str(out) == "-":
        if shard.count > 1:
            raise UsageError("a shard needs a file for --out: the last one to end puts all answers together")
        return _run(arguments, settings, shard)
    parts.check_new(out)
    with lock.held(lock.beside(out if shard.count == 1 else shard.part(out))):
        return _run(arguments, settings, shard)


def _run(arguments: argparse.Namespace, settings: dict[str, Any], shard: Any) -> int:
    from minivlm.app import batch, questions

    text = questions.read_file(arguments.questions, arguments.question)
    _tell_bad(questions.bad_lines(text, arguments.image_folder))
    session, folder = options.prepared(arguments), arguments.image_folder
    size, system, timed = arguments.batch_size, arguments.system, arguments.verbose
    job = batch.Job(session.model(), session.processor, settings, size, system, folder, timed)
    if str(arguments.out) == "-":
        summary = batch.run_to(job, text, partial(print, end="", flush=True))
        terminal.note(str(summary))
    else:
        quantize = f"{arguments.quantize} and the head" if arguments.quantize_head else arguments.quantize
        about = {"model": session.name, "dtype": session.dtype, "no_split": arguments.no_split, "quantize": quantize}
        about |= {"chat_template": arguments.chat_template, "system": system, **settings}
        about |= {"adapter": arguments.adapter, "image_folder": None if folder is None else str(folder)}
        summary = batch.run(job, text, arguments.out, about, shard)
        terminal.note(f"{summary}; {arguments.out}")
    if arguments.verbose:
        _tell_speed(summary, session.device)
    return summary.failed


def _tell_bad(bad: dict[int, str]) -> None:
    for number, why in list(bad.items())[:SHOWN]:
        terminal.note(f"line {number}: {why}")
    if len(bad) > SHOWN:
        terminal.note(f"and {len(bad) - SHOWN:,} more lines cannot be answered")


def _tell_speed(summary: Any, device: str) -> None:
    from minivlm.devices.memory import peak

    first = sorted(summary.first_tokens)
    middle = f", first token after {first[len(first) // 2]:.2f} s (median batch)" if first else ""
    most = peak(device)
    held = "" if most is None else f", peak memory {terminal.memory(most)}"
    terminal.note(f"{summary.tokens:,} new tokens in {summary.seconds:.1f} s{middle}{held}")
