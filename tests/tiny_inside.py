"""A tiny random model of each family, the reference's and ours with the same weights, and a batch that is hard: rows
with several images, with one and with none, of different sizes, padded on the left."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import oracle
import oracle_idefics
import oracle_llava

from minivlm import AutoModelForImageTextToText, AutoProcessor
from minivlm.families import FAMILIES
from minivlm.parity import drawn_image

NAMES = ("idefics2", "idefics2, no window", "llava_next", "idefics")


@cache
def pair(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """(reference, ours, inputs). Idefics2: grouped queries, window 7, shorter than the prompts."""
    if name.startswith("idefics2"):
        config = oracle.idefics2_config(window=None if "no window" in name else 7)
        reference, inputs = oracle.random_reference(config), oracle.random_inputs((2, 0, 3, 1), 4)
    elif name == "llava_next":
        config = oracle_llava.llava_config()
        reference = oracle_llava.random_llava(config)
        inputs = oracle_llava.llava_inputs([[(30, 50), (100, 33)], [], [(7, 90)]], config)
    else:
        reference = oracle_idefics.random_reference(oracle_idefics.idefics_config(interval=2))
        inputs = oracle_idefics.random_inputs((2, 0, 3, 1))
    folder = oracle.save(reference, Path(mkdtemp()))
    model_class = FAMILIES[name.split(",")[0]].model_class
    return reference, model_class.from_pretrained(folder), inputs


def row_of(inputs: dict[str, Any], name: str, row: int = 0) -> dict[str, Any]:
    """One row of a batch with all of its images, without padding."""
    real = inputs["attention_mask"][row].bool()
    found = {key: inputs[key][row : row + 1][:, real] for key in ("input_ids", "attention_mask")}
    if name == "llava_next":
        assert row == 0
        return {**found, "pixel_values": inputs["pixel_values"][:2], "image_sizes": inputs["image_sizes"][:2]}
    for key in ("pixel_values", "pixel_attention_mask", "image_attention_mask"):
        if key in inputs:
            found[key] = inputs[key][row : row + 1]
    if "image_attention_mask" in found:
        found["image_attention_mask"] = found["image_attention_mask"][:, real]
    return found


def asked(
    name: str, question: str = "what is this?", images: Any = None, **options: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """(model, processor, inputs) of a built-in checkpoint, asked about a drawn image or about these."""
    model, processor = AutoModelForImageTextToText.from_pretrained(name, **options), AutoProcessor.from_pretrained(name)
    content = [{"type": "image", "image": image} for image in images or [drawn_image()]]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return model, processor, dict(inputs)
