"""Idefics2's processor against recorded transformers 4.57.6 outputs and against transformers 5.23 side by side."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from committed import PHOTOGRAPHS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minivlm.processing.idefics2 import (
    Idefics2ImageProcessor,
    Idefics2Processor,
    crop_boxes,
    image_block,
    resized_size,
)
from minivlm.text.tokenizer import Tokenizer

FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"


@pytest.fixture
def processor(processor_of, checkpoint):
    return processor_of(Idefics2Processor, checkpoint("idefics2-8b"))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def assert_pixels_equal(ours, theirs) -> None:
    for name in ("pixel_values", "pixel_attention_mask"):
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


# ---- geometry


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (480, 640)),
        ((1024, 768), (980, 735)),
        ((2000, 100), (980, 378)),
        ((100, 2000), (378, 980)),
        ((30, 40), (378, 378)),
        ((191, 384), (378, 384)),
        ((981, 980), (980, 979)),
        ((1001, 1500), (653, 980)),
        ((899, 1024), (860, 980)),
        ((377, 980), (378, 980)),
        ((3000, 4000), (735, 980)),
        ((1000, 1000), (980, 980)),
        ((1, 1), (378, 378)),
    ],
)
def test_resized_size(size, expected):
    assert resized_size(*size) == expected


@given(st.integers(1, 5000), st.integers(1, 5000))
@settings(max_examples=300, deadline=None)
def test_geometry_equals_the_reference(height, width):
    from transformers.image_utils import SizeDict
    from transformers.models.idefics2 import image_processing_pil_idefics2 as reference

    blank = np.broadcast_to(np.uint8(0), (3, height, width))
    size = SizeDict(shortest_edge=378, longest_edge=980)
    assert resized_size(height, width) == reference.get_resize_output_image_size(blank, size)
    crops = reference.Idefics2ImageProcessorPil.split_images(None, blank)[:4]
    boxes = crop_boxes(height, width)
    assert [(bottom - top, right - left) for left, top, right, bottom in boxes] == [c.shape[1:] for c in crops]


@pytest.mark.parametrize("splitting", [False, True])
@pytest.mark.parametrize(
    "text", ["a<image>b", "<image><image>", "<image> <image>", "<image>", f"{FAKE}<image>{FAKE}x", "</s><image>\n"]
)
def test_image_tokens_are_those_of_the_expanded_text(processor, text, splitting):
    """The reference writes every token of an image into the text, and encodes that."""
    processor.image_processor.do_image_splitting, processor.image_seq_len = splitting, 2
    image = f"{FAKE}{IMAGE * 2}{FAKE}" * (5 if splitting else 1)
    written = text.replace(IMAGE, image).replace(FAKE + FAKE, FAKE)
    ids = processor(text=text, images=[noise(9, 9)] * text.count(IMAGE)).input_ids[0]
    assert ids == processor.tokenizer.encode(written)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", {"longest_edge": 64}),
        ("size", 64),
        ("do_image_splitting", "yes"),
        ("image_mean", [0.5]),
        ("resample", "bicubic"),
    ],
)
def test_fields_set_later_are_checked_when_used(processor, name, value):
    setattr(processor.image_processor, name, value)
    for call in (lambda: processor(text=IMAGE, images=noise(9, 9)), lambda: processor.image_processor(noise(9, 9))):
        with pytest.raises(ValueError, match=f"{name} is"):
            call()


@pytest.mark.parametrize("length", [0, "64", 6.4, None])
def test_image_seq_len_is_checked_when_used(processor, length):
    processor.image_seq_len = length
    with pytest.raises(ValueError, match="image_seq_len"):
        processor(text=IMAGE, images=noise(9, 9))


def test_image_block():
    assert image_block(2, False) == [FAKE, IMAGE, IMAGE, FAKE]
    assert image_block(1, True) == [FAKE, IMAGE] * 5 + [FAKE]


# ---- recorded outputs


def recorded(data) -> list[dict]:
    return json.loads((data / "processors_4.57.6.json").read_text(encoding="utf-8"))["cases"]


def unpacked(row: list) -> list[int]:
    return [i for entry in row for i in ([entry] if isinstance(entry, int) else [entry[0]] * entry[1])]


@pytest.mark.parametrize("number", range(5))
def test_recorded_cases(checkpoint, data, pictures, number):
    case = recorded(data)[number]
    options = dict(case["kwargs"])
    changes = {"do_image_splitting": options.pop("split")} if "split" in options else {}
    processor = Idefics2Processor.from_pretrained(checkpoint(case["checkpoint"].split("/")[1]), **changes)
    images = [[pictures / name for name in row] for row in case["images"]]
    inputs = processor(text=case["text"], images=images, return_tensors="pt", **options)
    assert inputs.input_ids.tolist() == [unpacked(row) for row in case["input_ids"]]
    assert inputs.attention_mask.sum(1).tolist() == case["attention_mask"]
    expected = case["pixel_values"]
    assert list(inputs.pixel_values.shape) == expected["shape"]
    assert hashlib.sha256(inputs.pixel_values.numpy().tobytes()).hexdigest() == expected["sha256"]
    assert inputs.pixel_attention_mask.double().mean().item() == pytest.approx(
        case["pixel_attention_mask"]["mean"], abs=1e-12
    )


# ---- transformers 5.23, side by side


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs(processor, reference, pictures, name, split):
    processor.image_processor.do_image_splitting = reference.image_processor.do_image_splitting = split
    path = str(pictures / name)
    theirs = reference(text="<image>", images=Image.open(path), return_tensors="pt")
    assert_pixels_equal(processor(text="<image>", images=path, return_tensors="pt"), theirs)
    ours = processor.image_processor(Image.open(path), return_tensors="np")
    assert np.array_equal(ours.pixel_values, theirs["pixel_values"].numpy())


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (40, 30), (3, 2), (100, 2000), (1500, 1001), (980, 981), (979, 377)])
def test_sizes(processor, reference, size, split):
    if split and size == (1, 1):
        processor.image_processor.do_image_splitting = True
        with pytest.raises(ValueError, match="no quarters"):
            processor(text="<image>", images=noise(1, 1))
        return
    processor.image_processor.do_image_splitting = reference.image_processor.do_image_splitting = split
    arguments = {"text": "<image>", "images": noise(*size), "return_tensors": "pt"}
    assert_pixels_equal(processor(**arguments), reference(**arguments))


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("counts", [(1, 2, 3), (0, 3), (2, 0, 1), (0, 0, 1)])
def test_batches(processor, reference, counts, split):
    processor.image_processor.do_image_splitting = reference.image_processor.do_image_splitting = split
    images = [[noise(60 + 97 * n, 50 + 111 * row, n) for n in range(count)] for row, count in enumerate(counts)]
    texts = ["x <image>" * count + "y" for count in counts]
    ours = processor(text=texts, images=images, padding=True, return_tensors="pt")
    theirs = reference.image_processor(images, return_tensors="pt")
    assert_pixels_equal(ours, theirs)
    flat = processor(text=texts, images=[i for row in images for i in row], padding=True, return_tensors="pt")
    assert all(torch.equal(flat[name], ours[name]) for name in ours)
    for row, count in enumerate(counts):
        assert ours.input_ids[row].eq(32001).sum() == count * 64 * (5 if split else 1)


@pytest.mark.parametrize(
    "change",
    [
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"rescale_factor": 0.01},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.8, 0.7]},
        {"resample": 3},
        {"resample": 0},
        {"size": {"shortest_edge": 200, "longest_edge": 448}},
        {"do_pad": False},
    ],
    ids=str,
)
def test_every_field(checkpoint, reference, change):
    ours = Idefics2ImageProcessor.from_pretrained(checkpoint("idefics2-8b-base"))
    processor = Idefics2ImageProcessor.from_dict(vars(ours) | change)
    image = noise(600, 500)
    theirs = reference.image_processor([[image]], do_image_splitting=False, return_tensors="pt", **change)
    inputs = processor(image, return_tensors="pt")
    assert torch.equal(inputs.pixel_values, theirs["pixel_values"].float())
    assert ("pixel_attention_mask" in inputs) == ("pixel_attention_mask" in theirs)


def test_named_differences_from_5_23(processor, reference, pictures):
    """1: after a special token the file's "▁" is kept and no space is put in. 2: bare image processors here treat
    EXIF and transparency as processors do."""
    messages_text = f"User:{IMAGE}What is this?{END}\nAssistant:"
    ours = processor(text=messages_text, images=noise(400, 400)).input_ids[0]
    reference.image_processor.do_image_splitting = True
    theirs = reference(text=messages_text, images=noise(400, 400)).input_ids[0]
    assert ours[-10:] == [1824, 349, 456, 28804, 32002, 28705, 13, 7226, 11143, 28747]
    assert theirs[-9:] == [1824, 349, 456, 28804, 32002, 13, 7226, 11143, 28747]
    assert ours[:-10] == theirs[:-9]
    rotated = Image.open(pictures / "exif_landscape_6.jpg")
    assert processor.image_processor(rotated).pixel_values.shape[-2:] == (653, 980)
    assert reference.image_processor(rotated)["pixel_values"].shape[-2:] == (980, 653)


def test_documentation_snippet(processor):
    """The calls of transformers' Idefics2 page."""
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What’s the difference between these two images?"},
                {"type": "image"},
                {"type": "image"},
            ],
        }
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == f"User: What’s the difference between these two images?<image><image>{END}\nAssistant:"
    inputs = processor(images=[noise(40, 30), noise(30, 40)], text=text, return_tensors="pt").to("cpu")
    assert inputs.pixel_values.shape == (1, 10, 3, 378, 378)
    labels = inputs.input_ids.clone()
    labels[labels == processor.tokenizer.pad_token_id] = -100
    labels[labels == processor.image_token_id] = -100
    inputs["labels"] = labels
    assert processor.batch_decode(inputs.input_ids, skip_special_tokens=True)[0].startswith("User: What’s")


# ---- text and image counts


def test_text_alone(processor):
    for images in (None, [], [[]]):
        inputs = processor(text="Hello", images=images, return_tensors="pt")
        assert inputs.input_ids.tolist() == [[1, 22557]]
        assert list(inputs) == ["input_ids", "attention_mask"]
    assert processor(text=["Hello", "a b"], images=[[], None]).input_ids == [[1, 22557], [1, 264, 287]]
    assert processor(text="Hello", add_special_tokens=False).input_ids == [[22557]]
    assert processor(images=noise(9, 9)).pixel_values.shape == (1, 5, 3, 378, 378)


def test_padding_is_on_the_left(processor):
    inputs = processor(text=["a b c", "a"], padding=True, return_tensors="pt")
    assert inputs.input_ids.tolist() == [[1, 264, 287, 277], [0, 0, 1, 264]]
    assert inputs.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_truncation_of_text_behind_the_picture_is_fine(processor):
    processor.image_processor.do_image_splitting = False
    inputs = processor(text="<image> " + "word " * 200, images=noise(9, 9), max_length=80, truncation=True)
    assert len(inputs.input_ids[0]) == 80
    assert inputs.input_ids[0].count(32001) == 64


# ---- configuration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"height": 3, "width": 3}}, "shortest_edge"),
        ({"size": 980}, "shortest_edge"),
        ({"size": {"shortest_edge": 0, "longest_edge": 980}}, "shortest_edge"),
        ({"size": {"shortest_edge": 980, "longest_edge": 378}}, "shortest_edge"),
        ({"size": {"shortest_edge": 10**9, "longest_edge": 10**9}}, "4096"),
        ({"resample": 9}, "resample"),
        ({"resample": "bilinear"}, "resample"),
        ({"image_mean": 0.5}, "image_mean"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": [0.5, "0.5", 0.5]}, "image_std"),
        ({"image_std": [0.5, 0, 0.5]}, "must not be 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"rescale_factor": float("nan")}, "NaN is no number in JSON"),
    ],
    ids=str,
)
def test_nonsense_in_the_configuration(checkpoint, tmp_path, change, message):
    folder = shutil.copytree(checkpoint("idefics2-8b"), tmp_path / "x")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        Idefics2Processor.from_pretrained(folder)


def test_pictures_of_several_sizes_need_padding():
    processor = Idefics2ImageProcessor(do_pad=False)
    with pytest.raises(ValueError, match="do_pad=True"):
        processor([noise(400, 500), noise(500, 400)])


def test_from_pretrained_options(checkpoint):
    folder = checkpoint("idefics2-8b")
    processor = Idefics2Processor.from_pretrained(
        folder, do_image_splitting=False, size={"longest_edge": 448, "shortest_edge": 378}, use_fast=True
    )
    assert processor.image_processor.do_image_splitting is False
    assert processor(text="<image>", images=noise(600, 500)).pixel_values.shape == (1, 1, 3, 378, 448)
    assert Idefics2Processor.from_pretrained(folder, do_image_splitting=None).image_processor.do_image_splitting is True
    assert Idefics2Processor.from_pretrained(folder, padding_side="right").tokenizer.padding_side == "right"
    with pytest.raises(TypeError, match="do_image_spliting"):
        Idefics2Processor.from_pretrained(folder, do_image_spliting=False)
    with pytest.raises(ValueError, match="image_seq_len"):
        Idefics2Processor.from_pretrained(folder, image_seq_len=0)


def test_missing_files(tmp_path):
    for name in ("preprocessor_config.json", "tokenizer.json"):
        with pytest.raises(OSError, match=name):
            Idefics2Processor.from_pretrained(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text("{}")


def test_a_tokenizer_without_the_three_tokens_gets_them(processor):
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"))
    made = Idefics2Processor(processor.image_processor, Tokenizer(backend, {"unk_token": "<unk>"}), image_seq_len=1)
    assert made.tokenizer.convert_tokens_to_ids([FAKE, IMAGE, END]) == [2, 3, 4]
    assert made(text="a<image>", images=noise(9, 9)).input_ids == [[0, *([2, 3] * 5), 2]]


@pytest.mark.parametrize("name", ["idefics2-8b", "idefics2-8b-base"])
def test_saved_processors_load_in_transformers_and_here(checkpoint, tmp_path, name):
    from transformers import AutoProcessor

    ours = Idefics2Processor.from_pretrained(checkpoint(name), do_image_splitting=False, image_seq_len=5)
    ours.save_pretrained(tmp_path / "saved")
    again = Idefics2Processor.from_pretrained(tmp_path / "saved")
    theirs = AutoProcessor.from_pretrained(tmp_path / "saved")
    original = AutoProcessor.from_pretrained(checkpoint(name), image_seq_len=5)
    original.image_processor.do_image_splitting = False
    arguments = {
        "text": ["a <image>b", "c"],
        "images": [[noise(400, 390)], []],
        "padding": True,
        "return_tensors": "pt",
    }
    saved, expected, back, before = again(**arguments), ours(**arguments), theirs(**arguments), original(**arguments)
    assert all(torch.equal(saved[key], expected[key]) for key in expected)
    assert all(torch.equal(back[key], before[key]) for key in before)
    assert_pixels_equal(saved, back)
    assert again.chat_template == ours.chat_template == theirs.chat_template
    # the other way round: what transformers 5 writes
    theirs.save_pretrained(tmp_path / "theirs")
    shutil.copy(checkpoint(name) / "tokenizer.json", tmp_path / "theirs")  # 5.23 saves its rebuilt one
    from_theirs = Idefics2Processor.from_pretrained(tmp_path / "theirs")(**arguments)
    assert all(torch.equal(from_theirs[key], expected[key]) for key in expected)
