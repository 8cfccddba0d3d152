"""What a checkpoint is made of: parts, sizes, parameters, memory, from its config alone; what images will cost; and
whether its files are sound and its answers depend on the images at all."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minivlm import auto
from minivlm.app import options
from minivlm.app.answer import encoded
from minivlm.app.terminal import columns, memory
from minivlm.checkpoint import hub, loading
from minivlm.checkpoint.checking import check_weights
from minivlm.modules.config import text_config, vocabulary
from minivlm.modules.inputs import Inputs
from minivlm.processing.common import fetch_image
from minivlm.quantization import apply, foreign
from minivlm.text.messages import make_message
from minivlm.training import adapters, targets

# The sizes of a part that are shown → their names.
SIZES = {
    "num_hidden_layers": "layers",
    "resampler_depth": "layers",
    "hidden_size": "width",
    "intermediate_size": "MLP",
    "num_attention_heads": "heads",
    "resampler_n_heads": "heads",
    "num_key_value_heads": "KV heads",
    "resampler_n_latents": "latents",
    "image_size": "image",
    "patch_size": "patch",
    "vocab_size": "vocabulary",
    "sliding_window": "window",
}
BYTES = {"float32": 4, "bfloat16": 2}


def describe(name: str) -> dict[str, Any]:
    """What `inspect` prints, as plain data. The model is built on the meta device: no weights, no memory."""
    config = known_config(name)
    model = auto.skeleton(config)
    stored = None if is_release(name) else hub.source(name).json("config.json").get("quantization_config")
    parts = [_part(part, module) for part, module in _parts(model)]
    total = sum(part["parameters"] for part in parts)
    text = text_config(config)
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return {
        "model": name,
        "model_type": config.model_type,
        "dtype": config.dtype,
        "parts": parts,
        "parameters": total,
        "bytes": {dtype: total * size for dtype, size in BYTES.items()},
        "quantised": _quantised(model, stored),
        "tokens_per_image": auto.family(config.model_type).image_tokens(config),
        "max_position_embeddings": text.max_position_embeddings,
        "cache_bytes_per_token": {dtype: cache * size for dtype, size in BYTES.items()},
    }


def is_release(name: str) -> bool:
    """Whether it is the name of a released checkpoint, whose configuration is known without its files."""
    return name in auto.PRESETS and not Path(name).is_dir()


def known_config(name: str) -> Any:
    """A checkpoint's configuration; of a released one without a network."""
    return auto.PRESETS[name] if is_release(name) else auto.config_of(name)


def check(name: str) -> dict[str, int]:
    """How many tensors and tokens a checkpoint has, once all its files are found to be sound and to fit each other."""
    files, model = hub.source(name), auto.skeleton(auto.config_of(name))
    loading.read_generation_config(files)
    tokenizer = auto.AutoProcessor.from_pretrained(name).tokenizer
    with hub.blame(f"{name}: tokenizer.json"):
        tokenizer.check_vocabulary(vocabulary(model.config))
    return {"tensors": check_weights(model, files), "tokens": len(tokenizer)}


def adapter(name: str, folder: str) -> dict[str, Any]:
    """What an adapter is made of, once each of its tensors is found to fit this model, whose weights are not read."""
    model = auto.skeleton(auto.config_of(name))
    found = adapters.read(folder)
    fit = adapters.fit(model, found)
    numbers: Counter[str] = Counter()
    for parameter, value in fit.values.items():
        numbers[targets.part_of(model.config.model_type, parameter)] += value.numel()
    kind = "DoRA" if found.config.use_dora else "LoRA"
    about = {"adapter": folder, "kind": kind, "r": found.config.r, "alpha": found.config.lora_alpha}
    return {**about, "base": found.base, "layers": len(fit.chosen), "parameters": dict(numbers)}


def adapter_line(found: dict[str, Any]) -> str:
    """One line about an adapter."""
    parts = ", ".join(f"{part} {count:,}" for part, count in found["parameters"].items())
    sizes = f"r {found['r']}, alpha {found['alpha']}, {found['layers']} layers"
    return f"adapter {found['adapter']}: {found['kind']}, {sizes}; parameters: {parts}"


def cost(name: str, images: list[Any]) -> tuple[dict[str, Any], Inputs]:
    """What these images will cost, from sizes alone: tokens of each and of all in one prompt, and the bytes of their
    pixels; and that prompt."""
    processor = auto.AutoProcessor.from_pretrained(name)
    fetched = [fetch_image(processor, image) for image in images]

    def prompt(*some: Any) -> Inputs:
        return encoded(processor, [make_message("user", "What is this?", some)])

    without, inputs = prompt()["input_ids"].shape[1], prompt(*fetched)
    each = [prompt(image)["input_ids"].shape[1] - without for image in fetched]
    whole = inputs["input_ids"].shape[1]
    return {"tokens": each, "prompt_tokens": whole, "pixel_bytes": inputs["pixel_values"].nbytes}, inputs


@torch.no_grad()
def sight(name: str, inputs: Inputs) -> float:
    """How far the next token's distribution moves, KL in nats, when the images turn to plain grey.

    Loads the model. ValueError if it does not move at all: answers would be fluent but not about the images.
    """
    model = auto.AutoModelForImageTextToText.from_pretrained(name, device_map="auto")
    inputs = inputs.to(model.device)
    seen, grey = (
        model(**inputs | {"pixel_values": pixels}).logits[0, -1].float().log_softmax(0)
        for pixels in (inputs["pixel_values"], torch.zeros_like(inputs["pixel_values"]))
    )
    moved = float((seen.exp() * (seen - grey)).sum())
    if torch.equal(seen, grey):
        raise ValueError(f"{name} answers the same whatever its images show: its vision part has no effect")
    return moved


def _quantised(model: Any, stored: Any) -> list[dict[str, Any]]:
    """The memory of a checkpoint that is quantised, or that any would take once it were; the rest is in 16 bits."""
    configs = [options.quantization(kind) for kind in ("nf4", "int4", "int8")]
    total, found = model.num_parameters(), []
    for config in configs if stored is None else [foreign.from_hub(stored)]:
        names = apply.selected(model, apply.present(model, config.skip_modules), config.quantize_head)
        weights = [model.get_submodule(name).weight for name in names]
        count = sum(weight.numel() for weight in weights)
        size = sum(config.format.nbytes(tuple(weight.shape)) for weight in weights)
        numbers = {"parameters": count, "bytes": size, "bytes_per_parameter": size / count}
        found.append({"format": str(config.format), **numbers, "total_bytes": size + 2 * (total - count)})
    return found


def _parts(model: Any) -> Iterator[tuple[str, Any]]:
    """The head, the parts of the model under it, and the parameters that it holds itself (LLaVA's `image_newline`)."""
    for name, child in model.named_children():
        if name == "model":
            yield from child.named_children()
            yield from child.named_parameters(recurse=False)
        else:
            yield name, child


def _part(name: str, part: Any) -> dict[str, Any]:
    config = getattr(part, "config", None)
    sizes = {size: getattr(config, size) for size in SIZES if getattr(config, size, None) is not None}
    if name == "lm_head":
        sizes = {"hidden_size": part.in_features, "vocab_size": part.out_features}
    parameters = sum(parameter.numel() for parameter in ([part] if hasattr(part, "numel") else part.parameters()))
    total = {dtype: parameters * size for dtype, size in BYTES.items()}
    return {"part": name, "class": type(part).__name__, "sizes": sizes, "parameters": parameters, "bytes": total}


def table(found: dict[str, Any]) -> str:
    rows = [("part", "class", "parameters", *BYTES, "sizes")]
    for part in [*found["parts"], {**found, "part": "total", "class": "", "sizes": {}}]:
        sizes = ", ".join(f"{SIZES[name]} {value}" for name, value in part["sizes"].items())
        held = (memory(part["bytes"][dtype]) for dtype in BYTES)
        rows.append((part["part"], part["class"], f"{part['parameters']:,}", *held, sizes))
    lines = columns(rows, right=(2, 3, 4))
    tokens, cache = found["tokens_per_image"], found["cache_bytes_per_token"]
    quantised = [
        f"{entry['format']}: {entry['parameters']:,} parameters, {entry['bytes_per_parameter']:.3f} byte each; "
        f"with the rest in 16 bits {memory(entry['total_bytes'])}"
        for entry in found["quantised"]
    ]
    return "\n".join(
        [
            f"{found['model']} ({found['model_type']}, stored as {found['dtype'] or 'unknown dtype'})\n",
            *lines,
            "",
            *quantised,
            f"\ntokens per image: {', '.join(f'{count} ({kind})' for kind, count in tokens.items())}",
            f"positions: {found['max_position_embeddings']:,}",
            *(f"checked: {count:,} {what}" for what, count in found.get("checked", {}).items()),
            f"cache per 1,000 tokens: {', '.join(f'{memory(1000 * cache[dtype])} in {dtype}' for dtype in BYTES)}",
            *_image_lines(found),
        ]
    )


def _image_lines(found: dict[str, Any]) -> Iterator[str]:
    """Lines about the images that were given."""
    if "pictures" in found:
        given, cache = found["pictures"], found["cache_bytes_per_token"]["bfloat16"]
        yield f"these images: {', '.join(f'{tokens:,}' for tokens in given['tokens'])} tokens"
        yield f"all of them in one prompt: {given['prompt_tokens']:,} tokens; in bfloat16 their cache takes " + (
            f"{memory(cache * given['prompt_tokens'])}, their pixels {memory(given['pixel_bytes'] / 2)}"
        )
    if "sight" in found:
        yield f"the images matter: on plain grey, the next token's distribution is {found['sight']:.2g} nats away"
