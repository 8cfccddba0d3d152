"""Good tiny checkpoints of the three families, and a table of ways to break them.

A case is a name, the family, how the folder is broken, and what must come of it: the kind of error, and words of its
message. Kinds: `file` (CheckpointFileError: absent, cut, no file), `content` (CheckpointError: what it says cannot be),
`use` (ValueError: the files are sound, and an answer shows that they do not go together).
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_idefics
import torch

from minivlm import BitsAndBytesConfig, Int4Config
from minivlm.models.idefics import IdeficsConfig, IdeficsForVisionText2Text
from minivlm.models.idefics2 import Idefics2Config, Idefics2ForConditionalGeneration
from minivlm.models.llava_next import LlavaNextConfig, LlavaNextForConditionalGeneration

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SIDE = 28  # of pictures and tiles, two patches of 14
VOCABULARY = 102  # of `tiny_idefics.write_small`

# ---- Good checkpoints ------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": SIDE, "patch_size": 14, "num_hidden_layers": 1}
TEXT = {**SMALL, "vocab_size": VOCABULARY, "num_key_value_heads": 1, "max_position_embeddings": 64}
PERCEIVER = {"resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "idefics2": {
        "vision_config": VISION,
        "perceiver_config": {**PERCEIVER, "num_key_value_heads": 1, "hidden_size": 16},
        "text_config": {**TEXT, "model_type": "mistral"},
        "image_token_id": 4,
    },
    "llava_next": {
        "vision_config": {**VISION, "num_hidden_layers": 2},
        "text_config": {**TEXT, "model_type": "llama"},
        "image_token_index": 4,
        "image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
    },
    "idefics": {
        **{**TEXT, "num_key_value_heads": None, "vocab_size": VOCABULARY - 3},
        "vision_config": {"embed_dim": 16, **{name: size for name, size in VISION.items() if name != "hidden_size"}},
        "perceiver_config": PERCEIVER,
        "use_resampler": True,
        "additional_vocab_size": 3,
    },
}
SQUARE = {"height": SIDE, "width": SIDE}
PIXELS = {
    **{"do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255, "resample": 2},
    **{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
}
PREPROCESSORS: dict[str, dict[str, Any]] = {
    "idefics2": {**PIXELS, "size": {"shortest_edge": 14, "longest_edge": SIDE}, "do_image_splitting": False},
    "llava_next": {
        **PIXELS,
        **{"size": {"shortest_edge": SIDE}, "crop_size": SQUARE},
        "image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
    },
    "idefics": {**PIXELS, "image_size": SIDE, "image_num_channels": 3},
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "idefics2": {"image_seq_len": 2},
    "llava_next": {"patch_size": 14, "vision_feature_select_strategy": "default"},
    "idefics": {"add_end_of_utterance_token": False},
}
MODELS: dict[str, tuple[Any, Any]] = {
    "idefics2": (Idefics2ForConditionalGeneration, Idefics2Config),
    "llava_next": (LlavaNextForConditionalGeneration, LlavaNextConfig),
    "idefics": (IdeficsForVisionText2Text, IdeficsConfig),
}


def write_good(family: str, folder: Path) -> Path:
    """A whole checkpoint of random weights: config, weights, generation settings, tokenizer, processor."""
    tiny_idefics.write_small(folder)
    model_class, config_class = MODELS[family]
    torch.manual_seed(0)
    model = model_class(config_class.from_hub(CONFIGS[family]))
    model.save_pretrained(folder)
    write_json(folder / "config.json", {"model_type": family, **CONFIGS[family], "dtype": "float32"})
    write_json(folder / "generation_config.json", {"max_new_tokens": 2, "eos_token_id": 2, "pad_token_id": 0})
    write_json(folder / "preprocessor_config.json", PREPROCESSORS[family])
    write_json(folder / "processor_config.json", PROCESSORS[family])
    return folder


# ---- Ways to break a folder ------------------------------------------------------------------------------------------

Break = Callable[[Path], Any]
GONE = object()  # as a value: the entry is removed


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def entry(name: str, where: str, value: Any) -> Break:
    """Set one entry of a JSON file; `where` is like text_config.hidden_size or model.merges."""

    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        *parents, last = where.split(".")
        inner = values
        for parent in parents:
            inner = inner[int(parent)] if isinstance(inner, list) else inner[parent]
        if value is GONE:
            del inner[last]
        else:
            inner[int(last) if isinstance(inner, list) else last] = value
        write_json(folder / name, values)

    return change


def text(name: str, change: Callable[[str], str]) -> Break:
    """Change a file as text, which allows what no JSON writer writes."""
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


def content(name: str, data: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(data)


def without(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def cut(name: str, size: Callable[[int], int]) -> Break:
    return lambda folder: os.truncate(folder / name, size((folder / name).stat().st_size))


def instead(name: str, make: Callable[[Path], Any]) -> Break:
    """Something else in the place of a file: `make` gets its path, where nothing is any more."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def linked(name: str) -> Break:
    """The file lies beside the folder, and a link leads there."""

    def change(folder: Path) -> None:
        outside = folder.with_name(folder.name + ".outside")
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return change


def several(*changes: Break) -> Break:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def read_weights(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_weights(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def header(change: Callable[[dict[str, Any]], Any]) -> Break:
    """Change the header; the data stay. `change` works in place, or returns the bytes that take its place."""

    def broken(folder: Path) -> None:
        values, data = read_weights(folder / WEIGHTS)
        result = change(values)
        raw = result if isinstance(result, bytes) else json.dumps(values).encode()
        write_weights(folder / WEIGHTS, raw, data)

    return broken


def tensor(**changes: Any) -> Break:
    """Change the description of the head's weights, (102, 16) F32."""
    return header(lambda values: values["lm_head.weight"].update(changes))


def offsets(change: Callable[[int, int], list[Any]]) -> Break:
    """Change where the head's weights are said to lie."""
    return header(lambda values: values["lm_head.weight"].update(data_offsets=change(*place(values))))


def place(values: dict[str, Any]) -> tuple[int, int]:
    head = next(name for name in values if name.endswith("lm_head.weight"))  # LLaVA-NeXT's has a longer name
    begin, end = values[head]["data_offsets"]
    return begin, end


def numbers(value: float) -> Break:
    """Put one number into the head's weights, all else being as it was."""

    def change(folder: Path) -> None:
        values, data = read_weights(folder / WEIGHTS)
        at = place(values)[0]
        bits = torch.tensor([value]).view(torch.uint8).numpy().tobytes()
        write_weights(folder / WEIGHTS, json.dumps(values).encode(), data[:at] + bits + data[at + 4 :])

    return change


def tensors(change: Callable[[dict[str, tuple[str, list[int], bytes]]], Any]) -> Break:
    """Change what tensors there are, name → (dtype, shape, bytes); the file is written anew and sound."""

    def broken(folder: Path) -> None:
        values, data = read_weights(folder / WEIGHTS)
        values.pop("__metadata__", None)
        parts = {n: (v["dtype"], v["shape"], data[slice(*v["data_offsets"])]) for n, v in values.items()}
        change(parts)
        write_tensors(folder / WEIGHTS, parts)

    return broken


def half_of_them(parts: dict[str, tuple[str, list[int], bytes]]) -> None:
    """Every other tensor in half precision, which zeros are easily turned into."""
    for name in sorted(parts)[::2]:
        _, shape, data = parts[name]
        parts[name] = "F16", shape, bytes(len(data) // 2)


def write_tensors(path: Path, parts: dict[str, tuple[str, list[int], bytes]]) -> None:
    described, end = {}, 0
    for name, (dtype, shape, data) in parts.items():
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    write_weights(path, json.dumps(described).encode(), b"".join(data for _, _, data in parts.values()))


def sharded(change: Callable[[dict[str, str], dict[str, dict]], Any] = lambda *_: None) -> Break:
    """Two shards and an index. `change` gets the index's map and the shards, name → tensors, before that."""

    def broken(folder: Path) -> None:
        values, data = read_weights(folder / WEIGHTS)
        values.pop("__metadata__", None)
        parts = {n: (v["dtype"], v["shape"], data[slice(*v["data_offsets"])]) for n, v in values.items()}
        names = sorted(parts)
        shards = {
            "a.safetensors": {n: parts[n] for n in names[::2]},
            "b.safetensors": {n: parts[n] for n in names[1::2]},
        }
        weight_map = {name: shard for shard, inside in shards.items() for name in inside}
        change(weight_map, shards)
        for shard, inside in shards.items():
            write_tensors(folder / shard, inside)
        write_json(folder / INDEX, {"weight_map": weight_map})
        (folder / WEIGHTS).unlink()

    return broken


def quantised(config: Any, change: Callable[[dict[str, tuple[str, list[int], bytes]], str], Any]) -> Break:
    """Quantise an Idefics2 folder. `change` then gets its tensors, and what the names of one layer's begin with."""

    def broken(folder: Path) -> None:
        model = Idefics2ForConditionalGeneration.from_pretrained(folder, quantization_config=config)
        model.save_pretrained(folder)
        tensors(lambda parts: change(parts, "model.text_model.layers.0.mlp.down_proj."))(folder)

    return broken


def part(config: Any, leaf: str, dtype: str, shape: list[int], data: bytes) -> Break:
    """Another tensor in the place of one of a quantised layer's."""
    return quantised(config, lambda parts, layer: parts.update({layer + leaf: (dtype, shape, data)}))


def state(config: Any, about: bytes, shape: list[int] | None = None) -> Break:
    """Another JSON about a layer in NF4: 16 outputs, 24 inputs."""
    return part(config, "weight.quant_state.bitsandbytes__nf4", "U8", shape or [len(about)], about)


def pickled(*names: str) -> Break:
    """Only these files, a pickle's beginning in each, where the weights were."""
    return several(without(WEIGHTS), *(content(name, b"\x80\x02}q\x00.") for name in names))


def sparse(folder: Path) -> None:
    """A header of 64 MB, all of it zeros that take no room on the disk."""
    (folder / WEIGHTS).write_bytes((2**26).to_bytes(8, "little"))
    os.truncate(folder / WEIGHTS, 2**27)


# ---- The table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    family: str
    damage: Break
    kind: str  # of the error
    words: str  # a regular expression that its message holds


def _cases(family: str, kind: str, named: dict[str, tuple[Break, str]]) -> dict[str, Case]:
    return {f"{family}: {name}": Case(family, damage, kind, words) for name, (damage, words) in named.items()}


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
PAGE = b"\n<!DOCTYPE html><html><body>Repository Not Found</body></html>"
DEEP = '{"model_type": ' + "[" * 100_000 + "]" * 100_000 + "}"

FILES = _cases(
    "idefics2",
    "file",
    {
        "no config": (without("config.json"), "has no config.json; found"),
        "empty config": (content("config.json", b""), "config.json is empty"),
        "config is a Git LFS pointer": (content("config.json", LFS), "Git LFS pointer"),
        "config is a web page": (content("config.json", PAGE), "a web page; download the file from"),
        "config is a folder": (instead("config.json", Path.mkdir), "a regular file, found a folder"),
        "config is a pipe": (instead("config.json", os.mkfifo), "found a pipe or device"),
        "config is a device": (
            instead("config.json", lambda p: p.symlink_to("/dev/zero")),
            "link to /dev/zero, where no",
        ),
        "config is a link to nothing": (
            instead("config.json", lambda p: p.symlink_to("gone")),
            "a link to gone, where",
        ),
        "config is a link to itself": (instead("config.json", lambda p: p.symlink_to(p.name)), "where no file is"),
        "weights are a folder": (instead(WEIGHTS, Path.mkdir), "a regular file, found a folder"),
        "weights are a pipe": (instead(WEIGHTS, os.mkfifo), "found a pipe or device"),
        "no weights": (without(WEIGHTS), "neither model.safetensors nor model.safetensors.index.json"),
        "only a pickle": (pickled("pytorch_model.bin"), "only pickled weights .pytorch_model.bin., which can run code"),
        "only pickled shards": (pickled("pytorch_model.bin.index.json"), "only pickled weights"),
        "a pickle by another name": (content(WEIGHTS, b"\x80\x02}q\x00."), "is a pickle, which can run code"),
        "a later pickle by another name": (content(WEIGHTS, b"\x80\x04\x95\x10" + bytes(99)), "is a pickle, which can"),
        "a PyTorch file by another name": (content(WEIGHTS, b"PK\x03\x04" + bytes(99)), "is a PyTorch pickle"),
        "a GGUF file by another name": (content(WEIGHTS, b"GGUF\x03\x00\x00\x00" + bytes(99)), "is a GGUF file"),
        "an HDF5 file by another name": (content(WEIGHTS, b"\x89HDF\r\n\x1a\n" + bytes(99)), "is an HDF5 file"),
        "weights are a Git LFS pointer": (content(WEIGHTS, LFS), "is a Git LFS pointer"),
        "weights are a web page": (content(WEIGHTS, PAGE), "is a web page"),
        "empty weights": (content(WEIGHTS, b""), "model.safetensors is empty"),
        "weights of 7 bytes": (cut(WEIGHTS, lambda _: 7), "not a complete safetensors file"),
        "weights of 8 bytes": (cut(WEIGHTS, lambda _: 8), "not a complete safetensors file: its header should have"),
        "weights cut in the header": (
            cut(WEIGHTS, lambda _: 999),
            "its header should have .* has 999; the download may",
        ),
        "weights cut in half": (
            cut(WEIGHTS, lambda size: size // 2),
            "its tensors need .* found .*the download may have",
        ),
        "last byte missing": (cut(WEIGHTS, lambda size: size - 1), "its tensors need"),
        "download not finished": (
            lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.json.incomplete"),
            "no tokenizer.json but tokenizer.json.incomplete, so its download is not finished",
        ),
        "download of zeros so far": (
            content(WEIGHTS + ".aria2", b""),
            "has model.safetensors but model.safetensors.aria2, so its download is not finished; wait, or resume it",
        ),
        "a shard with a name of 5,000 letters": (
            sharded(lambda weight_map, _: weight_map.update(x="a" * 5000 + ".safetensors")),
            "aaaa of .* cannot be opened: File name too long",
        ),
        "weights of the machine's memory": (
            instead(WEIGHTS, lambda p: p.symlink_to("/proc/self/mem")),
            "is empty|where no file",
        ),
        "settings are a pipe": (instead("generation_config.json", os.mkfifo), "found a pipe or device"),
        "weights are a message": (content(WEIGHTS, b'{"error": "restricted"}'), "not a complete safetensors file"),
        "no tokenizer": (without("tokenizer.json"), "has no tokenizer.json"),
        "tokenizer is a Git LFS pointer": (content("tokenizer.json", LFS), "tokenizer.json is a Git LFS pointer"),
        "empty tokenizer": (content("tokenizer.json", b""), "tokenizer.json is empty"),
        "tokenizer is a pipe": (instead("tokenizer.json", os.mkfifo), "found a pipe or device"),
        "template is a pipe": (
            lambda folder: os.mkfifo(folder / "chat_template.jinja"),
            "chat_template.jinja should be a regular file, found a pipe",
        ),
        "no preprocessor": (without("preprocessor_config.json"), "has no preprocessor_config.json"),
        "a shard is missing": (
            several(sharded(), without("b.safetensors")),
            "has no b.safetensors; found",
        ),
        "a shard is half there": (
            several(sharded(), cut("b.safetensors", lambda size: size // 2)),
            "b.safetensors is not a complete safetensors file",
        ),
        "a shard is a Git LFS pointer": (
            several(sharded(), content("a.safetensors", LFS)),
            "a.safetensors is a Git LFS",
        ),
    },
)

JSON = _cases(
    "idefics2",
    "content",
    {
        "config of the machine": (instead("config.json", lambda p: p.symlink_to("/etc/passwd")), "not valid JSON"),
        "config cut in half": (
            cut("config.json", lambda size: size // 2),
            "config.json is not valid JSON .*download it",
        ),
        "config in Latin-1": (content("config.json", b'{"a": "\xe9"}'), "config.json is not valid JSON .*utf-8"),
        "config with a byte order mark": (content("config.json", b"\xef\xbb\xbf{}"), "not valid JSON .*BOM"),
        "config is a list": (content("config.json", b"[]"), "should hold a JSON object, found list"),
        "config is a number": (content("config.json", b"7"), "should hold a JSON object, found int"),
        "config of single quotes": (content("config.json", b"{'a': 1}"), "not valid JSON"),
        "config with NaN": (text("config.json", lambda s: s.replace("102", "NaN", 1)), "NaN is no number in JSON"),
        "config with Infinity": (
            text("config.json", lambda s: s.replace("102", "-Infinity", 1)),
            "-Infinity is no number",
        ),
        "config says it twice": (
            text("config.json", lambda s: s.replace('"hidden_size"', '"hidden_size": 3, "hidden_size"', 1)),
            "'hidden_size' is given twice",
        ),
        "config is deep": (content("config.json", DEEP.encode()), "not valid JSON|nested deeper"),
        "config is rather deep": (entry("config.json", "x", json.loads("[" * 40 + "]" * 40)), "nested deeper than 16"),
        "config of 9 MB": (
            text("config.json", lambda s: s + " " * 9_000_000),
            "has 9,000,.* bytes; such a file has at",
        ),
        "config with a number of 9,999 digits": (
            text("config.json", lambda s: s.replace("102", "9" * 9999, 1)),
            "not valid JSON",
        ),
        "another model type": (entry("config.json", "model_type", "blip"), "model_type 'blip'; minivlm implements"),
        "model type is a list": (entry("config.json", "model_type", ["idefics2"]), "has model_type"),
        "no model type": (entry("config.json", "model_type", GONE), "has model_type None"),
        "config in UTF-16": (text("config.json", lambda s: "\0".join(s)), "not valid JSON"),
        "config twice": (text("config.json", lambda s: s + s), "not valid JSON .*Extra data"),
        "config with a number beyond all": (text("config.json", lambda s: s.replace(": 102", ": 1e999", 1)), "finite"),
        "an activation of 100,000 letters": (
            entry("config.json", "perceiver_config.hidden_act", "x" * 10**5),
            "hidden_act.*x{60}",
        ),
        "model type of another family": (
            entry("config.json", "model_type", "llava_next"),
            "lack image_grid_pinpoints",
        ),
    },
)

INVALID = "is no valid safetensors file"  # and then what `safetensors` says
HEADERS = _cases(
    "idefics2",
    "content",
    {
        "header of length 0": (content(WEIGHTS, bytes(64)), "the header has 0 bytes, expected 2 to"),
        "header of length 1": (content(WEIGHTS, (1).to_bytes(8, "little") + bytes(64)), "the header has 1 bytes"),
        "header of 64 MB": (sparse, "the header has 67,108,864 bytes, expected 2 to"),
        "a byte behind the data": (
            lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"x"),
            INVALID,
        ),
        "header is no JSON": (header(lambda values: b"{'a'}"), "the header of .* is not valid JSON"),
        "header is a list": (header(lambda values: b"[]"), "the header of .* JSON object, found list"),
        "header in Latin-1": (header(lambda values: b'{"\xe9": 1}'), "the header of .* not valid JSON .*utf-8"),
        "header is deep": (header(lambda values: DEEP.encode()), "the header of .* not valid JSON|nested deeper"),
        "tensor given twice": (
            header(
                lambda values: (
                    json.dumps(values).encode().replace(b'"model.text_model.norm.weight"', b'"lm_head.weight"')
                )
            ),
            "'lm_head.weight' is given twice",
        ),
        "tensor given twice, once with escapes": (
            header(
                lambda values: (
                    json.dumps(values)[:-1] + ', "lm\\u005fhead.weight": ' + json.dumps(values["lm_head.weight"]) + "}"
                ).encode()
            ),
            "'lm_head.weight' is given twice",
        ),
        "zeros behind the JSON": (header(lambda values: json.dumps(values).encode() + bytes(8)), "not valid JSON"),
        "header in UTF-16": (header(lambda values: json.dumps(values).encode("utf-16")), "not valid JSON"),
        "shape whose size overflows to the right one": (tensor(shape=[2**61, 8, 1632]), INVALID),
        "100,000 empty tensors": (
            header(
                lambda values: values.update(
                    {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
                )
            ),
            r"100000 tensors unexpected:(.|\n)*of one checkpoint, and of this revision",
        ),
        "tensor is a list": (
            header(lambda values: values.update(x=[1])),
            INVALID,
        ),
        "tensor without dtype": (
            header(lambda v: v["lm_head.weight"].pop("dtype")),
            INVALID,
        ),
        "tensor with more to it": (tensor(run="me"), "'lm_head.weight' should be described by"),
        "unknown dtype": (
            tensor(dtype="F12"),
            INVALID,
        ),
        "dtype is a number": (tensor(dtype=32), INVALID),
        "dtype is a list": (tensor(dtype=["F32"]), INVALID),
        "dtype of 8 bits": (tensor(dtype="F8_E4M3"), INVALID),
        "dtype of half the bytes": (tensor(dtype="F16"), INVALID),
        "whole numbers as weights": (tensor(dtype="I32"), "tensors that are not of F64.*\n *lm_head.weight of I32"),
        "negative shape": (tensor(shape=[-102, -16]), INVALID),
        "shape of fractions": (tensor(shape=[102.0, 16]), INVALID),
        "shape of strings": (tensor(shape=["102", 16]), INVALID),
        "shape of truth": (tensor(shape=[True, 1632]), INVALID),
        "shape is null": (tensor(shape=None), INVALID),
        "shape beyond 64 bits": (tensor(shape=[2**62, 2**62]), INVALID),
        "shape of a number beyond all": (tensor(shape=[10**30, 0]), INVALID),
        "shape of 9 dimensions": (tensor(shape=[1] * 7 + [102, 16]), "of another shape"),
        "shape of more numbers": (tensor(shape=[103, 16]), INVALID),
        "shape turned": (tensor(shape=[16, 102]), r"lm_head.weight \[16, 102\], expected \[102, 16\]"),
        "negative offsets": (
            offsets(lambda begin, end: [-8, end]),
            INVALID,
        ),
        "offsets the other way round": (offsets(lambda begin, end: [end, begin]), INVALID),
        "three offsets": (offsets(lambda begin, end: [begin, end, end]), INVALID),
        "offsets as strings": (offsets(lambda begin, end: [str(begin), end]), INVALID),
        "tensors that overlap": (
            offsets(lambda begin, end: [begin + 64, end + 64]),
            INVALID,
        ),
        "a gap between tensors": (
            header(lambda values: values.pop("lm_head.weight")),
            INVALID,
        ),
        "control characters in a name": (
            header(lambda values: values.update({"\x1b[2Jx": values.pop("lm_head.weight")})),
            "printable characters",
        ),
        "a name of a million letters": (
            header(lambda values: values.update({"a" * 10**6: values.pop("lm_head.weight")})),
            "up to 256 printable",
        ),
        "weights of two kinds": (
            several(tensors(half_of_them), entry("config.json", "dtype", GONE)),
            "stores its weights in torch.float16 and torch.float32, and config.json does not say which",
        ),
        "half a character in a name": (
            header(lambda values: values.update({"\ud800": values.pop("lm_head.weight")})),
            INVALID,
        ),
        "metadata is a list": (
            header(lambda values: values.update(__metadata__=[])),
            INVALID,
        ),
        "metadata of numbers": (header(lambda values: values.update(__metadata__={"a": 1})), INVALID),
        "missing tensor": (tensors(lambda parts: parts.pop("lm_head.weight")), r"1 tensors missing:\n +lm_head"),
        "unexpected tensor": (
            tensors(lambda parts: parts.update(x=("F32", [2], bytes(8)))),
            r"1 tensors unexpected:\n +x \[2\]",
        ),
        "renamed tensor": (
            tensors(lambda parts: parts.update(head=parts.pop("lm_head.weight"))),
            "missing:\n +lm_head.weight(.|\n)*unexpected:\n +head",
        ),
        "no tensors": (tensors(dict.clear), "tensors missing:(.|\n)* more"),
        "empty tensors": (tensor(shape=[0, 16]), INVALID),
        "many missing tensors": (
            tensors(lambda parts: [parts.pop(name) for name in list(parts) if "vision" in name]),
            r"tensors missing:(.|\n)*and \d+ more",
        ),
    },
)
HEADERS |= _cases(
    "idefics2",
    "file",
    {
        "header longer than the file": (
            content(WEIGHTS, (9999).to_bytes(8, "little") + b"{}"),
            "its header should have 9,999",
        ),
        "header of 2⁶³ bytes": (content(WEIGHTS, b"\x00" * 7 + b"\x80{}"), "its header should have 9,223,372"),
        "offsets beyond the file": (offsets(lambda begin, end: [begin + 10**12, end + 10**12]), "its tensors need"),
    },
)

INDICES = _cases(
    "idefics2",
    "content",
    {
        "index out of the folder": (
            sharded(lambda m, _: m.update(x="../a.safetensors")),
            "names '../a.safetensors', which",
        ),
        "index to the root": (
            sharded(lambda m, _: m.update(x="/etc/a.safetensors")),
            "names '/etc/a.safetensors', which is",
        ),
        "index into a folder": (
            sharded(lambda m, _: m.update(x="sub/a.safetensors")),
            "not a safetensors file of its folder",
        ),
        "index by a backslash": (
            sharded(lambda m, _: m.update(x="..\\a.safetensors")),
            "not a safetensors file of its",
        ),
        "index to a pickle": (
            sharded(lambda m, _: m.update(x="model.bin")),
            "names 'model.bin', which is not a safetensors",
        ),
        "index to an address": (
            sharded(lambda m, _: m.update(x="http://a/b.safetensors")),
            "not a safetensors file of its",
        ),
        "index to a number": (sharded(lambda m, _: m.update(x=7)), "should map tensor names to file names"),
        "index without a map": (several(sharded(), content(INDEX, b"{}")), "file names under 'weight_map'"),
        "index with a list": (several(sharded(), content(INDEX, b'{"weight_map": []}')), "under 'weight_map'"),
        "index of nothing": (several(sharded(), content(INDEX, b'{"weight_map": {}}')), "tensors missing"),
        "index is no JSON": (several(sharded(), content(INDEX, b"{")), "index.json is not valid JSON"),
        "tensor in another shard": (
            sharded(lambda weight_map, _: weight_map.update({"lm_head.weight": "b.safetensors"})),
            "says that 'lm_head.weight' is in b.safetensors, but it is in a.safetensors",
        ),
        "tensor in no shard": (
            sharded(lambda weight_map, shards: shards["a.safetensors"].pop("lm_head.weight")),
            "'lm_head.weight' is in a.safetensors, but it is in none",
        ),
        "tensor in both shards": (
            sharded(
                lambda _, shards: shards["b.safetensors"].update({"lm_head.weight": ("F32", [102, 16], bytes(6528))})
            ),
            r"1 tensors given twice:\n +lm_head.weight",
        ),
    },
)


def _values(family: str, name: str, kind: str, values: list[tuple[str, Any, str]]) -> dict[str, Case]:
    """Entries of a JSON file that hold what they cannot."""
    found: dict[str, Case] = {}
    for where, value, words in values:
        shown = "no value" if value is GONE else repr(value)
        label = f"{family}: {name.removesuffix('.json')}: {where} = {shown:.30}"
        if label in found:  # alike at the beginning
            label += f" {len(found)}"
        found[label] = Case(family, entry(name, where, value), kind, words)
    return found


HUGE = 10**30
SIZES = [
    ("vision_config", 3, "vision_config should be a JSON object, found 3"),
    ("vision_config", [], "vision_config should be a JSON object"),
    ("text_config", "mistral", "text_config should be a JSON object"),
    ("perceiver_config", False, "perceiver_config should be a JSON object"),
    ("text_config.hidden_size", -16, "DecoderConfig.hidden_size must be positive, found -16"),
    ("text_config.hidden_size", 0, "hidden_size must be positive"),
    ("text_config.hidden_size", "16", "DecoderConfig.hidden_size should be int, found '16'"),
    ("text_config.hidden_size", 16.0, "hidden_size should be int, found 16.0"),
    ("text_config.hidden_size", True, "hidden_size should be int, found True"),
    ("text_config.hidden_size", None, "hidden_size should be int, found None"),
    ("text_config.hidden_size", [16], "hidden_size should be int"),
    ("text_config.hidden_size", HUGE, "hidden_size is a number beyond 32 bits"),
    ("text_config.hidden_size", 2**30, "hidden_size is absurd, found 1073741824"),
    ("text_config.hidden_size", 32, r"weights in .* do not fit the model(.|\n)*of another shape"),
    ("text_config.num_hidden_layers", 10**9, "num_hidden_layers is absurd, found 1000000000 .at most 512"),
    ("text_config.num_hidden_layers", 3, "tensors missing:\n +model.text_model.layers.2"),
    ("text_config.num_hidden_layers", 1, "tensors unexpected:\n +model.text_model.layers.1"),
    ("text_config.vocab_size", 10**9, "vocab_size is absurd"),
    ("text_config.vocab_size", 103, r"lm_head.weight \[102, 16\], expected \[103, 16\]"),
    ("text_config.vocab_size", 3, "image_token_id 4 is outside the vocabulary of 3"),
    ("text_config.intermediate_size", 10**9, "intermediate_size is absurd"),
    ("text_config.num_attention_heads", 3, "even head_dim and .*: 5"),
    ("text_config.num_attention_heads", 10**6, "num_attention_heads is absurd"),
    ("text_config.num_key_value_heads", 3, "must be a multiple of num_key_value_heads"),
    ("text_config.num_key_value_heads", -1, "num_key_value_heads must be positive"),
    ("text_config.head_dim", 7, "even head_dim and .*: 7"),
    ("text_config.head_dim", 10**9, "head_dim is absurd"),
    ("text_config.max_position_embeddings", 2**31 - 1, "max_position_embeddings is absurd"),
    ("text_config.max_position_embeddings", -1, "max_position_embeddings"),
    (
        "text_config.max_position_embeddings",
        "many",
        "max_position_embeddings should be a number of tokens, found 'many'",
    ),
    ("text_config.rms_norm_eps", -1.0, "rms_norm_eps must be positive"),
    ("text_config.rms_norm_eps", 0, "rms_norm_eps must be positive"),
    ("text_config.rms_norm_eps", 5.0, "rms_norm_eps is absurd"),
    ("text_config.rms_norm_eps", "small", "rms_norm_eps should be float"),
    ("text_config.hidden_act", "sin", "DecoderConfig.hidden_act should be one of silu, gelu"),
    ("text_config.hidden_act", ["silu"], "hidden_act should be str"),
    ("text_config.initializer_range", -1.0, "initializer_range should be from 0 to 100"),
    ("text_config.rope_theta", 0, "rope_theta must be positive"),
    ("text_config.rope_theta", 1.0, "rope_theta above 1: 8, 1.0"),
    ("text_config.rope_theta", -10000.0, "rope_theta must be positive"),
    ("text_config.rope_theta", HUGE, "rope_theta is a number beyond 32 bits"),
    ("text_config.rope_scaling", "yarn", "rope_scaling should be a JSON object"),
    ("text_config.rope_scaling", {"type": ["yarn"]}, "rope_type should be a string"),
    ("text_config.rope_scaling", {"type": "spiral", "factor": 2}, "rope type 'spiral' is not supported"),
    ("text_config.rope_scaling", {"type": "linear", "factor": 0}, "RopeScaling.factor must be positive"),
    (
        "text_config.rope_scaling",
        {"type": "linear", "factor": 1e-30},
        "RopeScaling.factor is made of numbers from 1e-06",
    ),
    ("text_config.rope_scaling", {"type": "linear"}, "needs factor"),
    ("text_config.sliding_window", 0, "sliding_window must be positive"),
    ("text_config.sliding_window", "wide", "sliding_window should be int or null"),
    ("text_config.eos_token_id", ["</s>"], "eos_token_id should be made of token ids"),
    ("text_config.model_type", "gpt2", "text_config.model_type 'gpt2' is not supported"),
    ("text_config.model_type", {}, "text_config.model_type {} is not supported"),
    ("text_config.attention_bias", True, "attention_bias and mlp_bias are settings of Llama"),
    ("text_config.attention_bias", "no", "attention_bias should be bool"),
    ("vision_config.image_size", 10**9, "image_size is absurd"),
    ("vision_config.image_size", 7, "image_size 7 is smaller than one patch of 14"),
    ("vision_config.patch_size", 0, "patch_size must be positive"),
    ("vision_config.patch_size", 7, "of another shape"),
    ("vision_config.num_channels", 4, "num_channels should be one of 3, found 4"),
    ("vision_config.num_attention_heads", 5, "must be a multiple of num_attention_heads"),
    ("vision_config.layer_norm_eps", -1e-6, "layer_norm_eps must be positive"),
    ("vision_config.hidden_act", "relu6", "VisionConfig.hidden_act should be one of"),
    ("perceiver_config.resampler_depth", 10**8, "resampler_depth is absurd"),
    ("perceiver_config.resampler_n_latents", 3, r"latents \[2, 16\], expected \[3, 16\]"),
    ("perceiver_config.hidden_act", None, "hidden_act should be str"),
    ("image_token_id", 102, "image_token_id 102 is outside the vocabulary of 102"),
    ("image_token_id", -1, "image_token_id -1 is outside"),
    ("image_token_id", 4.0, "image_token_id should be int"),
    ("tie_word_embeddings", True, "other than the embeddings.* .tie_word_embeddings"),
    ("dtype", "float128", "config.json names the dtype 'float128'; known: float32"),
    ("dtype", 32, "dtype should be str or null"),
]
VALUES = _values("idefics2", "config.json", "content", SIZES)
VALUES |= _values(
    "llava_next",
    "config.json",
    "content",
    [
        ("text_config", None, "of another shape|missing"),
        ("text_config.model_type", "qwen2", "missing"),
        ("text_config.layer_types", ["x"], "idefics_never"),
        ("vision_config.model_type", "vit", "vision_config.model_type 'vit' is not supported"),
        ("image_grid_pinpoints", [], "image_grid_pinpoints is a list of at least one"),
        ("image_grid_pinpoints", [[28, 30]], "multiples of the tile's side of 28; found .28, 30"),
        ("image_grid_pinpoints", [[28, -28]], "whole numbers from 1"),
        ("image_grid_pinpoints", [[28, 28 * 10**6]], "whole numbers from 1 to 4096"),
        ("image_grid_pinpoints", [[28.0, 28.0]], "image_grid_pinpoints are .height, width. in whole numbers"),
        ("image_grid_pinpoints", [28, 56], "image_grid_pinpoints are"),
        ("image_grid_pinpoints", [[28, 56]] * 5000, "at most 256"),
        ("image_grid_pinpoints", "28x56", "image_grid_pinpoints should be list or tuple"),
        ("vision_feature_layer", -9, "vision_feature_layer should be one or more of the 3 hidden states"),
        ("vision_feature_layer", [], "vision_feature_layer should be one or more"),
        ("vision_feature_layer", [0] * 99, "vision_feature_layer should be one or more"),
        ("vision_feature_layer", ["last"], "vision_feature_layer should be one or more"),
        ("vision_feature_select_strategy", "full", "vision_feature_select_strategy 'full' is not supported"),
        ("projector_hidden_act", "sin", "projector_hidden_act should be one of"),
        ("image_token_index", 10**6, "image_token_index 1000000 is outside"),
        ("multimodal_projector_bias", False, "unexpected:\n.*bias"),
    ],
)
del VALUES["llava_next: config: text_config.layer_types = ['x']"]  # harmless: only Qwen2 reads it
VALUES |= _values(
    "idefics",
    "config.json",
    "content",
    [
        ("cross_layer_interval", 0, "cross_layer_interval must be positive"),
        ("cross_layer_interval", 3, "must be a multiple of cross_layer_interval"),
        ("num_hidden_layers", 2 * 10**9, "num_hidden_layers is absurd"),
        ("num_attention_heads", 3, "must be a multiple of num_attention_heads"),
        ("additional_vocab_size", -3, "additional_vocab_size should be from 0 to"),
        ("additional_vocab_size", 10**9, "additional_vocab_size should be from 0 to"),
        ("additional_vocab_size", 4, r"additional.*\[3, 16\], expected \[4, 16\]"),
        ("alpha_type", "matrix", "alpha_type should be one of float, vector"),
        ("alpha_type", ["float"], "alpha_type should be str"),
        ("alphas_initializer_range", -1.0, "alphas_initializer_range should be from 0 to 100"),
        ("freeze_text_module_exceptions", [["LayerNorm"]], "freeze_text_module_exceptions knows"),
        ("use_resampler", False, "unexpected:\n.*perceiver"),
        ("use_resampler", "yes", "use_resampler should be bool"),
        ("qk_layer_norms", True, "missing:\n.*layer_norm"),
        ("vision_config.embed_dim", HUGE, "VisionConfig.hidden_size is a number beyond 32 bits"),
        ("hidden_act", "swish9", "hidden_act should be one of"),
        ("rms_norm_eps", -1e-5, "rms_norm_eps must be positive"),
    ],
)
VALUES |= _values(
    "idefics2",
    "generation_config.json",
    "content",
    [
        ("max_new_tokens", "many", "generation_config.json: GenerationConfig.max_new_tokens should be int or null"),
        ("max_new_tokens", HUGE, "max_new_tokens is a number beyond 32 bits"),
        ("eos_token_id", ["x"], "eos_token_id should be made of token ids"),
        ("eos_token_id", [[2]], "eos_token_id should be made of token ids"),
        ("pad_token_id", -7, "pad_token_id should be made of token ids"),
        ("num_beams", 10**9, "num_beams should be an integer from 1 to 256"),
        ("num_return_sequences", 0, "num_return_sequences should be an integer from 1"),
        ("do_sample", "true", "do_sample should be bool or null"),
        ("top_p", "all", "top_p should be float or null"),
    ],
)
VALUES |= _values(
    "idefics2",
    "generation_config.json",
    "use",
    [
        ("max_new_tokens", -1, "max_new_tokens should be an integer > 0"),
        ("max_new_tokens", 10**9, "positions, but this model has 64"),
        ("num_beams", 0.5, "num_beams"),
        ("repetition_penalty", -1.0, "repetition_penalty should be a float > 0"),
        ("length_penalty", 1e30, "length_penalty should be a number from -10 to 10"),
        ("max_time", -1, "max_time should be a number of seconds"),
        ("bad_words_ids", [["no"]], "bad_words_ids should be a list of words"),
        ("bad_words_ids", [[500]], "bad_words_ids has the id 500, but the vocabulary has 102"),
        ("stop_strings", ["x"], "stop_strings need a tokenizer"),
        ("guidance_scale", 7.5, "guidance_scale=7.5 is not supported"),
        ("run_code", "rm", "unknown setting 'run_code'"),
    ],
)
VALUES["idefics2: generation_config: num_beams = 0.5"] = Case(
    "idefics2", entry("generation_config.json", "num_beams", 0.5), "content", "num_beams should be int or null"
)

TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
NOTHING = {
    **TEMPLATE,
    "single": TEMPLATE["single"][:1],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}
BEYOND = {**TEMPLATE, "special_tokens": {"<s>": {"id": "<s>", "ids": [999], "tokens": ["<s>"]}}}
LONG = {**TEMPLATE, "special_tokens": {"<s>": {"id": "<s>", "ids": [1] * 99, "tokens": ["<s>"] * 99}}}
DOUBLING = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}
SPLIT = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
ADDED = {"id": 0, "content": "<unk>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TOKENIZERS = _values(
    "llava_next",
    "tokenizer.json",
    "content",
    [
        ("model", GONE, "tokenizer.json: no tokenizer.json that `tokenizers`"),
        ("model.type", "Pickle", "no tokenizer.json that"),
        ("model.vocab", {}, "no token for the letter a|Unk token|no tokenizer.json|cannot be followed|has id None"),
        ("model.vocab", [1, 2], "no tokenizer.json that"),
        ("model.vocab.a", -1, "no tokenizer.json that"),
        ("model.vocab.a", "8", "no tokenizer.json that"),
        ("model.merges", ["a"], "no tokenizer.json that"),
        ("model.merges", [["a", "zz"]], "out of vocabulary"),
        ("model.dropout", 0.5, "model.dropout 0.5 makes ids random"),
        ("post_processor", TEMPLATE, "this tokenizer.json cannot be followed"),
        ("post_processor", NOTHING, "no token for the letter a"),
        ("post_processor", BEYOND, "tokens around a text, found .999"),
        ("post_processor", LONG, "up to 16 tokens around a text"),
        ("post_processor", 3, "no tokenizer.json that"),
        (
            "normalizer",
            DOUBLING,
            "the normalizer can make a text 1,099,511,627,776 times as long, expected at most 256",
        ),
        ("pre_tokenizer", SPLIT, "no tokenizer.json that"),
        ("added_tokens", {}, "no tokenizer.json that"),
        ("added_tokens", [1], "added_tokens is a list of at most"),
        (
            "added_tokens",
            [{"id": i, "content": f"<{i}>" * 50} for i in range(50_000)],
            "added_tokens is a list of at most",
        ),
        ("model.vocab.a", 2**31, "'a' has id 2,147,483,648, expected at most"),
        (
            "post_processor",
            {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 10_000,
                "pair": [],
                "special_tokens": {},
            },
            "the post_processor can make a text 10,000 times as long",
        ),
        ("added_tokens.0.id", 77, "'<unk>' has id 0, but 77 under added_tokens"),
        ("added_tokens.0.id", "0", "no tokenizer.json that|'<unk>' has id 0, but '0' under added_tokens"),
        (
            "added_tokens",
            [{**ADDED, "special": True, "content": "<image>", "id": 4, "lstrip": 3}],
            "no tokenizer.json that",
        ),
    ],
)
TOKENIZERS |= _values(
    "llava_next",
    "tokenizer_config.json",
    "content",
    [
        ("model_max_length", "long", "model_max_length is a number of tokens, found 'long'"),
        ("model_max_length", -1, "model_max_length is a number of tokens, found -1"),
        ("model_max_length", True, "model_max_length is a number of tokens, found True"),
        ("chat_template", 7, "chat_template should be text, found int"),
        ("padding_side", "middle", "padding_side is .left. or .right., found 'middle'"),
        ("padding_side", None, "padding_side is .left. or .right., found None"),
        ("truncation_side", "both", "truncation_side is .left. or .right."),
        ("added_tokens_decoder", [3], "added_tokens_decoder is an object of ids"),
        ("added_tokens_decoder", {"x": {"content": "<y>"}}, "gives an id its token, found .* for 'x'"),
        ("added_tokens_decoder", {"4": "<image>"}, "gives an id its token"),
        ("added_tokens_decoder", {"4": {"content": None}}, "gives an id its token"),
        (
            "added_tokens_decoder",
            {"5": {"content": "<image>"}},
            "'<image>' has id 4 by tokenizer.json but 5 by the files",
        ),
        ("added_tokens_decoder", {"999": {"content": "<new>"}}, "'<new>' has id 102 by tokenizer.json but 999"),
    ],
)
TOKENIZERS |= _cases(
    "llava_next",
    "content",
    {
        "tokenizer cut in half": (cut("tokenizer.json", lambda size: size // 2), "tokenizer.json"),
        "tokenizer is a list": (content("tokenizer.json", b"[]"), "no tokenizer.json that `tokenizers`"),
        "tokenizer is deep": (content("tokenizer.json", DEEP.encode()), "no tokenizer.json that `tokenizers`"),
        "tokenizer of 33 MB": (cut("tokenizer.json", lambda _: 2**25 + 1), "has 33,554,433 bytes, expected at most"),
        "added tokens without end": (
            text("tokenizer.json", lambda s: s.replace('"added_tokens": [', '"added_tokens": ' + "[" * 9999)),
            "tokenizer.json",
        ),
        "20,000 added tokens": (
            text(
                "tokenizer.json",
                lambda s: json.dumps(
                    {
                        **json.loads(s),
                        "added_tokens": [
                            {**ADDED, "special": bool(i % 2), "id": i, "content": f"<{i}>"} for i in range(20_000)
                        ],
                    }
                ),
            ),
            "added_tokens",
        ),
        "token ids that are none": (
            content("added_tokens.json", b'{"<a>": "4"}'),
            "each token its id, found '4' for '<a>'",
        ),
        "token ids that contradict": (content("added_tokens.json", b'{"<image>": 7}'), "'<image>' has id 4 .* but 7"),
        "20,000 tokens beside the file": (
            content("added_tokens.json", json.dumps({f"<{i}>": i for i in range(102, 20_102)}).encode()),
            "the files beside tokenizer.json list more than 16384 added tokens",
        ),
        "2,000 tokens that the file lacks": (
            content("added_tokens.json", json.dumps({f"<{i}>": i for i in range(102, 2_102)}).encode()),
            "tokenizer.json lacks 2,000 tokens that the files beside it have",
        ),
        "a template in Latin-1": (content("chat_template.jinja", b"caf\xe9"), "chat_template.jinja: .*utf-8"),
        "roles that are numbers": (
            content("special_tokens_map.json", b'{"eos_token": 3}'),
            "eos_token should be a string, found 3",
        ),
    },
)
TOKENIZERS |= _cases(
    "llava_next",
    "use",
    {
        "a tokenizer of more tokens": (
            several(
                entry("tokenizer.json", "model.vocab.k", 1000),
                entry("tokenizer.json", "model.vocab.zz", 101),
            ),
            "input_ids has the id 1000, but the vocabulary has 102 tokens; is the tokenizer of another checkpoint",
        ),
    },
)

NF4, NESTED = (
    BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    for nested in (False, True)
)
INT8, INT4 = BitsAndBytesConfig(load_in_8bit=True), Int4Config(32)
ABOUT = {"quant_type": "nf4", "blocksize": 64, "shape": [16, 24], "nested_blocksize": 256, "nested_dtype": "float32"}


def about(**changes: Any) -> bytes:
    return json.dumps({**ABOUT, **changes}).encode()


QUANTISED = _values(
    "idefics2",
    "config.json",
    "content",
    [
        ("quantization_config", value, f"quantization_config of config.json: {words}")
        for value, words in [
            (3, "quantization_config should be a JSON object"),
            ({}, "quant_method None is not supported"),
            ({"quant_method": ["awq"]}, "quant_method .'awq'. is not supported"),
            ({"quant_method": "x" * 10**6}, "quant_method 'x+"),
            ({"load_in_4bit": "yes"}, "load_in_4bit should be True or False"),
            ({"load_in_4bit": True, "load_in_8bit": True}, "set one of load_in_4bit and load_in_8bit"),
            ({"load_in_4bit": True, "bnb_4bit_quant_type": ["nf4"]}, "bnb_4bit_quant_type should be"),
            ({"load_in_4bit": True, "bnb_4bit_compute_dtype": {}}, "bnb_4bit_compute_dtype should be one of"),
            ({"quant_method": "minivlm_int4", "group_size": [32]}, "group_size should be one of 32, 64, 128"),
            ({"quant_method": "minivlm_int4", "group_size": 32, "skip_modules": "a"}, "skip_modules should be a list"),
            ({"quant_method": "awq", "bits": 8}, "AWQ files of bits 8 are not supported"),
            ({"quant_method": "awq", "group_size": 0}, "group_size should be -1 or a multiple of 32"),
            ({"quant_method": "awq", "group_size": 2**70}, "group_size should be -1 or a multiple of 32"),
            ({"quant_method": "gptq", "bits": [4] * 9999}, "GPTQ files of bits .4, 4"),
            ({"quant_method": "gptq", "bits": 4, "group_size": "128"}, "group_size should be a whole number"),
        ]
    ],
)
QUANTISED |= _cases(
    "idefics2",
    "content",
    {
        "said to be quantised": (
            entry("config.json", "quantization_config", {"load_in_8bit": True, "quant_method": "bitsandbytes"}),
            "says that the weights are quantised, but the files hold no tensor",
        ),
        "quantised twice over": (
            several(
                quantised(NF4, lambda *_: None), entry("config.json", "quantization_config.bnb_4bit_quant_type", "fp4")
            ),
            "missing:(.|\n)*bitsandbytes__fp4",
        ),
        "NF4 that does not say so": (
            several(quantised(NF4, lambda *_: None), entry("config.json", "quantization_config", GONE)),
            "tensors unexpected:(.|\n)*absmax",
        ),
        "NF4: no state": (state(NF4, b""), "down_proj: its quant_state is not valid JSON"),
        "NF4: a deep state": (state(NF4, b"[" * 4000), "its quant_state is not valid JSON"),
        "NF4: a state of a megabyte": (state(NF4, about(shape="x" * 10**6)), "its quant_state has 1,000,.* bytes"),
        "NF4: a state in rows": (state(NF4, b"{}", [1, 2]), "its quant_state has quant_type None"),
        "NF4: state is a list": (state(NF4, b"[]"), "should be a JSON object, found list"),
        "NF4: blocks of nothing": (state(NF4, about(blocksize=0)), "its quant_state has blocksize 0, expected 64"),
        "NF4: another shape": (state(NF4, about(shape=[24, 16])), "its quant_state has shape .24, 16., expected"),
        "NF4: codes of floats": (part(NF4, "weight", "F32", [1], bytes(4)), r"its weight is .4. of torch.uint8"),
        "NF4: values of half precision": (
            part(NF4, "weight.quant_map", "F16", [16], bytes(32)),
            "its weight.quant_map is .16. of torch.float16, expected .16. of torch.float32",
        ),
        "NF4: values of truth": (
            part(NF4, "weight.quant_map", "BOOL", [16], bytes(16)),
            "quant_map is .16. of torch.b",
        ),
        "NF4: one scale": (part(NF4, "weight.absmax", "F32", [], bytes(4)), "its weight.absmax is .. of torch.float32"),
        "NF4, doubly: no offset": (state(NESTED, about()), "nested_offset None, expected a number"),
        "NF4, doubly: offsets": (state(NESTED, about(nested_offset=[1])), "nested_offset .1., expected a number"),
        "NF4, doubly: a great offset": (state(NESTED, about(nested_offset=10**400)), "nested_offset 10+, expected"),
        "NF4, doubly: whole values": (
            part(NESTED, "weight.nested_quant_map", "I64", [256], bytes(2048)),
            "its weight.nested_quant_map is .256. of torch.int64",
        ),
        "int8: whole scales": (
            part(INT8, "SCB", "I64", [16], bytes(128)),
            "its SCB are of torch.int64, expected one of float",
        ),
        "int8: by columns": (part(INT8, "weight_format", "U8", [], b"\x01"), "its weight_format is 1, expected 0"),
        "int4: whole scales": (part(INT4, "scales", "I32", [16, 1], bytes(64)), "its scales are of torch.int32"),
        "int4: signed codes": (
            part(INT4, "qweight", "I8", [16, 12], bytes(192)),
            "its qweight is .16, 12. of torch.int8",
        ),
    },
)
QUANTISED |= _cases(
    "idefics2",
    "use",
    {
        f"{name}: scales that are none": (
            part(config, leaf, "F32", shape, b"\xff" * 4 * shape[0]),
            "the weights of model.text_model.layers.0.mlp.down_proj hold NaN",
        )
        for name, config, leaf, shape in [
            ("NF4", NF4, "weight.absmax", [6]),
            ("int8", INT8, "SCB", [16]),
            ("int4", INT4, "scales", [16, 1]),
        ]
    },
)

BAD_PIXELS = [
    ("image_std", [0.5, 0, 0.5], "image_std divides the pixels and so must not be 0"),
    ("image_std", [0.5, -0.5, 0.5], "image_std divides the pixels"),
    ("image_std", [0.5, 1e-40, 0.5], "image_std divides the pixels"),
    ("image_std", [0.5, 0.5], "image_std is made of numbers"),
    ("image_mean", [0.5] * 4, "image_mean is made of numbers"),
    ("image_mean", 0.5, "image_mean is made of numbers"),
    ("image_mean", [0.5, "0.5", 0.5], "image_mean is made of numbers"),
    ("image_mean", [0.5, True, 0.5], "image_mean is made of numbers"),
    ("image_mean", [0.5, 1e300, 0.5], "image_mean is made of numbers"),
    ("rescale_factor", 0, "rescale_factor multiplies the pixels"),
    ("rescale_factor", -1.0, "rescale_factor multiplies the pixels"),
    ("rescale_factor", "1/255", "rescale_factor is made of numbers"),
    ("rescale_factor", HUGE, "rescale_factor is made of numbers"),
    ("resample", 9, "resample is one of Pillow's filters"),
    ("resample", "bicubic", "resample is one of Pillow's filters"),
    ("resample", True, "resample is one of Pillow's filters"),
    ("do_rescale", "false", "do_rescale is true or false"),
    ("do_normalize", 1, "do_normalize is true or false"),
]
PICTURES = _values("idefics", "preprocessor_config.json", "content", BAD_PIXELS)
PICTURES |= _values(
    "idefics",
    "preprocessor_config.json",
    "content",
    [
        ("image_size", -224, "image_size is the side of a square"),
        ("image_size", 10**9, "image_size is the side of a square"),
        ("image_size", 5000, "image_size is the side of a square in pixels, 1 to 4096"),
        ("image_num_channels", 1, "image_num_channels is 3"),
        ("size", {"height": [], "width": 3}, "images are squares"),
        ("size", 224, "images are squares"),
    ],
)
PICTURES |= _values(
    "idefics2",
    "preprocessor_config.json",
    "content",
    [
        ("size", {"shortest_edge": 0, "longest_edge": 28}, "size is .* with 1 <= a <= b <= 4096"),
        ("size", {"shortest_edge": 56, "longest_edge": 28}, "size is .* with 1 <= a <= b"),
        ("size", {"shortest_edge": 14, "longest_edge": 10**9}, "size is .* with 1 <= a <= b"),
        ("size", {"shortest_edge": "14", "longest_edge": 28}, "size is"),
        ("size", [14, 28], "size is"),
        ("do_image_splitting", "no", "do_image_splitting is true or false"),
    ],
)
PICTURES |= _values(
    "llava_next",
    "preprocessor_config.json",
    "content",
    [
        ("image_grid_pinpoints", GONE, "lack image_grid_pinpoints"),
        ("image_grid_pinpoints", [[28, 57]], "multiples of the tile's side of 28"),
        ("image_grid_pinpoints", [[28, 56]] * 999, "at most 256"),
        ("image_grid_pinpoints", [[0, 0]], "whole numbers from 1"),
        ("image_grid_pinpoints", {"28": 56}, "image_grid_pinpoints is a list"),
        ("crop_size", {"height": 28, "width": 29}, "crop_size is a square"),
        ("crop_size", {"height": [28], "width": [28]}, "crop_size is a square"),
        ("crop_size", 10**9, "crop_size is a square"),
        ("size", {"shortest_edge": -28}, "size is a square"),
        ("size", {"depth": 28}, "size is a square"),
    ],
)
PICTURES |= _values(
    "llava_next",
    "processor_config.json",
    "content",
    [
        ("patch_size", 0, "patch_size is a whole number from 1 to the tile's side"),
        ("patch_size", "14", "patch_size is a whole number"),
        ("patch_size", 10**9, "patch_size is a whole number"),
        ("vision_feature_select_strategy", "none", "vision_feature_select_strategy is one of"),
        ("image_token", 7, "image_token is the text"),
        ("image_token", "", "image_token is the text"),
        ("num_additional_image_tokens", -1, "num_additional_image_tokens is a whole number"),
        ("num_additional_image_tokens", HUGE, "num_additional_image_tokens is a whole number from 0 to 64"),
    ],
)
PICTURES |= _values(
    "idefics2",
    "processor_config.json",
    "content",
    [
        ("image_seq_len", 0, "image_seq_len is the number"),
        ("image_seq_len", 10**9, "image_seq_len is the number"),
        ("image_seq_len", "2", "image_seq_len is the number"),
        ("image_seq_len", True, "image_seq_len is the number"),
    ],
)
PICTURES |= _values(
    "idefics2",
    "processor_config.json",
    "use",
    [("image_seq_len", 3, "the prompt has 3 image tokens, but 1 images of 2 vectors each")],
)
PICTURES |= _values(
    "idefics",
    "processor_config.json",
    "content",
    [("add_end_of_utterance_token", "yes", "add_end_of_utterance_token is true or false")],
)

NUMBERS = {
    f"{family}: {value} in a weight": Case(family, numbers(value), "use", words)
    for family in CONFIGS
    for value, words in [
        (float("nan"), "logits of row 0 are not finite at new token 1: the weights of lm_head hold NaN or infinity"),
        (float("inf"), "the weights of lm_head hold NaN or infinity; `minivlm inspect MODEL --check`"),
    ]
}

GROUPS = {
    "files that are absent, cut, or something else": FILES,
    "JSON that is none": JSON,
    "headers of weights": HEADERS,
    "indices of shards": INDICES,
    "settings that cannot be": VALUES,
    "tokenizers": TOKENIZERS,
    "quantised weights": QUANTISED,
    "settings of pictures": PICTURES,
    "numbers that are none": NUMBERS,
}
CASES = {name: case for group in GROUPS.values() for name, case in group.items()}


# ---- What may look odd and is sound ----------------------------------------------------------------------------------


def link_inside(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "weights.bin")
    (folder / WEIGHTS).symlink_to("weights.bin")


def hub_cache(folder: Path) -> None:
    """The layout of the Hub's cache: `folder` becomes a link into snapshots/, whose files are links into blobs/."""
    home = folder.with_name(folder.name + ".cache")
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots" / "0a1b").mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, home / "blobs" / str(number))
        (home / "snapshots" / "0a1b" / path.name).symlink_to(Path("../../blobs") / str(number))
    folder.rmdir()
    folder.symlink_to(home / "snapshots" / "0a1b")


def odd(values: dict[str, Any]) -> bytes:
    """Data that begin at an odd byte: most writers fill the header up to 8, and the format does not ask for it."""
    raw = json.dumps(values).encode()
    return raw + b" " * (1 - len(raw) % 2)


SOUND: dict[str, Break] = {
    "as it is": lambda folder: None,
    "two shards": sharded(),
    "a link inside the folder": link_inside,
    "a config that lies outside": linked("config.json"),
    "a tokenizer that lies outside": linked("tokenizer.json"),
    "weights that lie outside": linked(WEIGHTS),
    "a shard that lies outside": several(sharded(), linked("b.safetensors")),
    "weights of a link through a folder": several(
        lambda folder: (folder / "up").symlink_to(folder.parent),
        lambda folder: shutil.move(folder / WEIGHTS, folder.parent / "w.safetensors"),
        lambda folder: (folder / WEIGHTS).symlink_to("up/w.safetensors"),
    ),
    "the Hub's cache": hub_cache,
    "settings that nobody knows": entry("config.json", "favourite_colour", "blue"),
    "a header that ends at an odd byte": header(odd),
    "templates without a name": entry("processor_config.json", "chat_template", ["a", {"name": ["default"]}]),
    "other files beside": content("pytorch_model.bin", b"\x80\x02}q\x00."),
    "an unfinished download of something else": content("notes.txt.incomplete", b""),
}

if __name__ == "__main__":  # the numbers of the README's table
    for what, group in GROUPS.items():
        print(f"{len(group):4d}  {what}")
    print(f"{len(CASES):4d}  in all", file=sys.stdout)
