"""Write a checkpoint in four or eight bits: a folder that loads like any other."""

import argparse
import shutil
from pathlib import Path

from minivlm.app import options, terminal

EXAMPLES = """\
minivlm quantize HuggingFaceM4/idefics2-8b idefics2-nf4
minivlm quantize shapes-idefics2 shapes-int4 --format int4 --group-size 64"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder, built-in name or Hub id")
    parser.add_argument("out", type=Path, help="a new folder")
    formats = "nf4 (default) and fp4: as bitsandbytes, doubly quantised; int4: fastest on a CPU; int8"
    parser.add_argument("--format", choices=options.FORMATS, default="nf4", help=formats)
    parser.add_argument("--group-size", type=int, default=128, choices=[32, 64, 128], help="of int4")
    parser.add_argument(
        "--skip", nargs="*", default=[], metavar="MODULE", help="modules to leave as they are, such as vision_model"
    )
    options.add_head_option(parser)
    what = "of what is not quantised; auto: as stored"
    parser.add_argument("--dtype", choices=options.DTYPES, default="bfloat16", help=what)


def run(arguments: argparse.Namespace) -> None:
    """Quantise while loading, write the weights, and copy what belongs to them."""
    from minivlm import AutoModelForImageTextToText
    from minivlm.app import lock
    from minivlm.checkpoint import hub
    from minivlm.checkpoint.files import saving
    from minivlm.quantization import apply

    out = arguments.out
    options.check_name(arguments.model)
    config = options.quantization(arguments.format, arguments.group_size, arguments.skip, arguments.quantize_head)
    files = hub.source(arguments.model)
    if files.json("config.json").get("quantization_config") is not None:
        raise ValueError(f"{arguments.model} is quantised already; start from the original")
    with lock.new_folder(out):
        model = AutoModelForImageTextToText.from_pretrained(
            arguments.model, quantization_config=config, dtype=arguments.dtype
        )
        with saving() as save:
            model.save_pretrained(out)
            for name in hub.BESIDE_THE_WEIGHTS:
                path = files.file(name, required=False)
                if path is not None:
                    shutil.copyfile(path, save.file(out / name))
    layers = apply.layers(model).values()
    count = sum(layer.in_features * layer.out_features for layer in layers)
    size = sum(config.format.nbytes(layer.shape) for layer in layers)
    print(f"{out}: {count:,} parameters as {config.format}, {size / count:.3f} byte each, {terminal.memory(size)}")
