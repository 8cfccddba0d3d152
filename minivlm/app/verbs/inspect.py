"""Show what a checkpoint is made of, from its config alone."""

import argparse
import json

from minivlm.app import options

EXAMPLES = """\
minivlm inspect HuggingFaceM4/idefics2-8b
minivlm inspect shapes-idefics2 --check --image docs/shapes.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="folder, built-in name, Hub id, or the name of a known release (needs no network)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--image", nargs="+", metavar="IMAGE", help="how many tokens and bytes these would take")
    parser.add_argument(
        "--check",
        action="store_true",
        help="read all of its files too, and every number of its weights; with --image, does the answer depend on it?",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print parts, sizes, parameters and memory as a table or as JSON; `--check` fails for any file that is damaged."""
    from minivlm.app import inspection

    options.check_name(arguments.model)
    found = inspection.describe(arguments.model)
    if arguments.check:
        found["checked"] = inspection.check(arguments.model)
    if arguments.image:
        found["pictures"], inputs = inspection.cost(arguments.model, arguments.image)
        if arguments.check:
            found["sight"] = inspection.sight(arguments.model, inputs)
    print(json.dumps(found) if arguments.json else inspection.table(found))
