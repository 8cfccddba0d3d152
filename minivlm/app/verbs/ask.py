"""Answer a question, about images or without any, word by word."""

import argparse
import json

from minivlm.app import options, terminal

USAGE = "[IMAGE…] QUESTION [options]"
RUNS_ON_GPUS = True  # --gpus: see `minivlm.app.launch`
EXAMPLES = """\
minivlm ask docs/shapes.png "What number is written?"
minivlm ask a.jpg b.jpg "What differs?" --model HuggingFaceM4/idefics2-8b --quantize int4 --verbose
curl -s https://example.org/photo.jpg | minivlm ask - "Describe it." --temperature 0.7 --seed 1 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    images = "image files, URLs, base64, or - for stdin; then the question"
    parser.add_argument("words", nargs="+", metavar="IMAGE… QUESTION", help=images)
    parser.add_argument("--json", action="store_true", help="print one JSON object when done, instead of streaming")
    options.add_model_options(parser)
    options.add_generation_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Stream the answer to stdout, or print it as JSON. Images and settings are checked before any weight is read."""
    *names, question = arguments.words
    question = options.checked_question(question)
    settings = options.generation_settings(arguments)
    name = options.model_name(arguments)

    from minivlm.app import images
    from minivlm.app.answer import peak_memory
    from minivlm.app.chat import Chat
    from minivlm.processing.common import fetch_image

    device, dtype = options.device_and_dtype(arguments)
    processor = options.load_processor(name, arguments)
    fetched = [fetch_image(processor, images.source(each)) for each in names]
    chat = Chat(options.load_model(name, arguments, device, dtype), processor, system=arguments.system, **settings)
    if not arguments.json:
        terminal.print_pieces(chat.stream(question, fetched))
        if (cut := chat.last.cut()) is not None:
            terminal.note(cut)
        if arguments.verbose:
            terminal.took(chat.last, device)
        return
    answer = chat.ask(question, fetched)
    found = {"answer": answer, "model": name, "finish_reason": chat.last.finish_reason}
    found |= {"prompt_tokens": chat.last.prompt_tokens, "new_tokens": chat.last.new_tokens}
    found |= {"seconds": round(chat.last.seconds, 3)}
    if arguments.verbose:
        found |= {"first_token_seconds": round(chat.last.first_token, 3)}
        found |= {"tokens_per_second": round(chat.last.tokens_per_second, 2), "peak_memory_bytes": peak_memory(device)}
    print(json.dumps(found))
