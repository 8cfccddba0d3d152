"""The options of `minivlm finetune`, in four groups, and the training and adapter settings made of them."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from minivlm.app import options


def add_model_options(group: Any) -> None:
    group.add_argument("--model", help=f"folder, built-in name or Hub id (default: {options.DEFAULT_MODEL})")
    group.add_argument("--load", choices=options.FORMATS, help="freeze the weights in 4 or 8 bits (QLoRA)")
    group.add_argument("--dtype", choices=options.DTYPES[:3], default="auto", help="of the weights")
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")
    group.add_argument("--attn", choices=options.ATTENTION, help="attention backend")
    group.add_argument("--chat-template", metavar="NAME|FILE", help="of the prompts (default: the checkpoint's own)")


def add_adapter_options(group: Any) -> None:
    targets = (
        "text, text+connector, all (with the vision tower), all-linear, a regular expression, or names with commas"
    )
    group.add_argument("--method", choices=["lora", "full"], default="lora", help="an adapter, or every weight")
    group.add_argument("--targets", default="text+connector", metavar="NAMES", help=targets)
    rank = "rank of the adapter (--rank under torchrun, which has a --r of its own)"
    group.add_argument("--r", "--rank", type=options.positive, default=8, help=rank)
    group.add_argument("--alpha", type=float, metavar="A", help="scale, alpha / r (default: r)")
    group.add_argument("--dropout", type=float, default=0.0, metavar="P", help="on the adapter's input")
    group.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(r)")
    group.add_argument("--dora", action="store_true", help="train the lengths of weights apart from their directions")
    group.add_argument("--train", nargs="+", metavar="MODULE", help="train in full: lm_head, embed_tokens, …")


def add_data_options(group: Any) -> None:
    group.add_argument("--image-folder", type=Path, metavar="DIR", help="where relative image paths start")
    group.add_argument("--no-split", action="store_true", help="send each image once, without its four quarters")
    group.add_argument(
        "--longest-edge", type=options.positive, metavar="N", help="shrink images to N pixels (Idefics2)"
    )
    group.add_argument("--max-tokens", type=options.positive, metavar="N", help="longest row (default: what fits)")
    group.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be trained on")
    group.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images")
    group.add_argument("--eval", type=Path, metavar="FILE", help="rows to measure the loss on")
    group.add_argument("--eval-every", type=int, default=0, metavar="N", help="steps (0: at the end)")


def add_step_options(group: Any) -> None:
    group.add_argument("--lr", type=float, default=1e-4, help="learning rate")
    group.add_argument("--schedule", choices=["linear", "cosine", "constant"], default="cosine", help="how it changes")
    group.add_argument("--warmup", type=float, default=0.03, metavar="N", help="steps, or a share of all if below 1")
    group.add_argument("--decay", type=float, default=0.0, help="weight decay, except of norms and biases")
    group.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    group.add_argument("--batch", type=options.positive, default=2, metavar="N", help="rows at once")
    group.add_argument("--accumulate", type=options.positive, default=4, metavar="N", help="batches in a step")
    group.add_argument("--epochs", type=float, default=3.0, metavar="N", help="passes over the data")
    group.add_argument("--steps", type=options.positive, metavar="N", help="instead of --epochs")
    group.add_argument("--seed", type=int, default=42, help="of the order of rows and of dropout")
    group.add_argument(
        "--optimizer", choices=["adamw", "adamw8bit", "paged_adamw8bit"], default="adamw", help="8bit: bitsandbytes"
    )
    text = "under torchrun: cut the weights among the processes instead of copying them to each (FSDP2)"
    group.add_argument("--fsdp", action="store_true", help=text)
    group.add_argument("--checkpointing", action="store_true", help="less memory for a third more time")
    group.add_argument("--cache-features", type=float, default=0.0, metavar="GIB", help="keep a frozen tower's outputs")
    group.add_argument("--save-every", type=int, default=100, metavar="N", help="steps")


def recipe(arguments: argparse.Namespace) -> Any:
    """The settings of the training: options have the names of its fields. ValueError for impossible numbers."""
    from minivlm.training.recipe import Recipe

    names = {field.name for field in dataclasses.fields(Recipe)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return Recipe(**given, cache_bytes=arguments.cache_features * 2**30)


def adapter(arguments: argparse.Namespace) -> Any:
    """The adapter's settings; None where every weight is trained."""
    from minivlm.training import targets

    if arguments.method == "full":
        return None
    known = arguments.targets in (*targets.PRESETS, targets.ALL_LINEAR) or any(c in arguments.targets for c in r"\*(|[")
    return targets.LoraConfig(
        r=arguments.r,
        lora_alpha=arguments.alpha if arguments.alpha is not None else arguments.r,
        target_modules=arguments.targets if known else tuple(arguments.targets.split(",")),
        lora_dropout=arguments.dropout,
        modules_to_save=tuple(arguments.train) if arguments.train else None,
        use_rslora=arguments.rslora,
        use_dora=arguments.dora,
    )
