"""The walk of docs/reading.md: one image and one question through a model, with the shapes of a real run.

    python scripts/walk.py                          print the table, from the image file to the answer
    python scripts/walk.py --model shapes-idefics   the same for another checkpoint
    python scripts/walk.py --write                  put the table of shapes-idefics2 into docs/reading.md

Every row is a call that happened: a hook on each module of the list below records its output.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from minivlm import AutoModelForImageTextToText, AutoProcessor

ROOT = Path(__file__).parents[1]
IMAGE, QUESTION = "docs/shapes.png", "What number is written?"
START, END = "<!-- walk: made by scripts/walk.py --write -->", "<!-- end of the walk -->"

# module → a description; `*` is a layer's number. Modules that a family lacks are left out.
STEPS = {
    "model.vision_model.embeddings": "patches and their positions become vectors",
    "model.vision_model.encoder.layers.*": "every patch attends to every patch of its image",
    "model.vision_model.post_layernorm": "the vision tower's last norm",
    "model.vision_tower.embeddings": "patches and their positions become vectors, a class token in front",
    "model.vision_tower.encoder.layers.*": "every patch attends to every patch of its tile",
    "model.connector.modality_projection": "from vision width to text width",
    "model.connector.perceiver_resampler.layers.*": "the latents attend to the patches and to themselves",
    "model.connector.perceiver_resampler": "one vector for each latent of each image",
    "model.perceiver_resampler": "one vector for each latent of each image",
    "model.multi_modal_projector": "from vision width to text width, patch by patch",
    "model.text_model.embed_tokens": "token ids become vectors",
    "model.language_model.embed_tokens": "token ids become vectors",
    "model.gated_cross_attn_layers.*": "each token attends to the images before it; a gate scales the result",
    "model.text_model.layers.*": "each token attends to itself and to the tokens before it",
    "model.language_model.layers.*": "each token attends to itself and to the tokens before it",
    "model.text_model.norm": "the last norm, at the last token alone",
    "model.language_model.norm": "the last norm, at the last token alone",
    "lm_head": "a score for every token of the vocabulary",
}


def shape(x: Tensor) -> str:
    return "×".join(map(str, x.shape))


def source(thing: Any) -> str:
    """`models/idefics2.py Connector`: where the class or function of this name is written."""
    path = Path(inspect.getsourcefile(thing)).resolve()
    package = ROOT / "minivlm"
    return f"`{path.relative_to(package).as_posix()}` {thing.__name__}" if package in path.parents else "torch"


def watched(model: nn.Module) -> tuple[dict[str, list], list[Any]]:
    """name → [class, shapes that came out], filled while the model runs; and the hooks, to be removed."""
    seen: dict[str, list] = {}
    hooks = []
    for name, module in model.named_modules():
        general = ".".join("*" if part.isdigit() else part for part in name.split("."))
        if general not in STEPS:
            continue

        def note(module: nn.Module, args: Any, out: Any, general: str = general) -> None:
            out = out[0] if isinstance(out, tuple) else out
            seen.setdefault(general, [type(module)]).append(shape(out))

        hooks.append(module.register_forward_hook(note))
    return seen, hooks


def rows(name: str) -> tuple[list[tuple[str, str, str]], str]:
    """The steps of one run, (where, what, shape) each, and the answer."""
    processor = AutoProcessor.from_pretrained(name)
    model = AutoModelForImageTextToText.from_pretrained(name, fast_cpu=False)  # the classes that a reader opens
    content = [{"type": "image", "image": str(ROOT / IMAGE)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with Image.open(ROOT / IMAGE) as image:
        table = [(f"`{IMAGE}`", "a PNG file", f"{image.width}×{image.height} pixels")]
    table.append((source(type(processor.image_processor)), "resize, scale, normalise", shape(inputs["pixel_values"])))
    ids, pieces = inputs["input_ids"], processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    what = f"template, tokens; {pieces.count('<image>')} of them `<image>`"
    table.append((source(type(processor)), what, shape(ids)))
    seen, hooks = watched(model)
    with torch.no_grad():
        model(**inputs, logits_to_keep=1)
    for general, what in STEPS.items():
        if general in seen:
            kind, *shapes = seen.pop(general)
            times = (
                f"{len(shapes)} layers, {shapes[0]} each" if "*" in general and len(set(shapes)) == 1 else shapes[-1]
            )
            if "*" in general and len(set(shapes)) > 1:
                times = f"{len(shapes)} layers, {shapes[0]}; the last one {shapes[-1]}"
            table.append((source(kind), what, times))
    for hook in hooks:
        hook.remove()
    out = model.generate(**inputs, max_new_tokens=16)[0, ids.shape[1] :]
    table.append(("`generation/loop.py` generate", "one token after another, each attending to the cache", shape(out)))
    answer = processor.decode(out, skip_special_tokens=True)
    table.append((source(type(processor.tokenizer)), "token ids become text", repr(answer)))
    return table, answer


def markdown(table: list[tuple[str, str, str]]) -> str:
    lines = [f"| {number} | {' | '.join(row)} |" for number, row in enumerate(table, 1)]
    return "\n".join(["| | where | what happens | shape |", "| ---: | --- | --- | --- |", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="shapes-idefics2", help="a checkpoint (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reading.md")
    args = parser.parse_args()
    text = markdown(rows(args.model)[0])
    if not args.write:
        return print(text)
    page = ROOT / "docs" / "reading.md"
    before, rest = page.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    page.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
