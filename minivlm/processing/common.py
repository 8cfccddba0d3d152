"""What the processors of the three models share: reading their folders, checking their settings, encoding prompts."""

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np

from minivlm import hub
from minivlm.processing import chat_template as chat
from minivlm.processing.files import read_configs
from minivlm.processing.images import load_image, pixel_table
from minivlm.processing.shown import short
from minivlm.processing.tokenizer import Tokenizer

# red, green and blue of the pictures that CLIP was trained on
MAX_EDGE = 2**12  # of a picture or tile, as settings may ask for: 200 MB of pixel values
MOST = 10**6  # of a mean or deviation of bytes; beyond, float32 would forget the picture
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def read_processor(
    source: hub.Source, image_processor_class: type, names: Iterable[str], changes: dict[str, Any]
) -> tuple[Any, Tokenizer, dict[str, Any]]:
    """The image processor and the tokenizer of a checkpoint, and what it says about the processor's settings `names`.

    `changes` are the caller's and win: fields of the image processor, padding_side, chat_template and `names`. One of
    None counts as not given. TypeError for any other name.
    """
    image_config, config = read_configs(source)
    with hub.blame(f"{source.name}: the image processor's settings"):
        image_processor = image_processor_class.from_dict(image_config)
    tokenizer = Tokenizer.from_source(source)
    template = chat.find_template(source, config, tokenizer.config)
    settings = {name: config.get(name) for name in names} | {"chat_template": template}
    image_fields = {f.name for f in fields(image_processor_class)}
    unknown = set(changes) - image_fields - set(settings) - {"padding_side"}
    if unknown:
        raise TypeError(f"from_pretrained got unknown options: {', '.join(sorted(unknown))}")
    changes = {name: value for name, value in changes.items() if value is not None}
    tokenizer.padding_side = changes.get("padding_side", tokenizer.padding_side)
    settings |= {name: changes[name] for name in settings if name in changes}
    image_changes = {name: value for name, value in changes.items() if name in image_fields}
    return (
        replace(image_processor, **image_changes),
        tokenizer,
        {name: value for name, value in settings.items() if value is not None},
    )


def check_pixel_options(options: Any) -> None:
    """ValueError unless an image processor's switches, resample, mean, deviation and rescale_factor make sense."""
    for switch in (f.name for f in fields(options) if f.name.startswith("do_")):
        if not isinstance(getattr(options, switch), bool):
            raise ValueError(f"{switch} is true or false, found {getattr(options, switch)!r:.80}")
    if type(options.resample) is not int or options.resample not in range(6):
        raise ValueError(f"resample is one of Pillow's filters, 0 to 5 (2: bilinear), found {options.resample!r:.80}")
    for name in ("image_mean", "image_std", "rescale_factor"):
        found = getattr(options, name)
        values = [found] * 3 if name == "rescale_factor" else found
        numbers = isinstance(values, list | tuple) and len(values) == 3
        if not numbers or not all(type(v) in (int, float) and abs(v) <= MOST for v in values):
            raise ValueError(f"{name} is made of numbers up to {MOST}, one per channel (3), found {found!r:.80}")
        if name != "image_mean" and min(values) < 1 / MOST:
            verb = "divides" if name == "image_std" else "multiplies"
            raise ValueError(f"{name} {verb} the pixels and so must not be 0, less, or almost 0; found {found!r:.80}")


def pixel_table_of(options: Any) -> np.ndarray:
    """`pixel_table` (3, 256) by the fields of an image processor."""
    mean, std = (options.image_mean, options.image_std) if options.do_normalize else (None, None)
    return pixel_table(options.rescale_factor if options.do_rescale else None, mean, std)


def fetch_picture(processor: Any, source: Any) -> Any:
    """`load_image` by the rules of the processor: IDEFICS lays what is transparent on white."""
    return load_image(source, getattr(processor.image_processor, "background", None))


def as_prompts(text: Any) -> list[str]:
    """One prompt or several as a list. ValueError for anything else."""
    prompts = [text] if isinstance(text, str) else text
    if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"text is a string or a list of strings, found {short(text)}")
    return list(prompts)


def encode_all(tokenizer: Tokenizer, prompts: list[str], guard: str | None) -> list[list[int]]:
    """Ids of each prompt, without bos; with `guard`, see `Tokenizer.encode_guarded`."""
    if guard is None:
        return [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    return [tokenizer.encode_guarded(prompt, guard) for prompt in prompts]
