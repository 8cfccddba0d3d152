"""What the three models' processors share: reading and writing their folders, checking their settings, their calls.

The functions whose first argument is `cls` or `self` are methods, written into the classes as they are.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from minivlm.checkpoint import hub, options
from minivlm.checkpoint.files import read_configs, saving, write_json
from minivlm.modules.inputs import Inputs
from minivlm.processing.images import image_rows, load_image, pixel_table
from minivlm.text import chat_template as chat
from minivlm.text.tokenizer import Prompt, Tokenizer, as_texts

Processor = TypeVar("Processor", bound=Callable)
MAX_EDGE = 2**12  # of a picture or tile, as settings may ask for: 200 MB of pixel values
MOST = 10**6  # of a mean or deviation of bytes; beyond, float32 would forget the picture
# red, green and blue of the pictures that CLIP was trained on
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

# ---- Methods of the image processors ---------------------------------------------------------------------------------


def image_settings(cls: type, config: dict[str, Any]) -> Any:
    """From the JSON of any transformers version; keys that are not fields (its class names) are left aside."""
    return cls(**{f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None})


def read_image_processor(cls: type, name_or_folder: str | Path, **where: Any) -> Any:
    """From a folder or Hub id; `where` is what `hub.source` takes."""
    with hub.blame(str(name_or_folder)):
        return cls.from_dict(read_configs(hub.source(name_or_folder, **where))[0])


def write_image_processor(self: Any, folder: str | Path) -> None:
    """Write preprocessor_config.json, as transformers reads it."""
    name = type(self).__name__
    names = {"image_processor_type": name, "processor_class": name.replace("ImageProcessor", "Processor")}
    write_json(Path(folder) / "preprocessor_config.json", asdict(self) | names)


# ---- Methods of the processors ---------------------------------------------------------------------------------------


def from_pretrained(
    cls: type[Processor],
    name_or_folder: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
    use_auth_token: str | bool | None = None,
    **changes: Any,
) -> Processor:
    """A checkpoint's processor: of a folder, a name that ships with the package, or a Hub id.

    `changes` are the caller's and win over the files: fields of the image processor (do_image_splitting=False,
    size={…}), `SETTINGS` of the processor, padding_side and chat_template (jinja, or a name of `chat_template.KNOWN`).
    One of None counts as not given; TypeError for any other name. Other options of `transformers` are accepted where
    they change nothing here (`checkpoint/options.py`).
    """
    source = hub.source(
        name_or_folder,
        revision=revision,
        cache_dir=cache_dir,
        token=options.first(token=token, use_auth_token=use_auth_token),
        local_files_only=local_files_only,
        subfolder=subfolder,
    )
    image_config, config = read_configs(source)
    with hub.blame(f"{source.name}: the image processor's settings"):
        image_processor = cls.image_processor_class.from_dict(image_config)
    tokenizer = Tokenizer.from_source(source)
    image_fields = {f.name for f in fields(image_processor)}
    known = image_fields | cls.SETTINGS.keys() | {"padding_side", "chat_template"}
    others = {name: value for name, value in changes.items() if name not in known}
    options.refuse_others(others, options.LOADING, known)
    changes = {name: value for name, value in changes.items() if name in known and value is not None}
    tokenizer.padding_side = changes.get("padding_side", tokenizer.padding_side)
    template = chat.find_template(source, config, tokenizer.config)
    settings = {"chat_template": template} | {name: config.get(name) for name in cls.SETTINGS}
    settings |= {name: changes[name] for name in settings if name in changes}
    if missing := {name: path for name, path in cls.SETTINGS.items() if path and settings[name] is None}:
        settings |= _from_model_config(source, missing)
    image_changes = {name: value for name, value in changes.items() if name in image_fields}
    with hub.blame(source.name):
        known = {name: value for name, value in settings.items() if value is not None}
        return cls(replace(image_processor, **image_changes), tokenizer, **known)


def _from_model_config(source: hub.Source, paths: dict[str, str]) -> dict[str, Any]:
    """What the model's config.json, if there is one, says about a processor's settings; None where it says nothing."""
    found = {}
    for name, path in paths.items():
        value = source.json("config.json", required=False)
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        found[name] = value
    return found


def save_pretrained(self: Any, folder: str | Path) -> None:
    """Write all small files; `transformers.AutoProcessor.from_pretrained(folder)` reads them."""
    config = {name: getattr(self, name) for name in self.SETTINGS} | {"processor_class": type(self).__name__}
    known = {name: value for name, value in sorted(config.items()) if value is not None}
    with saving() as save:
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save.json(Path(folder) / "processor_config.json", known)
        chat.save(self.chat_template, Path(folder))


def call(
    self: Any,
    images: Any = None,
    text: str | list[str] | None = None,
    *,
    padding: bool | str = False,
    truncation: bool | str | None = None,
    max_length: int | None = None,
    return_tensors: str | None = None,
    add_special_tokens: bool = True,
) -> Inputs:
    """Prompts, pictures or both → `Inputs`; the options of the text are those of `Tokenizer.assemble`."""
    if text is None and images is None:
        raise ValueError("pass text, images or both")
    if text is None:
        return self.image_processor(images, return_tensors)
    options = {"padding": padding, "truncation": truncation, "max_length": max_length}
    options |= {"return_tensors": return_tensors, "add_special_tokens": add_special_tokens}
    return self.encode_prompts([Prompt(each) for each in as_texts(text)], images, **options)


def encode_prompts(
    self: Any,
    prompts: list[Prompt],
    images: Any = None,
    *,
    return_tensors: str | None = None,
    **options: Any,
) -> Inputs:
    """What `call` and `apply_chat_template` share. ValueError unless there is one image for every image token."""
    rows = image_rows(images, [prompt.text.count(self.image_token) for prompt in prompts], self.image_token)
    return self.encode(prompts, rows, **options).convert(return_tensors)


def call_options(self: Any) -> tuple[str, ...]:
    """Names of the options of `call` that `apply_chat_template` passes on."""
    return ("padding", "truncation", "max_length", "return_tensors", "add_special_tokens")


def decode(self: Any, *args: Any, **kwargs: Any) -> str | list[str]:
    """`Tokenizer.decode`."""
    return self.tokenizer.decode(*args, **kwargs)


def batch_decode(self: Any, *args: Any, **kwargs: Any) -> list[str]:
    """`Tokenizer.batch_decode`."""
    return self.tokenizer.batch_decode(*args, **kwargs)


# ---- Pictures and prompts --------------------------------------------------------------------------------------------


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


def assemble(
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    image_token_id: int,
    blocks: Iterator[list[int]],
    border: int | None = None,
    **options: Any,
) -> Inputs:
    """input_ids and attention_mask (B, T), with the next of `blocks` for every image token.

    The ids are those of the text with the blocks written out. Where two `border` tokens meet, one is left. Prompts with
    learned spans give assistant_masks as well.
    """
    bodies, learned = [], []
    for prompt in prompts:
        ids, marks = expand(*prompt.encode(tokenizer), image_token_id, blocks, border)
        bodies.append(ids)
        learned.append(marks)
    keep = image_token_id if border is None else border
    wanted = any(prompt.learned is not None for prompt in prompts)
    return tokenizer.assemble(bodies, keep=keep, beside={"assistant_masks": (learned, 0)} if wanted else {}, **options)


def expand(
    ids: list[int], marks: list[int], image_token_id: int, blocks: Iterator[list[int]], border: int | None = None
) -> tuple[list[int], list[int]]:
    """Each image token replaced by the next block; the block's tokens get its mark. For `border` see `assemble`."""
    if image_token_id not in ids and border not in ids:
        return ids, marks
    new_ids: list[int] = []
    new_marks: list[int] = []
    for i, mark in zip(ids, marks, strict=True):
        block = next(blocks) if i == image_token_id else [i]
        if border is not None and new_ids[-1:] == [border] == block[:1]:
            block = block[1:]
        new_ids += block
        new_marks += [mark] * len(block)
    return new_ids, new_marks
