"""Run a model in two ways and name the first stage at which they disagree."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from minivlm.app import options, terminal
from minivlm.app.options import DEFAULT_MODEL, UsageError

EXAMPLES = """\
minivlm parity shapes-idefics2
minivlm parity HuggingFaceM4/idefics2-8b --dtype bfloat16 --record reference.safetensors
minivlm parity shapes-idefics2 --reference minivlm --b attn=eager --inside --layers 0"""
ABOUT = """

Side a is transformers (or a recording), side b is minivlm. Both run on the same inputs and are compared stage by stage,
from pixels to greedy tokens."""
# options that a recording fixes, and their defaults
GIVEN = {"a": [], "layers": None, "inside": False, "ops": False, "tokens": 16, "record": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    settings = "a setting of side {}: attn=eager, dtype=bfloat16, quantize=nf4, model=FOLDER, code=transformers"
    parser.description += ABOUT
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="folder, built-in name or Hub id")
    options.add_adapter_option(parser)
    parser.add_argument("--image", action="append", metavar="FILE", help="an image; repeat for more (default: drawn)")
    parser.add_argument("--prompt", metavar="TEXT", help="the question about it (default: what is this?)")
    parser.add_argument(
        "--reference", choices=["transformers", "minivlm"], default="transformers", help="side a's code"
    )
    parser.add_argument(
        "--dtype", default="float32", metavar="D[,D]", help="of both sides; several: one after the other"
    )
    parser.add_argument("--device", help="cpu, cuda, … (default: cpu)")
    parser.add_argument("--a", action="append", default=[], metavar="KEY=VALUE", help=settings.format("a"))
    parser.add_argument("--b", action="append", default=[], metavar="KEY=VALUE", help=settings.format("b"))
    parser.add_argument("--layers", metavar="N,N,…", help="look at these layers only (default: all)")
    parser.add_argument("--inside", action="store_true", help="look inside layers: norms and projections")
    parser.add_argument("--ops", action="store_true", help="find the operation that goes wrong in the first stage")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="greedy tokens to compare")
    parser.add_argument("--record", type=Path, metavar="FILE", help="store side a in a safetensors file, and stop")
    parser.add_argument("--against", type=Path, metavar="FILE", help="a recording as side a: needs no transformers")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the error by depth")
    parser.add_argument("--json", action="store_true", help="print one JSON object: a report for each dtype")


def run(arguments: argparse.Namespace) -> bool:
    """Print a report for each dtype, or store a recording. Return whether something diverges."""
    from minivlm.parity import Question, Recording, against, check_plot, compare, drawn_image, plot, record
    from minivlm.processing.images import load_image

    dtypes = arguments.dtype.split(",")
    _check(arguments, dtypes)
    if arguments.plot:
        check_plot(arguments.plot)
    images = [load_image(image) for image in arguments.image] if arguments.image else [drawn_image()]
    question = Question(tuple(images)) if arguments.prompt is None else Question(tuple(images), arguments.prompt)
    shared = {"layers": options.layer_numbers(arguments.layers), "inside": arguments.inside, "tokens": arguments.tokens}
    progress = sys.stderr.isatty()
    recording = Recording(arguments.against) if arguments.against else None
    reports = {}
    for dtype in dtypes:
        b = _side(arguments, arguments.b, dtype, "minivlm")
        if recording is not None:
            reports[dtype] = against(recording, b, question, progress=progress)
            continue
        a = _side(arguments, arguments.a, dtype, arguments.reference)
        if arguments.record:
            stored = record(a, arguments.record, question, other_dtype=b.dtype, **shared, progress=progress)
            print(f"{arguments.record}: {terminal.memory(arguments.record.stat().st_size)}, {stored.metadata['side']}")
            return False
        reports[dtype] = compare(a, b, question, **shared, ops=arguments.ops, progress=progress)
    if arguments.plot:
        plot(reports, arguments.plot)
    if arguments.json:
        print(json.dumps({dtype: report.to_json() for dtype, report in reports.items()}))
    else:
        print("\n\n".join(report.table() for report in reports.values()))
    return any(report.first for report in reports.values())


def _check(arguments: argparse.Namespace, dtypes: list[str]) -> None:
    """UsageError for options that do not go with --record or --against."""
    if (arguments.record or arguments.against) and len(dtypes) > 1:
        raise UsageError("a recording is of one dtype")
    for name, default in GIVEN.items():
        if arguments.against and getattr(arguments, name) != default:
            raise UsageError(f"--{name} and --against do not go together: a recording fixes it; record anew")


def _side(arguments: argparse.Namespace, settings: list[str], dtype: str, code: str) -> Any:
    """A `parity.Side` with the settings KEY=VALUE of the command line over what both sides share."""
    from minivlm.checkpoint.loading import DTYPES
    from minivlm.parity import Side

    values = {"model": arguments.model, "code": code, "dtype": dtype}
    values |= {"device": arguments.device, "adapter": arguments.adapter}
    known = (*values, "attn", "quantize")
    for setting in settings:
        key, equals, value = setting.partition("=")
        if key not in known or not equals:
            raise UsageError(f"a setting is KEY=VALUE with one of {', '.join(known)}, found {setting!r}")
        values[key] = value
    if values["dtype"] not in DTYPES:
        raise UsageError(f"dtype is one of {', '.join(DTYPES)}, found {values['dtype']!r}")
    options.check_attention(values.get("attn"), (values["device"] or "cpu").partition(":")[0])
    return Side(**values)
