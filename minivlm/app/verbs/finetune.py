"""Train an adapter, or the whole model, on a file of conversations; interrupted, --resume goes on."""

import argparse
import os
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from minivlm.app import finetune_options, options, terminal

EXAMPLES = """\
minivlm finetune receipts.jsonl runs/receipts --model HuggingFaceM4/idefics2-8b --load nf4 --dry-run
minivlm finetune receipts.jsonl runs/receipts --model HuggingFaceM4/idefics2-8b --load nf4 --checkpointing
minivlm ask receipt.jpg "What is the total?" --adapter runs/receipts
torchrun --nproc-per-node 2 -m minivlm finetune receipts.jsonl runs/receipts --model HuggingFaceM4/idefics2-8b"""
ABOUT = """

A row is {"messages": […], "images": […]} or LLaVA's {"image": …, "conversations": […]}, in .jsonl, .json, .parquet or
.tar. The model learns the assistant's words and the mark that ends them. Every row is checked before the first step.
OUT becomes an adapter's folder (PEFT's form), for `minivlm ask --adapter OUT` and `minivlm merge`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description += ABOUT
    parser.add_argument("data", type=Path, metavar="DATA", help="conversations to learn from")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder for the result, the log and the state")
    parser.add_argument(
        "--dry-run", action="store_true", help="show rows, what is trained and its memory; load nothing"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the state in OUT")
    parser.set_defaults(adapter=None)  # the verbs that share `options` with this one can load one
    finetune_options.add_model_options(parser.add_argument_group("the model"))
    finetune_options.add_adapter_options(parser.add_argument_group("what is trained"))
    finetune_options.add_data_options(parser.add_argument_group("the data"))
    finetune_options.add_step_options(parser.add_argument_group("the steps"))


def run(arguments: argparse.Namespace) -> None:
    """Check the rows, load the model, train, and print one line a step."""
    name = options.model_name(arguments)
    if arguments.fsdp and int(os.environ.get("WORLD_SIZE", "1")) == 1 and not arguments.dry_run:
        raise options.UsageError("--fsdp cuts the model among processes; start them by torchrun --nproc-per-node N")
    if arguments.fsdp and (arguments.load or arguments.train or arguments.dora):
        raise options.UsageError("--fsdp goes with neither --load, --train nor --dora; without it, weights are copied")

    from minivlm import auto
    from minivlm.app import lock
    from minivlm.checkpoint import hub
    from minivlm.training import folder
    from minivlm.training.rows import read_rows

    recipe, adapter = finetune_options.recipe(arguments), finetune_options.adapter(arguments)
    if not arguments.dry_run:
        folder.check(arguments.out, arguments.resume)
    processor = _processor(name, arguments)
    rows = read_rows(arguments.data, arguments.image_folder)
    held_out = read_rows(arguments.eval, arguments.image_folder) if arguments.eval else None
    model = auto.skeleton(auto.config_of(name))
    quantised = arguments.load or hub.source(name).json("config.json").get("quantization_config")
    if arguments.method == "full" and quantised:
        raise options.UsageError("quantised weights are not trained; leave --load out, or use --method lora")
    _choose(model, adapter)
    rows, sizes = _checked(processor, rows, model, arguments)
    if held_out is not None:
        held_out, _ = _checked(processor, held_out, model, arguments)
    if arguments.dry_run:
        _show(model, processor, rows, sizes, arguments)
        return
    with _processes() as (rank, device):
        alone = lock.held(lock.beside(arguments.out)) if rank == 0 else nullcontext()
        with alone:  # no other run trains into the same folder
            _train(name, processor, rows, held_out, recipe, adapter, arguments, rank, device, model.config.dtype)


def _processor(name: str, arguments: argparse.Namespace) -> Any:
    processor = options.load_processor(name, arguments)
    if arguments.longest_edge:
        images = processor.image_processor
        if "longest_edge" not in (getattr(images, "size", None) or {}):
            raise ValueError(f"--longest-edge: {name} has images of a fixed size")
        shortest = min(images.size["shortest_edge"], arguments.longest_edge)
        images.size = {"longest_edge": arguments.longest_edge, "shortest_edge": shortest}
    return processor


def _choose(model: Any, adapter: Any) -> None:
    """Put the adapter on, or unfreeze everything."""
    from minivlm.training import lora

    if adapter is None:
        model.requires_grad_(True)
    else:
        lora.apply(model, adapter)


def _checked(processor: Any, rows: list[Any], model: Any, arguments: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """The rows that can be trained on, and their sizes."""
    from minivlm.modules.config import text_config, vocabulary
    from minivlm.training import data

    text = text_config(model.config)
    most = min(arguments.max_tokens or text.max_position_embeddings, text.max_position_embeddings)
    sizes = data.measure(data.for_training(processor), rows, arguments.workers)
    good = data.fitting(rows, sizes, most, vocabulary(model.config), arguments.skip_bad)
    if len(good) < len(rows):
        terminal.note(f"left out {len(rows) - len(good)} of {len(rows)} rows")
    kept = {row.where for row in good}
    return good, [size for row, size in zip(rows, sizes, strict=True) if row.where in kept]


def _show(model: Any, processor: Any, rows: list[Any], sizes: list[Any], arguments: argparse.Namespace) -> None:
    """The first rows with learned tokens in brackets, what is trained, and the estimated memory."""
    import torch

    from minivlm.training import data, memory

    for row in rows[:3]:
        print(f"{row.where}: {data.shown(data.for_training(processor), row)}\n")
    longest = max(size.tokens for size in sizes)
    print(
        f"{len(rows):,} rows, {sum(size.tokens for size in sizes):,} tokens, "
        f"{sum(size.learned for size in sizes):,} of them learned; the longest row has {longest:,}"
    )
    print(_trained(model))
    stored = model.config.dtype if arguments.dtype == "auto" else arguments.dtype
    found = memory.estimate(
        model,
        tokens=arguments.batch * longest,
        learned=arguments.batch * max(size.learned for size in sizes),
        dtype=torch.float32 if stored == "float32" else torch.bfloat16,
        quantised=options.quantization(arguments.load) if arguments.load else None,
        optimiser_bytes=2 if "8bit" in arguments.optimizer else 8,
        checkpointing=arguments.checkpointing,
    )
    parts = ", ".join(f"{part} {terminal.memory(size)}" for part, size in vars(found).items() if size)
    print(f"memory, estimated: {terminal.memory(found.total)} ({parts}), and a few hundred MiB of libraries")


def _trained(model: Any) -> str:
    """What is trained, by part of the model."""
    from minivlm.training import targets

    counts = targets.trained(model)
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    return f"trained: {parts}, {sum(counts.values()):,} in all"


@contextmanager
def _processes() -> Any:
    """(this process, its device or None), having met the others if torchrun has started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, None
        return
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else None
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield dist.get_rank(), device
    finally:
        dist.destroy_process_group()


def _loaded(name: str, arguments: argparse.Namespace, device: str, dtype: str | None) -> Any:
    from minivlm import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        name,
        device_map=device,
        dtype=dtype,
        attn_implementation=arguments.attn,
        quantization_config=options.quantization(arguments.load) if arguments.load else None,
        fast_cpu=False,  # for generating; training takes torch's path
    )


def _cut(name: str, arguments: argparse.Namespace, dtype: str | None) -> Any:
    """The model cut among all processes: in fp32 if its weights are trained, else in its own dtype."""
    import torch

    from minivlm import auto
    from minivlm.checkpoint import loading
    from minivlm.training import fsdp

    config = auto.config_of(name)
    compute = loading.wanted_dtype(dtype, config.dtype) or torch.float32
    full = arguments.method == "full"
    return fsdp.from_pretrained(
        auto.family(config.model_type).model_class,
        name,
        dtype=torch.float32 if full else compute,
        compute_dtype=compute,
        attn_implementation=arguments.attn,
        prepare=lambda model: model.requires_grad_(full),
    )


def _train(
    name: str,
    processor: Any,
    rows: list[Any],
    held_out: Any,
    recipe: Any,
    adapter: Any,
    arguments: argparse.Namespace,
    rank: int,
    device: str | None,
    stored: str | None,
) -> None:
    import torch
    from tqdm import tqdm

    from minivlm.training import loop

    arguments.device = device or arguments.device
    device, dtype = options.device_and_dtype(arguments)
    if dtype is None and stored == "float16":
        dtype = "bfloat16"
        terminal.note("the weights are stored in float16, which loses small gradients; training in bfloat16")
    model = _cut(name, arguments, dtype) if arguments.fsdp else _loaded(name, arguments, device, dtype)
    torch.manual_seed(recipe.seed)  # the adapter begins the same in every process
    _choose(model, adapter)
    if rank == 0:
        terminal.note(_trained(model))
    steps = loop.finetune(model, processor, rows, recipe, arguments.out, eval_rows=held_out, resume=arguments.resume)
    for step in tqdm(steps, total=recipe.steps, unit="step", disable=True if rank else None):
        if rank == 0:
            speed, held = f"{step.tokens_per_second:.0f} tokens/s", terminal.memory(step.memory)
            line = f"step {step.number}: loss {step.loss:.4f}, lr {step.lr:.2e}, norm {step.norm:.2f}, {speed}, {held}"
            line += "" if step.eval_loss is None else f", eval loss {step.eval_loss:.4f}"
            tqdm.write(line)
    if rank == 0:
        terminal.note(
            f"{arguments.out} holds the result; try minivlm ask IMAGE QUESTION "
            f"{'--adapter' if arguments.method == 'lora' else '--model'} {arguments.out}"
        )
