"""IDEFICS's processor against recorded transformers 4.57.6 outputs and against transformers 5.23 side by side.

Two kinds of checkpoint: `small`, built here, with letters for a vocabulary, tests every rule; the released ones need
Llama's vocabulary, which may not be stored here: their tests are skipped where ../shared/hub does not have it.
"""

import hashlib
import http.server
import json
import random
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from committed import PHOTOGRAPHS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_idefics import SPECIAL, write_small

from minivlm.processing import fetch
from minivlm.processing.idefics import IdeficsImageProcessor, IdeficsProcessor, visible

SHARED = Path(__file__).parents[3] / "shared" / "hub" / "HuggingFaceM4"
UNK, BOS, EOS, F, I, EOU = range(6)
FAKE, IMAGE, END = SPECIAL[3:]
KEYS = ["input_ids", "attention_mask", "pixel_values", "image_attention_mask"]


def load_reference(folder: Path):
    """transformers' processor, with the Pillow backend whether or not torchvision is installed."""
    from transformers import AutoProcessor
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = IdeficsImageProcessorPil.from_pretrained(folder)
    return processor


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    return write_small(tmp_path_factory.mktemp("idefics") / "small")


@pytest.fixture
def processor(small):
    return IdeficsProcessor.from_pretrained(small)


@pytest.fixture(scope="session")
def reference(small):
    return load_reference(small)


@pytest.fixture(scope="session")
def released():
    """`released("idefics-9b")`: (ours, theirs), with Llama's vocabulary."""
    made = {}

    def load(name: str):
        if not (SHARED / name / "tokenizer.json").is_file():
            pytest.skip(f"Llama's vocabulary may not be stored here, and {SHARED / name} has no tokenizer.json")
        if name not in made:
            made[name] = load_reference(SHARED / name)
        return IdeficsProcessor.from_pretrained(SHARED / name), made[name]

    return load


def noise(width: int, height: int, seed: int = 0, channels: int = 3) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8))


def assert_equal(ours, theirs) -> None:
    assert list(ours) == list(theirs) == KEYS
    for name in KEYS:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


def sees(inputs, row: int = 0) -> list[int | None]:
    """Which picture each token sees."""
    mask = inputs["image_attention_mask"][row]
    assert mask.sum(1).max() <= 1
    return [int(seen.argmax()) if seen.any() else None for seen in mask]


# ---- recorded outputs


def recorded(data) -> list[dict]:
    cases = json.loads((data / "processors_4.57.6.json").read_text(encoding="utf-8"))["cases"]
    return [case for case in cases if "idefics-" in case["checkpoint"]]


@pytest.mark.parametrize("number", range(3))
def test_recorded_cases(released, data, pictures, number):
    case = recorded(data)[number]
    processor, _ = released(case["checkpoint"].split("/")[1])
    prompts = [[pictures / item if (pictures / item).is_file() else item for item in row] for row in case["text"]]
    inputs = processor(prompts, **case["kwargs"])
    assert inputs.input_ids.tolist() == case["input_ids"]
    assert inputs.attention_mask.sum(1).tolist() == case["attention_mask"]
    for name in ("pixel_values", "image_attention_mask"):
        assert list(inputs[name].shape) == case[name]["shape"]
        assert str(inputs[name].dtype) == case[name]["dtype"]
        assert hashlib.sha256(inputs[name].numpy().tobytes()).hexdigest() == case[name]["sha256"]


# ---- pictures


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs(pictures, name):
    """Equal to the reference on the upright picture: of the photographs, one is stored lying on its side."""
    from PIL import ImageOps
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    upright = ImageOps.exif_transpose(Image.open(pictures / name))
    expected = IdeficsImageProcessorPil(image_size=224)([upright], return_tensors="pt")
    for picture in (pictures / name, str(pictures / name), Image.open(pictures / name), (pictures / name).read_bytes()):
        ours = IdeficsImageProcessor()(picture, return_tensors="pt")
        assert ours.shape == (1, 3, 224, 224)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (40, 30), (3, 2), (223, 225), (224, 224), (100, 2000), (1500, 1001)])
def test_sizes(size):
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    expected = IdeficsImageProcessorPil(image_size=224)([noise(*size)], return_tensors="pt")
    assert torch.equal(IdeficsImageProcessor()(noise(*size), return_tensors="pt"), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 30},
        {"do_rescale": False},
        {"do_normalize": False},
        {"rescale_factor": 0.01},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.8, 0.7]},
        {"resample": 2},
        {"do_resize": False},
    ],
    ids=str,
)
def test_every_field(change):
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    made = IdeficsImageProcessorPil(**{"image_size": 224} | change)
    expected = made([noise(60, 50), noise(60, 50, 1)], return_tensors="pt")
    ours = IdeficsImageProcessor(**change)
    assert torch.equal(ours([noise(60, 50), noise(60, 50, 1)], return_tensors="pt"), expected.float())
    assert IdeficsImageProcessor.from_dict(json.loads(made.to_json_string())) == ours


def test_transparency_is_laid_on_white_on_every_route(tmp_path):
    """Named difference: the reference does so with `PIL` images and drops the transparency of files and URLs."""
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    palette = noise(9, 7).quantize(8)
    palette.info["transparency"] = 3
    for index, picture in enumerate([noise(9, 7, channels=4), noise(9, 7, channels=4).convert("LA"), palette]):
        expected = IdeficsImageProcessorPil(image_size=24)([picture], return_tensors="pt")
        path = tmp_path / f"{index}.png"
        picture.save(path)
        for route in (picture, path, path.read_bytes()):
            assert torch.equal(IdeficsImageProcessor(24)(route, return_tensors="pt"), expected)
        opaque = Image.frombytes("RGB", picture.size, picture.convert("RGB").tobytes())
        assert not torch.equal(IdeficsImageProcessor(24)(opaque, return_tensors="pt"), expected)
    array = np.asarray(noise(9, 7, channels=4))
    assert np.array_equal(IdeficsImageProcessor(24)(array), IdeficsImageProcessor(24)(Image.fromarray(array)))
    assert IdeficsImageProcessor(1, do_normalize=False)(np.zeros((5, 5, 4), np.uint8)).tolist() == [[[[1]]] * 3]


def test_a_turned_picture_is_upright_on_every_route(pictures):
    """Named difference: of a `PIL` image the reference leaves the orientation as it is stored."""
    from transformers.image_utils import load_image
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    path, theirs = pictures / "exif_landscape_6.jpg", IdeficsImageProcessorPil(image_size=24)
    ours = IdeficsImageProcessor(24)(Image.open(path), return_tensors="pt")
    assert torch.equal(ours, theirs([load_image(str(path))], return_tensors="pt"))  # what it does with a URL
    assert not torch.equal(ours, theirs([Image.open(path)], return_tensors="pt"))


def test_what_the_image_processor_takes_and_gives():
    ours, a, b = IdeficsImageProcessor(8), noise(9, 9), noise(5, 9, 1)
    assert isinstance(ours(a), np.ndarray)
    assert torch.equal(ours([a, b], return_tensors="pt"), torch.cat([ours(a, "pt"), ours(b, "pt")]))
    assert np.array_equal(ours([[a], [b, a]]), ours((a, b, a)))
    assert [picture.mode for picture in ours.fetch_images([a.convert("L"), b])] == ["RGB", "RGB"]
    for nothing in ([], [[]], None):
        with pytest.raises(ValueError, match="no image"):
            ours(nothing)
    with pytest.raises(ValueError, match="2 sizes"):
        IdeficsImageProcessor(do_resize=False)([a, b])


def test_transform_for_training(processor):
    def flip(picture):
        return torch.from_numpy(np.asarray(picture)[:, ::-1].copy()).permute(2, 0, 1) / 255

    pixels = processor([["a", noise(6, 5)], ["b"]], transform=flip).pixel_values
    assert pixels.shape == (2, 1, 3, 5, 6)
    assert torch.equal(pixels[0, 0], flip(noise(6, 5)))
    assert not pixels[1].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 0}, "image_size"),
        ({"image_size": 1e9}, "image_size"),
        ({"image_size": "224"}, "image_size"),
        ({"image_num_channels": 1}, "image_num_channels is 3"),
        ({"image_size": None, "size": {"height": 224, "width": 336}}, "squares"),
        ({"size": 224}, "squares"),
        ({"image_mean": 0.5}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "must not be 0"),
        ({"resample": 9}, "resample"),
    ],
    ids=str,
)
def test_nonsense_in_the_configuration(small, tmp_path, change, message):
    config = json.loads((small / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        IdeficsImageProcessor.from_pretrained(tmp_path)


# ---- prompts: what is written, who sees what


def test_a_prompt_by_hand(processor):
    """`<s> a b F I F c d`: each text piece begins with "▁"; the opening F does not see the picture, I does."""
    inputs = processor([["ab", noise(9, 9), "c"]])
    assert processor.tokenizer.convert_ids_to_tokens(inputs.input_ids[0].tolist()) == [
        *("<s>", "▁", "a", "b", FAKE, IMAGE, FAKE, "▁", "c")
    ]
    assert sees(inputs) == [None, None, None, None, None, 0, 0, 0, 0]
    assert inputs.image_attention_mask.dtype == inputs.input_ids.dtype == torch.int64
    assert inputs.pixel_values.shape == (1, 1, 3, 24, 24)


def test_the_drawing_in_the_docstring(processor):
    inputs = processor(["Two:", noise(9, 9), noise(9, 9, 1), "x"])
    assert inputs.input_ids[0, -7:].tolist()[:5] == [F, I, F, I, F]
    assert sees(inputs)[-7:] == [None, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["small", "idefics-9b", "idefics-9b-instruct"])
def test_interleavings(request, released, name):
    """Batches of 1 to 3 prompts with 0 to 4 pictures each, between texts of many kinds: equal to the reference."""
    if name == "small":
        ours, theirs = request.getfixturevalue("processor"), request.getfixturevalue("reference")
    else:
        ours, theirs = released(name)
    rng = random.Random(0)
    texts = ["User:", "a dog ", " what  is", "\nAssistant:", "Ünï 🙂", "x</s>", "", "  ", "\n", "Hey\n ", "\t1 2", END]
    pictures = [noise(9 + 5 * seed, 30 - 4 * seed, seed) for seed in range(5)]
    for _ in range(150 if name == "small" else 40):
        prompts = []
        for _ in range(rng.randint(1, 3)):
            items = [rng.choice(pictures) for _ in range(rng.randint(0, 4))] + rng.choices(texts, k=rng.randint(0, 4))
            rng.shuffle(items)
            prompts.append(_without_text_behind_eos(items))
        written = [item for prompt in prompts for item in prompt if isinstance(item, str)]
        options = {"padding": rng.choice([True, "longest"]), "add_eos_token": "x</s>" not in written}
        options["add_end_of_utterance_token"] = name != "idefics-9b" and END not in written
        assert_equal(ours(prompts, **options), theirs(text=prompts, **options))


def _without_text_behind_eos(items: list) -> list:
    """Cut a prompt behind an item with `</s>`: what comes then sees its picture here, but not in the reference."""
    end = next((k for k, item in enumerate(items) if isinstance(item, str) and "</s>" in item), len(items))
    return items[: end + 1]


ITEMS = st.lists(st.one_of(st.integers(0, 4), st.text("ab \n:", max_size=5)), max_size=7)


@given(st.lists(ITEMS, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_any_prompts_equal_the_reference(small, reference, prompts):
    ours = IdeficsProcessor.from_pretrained(small)
    pictures = [noise(3 + n, 4, n) for n in range(5)]
    prompts = [[pictures[item] if isinstance(item, int) else item for item in prompt] for prompt in prompts]
    for option in (True, False):
        arguments = {"add_end_of_utterance_token": option}
        assert_equal(ours(prompts, **arguments), reference(text=prompts, **arguments))


@given(st.lists(st.text(), max_size=4), st.booleans())
@settings(max_examples=80, deadline=None)
def test_any_text_gives_ids_or_one_error(small, texts, eos):
    ours = IdeficsProcessor.from_pretrained(small)
    try:
        shapes = {name: value.shape[:2] for name, value in ours([texts], add_eos_token=eos).items()}
        said = ""
    except ValueError as error:  # a lone surrogate; or, by a rare chance, a URL of another scheme or a typed mark
        shapes, said = {}, str(error)
    assert shapes == {} or shapes["input_ids"] == shapes["attention_mask"] == shapes["image_attention_mask"]
    assert said == "" or any(word in said for word in ("surrogate", "only http", "typed in"))


def test_guide_snippets(released):
    """The guide's calls, with pictures in the place of its URLs, on the real tokenizer."""
    ours, theirs = released("idefics-9b")
    a, b = noise(90, 60), noise(60, 90, 1)
    categories = ["animals", "vegetables", "city landscape", "cars", "office"]
    task = "Instruction: Classify the following image into a single category from the following list:"
    for prompt in (
        [a],
        [a, "This is an image of "],
        ["User:", a, "Describe this image.\nAssistant: Two.\n", "User:", b, "Describe this image.\nAssistant:"],
        [f"{task} {categories}.\n", a, "Category: "],
        [[a, "This is an image of "], [b, "This is "], ["none"]],
    ):
        inputs = ours(prompt, return_tensors="pt").to("cpu")
        assert_equal(inputs, theirs(text=prompt, return_tensors="pt"))
    bad_words_ids = ours.tokenizer([IMAGE, FAKE], add_special_tokens=False).input_ids
    assert bad_words_ids == [[32001], [32000]]
    instruct, _ = released("idefics-9b-instruct")
    assert instruct.tokenizer(END, add_special_tokens=False).input_ids == [32002]
    inputs = instruct(["User: Who?", a, END, "\nAssistant: X." + END, "\nUser:", b, f"And that?{END}", "\nAssistant:"])
    newline = [29871, 13]
    assert inputs.input_ids[0].tolist() == [
        *(1, 4911, 29901, 11644, 29973, 32000, 32001, 32000, 32002, *newline, 7900, 22137, 29901, 1060, 29889, 32002),
        *(*newline, 2659, 29901, 32000, 32001, 32000, 1126, 393, 29973, 32002, *newline, 7900, 22137, 29901),
    ]
    assert instruct.batch_decode(inputs.input_ids[:, :8], skip_special_tokens=True) == ["User: Who?"]


# ---- ways to call


def test_what_is_one_prompt_and_what_a_batch(processor):
    picture = noise(9, 9)

    def ids(*arguments, **named):
        return processor(*arguments, **named).input_ids.tolist()

    assert ids(["ab", "c"], add_end_of_utterance_token=False) == ids([["abc"]])  # flat: one prompt
    assert ids("ab") == ids(["ab"]) == ids([["ab"]]) == ids(text="ab") == ids(text=[["ab"]]) == ids(images=["ab"])
    assert ids(picture) == ids([picture]) == ids([[picture]]) == [[BOS, F, I, F]]
    assert len(ids([["ab"], ["c"]])) == len(ids((("ab",), ["c"]))) == 2
    assert ids([[]]) == ids([[""]]) == ids([[" "]]) == [[BOS]]


def test_images_beside_text_equal_the_reference(processor, reference):
    a, b, c = (noise(9, 9, seed) for seed in range(3))
    for text, pictures in (
        ("x", a),
        ("x", [a]),
        (["x"], [a]),
        (["x", "y z"], [a, b]),
        (["x", "y"], [[a, b], [c]]),
        (["x", "y"], [[a], []]),
        ("x", [[a, b]]),
    ):
        assert_equal(processor(text=text, images=pictures), reference(text=text, images=pictures))
        assert_equal(processor(pictures, text), reference(pictures, text))
    flat, nested = processor(text="x", images=a), processor(text="x", images=[[a]])
    assert flat.input_ids.tolist()[0][1:4] == nested.input_ids.tolist()[0][-3:] == [F, I, F]  # before, after
    assert torch.equal(processor(text=["x", "y"], images=[[a], None]).pixel_values[1], torch.zeros(1, 3, 24, 24))


def test_every_kind_of_picture(processor, pictures, tmp_path):
    path = tmp_path / "a picture.png"
    noise(9, 7).save(path)
    expected = processor([noise(9, 7), "x"])
    array = np.asarray(noise(9, 7))
    for picture in (path, path.read_bytes(), bytearray(path.read_bytes()), array, torch.from_numpy(array.copy())):
        assert_equal(processor([picture, "x"]), expected)
    assert_equal(processor(text="x", images=str(path)), expected)


def test_no_pictures(processor, reference):
    """Zeros that no token sees; the mask is bool then, as in the reference."""
    inputs = processor([["ab"], ["c d e"]])
    assert_equal(inputs, reference(text=[["ab"], ["c d e"]]))
    assert inputs.pixel_values.shape == (2, 1, 3, 24, 24)
    assert inputs.image_attention_mask.dtype == torch.bool
    assert not inputs.image_attention_mask.any()
    mixed = processor([["ab"], [noise(9, 9), noise(9, 9)]])
    assert mixed.image_attention_mask.dtype == torch.int64
    assert not mixed.pixel_values[0].any()
    assert not mixed.image_attention_mask[0].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(processor, reference, side):
    prompts = [["ab", noise(9, 9), "c"], [noise(9, 9)]]
    processor.tokenizer.padding_side = side
    reference.tokenizer.padding_side, before = side, reference.tokenizer.padding_side
    for options in ({}, {"padding": "max_length", "max_length": 20}):
        assert_equal(processor(prompts, **options), reference(text=prompts, **options))
    reference.tokenizer.padding_side = before
    inputs = processor(prompts)
    assert inputs.attention_mask[1].tolist() == ([0] * 5 + [1] * 4 if side == "left" else [1] * 4 + [0] * 5)
    assert sees(inputs, 1)[:2] == ([None, None])


def test_no_padding_and_other_tensors(processor):
    prompts = [["abc", noise(9, 9)], ["d"]]
    with pytest.raises(ValueError, match="padding=True"):
        processor(prompts, padding=False)
    lists = processor(prompts, padding=False, return_tensors=None)
    assert [len(row) for row in lists.input_ids] == [8, 3]
    assert [mask.shape for mask in lists.image_attention_mask] == [(8, 1), (3, 1)]
    arrays, tensors = processor(prompts, return_tensors="np"), processor(prompts)
    assert all(np.array_equal(arrays[name], tensors[name].numpy()) for name in KEYS)


def test_truncation(processor, reference):
    prompt = ["a" * 30]
    for options in ({"max_length": 5, "truncation": True}, {"max_length": 5}):  # without truncation=True none, as there
        assert_equal(processor(prompt, **options), reference(text=prompt, **options))
    inputs = processor([noise(9, 9), "a" * 30], max_length=8, truncation=True)
    assert inputs.input_ids[0, :4].tolist() == [BOS, F, I, F]
    assert inputs.input_ids.shape == (1, 8)


# ---- the four named differences


def test_positional_prompts(processor, reference):
    """1: the guide's own call; 5.23 takes the first argument for images, and then there is no text."""
    assert processor(["ab"], return_tensors="pt").input_ids.shape == (1, 4)
    with pytest.raises(UnboundLocalError):
        reference(["ab"], return_tensors="pt")


def test_blanks_after_special_tokens(released):
    """2: the file's "▁" for a blank after a special token is kept, as in transformers 4. Where nobody writes one, the
    ids are equal (`test_interleavings`)."""
    ours, theirs = released("idefics-9b-instruct")
    prompt = [f"A.{END} B"]
    assert ours(prompt).input_ids.tolist() == [[1, 319, 29889, 32002, 29871, 350]]
    assert theirs(text=prompt).input_ids.tolist() == [[1, 319, 29889, 32002, 350]]


def test_end_of_utterance_between_texts(processor, reference):
    """3: on where the tokenizer knows it, as in transformers 4; 5.23 is off, and when asked writes it twice."""
    plain = ["Who?", "Me.", noise(9, 9), "Sure?"]
    on, off = {"add_end_of_utterance_token": True}, {"add_end_of_utterance_token": False}
    assert processor(plain).input_ids[0].tolist().count(EOU) == 1
    assert_equal(processor(plain), reference(text=plain, **on))
    assert_equal(processor(plain, **off), reference(text=plain))
    written = ["Who?", noise(9, 9), END, "\nMe." + END, "\nAnd?"]
    assert_equal(processor(written), processor(written, **off))
    assert_equal(processor(written, **off), reference(text=written, **off))
    twice = reference(text=written, **on).input_ids[0].tolist()
    assert twice.count(EOU) == 4
    assert processor(written, **on).input_ids[0].tolist().count(EOU) == 2


def test_end_of_utterance_settings(small, tmp_path):
    off = IdeficsProcessor.from_pretrained(small, add_end_of_utterance_token=False)
    assert EOU not in off(["a", "b"]).input_ids
    assert EOU in off(["a", "b"], add_end_of_utterance_token=True).input_ids
    off.save_pretrained(tmp_path / "off")
    assert IdeficsProcessor.from_pretrained(tmp_path / "off").add_end_of_utterance_token is False
    base = IdeficsProcessor.from_pretrained(write_small(tmp_path / "base", SPECIAL[:5]))
    assert base(["a", "b"]).input_ids.tolist() == base([["ab"]]).input_ids.tolist()
    with pytest.raises(ValueError, match="has no <end_of_utterance>"):
        base(["a", "b"], add_end_of_utterance_token=True)


def test_eos_does_not_end_the_view(processor, reference):
    """4: behind `</s>` the picture is still seen, here only; the border between packed documents ends the view."""
    prompt = ["a", noise(9, 9), "b</s>c", noise(9, 9, 1), "d</s>"]
    ours, theirs = processor(prompt), reference(text=prompt)
    assert torch.equal(ours.input_ids, theirs["input_ids"])
    # <s> ▁ a F | I F ▁ b </s> ▁ c F | I F ▁ d </s>
    assert sees(ours) == [None] * 4 + [0] * 8 + [1] * 5
    assert sees(theirs) == [None] * 4 + [0] * 5 + [None] * 3 + [1] * 5
    packed = ["a", noise(9, 9), "b</s><s>c", noise(9, 9, 1), "d"]
    assert_equal(processor(packed), reference(text=packed))
    assert None in sees(processor(packed))[8:]


def test_visible():
    ids = np.array([UNK, BOS, 9, F, I, F, 9, EOS, 9, F, I, F, I, EOS, BOS, 9, I, EOS])
    seen = visible(ids, I, (EOS, BOS), 3)
    no = None  # at the end: another document, and in it a fourth picture, of three
    assert [int(row.argmax()) if row.any() else no for row in seen] == [
        *(no, no, no, no, 0, 0, 0, 0, 0, 0, 1, 1, 2, 2, no, no, no, no)
    ]
    assert not visible(np.array([], np.int64), I, (EOS, BOS), 1).any()
    assert visible(np.array([I, 9]), I, (None, None), 1).tolist() == [[True], [True]]


# ---- refusals


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts are"),
        ([["a"], "b"], "prompts are"),
        (["b", ["a"]], "prompts are"),
        (["what is <image>?"], "prompt 0, item 0 .* <image> typed in"),
        ([["a"], ["b", f"x{FAKE}"]], f"prompt 1, item 1 is a text with {FAKE}"),
    ],
    ids=str,
)
def test_prompts_that_are_refused(processor, prompts, message):
    with pytest.raises(ValueError, match=message):
        processor(prompts)


@pytest.mark.parametrize("item", [3, None, {"type": "image"}, 2.5, ["nested", ["deeper"]]], ids=str)
def test_items_of_other_types(processor, item):
    with pytest.raises(TypeError, match=r"prompt 0, item 1: an item is a text, a URL"):
        processor([["a", item]])


def test_the_reference_lets_typed_marks_pass(processor, reference):
    """There a typed `<image>` is a picture that nobody passed, and all that follows looks at the wrong one."""
    prompt = [noise(9, 9), "Describe <image>"]
    assert sees(reference(text=prompt))[-1] is None
    with pytest.raises(ValueError, match="typed in"):
        processor(prompt)


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        (["a", "b"], 1, "1 images for 2 texts"),
        ("a", 2, "2 images for 1 texts"),
        ([], 1, "1 images for 0 texts"),
        ([["a"]], 1, "beside images, text is"),
        (3, 1, "beside images, text is"),
        (["a <image>"], 1, "typed in"),
    ],
    ids=str,
)
def test_images_that_do_not_fit_the_texts(processor, text, count, message):
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=[noise(9, 9)] * count)


def test_more_refusals(processor):
    with pytest.raises(ValueError, match="pass prompts"):
        processor()
    with pytest.raises(ValueError, match="mixes"):
        processor(text=["a", "b"], images=[[noise(9, 9)], noise(9, 9)])
    with pytest.raises(TypeError):
        processor(["a"], pading=True)
    with pytest.raises(OSError, match=r"gone\.png"):
        processor([Path("gone.png")])
    with pytest.raises(TypeError, match="an image is"):
        processor.image_processor(3)


@pytest.mark.parametrize(("side", "length"), [("right", 4), ("right", 5), ("left", 1), ("left", 2)])
def test_truncation_that_cuts_a_picture(processor, reference, side, length):
    """Anywhere in F I F; the reference keeps the picture and forgets its place."""
    processor.tokenizer.truncation_side = side
    prompt, options = ["a", noise(9, 9)], {"max_length": length, "truncation": True}  # <s> ▁ a F I F
    with pytest.raises(ValueError, match=f"max_length={length} would cut into an image"):
        processor(prompt, **options)
    if (side, length) == ("right", 4):
        assert not reference(text=prompt, **options)["image_attention_mask"].any()
    processor(prompt, max_length=6 if side == "right" else 3, truncation=True)


def test_a_file_name_as_text_is_pointed_out(processor):
    with pytest.warns(UserWarning, match=r"'cats.jpg' is read as text.*pathlib.Path"):
        processor(["cats.jpg", "What is this?"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor(["Look at cats.jpg", "a.b"])


# ---- URLs: a server on this machine


@pytest.fixture
def server(pictures, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answers = {"/china.jpg": (pictures / "china.jpg").read_bytes(), "/page": b"<html>", "/large": bytes(5000)}
            body = answers.get(self.path.split("?")[0])
            if body is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_urls(processor, reference, pictures, server):
    expected = processor(["a", pictures / "china.jpg", "b"])
    url = f"{server}/china.jpg?ixlib=rb-4.0.3&q=80"
    for written in (url, f" {url} ", f"{url}\n"):
        assert_equal(processor(["a", written, "b"]), expected)
    assert_equal(reference(text=["a", url, "b"]), expected)
    assert_equal(processor(text="a", images=[url]), processor(text="a", images=pictures / "china.jpg"))
    for text in (f"see {url}", "http://", "a://", "https:// x", "http:/x"):  # no URL and nothing else
        assert (processor([text]).input_ids == I).sum() == 0


def test_urls_that_give_no_picture(processor, server, monkeypatch):
    with pytest.raises(OSError, match=r"could not fetch http://127\.0\.0\.1:1/x\.png"):
        processor(["http://127.0.0.1:1/x.png"])
    with pytest.raises(OSError, match="404"):
        processor([f"{server}/nothing"])
    with pytest.raises(ValueError, match="/page is not a JPEG, PNG"):
        processor([f"{server}/page"])
    for other in ("ftp://host/x.png", "s3://bucket/x.png", "file://host/x.png"):
        with pytest.raises(ValueError, match="only http"):
            processor(["a", other])
    monkeypatch.setattr(fetch, "MAX_DOWNLOAD", 4000)
    with pytest.raises(OSError, match=r"/large \(more than 0 MiB\)"):
        processor([f"{server}/large"])


# ---- decoding, saving, conversations


def test_decode(processor):
    ids = processor([["ab", noise(9, 9), "c"], ["d"]]).input_ids
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["ab c", "d"]
    assert processor.decode(ids[1, -2:]) == "d"


@pytest.mark.parametrize("name", ["small", "idefics-9b-instruct"])
def test_saved_processors_load_in_transformers_and_here(request, released, tmp_path, name):
    if name == "small":
        ours, theirs = request.getfixturevalue("processor"), request.getfixturevalue("reference")
    else:
        ours, theirs = released(name)
    ours.image_processor.image_size = 16
    ours.save_pretrained(tmp_path / "saved")
    again, loaded = IdeficsProcessor.from_pretrained(tmp_path / "saved"), load_reference(tmp_path / "saved")
    assert type(loaded).__name__ == "IdeficsProcessor"
    assert again.image_processor == ours.image_processor
    prompts = [["ab", noise(9, 9), "c"], [f"d{END}"]]
    assert_equal(again(prompts), ours(prompts))
    assert_equal(loaded(text=prompts), ours(prompts))
    theirs.save_pretrained(tmp_path / "theirs")  # what transformers 5 writes; its image size is its own
    back = IdeficsProcessor.from_pretrained(tmp_path / "theirs", image_size=16)
    assert torch.equal(back(prompts).pixel_values, ours(prompts).pixel_values)


def test_from_pretrained_options(small):
    made = IdeficsProcessor.from_pretrained(small, image_size=12, padding_side="right", use_fast=True)
    inputs = made([["ab"], [noise(9, 9)]])
    assert inputs.pixel_values.shape == (2, 1, 3, 12, 12)
    assert inputs.input_ids[0, -1] == inputs.input_ids[0, -1]
    assert made.tokenizer.padding_side == "right"
    with pytest.raises(TypeError, match="image_sise"):
        IdeficsProcessor.from_pretrained(small, image_sise=12)
    built = IdeficsProcessor(IdeficsImageProcessor(), made.tokenizer, image_size=10)
    assert built([noise(9, 9)]).pixel_values.shape == (1, 1, 3, 10, 10)


def test_a_tokenizer_without_the_marks_gets_them(small):
    from minivlm.text.tokenizer import Tokenizer

    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"))
    made = IdeficsProcessor(IdeficsImageProcessor(8), Tokenizer(backend, {"unk_token": "<unk>"}))
    inputs = made(["a", noise(9, 9)], padding=False)  # for it has nothing to pad with, nor a <s>
    assert inputs.input_ids.tolist() == [[0, 2, 3, 2]]


def test_conversations(small):
    """With a chat template, typed marks and URLs are text, and ids those of the prompt as a list."""
    template = (
        "{% for m in messages %}{{ m.role.capitalize() + ':' }}{% for c in m.content %}"
        "{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    )
    processor = IdeficsProcessor.from_pretrained(small, chat_template=template)
    picture, options = noise(9, 9), {"tokenize": True, "return_dict": True, "return_tensors": "pt"}

    def ask(text):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, **options
        )

    expected = processor(["User:", picture, f"hi?{END}\nAssistant:"], add_end_of_utterance_token=False)
    assert_equal(ask("hi?"), expected)
    typed = ask(f"{IMAGE}{FAKE}</s>{END}")
    assert [(typed.input_ids == token).sum().item() for token in (I, F, EOS, EOU)] == [1, 2, 0, 1]
    assert (ask("http://127.0.0.1:1/x.png").input_ids == I).sum() == 1  # nothing is fetched
    two = [{"type": "image", "image": picture}] * 2
    inputs = processor.apply_chat_template([{"role": "user", "content": two}], **options)
    assert inputs.input_ids[0].tolist().count(F) == 3  # neighbours share a mark
    with pytest.raises(ValueError, match="no chat template"):
        IdeficsProcessor.from_pretrained(small).apply_chat_template([{"role": "user", "content": "hi"}])
