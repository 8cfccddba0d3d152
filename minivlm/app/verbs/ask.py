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
    options.add_words(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object when done, instead of streaming")
    options.add_model_options(parser)
    options.add_generation_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Stream the answer to stdout, or print it as JSON."""
    names, question = options.images_and_question(arguments.words)
    settings = options.generation_settings(arguments)
    session = options.prepared(arguments, names)

    from minivlm.app.chat import Chat
    from minivlm.devices.memory import peak

    chat = Chat(session.model(), session.processor, system=arguments.system, **settings)
    if not arguments.json:
        terminal.print_pieces(chat.stream(question, session.images))
        terminal.report(chat.last, session.device, arguments.verbose)
        return
    text, last = chat.ask(question, session.images), chat.last
    found = {"answer": text, "model": session.name, "finish_reason": last.finish_reason}
    found |= {"prompt_tokens": last.prompt_tokens, "new_tokens": last.new_tokens, "seconds": round(last.seconds, 3)}
    if arguments.verbose:
        found["first_token_seconds"] = round(last.first_token, 3)
        found["tokens_per_second"] = round(last.tokens_per_second, 2)
        found["peak_memory_bytes"] = peak(session.device)
    print(json.dumps(found))
