"""Code the three processors share: reading and writing their folders, checking settings, and their calls."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from minivlm.checkpoint import hub, options
from minivlm.checkpoint.files import saving, write_json
from minivlm.modules.inputs import Inputs
from minivlm.processing.images import image_rows, load_image, pixel_table
from minivlm.processing.tools import ImageProcessorTools, ProcessorTools
from minivlm.text import chat_template as chat
from minivlm.text.shown import suggestion
from minivlm.text.tokenizer import TEXT_OPTIONS, Prompt, Tokenizer, as_texts

MAX_EDGE = 2**12  # the largest image or tile that settings may request: 200 MB of pixel values
MAX_STATISTIC = 10**6  # of image_mean and image_std; beyond it the pixels would be lost to float32 rounding
# per channel (red, green, blue), of CLIP's training images
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
OTHER_OPTIONS = ("return_tensors", "return_mm_token_type_ids")
GROUPS = ("text_kwargs", "images_kwargs")


class ImageProcessor(ImageProcessorTools):
    """Base class of dataclasses whose fields are those of preprocessor_config.json."""

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """From the JSON of any transformers version; keys that are not fields (such as class names) are ignored."""
        return cls(**{f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None})

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, **where: Any) -> Self:
        """From a folder or Hub id; `where` is what `hub.source` takes."""
        with hub.blame(str(name_or_folder)):
            return cls.from_dict(_read_configs(hub.source(name_or_folder, **where))[0])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write preprocessor_config.json, as transformers reads it."""
        name = type(self).__name__
        names = {"image_processor_type": name, "processor_class": name.replace("ImageProcessor", "Processor")}
        write_json(Path(folder) / "preprocessor_config.json", asdict(self) | names)

    def changed(self, changes: dict[str, Any]) -> Self:
        """A copy with some fields changed; None leaves a field as it is. TypeError for unknown names."""
        names = [f.name for f in fields(self)]
        check_names(changes, names)
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


class Processor(ProcessorTools):
    """Base class: a family adds its constructor and `encode`.

    SETTINGS maps each setting of processor_config.json to its path in the model's config.json, which is read where
    older processor files lack it (None: it is not there).
    """

    image_processor_class: ClassVar[type]
    SETTINGS: ClassVar[dict[str, str | None]]
    apply_chat_template = chat.apply

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        use_auth_token: str | bool | None = None,
        **changes: Any,
    ) -> Self:
        """A checkpoint's processor: from a folder, by a name that ships with the package, or by a Hub id.

        `changes` override the files: fields of the image processor (do_image_splitting=False, size={…}), `SETTINGS`,
        padding_side and chat_template (jinja, or a name in `chat_template.KNOWN`). None means not given; TypeError for
        any other name. Other options of `transformers` are accepted if they would change nothing
        (`checkpoint/options.py`).
        """
        source = hub.source(
            name_or_folder,
            revision=revision,
            cache_dir=cache_dir,
            token=options.first(token=token, use_auth_token=use_auth_token),
            local_files_only=local_files_only,
            subfolder=subfolder,
        )
        image_config, config = _read_configs(source)
        with hub.blame(f"{source.name}: the image processor's settings"):
            image_processor = cls.image_processor_class.from_dict(image_config)
        tokenizer = Tokenizer.from_source(source)
        image_fields = {f.name for f in fields(image_processor)}
        known = image_fields | cls.SETTINGS.keys() | {"padding_side", "chat_template"}
        others = {name: value for name, value in changes.items() if name not in known}
        options.refuse_others(others, options.LOADING, known)
        changes = {name: value for name, value in changes.items() if name in known and value is not None}
        tokenizer.padding_side = changes.get("padding_side", tokenizer.padding_side)
        template = chat.named(changes.get("chat_template")) or chat.find_template(source, config, tokenizer.config)
        tokenizer.chat_template = template
        settings = {"chat_template": template} | {name: changes.get(name, config.get(name)) for name in cls.SETTINGS}
        if missing := {name: path for name, path in cls.SETTINGS.items() if path and settings[name] is None}:
            settings |= _from_model_config(source, missing)
        image_changes = {name: value for name, value in changes.items() if name in image_fields}
        with hub.blame(source.name):
            known = {name: value for name, value in settings.items() if value is not None}
            return cls(replace(image_processor, **image_changes), tokenizer, **known)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all small files; `transformers.AutoProcessor.from_pretrained(folder)` reads them."""
        config = {name: getattr(self, name) for name in self.SETTINGS} | {"processor_class": type(self).__name__}
        known = {name: value for name, value in sorted(config.items()) if value is not None}
        with saving() as save:
            self.image_processor.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            save.json(Path(folder) / "processor_config.json", known)
            chat.save(self.chat_template, Path(folder))

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **options: Any) -> Inputs:
        """Prompts, images or both → `Inputs`.

        Options: those of `Tokenizer.assemble` (padding, truncation, max_length, add_special_tokens, padding_side,
        pad_to_multiple_of); `return_tensors` ("pt", "np" or None); every field of the image processor, for this call
        alone (do_image_splitting, size, …); `return_mm_token_type_ids`, which adds 1 at image tokens and 0 elsewhere.
        They may also be given in text_kwargs={…} and images_kwargs={…}; None means not given.
        """
        if text is None and images is None:
            raise ValueError("pass text, images or both")
        if text is not None:
            return self.encode_prompts([Prompt(each) for each in as_texts(text)], images, **options)
        processor, options = self.for_call(options)
        return processor.image_processor(images, options.get("return_tensors"))

    def encode_prompts(self, prompts: list[Prompt], images: Any = None, **options: Any) -> Inputs:
        """The part that calls and `apply_chat_template` share. ValueError unless every image token has an image."""
        processor, options = self.for_call(options)
        return_tensors = options.pop("return_tensors", None)
        token_types = options.pop("return_mm_token_type_ids", False)
        rows = image_rows(images, [prompt.text.count(self.image_token) for prompt in prompts], self.image_token)
        return self.finished(processor.encode(prompts, rows, **options), return_tensors, token_types)

    def finished(self, inputs: Inputs, return_tensors: str | None, token_types: bool) -> Inputs:
        """Inputs as tensors, arrays or lists, and with mm_token_type_ids if requested."""
        if token_types:
            inputs["mm_token_type_ids"] = [[int(i == self.image_token_id) for i in row] for row in inputs["input_ids"]]
        return inputs.convert(return_tensors)

    def call_options(self) -> tuple[str, ...]:
        """Names of the options of a call."""
        image_fields = (f.name for f in fields(self.image_processor))
        return (*TEXT_OPTIONS, *OTHER_OPTIONS, *GROUPS, *image_fields)

    def for_call(self, options: dict[str, Any]) -> tuple[Self, dict[str, Any]]:
        """The processor with this call's image options applied, and the other options. TypeError for unknown names."""
        given = {name: value for name, value in options.items() if name not in GROUPS}
        for group in GROUPS:
            for name, value in (options.get(group) or {}).items():
                if name in given:
                    raise TypeError(f"the option {name!r} is given twice, in {group} too")
                given[name] = value
        check_names(given, self.call_options())
        given = {name: value for name, value in given.items() if value is not None}
        changes = {f.name: given.pop(f.name) for f in fields(self.image_processor) if f.name in given}
        if not changes:
            return self, given
        processor = copy.copy(self)
        processor.image_processor = self.image_processor.changed(changes)
        return processor, given

    def decode(self, *args: Any, **kwargs: Any) -> str | list[str]:
        """`Tokenizer.decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """`Tokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)


def _read_configs(source: hub.Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """The image processor's settings and the processor's own. transformers 5 writes the first into the second."""
    config = source.json("processor_config.json", required=False) or {}
    nested = config.get("image_processor")
    return nested if isinstance(nested, dict) else source.json("preprocessor_config.json"), config


def _from_model_config(source: hub.Source, paths: dict[str, str]) -> dict[str, Any]:
    """The processor's settings found in the model's config.json; None for those it lacks."""
    found = {}
    for name, path in paths.items():
        value = source.json("config.json", required=False)
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        found[name] = value
    return found


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """TypeError for an unknown name; the message suggests the nearest known one."""
    known = list(known)
    for name in given:
        if name not in known:
            raise TypeError(f"got an unexpected keyword argument {name!r}{suggestion(name, known)}")


# ---- Images and prompts --------------------------------------------------------------------------------------------


def check_pixel_options(options: Any) -> None:
    """Check an image processor's switches, resample, mean, deviation and rescale_factor; ValueError for bad ones."""
    for switch in (f.name for f in fields(options) if f.name.startswith("do_")):
        if not isinstance(getattr(options, switch), bool):
            raise ValueError(f"{switch} is true or false, found {getattr(options, switch)!r:.80}")
    if type(options.resample) is not int or options.resample not in range(6):
        raise ValueError(f"resample is one of Pillow's filters, 0 to 5 (2: bilinear), found {options.resample!r:.80}")
    for name in ("image_mean", "image_std", "rescale_factor"):
        found = getattr(options, name)
        values = [found] * 3 if name == "rescale_factor" else found
        numbers = isinstance(values, list | tuple) and len(values) == 3
        if not numbers or not all(type(v) in (int, float) and abs(v) <= MAX_STATISTIC for v in values):
            raise ValueError(
                f"{name} is made of numbers up to {MAX_STATISTIC}, one per channel (3), found {found!r:.80}"
            )
        if name != "image_mean" and min(values) < 1 / MAX_STATISTIC:
            verb = "divides" if name == "image_std" else "multiplies"
            raise ValueError(f"{name} {verb} the pixels and so must not be 0, less, or almost 0; found {found!r:.80}")


def pixel_table_of(options: Any) -> np.ndarray:
    """`pixel_table` (3, 256) for an image processor's settings."""
    mean, std = (options.image_mean, options.image_std) if options.do_normalize else (None, None)
    return pixel_table(options.rescale_factor if options.do_rescale else None, mean, std)


def fetch_image(processor: Any, source: Any) -> Any:
    """`load_image` by the processor's rules: IDEFICS composites transparent images on white."""
    return load_image(source, getattr(processor.image_processor, "background", None))


def assemble(
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    image_token_id: int,
    blocks: Iterator[list[int]],
    border: int | None = None,
    **options: Any,
) -> Inputs:
    """input_ids and attention_mask (B, T); each image token is replaced by the next of `blocks`.

    The ids equal those of the text with the blocks written out. Two adjacent `border` tokens become one. Prompts with
    learned spans also give assistant_masks.
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
    """Replace each image token by the next block, whose tokens all get its mark. For `border` see `assemble`."""
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
