"""`minivlm ask`, `chat`, `batch`: one question about pictures, a conversation, a file of questions. `minivlm inspect`:
what a checkpoint is made of. `minivlm quantize`: the same checkpoint in four or eight bits.

Exit codes: 0 done, 1 bad input (for chat and batch: some lines of it), 2 wrong usage, 130 interrupted; an error is one
line. Answers and tables go to stdout, everything else to stderr. torch is imported inside the verbs, so that `--help`
is instant.
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
    print("minivlm: error:", *(str(error) or type(error).__name__).split(), file=sys.stderr)
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

    from minivlm.loading import wanted_device

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
    if not pictures:
        parser.error(f"no picture before the question {question!r}")
    name = _name(args)

    from minivlm.chat import incremental_text
    from minivlm.generation import stream
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
        piece = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", piece if begun else piece.lstrip())
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

    from minivlm.chat import Chat, talk
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

    from minivlm.batch import check_new, run

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
    return parser


# The sizes of a part that are worth showing, and what to call them.
SIZES = {
    **{"num_hidden_layers": "layers", "resampler_depth": "layers", "hidden_size": "width", "intermediate_size": "MLP"},
    **{"num_attention_heads": "heads", "resampler_n_heads": "heads", "num_key_value_heads": "KV heads"},
    **{"resampler_n_latents": "latents", "image_size": "image", "patch_size": "patch", "vocab_size": "vocabulary"},
    **{"sliding_window": "window"},
}
BYTES = {"float32": 4, "bfloat16": 2}


def inspect(args: argparse.Namespace, parser: _Parser) -> None:
    """Print parts, sizes, parameters and memory as a table or as JSON."""
    found = describe(args.model)
    print(json.dumps(found) if args.json else _table(found))


def describe(name: str) -> dict[str, Any]:
    """What `inspect` prints, as plain data. The model is built on the meta device: no weights, no memory."""
    import torch

    from minivlm import auto, hub, loading

    if name in auto.PRESETS and not Path(name).is_dir():
        config, files = auto.PRESETS[name], None
        model_type = config.to_hub()["model_type"]
    else:
        files = hub.source(name)
        model_type = files.json("config.json").get("model_type")
        config = loading.read_config(files, auto.family(model_type, name)[0].config_class)
    with torch.device("meta"):
        model = auto.family(model_type, name)[0](config)
    stored = None if files is None else files.json("config.json").get("quantization_config")
    parts = [_part(part, module) for part, module in _parts(model)]
    total = sum(part["parameters"] for part in parts)
    text = getattr(config, "text_config", None) or config.decoder  # IDEFICS keeps its decoder's fields flat
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return {
        "model": name,
        "model_type": model_type,
        "dtype": config.dtype,
        "parts": parts,
        "parameters": total,
        "bytes": {dtype: total * size for dtype, size in BYTES.items()},
        "quantised": _quantised(model, stored),
        "tokens_per_image": config.image_tokens,
        "max_position_embeddings": text.max_position_embeddings,
        "cache_bytes_per_token": {dtype: cache * size for dtype, size in BYTES.items()},
    }


def _quantised(model: Any, stored: Any) -> list[dict[str, Any]]:
    """The memory of a checkpoint that is quantised, or that any would take once it were; the rest is in 16 bits."""
    from minivlm import BitsAndBytesConfig, Int4Config
    from minivlm.quantization import apply, foreign

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    configs = [nf4, Int4Config(), BitsAndBytesConfig(load_in_8bit=True)]
    total, found = sum(parameter.numel() for parameter in model.parameters()), []
    for config in configs if stored is None else [foreign.from_hub(stored)]:
        names = apply.selected(model, apply.present(model, config.skip_modules))
        weights = [model.get_submodule(name).weight for name in names]
        count = sum(weight.numel() for weight in weights)
        size = sum(config.format.nbytes(tuple(weight.shape)) for weight in weights)
        numbers = {"parameters": count, "bytes": size, "bytes_per_parameter": size / count}
        found.append({"format": str(config.format), **numbers, "total_bytes": size + 2 * (total - count)})
    return found


def _parts(model: Any) -> Iterator[tuple[str, Any]]:
    """The head, the parts of the model under it, and the parameters that it holds itself (LLaVA's `image_newline`)."""
    for name, child in model.named_children():
        if name == "model":
            yield from child.named_children()
            yield from child.named_parameters(recurse=False)
        else:
            yield name, child


def _part(name: str, part: Any) -> dict[str, Any]:
    config = getattr(part, "config", None)
    sizes = {size: getattr(config, size) for size in SIZES if getattr(config, size, None) is not None}
    if name == "lm_head":
        sizes = {"hidden_size": part.in_features, "vocab_size": part.out_features}
    parameters = sum(parameter.numel() for parameter in ([part] if hasattr(part, "numel") else part.parameters()))
    memory = {dtype: parameters * size for dtype, size in BYTES.items()}
    return {"part": name, "class": type(part).__name__, "sizes": sizes, "parameters": parameters, "bytes": memory}


def _table(found: dict[str, Any]) -> str:
    rows = [("part", "class", "parameters", *BYTES, "sizes")]
    for part in [*found["parts"], {**found, "part": "total", "class": "", "sizes": {}}]:
        sizes = ", ".join(f"{SIZES[name]} {value}" for name, value in part["sizes"].items())
        memory = (_memory(part["bytes"][dtype]) for dtype in BYTES)
        rows.append((part["part"], part["class"], f"{part['parameters']:,}", *memory, sizes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {0, 1, len(widths) - 1}
    lines = [
        "  ".join(cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in columns).rstrip()
        for columns in (enumerate(zip(row, widths, strict=True)) for row in rows)
    ]
    tokens, cache = found["tokens_per_image"], found["cache_bytes_per_token"]
    quantised = [
        f"{entry['format']}: {entry['parameters']:,} parameters, {entry['bytes_per_parameter']:.3f} byte each; "
        f"with the rest in 16 bits {_memory(entry['total_bytes'])}"
        for entry in found["quantised"]
    ]
    return "\n".join(
        [
            f"{found['model']} ({found['model_type']}, stored as {found['dtype'] or 'unknown dtype'})\n",
            *lines,
            "",
            *quantised,
            f"\ntokens per image: {', '.join(f'{count} ({kind})' for kind, count in tokens.items())}",
            f"positions: {found['max_position_embeddings']:,}",
            f"cache per 1,000 tokens: {', '.join(f'{_memory(1000 * cache[dtype])} in {dtype}' for dtype in BYTES)}",
        ]
    )


def _memory(size: int) -> str:
    """Bytes in the largest unit that leaves at least 1: 1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


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

    from minivlm import AutoModelForImageTextToText, BitsAndBytesConfig, Int4Config, hub
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
    print(f"{args.out}: {count:,} parameters as {config.format}, {size / count:.3f} byte each, {_memory(size)}")


VERBS = {
    "ask": (ask, _ask_parser),
    "chat": (chat, _chat_parser),
    "batch": (batch, _batch_parser),
    "inspect": (inspect, _inspect_parser),
    "quantize": (quantize, _quantize_parser),
}


if __name__ == "__main__":
    sys.exit(main())
