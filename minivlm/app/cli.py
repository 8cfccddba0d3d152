"""`minivlm ask`, `chat`, `batch`: one question about pictures, a conversation, a file of questions. `minivlm inspect`:
what a checkpoint is made of. `quantize`: the same one in four or eight bits. `parity`: where two ways of running it
disagree.

Exit codes: 0 done, 1 bad input (for chat and batch: some lines of it; for parity also: they disagree), 2 wrong usage,
130 interrupted; an error is one line. Answers and tables go to stdout, everything else to stderr. torch is imported
inside the verbs, so that `--help` is instant.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from minivlm import __version__

DEFAULT_MODEL = "shapes-idefics2"
CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"  # what terminals obey (not tab and new line); surrogates


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code; argparse exits with 2 (or 0 after `--help`) by itself."""
    argv = sys.argv[1:] if argv is None else argv
    top = _Parser("minivlm", description="Small vision-language models: ask them, look inside them.")
    top.add_argument("--version", action="version", version=f"minivlm {__version__}")
    top.add_argument("verb", choices=VERBS, help="what to do; `minivlm VERB --help` says more")
    verb, build = VERBS[top.parse_args(argv[:1]).verb]
    parser = build()
    args = parser.parse_intermixed_args(argv[1:])  # options may stand between the pictures and the question
    try:
        failed = verb(args, parser)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone, as in `minivlm ask … | head -c 1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, MemoryError) as error:
        return _fail(error)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        return _fail(f"{str(error).split('. ')[0]}; try --dtype bfloat16, --no-split or --device cpu")
    return 1 if failed else 0


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"minivlm: error: {message}; see `{self.prog} --help`\n")


def _fail(error: Exception | str) -> int:
    words = re.sub(CONTROL, "", str(error) or type(error).__name__).split()  # of names in files, for one
    print("minivlm: error:", *words, file=sys.stderr)
    return 1


# ---- The model ----


def _model_options(parser: _Parser) -> None:
    """The options of every verb that asks a model."""
    weights = "of the weights; auto (default): the checkpoint's own on a CPU, bfloat16 on a GPU"
    parser.add_argument("--model", help=f"folder, built-in name or Hub id (default: {DEFAULT_MODEL}, which ships here)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help=weights)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")
    parser.add_argument(
        "--attn", choices=["eager", "sdpa", "triton"], help="attention backend (default: best for both)"
    )
    parser.add_argument("--max-new-tokens", type=_positive, default=256, metavar="N", help="stop there (default: 256)")
    parser.add_argument("--no-split", action="store_true", help="send each picture once, without its four quarters")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def _name(args: argparse.Namespace) -> str:
    if args.model is None:
        about = "a small model that knows simple shapes"
        print(f"minivlm: no --model given, asking {DEFAULT_MODEL}, {about}", file=sys.stderr)
    return args.model or DEFAULT_MODEL


def _processor(name: str, args: argparse.Namespace) -> Any:
    from minivlm import AutoProcessor

    processor = AutoProcessor.from_pretrained(name)
    if args.no_split:
        if not hasattr(processor.image_processor, "do_image_splitting"):
            raise ValueError(f"--no-split: {name} does not split pictures")
        processor.image_processor.do_image_splitting = False
    return processor


def _model(name: str, args: argparse.Namespace, device: str, dtype: str | None) -> Any:
    from minivlm import AutoModelForImageTextToText

    options = {"device_map": device, "dtype": dtype, "attn_implementation": args.attn}
    return AutoModelForImageTextToText.from_pretrained(name, **options)


def _device_and_dtype(args: argparse.Namespace) -> tuple[str, str | None]:
    """Where to run, and in what; None keeps the checkpoint's own dtype. ValueError for a device that is not there."""
    import torch

    from minivlm.checkpoint.loading import wanted_device

    device = wanted_device(args.device or "auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: torch finds {torch.cuda.device_count()} CUDA devices; use --device cpu")
    if args.dtype != "auto":
        return str(device), args.dtype
    return str(device), "bfloat16" if device.type == "cuda" else None


# ---- ask ----


def _ask_parser() -> _Parser:
    parser = _Parser("minivlm ask", description="Answer a question about pictures, word by word.")
    parser.usage = "%(prog)s IMAGE… QUESTION [options]"
    parser.add_argument("words", nargs="+", metavar="IMAGE… QUESTION", help="picture files or URLs, then the question")
    _model_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object when done, instead of streaming")
    return parser


def ask(args: argparse.Namespace, parser: _Parser) -> None:
    """Stream the answer to stdout, or print it as JSON. Pictures and prompt are checked before any weight is read."""
    *pictures, question = args.words
    if os.path.isfile(question):
        parser.error(f"the last argument is the question, but {question!r} is a file")
    if not pictures or not question.strip():
        parser.error(f"no picture before the question {question!r}" if question.strip() else "the question is empty")
    name = _name(args)

    from minivlm.app.chat import incremental_text
    from minivlm.generation.loop import stream
    from minivlm.processing.common import fetch_picture

    device, dtype = _device_and_dtype(args)
    processor = _processor(name, args)
    content = [{"type": "image", "image": fetch_picture(processor, picture)} for picture in pictures]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    model = _model(name, args, device, dtype)

    start = time.perf_counter()
    tokens = stream(model, **inputs.to(device), max_new_tokens=args.max_new_tokens)
    decode = partial(processor.decode, skip_special_tokens=True)
    if not args.json:
        _print_pieces(incremental_text(decode, map(int, tokens)))
        return
    ids = [int(token) for token in tokens]
    answer = decode(ids).strip()
    sizes = {"prompt_tokens": inputs["input_ids"].shape[1], "new_tokens": len(ids)}
    seconds = round(time.perf_counter() - start, 3)
    print(json.dumps({"answer": answer, "model": name, **sizes, "seconds": seconds}))


def _print_pieces(pieces: Iterable[str]) -> None:
    """Print as they come, without leading blanks and control characters (a model may write escape sequences)."""
    begun = False
    for piece in pieces:
        piece = re.sub(CONTROL, "", piece if begun else piece.lstrip())
        begun = begun or bool(piece)
        print(piece, end="", flush=True)
    print()


# ---- chat ----


def _chat_parser() -> _Parser:
    commands = "In it, /image PATH adds a picture to the next question, /reset begins anew, /quit ends."
    parser = _Parser("minivlm chat", description=f"Talk about pictures, a question a line. {commands}")
    parser.usage = "%(prog)s [IMAGE…] [options]"
    parser.add_argument("pictures", nargs="*", metavar="IMAGE", help="picture files or URLs, for the first question")
    _model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    return parser


def chat(args: argparse.Namespace, parser: _Parser) -> int:
    """Answer the lines of stdin; how many have failed, which nobody needs to be told who has seen it."""
    name = _name(args)

    from minivlm.app.chat import Chat, talk
    from minivlm.processing.common import fetch_picture

    device, dtype = _device_and_dtype(args)
    processor = _processor(name, args)
    pictures = [fetch_picture(processor, picture) for picture in args.pictures]
    model = _model(name, args, device, dtype)
    conversation = Chat(model, processor, system=args.system, max_new_tokens=args.max_new_tokens)
    watched = sys.stdin.isatty() and sys.stdout.isatty()
    failed = talk(conversation, pictures, _lines("> " if watched else ""), _print_pieces, _fail)
    return 0 if watched else failed


def _lines(prompt: str) -> Iterator[str]:
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return


# ---- batch ----


def _batch_parser() -> _Parser:
    about = (
        'Answer a file of questions, one JSON object a line: {"question": "…", "images": ["path or URL", …]}, or '
        '{"messages": […]} as chat templates take them; "id" is optional. Interrupted, the same command goes on.'
    )
    parser = _Parser("minivlm batch", description=about)
    parser.add_argument("prompts", type=Path, metavar="PROMPTS.jsonl", help="paths in it start from the current folder")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="ANSWERS.jsonl", help="a new file, in the same order"
    )
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="so many at once (default: 8)")
    _model_options(parser)
    return parser


def batch(args: argparse.Namespace, parser: _Parser) -> int:
    """Answer all lines; how many have failed."""
    name = _name(args)

    from minivlm.app.batch import check_new, run

    check_new(args.out)
    args.prompts.open("rb").close()  # before any weight is read
    device, dtype = _device_and_dtype(args)
    processor = _processor(name, args)
    model = _model(name, args, device, dtype)
    options = {"max_new_tokens": args.max_new_tokens}
    about = {"model": name, "dtype": dtype, "no_split": args.no_split, **options}
    failed = run(model, processor, args.prompts, args.out, batch_size=args.batch_size, about=about, **options)
    if failed:
        print(f"minivlm: {failed} of the lines failed; {args.out} says why", file=sys.stderr)
    return failed


# ---- inspect ----


def _inspect_parser() -> _Parser:
    parser = _Parser("minivlm inspect", description="What a checkpoint is made of, from its config alone.")
    parser.add_argument(
        "model", help="folder, built-in name, Hub id, or the name of a known release (needs no network)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--image", nargs="+", metavar="IMAGE", help="how many tokens and bytes these would take")
    parser.add_argument(
        "--check",
        action="store_true",
        help="read all of its files too, and every number of its weights; with --image, does it look at them?",
    )
    return parser


def inspect(args: argparse.Namespace, parser: _Parser) -> None:
    """Print parts, sizes, parameters and memory as a table or as JSON; `--check` fails for any file that is damaged."""
    from minivlm.app import inspection

    found = inspection.describe(args.model)
    if args.check:
        found["checked"] = inspection.check(args.model)
    if args.image:
        found["pictures"], inputs = inspection.cost(args.model, args.image)
        if args.check:
            found["sight"] = inspection.sight(args.model, inputs)
    print(json.dumps(found) if args.json else inspection.table(found))


# ---- quantize ----


def _quantize_parser() -> _Parser:
    about = "Write a checkpoint in four or eight bits: a folder that loads like any other, with no further settings."
    parser = _Parser("minivlm quantize", description=about)
    parser.add_argument("model", help="folder, built-in name or Hub id")
    parser.add_argument("out", type=Path, help="a new folder")
    formats = "nf4 (default) and fp4: as bitsandbytes, doubly quantised; int4: fastest on a CPU; int8"
    parser.add_argument("--format", choices=["nf4", "fp4", "int4", "int8"], default="nf4", help=formats)
    parser.add_argument("--group-size", type=int, default=128, choices=[32, 64, 128], help="of int4 (default: 128)")
    parser.add_argument("--skip", nargs="*", default=[], metavar="MODULE", help="leave it as it is, as vision_model")
    kinds = ["auto", "float32", "bfloat16", "float16"]
    what = "of what is not quantised (default: bfloat16; auto: as stored)"
    parser.add_argument("--dtype", choices=kinds, default="bfloat16", help=what)
    return parser


def quantize(args: argparse.Namespace, parser: _Parser) -> None:
    """Quantise while loading, write the weights, and copy what belongs to them."""
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} exists already; name a new folder")

    from minivlm import AutoModelForImageTextToText, BitsAndBytesConfig, Int4Config
    from minivlm.app.inspection import memory
    from minivlm.checkpoint import hub
    from minivlm.quantization import apply

    if args.format == "int4":
        config = Int4Config(args.group_size, args.skip)
    elif args.format == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=args.skip or None)
    else:
        double = {"bnb_4bit_quant_type": args.format, "bnb_4bit_use_double_quant": True}
        config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=args.skip or None, **double)
    files = hub.source(args.model)
    if files.json("config.json").get("quantization_config") is not None:
        raise ValueError(f"{args.model} is quantised already; start from the original")
    model = AutoModelForImageTextToText.from_pretrained(args.model, quantization_config=config, dtype=args.dtype)
    model.save_pretrained(args.out)
    for name in hub.BESIDE_THE_WEIGHTS:
        path = files.file(name, required=False)
        if path is not None:
            shutil.copyfile(path, args.out / name)
    layers = apply.layers(model).values()
    count = sum(layer.in_features * layer.out_features for layer in layers)
    size = sum(config.format.nbytes(layer.shape) for layer in layers)
    print(f"{args.out}: {count:,} parameters as {config.format}, {size / count:.3f} byte each, {memory(size)}")


# ---- parity ----


def _parity_parser() -> _Parser:
    about = (
        "Run a model twice, as side a and side b, compare them stage by stage from pixels to greedy tokens, and "
        "name the first stage that diverges. Side a is transformers (or a recording), side b is minivlm."
    )
    settings = "a setting of side {}: attn=eager, dtype=bfloat16, quantize=nf4, model=FOLDER, code=transformers"
    parser = _Parser("minivlm parity", description=about)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL, help="folder, built-in name or Hub id")
    parser.add_argument("--image", action="append", metavar="FILE", help="a picture; repeat for more (default: drawn)")
    parser.add_argument("--prompt", metavar="TEXT", help="the question about it")
    parser.add_argument(
        "--reference", choices=["transformers", "minivlm"], default="transformers", help="side a's code"
    )
    parser.add_argument(
        "--dtype", default="float32", metavar="D[,D]", help="of both sides; several: one after the other"
    )
    parser.add_argument("--device", help="cpu, cuda, … (default: cpu)")
    parser.add_argument("--a", action="append", default=[], metavar="KEY=VALUE", help=settings.format("a"))
    parser.add_argument("--b", action="append", default=[], metavar="KEY=VALUE", help=settings.format("b"))
    parser.add_argument("--layers", metavar="N,N,…", help="look at these layers only")
    parser.add_argument("--inside", action="store_true", help="look inside of layers: norms and projections")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="greedy tokens to compare (default: 16)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="store side a in a safetensors file, and stop")
    parser.add_argument("--against", type=Path, metavar="FILE", help="a recording as side a: needs no transformers")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the error by depth")
    parser.add_argument("--json", action="store_true", help="print one JSON object: a report for each dtype")
    return parser


def parity(args: argparse.Namespace, parser: _Parser) -> bool:
    """Print a report for each dtype, or store a recording; whether something diverges."""
    from minivlm.app.inspection import memory
    from minivlm.parity import Question, Recording, against, check_plot, compare, drawn_picture, plot, record
    from minivlm.processing.images import load_image

    dtypes = args.dtype.split(",")
    if (args.record or args.against) and len(dtypes) > 1:
        parser.error("a recording is of one dtype")
    fixed = [
        name for name in ("a", "layers", "inside", "tokens", "record") if args.against and _set(args, parser, name)
    ]
    if fixed:
        parser.error(f"--{fixed[0]} and --against: a recording is of one side, these layers and tokens; record anew")
    if args.plot:
        check_plot(args.plot)
    pictures = [load_image(image) for image in args.image] if args.image else [drawn_picture()]
    question = Question(tuple(pictures), **({} if args.prompt is None else {"prompt": args.prompt}))
    shared = {"layers": _numbers(args.layers), "inside": args.inside, "tokens": args.tokens}
    progress = sys.stderr.isatty()
    recording = Recording(args.against) if args.against else None
    reports = {}
    for dtype in dtypes:
        b = _side(args, args.b, dtype, "minivlm", parser)
        if recording is not None:
            reports[dtype] = against(recording, b, question, progress=progress)
            continue
        a = _side(args, args.a, dtype, args.reference, parser)
        if args.record:
            stored = record(a, args.record, question, other_dtype=b.dtype, **shared, progress=progress)
            print(f"{args.record}: {memory(args.record.stat().st_size)}, {stored.metadata['side']}")
            return False
        reports[dtype] = compare(a, b, question, **shared, progress=progress)
    if args.plot:
        plot(reports, args.plot)
    if args.json:
        print(json.dumps({dtype: report.to_json() for dtype, report in reports.items()}))
    else:
        print("\n\n".join(report.table() for report in reports.values()))
    return any(report.first for report in reports.values())


def _set(args: argparse.Namespace, parser: _Parser, name: str) -> bool:
    return getattr(args, name) != parser.get_default(name)


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError(f"--layers takes numbers such as 0,1,31, found {text!r}")
    return [int(number) for number in text.split(",")]


def _side(args: argparse.Namespace, settings: list[str], dtype: str, code: str, parser: _Parser) -> Any:
    """A `parity.Side` with the settings KEY=VALUE of the command line over what both sides share."""
    from minivlm.checkpoint.loading import DTYPES
    from minivlm.parity import Side

    values = {"model": args.model, "code": code, "dtype": dtype, "device": args.device}
    known = (*values, "attn", "quantize")
    for setting in settings:
        key, equals, value = setting.partition("=")
        if key not in known or not equals:
            parser.error(f"a setting is KEY=VALUE with one of {', '.join(known)}, found {setting!r}")
        values[key] = value
    if values["dtype"] not in DTYPES:
        parser.error(f"dtype is one of {', '.join(DTYPES)}, found {values['dtype']!r}")
    return Side(**values)


VERBS = {
    "ask": (ask, _ask_parser),
    "chat": (chat, _chat_parser),
    "batch": (batch, _batch_parser),
    "inspect": (inspect, _inspect_parser),
    "quantize": (quantize, _quantize_parser),
    "parity": (parity, _parity_parser),
}


if __name__ == "__main__":
    sys.exit(main())
