"""Talk about images, a question a line."""

import argparse
import sys
from collections.abc import Iterator

from minivlm.app import options, terminal

USAGE = "[IMAGE…] [options]"
EXAMPLES = """\
minivlm chat docs/shapes.png
minivlm chat photo.jpg --model HuggingFaceM4/idefics2-8b-chatty --system "Answer in one sentence." """


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description += " In it, /image PATH adds an image to the next question, /reset begins anew, /quit ends."
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files or URLs, for the first question")
    options.add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")


def run(arguments: argparse.Namespace) -> int:
    """Answer the lines of stdin. Return the number of failed lines; 0 at a terminal, where the user saw them."""
    name = options.model_name(arguments)

    from minivlm.app.chat import Chat, talk
    from minivlm.processing.common import fetch_picture

    device, dtype = options.device_and_dtype(arguments)
    processor = options.load_processor(name, arguments)
    images = [fetch_picture(processor, image) for image in arguments.images]
    model = options.load_model(name, arguments, device, dtype)
    conversation = Chat(model, processor, system=arguments.system, max_new_tokens=arguments.max_new_tokens)
    watched = sys.stdin.isatty() and sys.stdout.isatty()
    failed = talk(conversation, images, _lines("> " if watched else ""), terminal.print_pieces, terminal.fail)
    return 0 if watched else failed


def _lines(prompt: str) -> Iterator[str]:
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
