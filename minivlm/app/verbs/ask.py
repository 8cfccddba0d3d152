"""Answer a question about images, word by word."""

import argparse
import json
import os
import time
from functools import partial

from minivlm.app import options, terminal
from minivlm.app.options import UsageError

USAGE = "IMAGE… QUESTION [options]"
EXAMPLES = """\
minivlm ask docs/shapes.png "What number is written?"
minivlm ask a.jpg b.jpg "What differs?" --model HuggingFaceM4/idefics2-8b --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="+", metavar="IMAGE… QUESTION", help="image files or URLs, then the question")
    options.add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object when done, instead of streaming")


def run(arguments: argparse.Namespace) -> None:
    """Stream the answer to stdout, or print it as JSON. Images and prompt are checked before any weight is read."""
    *images, question = arguments.words
    if os.path.isfile(question):
        raise UsageError(f"the last argument is the question, but {question!r} is a file")
    if not images or not question.strip():
        raise UsageError(f"no image before the question {question!r}" if question.strip() else "the question is empty")
    name = options.model_name(arguments)

    from minivlm.app.chat import incremental_text
    from minivlm.generation.loop import stream
    from minivlm.processing.common import fetch_picture

    device, dtype = options.device_and_dtype(arguments)
    processor = options.load_processor(name, arguments)
    content = [{"type": "image", "image": fetch_picture(processor, image)} for image in images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    model = options.load_model(name, arguments, device, dtype)

    start = time.perf_counter()
    tokens = stream(model, **inputs.to(device), max_new_tokens=arguments.max_new_tokens)
    decode = partial(processor.decode, skip_special_tokens=True)
    if not arguments.json:
        terminal.print_pieces(incremental_text(decode, map(int, tokens)))
        return
    ids = [int(token) for token in tokens]
    answer = decode(ids).strip()
    sizes = {"prompt_tokens": inputs["input_ids"].shape[1], "new_tokens": len(ids)}
    seconds = round(time.perf_counter() - start, 3)
    print(json.dumps({"answer": answer, "model": name, **sizes, "seconds": seconds}))
