"""Show what a checkpoint is made of, from its config alone."""

import argparse
import json

from minivlm.app import options

EXAMPLES = """\
minivlm inspect HuggingFaceM4/idefics2-8b
minivlm inspect shapes-idefics2 --check --image docs/shapes.png
minivlm inspect llava-hf/llava-v1.6-34b-hf --gpus 2 --context 8192
minivlm inspect --machine"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help="folder, built-in name, Hub id, or the name of a known release (needs no network)"
    )
    parser.add_argument("--machine", action="store_true", help="instead: this machine, its fast layers and kernels")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_adapter_option(parser)
    parser.add_argument("--image", nargs="+", metavar="IMAGE", help="how many tokens and bytes these would take")
    parser.add_argument("--gpus", type=options.positive, metavar="N", help="what each of N devices would hold")
    parser.add_argument("--dtype", choices=options.DTYPES[1:], default="bfloat16", help="with --gpus")
    parser.add_argument("--quantize", choices=options.FORMATS, help="with --gpus")
    options.add_head_option(parser)
    parser.add_argument("--context", type=options.positive, default=4096, metavar="T", help="with --gpus: tokens")
    parser.add_argument("--rows", type=options.positive, default=1, metavar="B", help="with --gpus: rows of a batch")
    parser.add_argument(
        "--check",
        action="store_true",
        help="read all of its files too, and every number of its weights; with --image, does the answer depend on it?",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print parts, sizes, parameters and memory as a table or as JSON; `--check` fails for any file that is damaged."""
    if arguments.machine:
        from minivlm.app import machine

        about = machine.describe()
        print(json.dumps(about) if arguments.json else machine.lines(about))
        return
    if arguments.model is None:
        raise options.UsageError("the following arguments are required: model (or --machine)")
    from minivlm.app import inspection

    options.check_name(arguments.model)
    found = inspection.describe(arguments.model)
    if arguments.check:
        found["checked"] = inspection.check(arguments.model)
    if arguments.image:
        found["pictures"], inputs = inspection.cost(arguments.model, arguments.image)
        if arguments.check:
            found["sight"] = inspection.sight(arguments.model, inputs)
    table = inspection.table(found)
    if arguments.adapter:
        found["adapter"] = inspection.adapter(arguments.model, arguments.adapter)
        table += "\n" + inspection.adapter_line(found["adapter"])
    if arguments.gpus:
        from minivlm.app import plan

        config = options.asked_quantization(arguments)
        sizes = (arguments.gpus, arguments.dtype, config, arguments.context, arguments.rows)
        found["plan"] = plan.plan(arguments.model, *sizes)
        table += "\n" + plan.table(found["plan"], arguments.context, arguments.rows)
    print(json.dumps(found) if arguments.json else table)
