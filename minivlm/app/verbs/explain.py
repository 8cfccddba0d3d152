"""Write a page that shows how a model came to its answer."""

import argparse
from pathlib import Path

from minivlm.app import options, terminal
from minivlm.app.options import UsageError

USAGE = "IMAGE… QUESTION --out PAGE.html [options]"
EXAMPLES = """\
minivlm explain docs/shapes.png "what colour is the star?" --out page.html
minivlm explain a.jpg b.jpg "What differs?" --out page.html --model HuggingFaceM4/idefics2-8b --layers 0,15,31
minivlm explain photo.jpg "What is this?" --out page.html --png figures"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_words(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE.html", help="one file that needs nothing else")
    parser.add_argument(
        "--layers", metavar="N,N,…", help="whose heads are shown one by one (default: as many as fit in 5 MB)"
    )
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="also write the figures one by one, for slides")
    parser.add_argument("--max-new-tokens", type=options.positive, default=32, metavar="N", help="cut the answer there")
    options.add_model_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Write the page, and print the answer."""
    names, question = options.images_and_question(arguments.words)
    if not names:
        raise UsageError("name an image, then ask a question about it")
    if not arguments.out.absolute().parent.is_dir() or arguments.out.is_dir():
        raise OSError(f"{arguments.out} cannot be written: name a file in a folder that exists")
    layers = options.layer_numbers(arguments.layers)
    session = options.prepared(arguments, names)

    from minivlm.app import explain, figures
    from minivlm.checkpoint.files import replacing

    model, processor, images = session.model(), session.processor, session.images
    found = explain.gather(model, processor, images, question, layers=layers, max_new_tokens=arguments.max_new_tokens)
    found["model"]["name"] = session.name
    text = explain.page(found)
    with replacing(arguments.out) as unfinished:  # as a whole or not at all
        unfinished.write_text(text, encoding="utf-8")
    terminal.note(f"{arguments.out}: {len(text.encode()) / 1e6:.1f} MB")
    if arguments.png:
        terminal.note(f"{arguments.png}: {figures.write(found, images, arguments.png)} figures")
    print(found["answer"])
