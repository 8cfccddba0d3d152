"""Talk about images; later questions cost only their own tokens."""

import argparse
import sys

from minivlm.app import options, terminal
from minivlm.app.options import UsageError

USAGE = "[IMAGE…] [options]"
RUNS_ON_GPUS = True  # --gpus: see `minivlm.app.launch`
EXAMPLES = """\
minivlm chat docs/shapes.png
minivlm chat photo.jpg --model HuggingFaceM4/idefics2-8b-chatty --system "Answer in one sentence."
printf '%s\\n' "What is it?" "Which colour?" | minivlm chat docs/shapes.png"""
ABOUT = """

A question a line, from the terminal or from a pipe. /help lists the commands: /image PATH adds an image, /reset begins
anew, /save and /load keep a conversation in a file. Ctrl-C stops an answer and keeps the conversation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description += ABOUT
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files or URLs, for the first question")
    options.add_model_options(parser)
    options.add_generation_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answer the lines of stdin. Return the number of failed lines; 0 at a terminal, where the user saw them."""
    if "-" in arguments.images:
        raise UsageError("the questions come from stdin, so no image can; name a file or URL")
    settings = options.generation_settings(arguments)
    session = options.prepared(arguments, arguments.images)

    from minivlm.app.chat import Chat
    from minivlm.app.prompt import reader
    from minivlm.app.talk import COMMANDS, Talk

    model = session.model()
    chat = Chat(model, session.processor, system=arguments.system, **settings)
    watched = sys.stdin.isatty() and sys.stdout.isatty()
    named = zip(session.images, arguments.images, strict=True)
    talk = Talk(chat, named, terminal.print_pieces, watched=watched, verbose=arguments.verbose)
    if watched:
        terminal.tell(talk.banner(session.name, session.device, str(model.dtype).removeprefix("torch.")))
    failed = talk.run(reader(watched, list(COMMANDS)))
    return 0 if watched else failed
