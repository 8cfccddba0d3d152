"""Serve a page on this machine: drop an image, ask about it, look inside the answer."""

import argparse

from minivlm.app import options, terminal

EXAMPLES = """\
minivlm demo docs/shapes.png
minivlm demo photo.jpg --model HuggingFaceM4/idefics2-8b --quantize nf4 --port 8000"""
ABOUT = """

Only this machine can open the page, and it loads nothing from elsewhere. It needs NiceGUI: pip install nicegui. Answers
are greedy, and each question stands alone, so that the page behind "Look inside" explains the answer that was given."""
PORT = 7860


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description += ABOUT
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="image file or URL to begin with")
    parser.add_argument("--port", type=options.positive, default=PORT, metavar="N", help="of 127.0.0.1")
    parser.add_argument(
        "--max-new-tokens", type=options.positive, default=256, metavar="N", help="cut the answer there"
    )
    options.add_model_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """The extra and the port are checked before any weight is read."""
    from minivlm.app import demo

    demo.check(arguments.port)
    session = options.prepared(arguments, [] if arguments.image is None else [arguments.image])
    desk = demo.Desk(session.model(), session.processor, session.name, arguments.max_new_tokens)
    terminal.note(f"open http://{demo.HOST}:{arguments.port} (Ctrl-C ends it)")
    demo.serve(desk, session.images[0] if session.images else None, arguments.port)
