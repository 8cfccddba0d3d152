"""Options of one call, and the names that other tools expect of processors: equal to transformers 5.23."""

import base64
import copy
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from minivlm import AutoProcessor
from minivlm.processing.idefics2 import Idefics2Processor
from minivlm.processing.images import load_image
from minivlm.processing.llava_next import LlavaNextProcessor

FAMILIES = ("shapes-idefics2", "shapes-llava-next", "shapes-idefics")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def prompts(name: str) -> dict:
    """Two prompts of different lengths, one with an image."""
    if "idefics2" not in name and "llava" not in name:
        return {"text": [["what", noise(40, 30), "is this?"], ["hello"]]}
    return {"text": ["what <image> is this?", "hello"], "images": [[noise(40, 30)], []]}


@pytest.fixture(params=FAMILIES)
def processor(request):
    made = AutoProcessor.from_pretrained(request.param)
    made.name = request.param
    return made


@pytest.fixture
def pair(processor_of, llava, llava_reference):
    """LLaVA-NeXT's processors, ours and transformers' (whose Idefics2 one uses some options for half a call)."""
    theirs = copy.copy(llava_reference)
    theirs.image_processor = copy.deepcopy(llava_reference.image_processor)
    return processor_of(LlavaNextProcessor, llava("llava-v1.6-mistral-7b-hf")), theirs


def assert_equal(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert np.array_equal(np.asarray(ours[name]), np.asarray(theirs[name])), name


SMALL = {"size": {"shortest_edge": 84}, "crop_size": {"height": 84, "width": 84}}


@pytest.mark.parametrize(
    "options",
    [
        {"padding": True, "padding_side": "right"},
        {"padding": True, "padding_side": "left", "pad_to_multiple_of": 64},
        {"text_kwargs": {"padding": "max_length", "max_length": 2000, "padding_side": "right"}},
        {"padding": True, "text_kwargs": {"pad_to_multiple_of": 7}, "images_kwargs": {"do_normalize": False}},
        {"padding": True, "do_rescale": False, "do_normalize": False},
        {"padding": True, "return_mm_token_type_ids": True},
        {"padding": True, "images_kwargs": SMALL},
        {"padding": True, "add_special_tokens": False, **SMALL},
    ],
    ids=str,
)
def test_options_of_a_call_equal_transformers(pair, options):
    arguments = {"text": ["<image>\nWhat?", "Hello", "a <image>"], "images": [noise(50, 40), noise(30, 90)]}
    ours, theirs = (processor(**arguments, **options, return_tensors="pt") for processor in pair)
    assert_equal(ours, theirs)


def test_pinpoints_for_one_call(pair):
    """Pixels and tokens; transformers' processor counts the tokens by its own pinpoints."""
    ours, theirs = pair
    options = {"image_grid_pinpoints": [[336, 336]], "return_tensors": "pt"}
    inputs = ours(text="<image>", images=noise(50, 40), **options)
    expected = theirs.image_processor(noise(50, 40), **options)
    assert torch.equal(inputs.pixel_values, expected["pixel_values"])
    theirs.image_processor.image_grid_pinpoints = [[336, 336]]
    assert_equal(inputs, theirs(text="<image>", images=noise(50, 40), return_tensors="pt"))


@pytest.mark.parametrize("splitting", [False, True])
def test_splitting_for_one_call(processor_of, checkpoint, reference, splitting):
    """Pixels and tokens; transformers' processor changes the pixels alone, and its model then fails."""
    processor = processor_of(Idefics2Processor, checkpoint("idefics2-8b"))
    processor.image_processor.do_image_splitting = not splitting
    arguments = {"text": "<image>", "images": noise(60, 50), "return_tensors": "pt"}
    inputs = processor(**arguments, do_image_splitting=splitting)
    reference.image_processor.do_image_splitting = splitting
    expected = reference(**arguments)
    assert_equal(inputs, expected)
    assert_equal(processor(**arguments, images_kwargs={"do_image_splitting": splitting}), expected)
    assert processor.image_processor.do_image_splitting is not splitting
    messages = [{"role": "user", "content": [{"type": "image", "image": noise(60, 50)}]}]
    options = {"tokenize": True, "return_dict": True, "do_image_splitting": splitting, "return_tensors": "pt"}
    found = processor.apply_chat_template(messages, **options)
    assert (found.input_ids == 32001).sum() == (320 if splitting else 64)
    assert found.pixel_values.shape[1] == (5 if splitting else 1)


def test_options_of_every_family(processor):
    arguments = prompts(processor.name)
    options = {"padding": True, "padding_side": "right", "pad_to_multiple_of": 8, "return_mm_token_type_ids": True}
    inputs = processor(**arguments, **options, do_normalize=False, return_tensors="pt")
    assert inputs.input_ids.shape[1] % 8 == 0
    assert inputs.attention_mask[1, 0] == 1
    assert inputs.attention_mask[1, -1] == 0
    assert torch.equal(inputs.mm_token_type_ids, (inputs.input_ids == processor.image_token_id).long())
    grouped = processor(**arguments, text_kwargs=options, images_kwargs={"do_normalize": False}, return_tensors="pt")
    assert_equal(inputs, grouped)
    assert inputs.pixel_values.max() > 0.9
    assert inputs.pixel_values.min() >= 0
    assert processor.image_processor.do_normalize
    assert processor.tokenizer.padding_side == "left"
    plain = processor.image_processor(noise(9, 9), do_normalize=False, do_rescale=False)
    plain = plain if isinstance(plain, np.ndarray) else plain.pixel_values
    assert plain.max() > 1
    wanted = processor(**arguments, padding=None, padding_side=None, images_kwargs=None, return_tensors=None)
    assert wanted.keys() == processor(**arguments).keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pading": True}, "pading.*padding"),
        ({"do_image_spliting": True}, "do_image_spliting"),
        ({"text_kwargs": {"pading": True}}, "pading.*padding"),
        ({"images_kwargs": {"do_resise": True}}, "do_resise.*do_resize"),
        ({"padding": True, "text_kwargs": {"padding": True}}, "twice"),
    ],
    ids=str,
)
def test_misspelt_options(processor, options, message):
    with pytest.raises(TypeError, match=message):
        processor(**prompts(processor.name), **options)
    with pytest.raises(TypeError, match=message):
        processor.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=True, **options)


def test_misspelt_options_of_loading():
    with pytest.raises(TypeError, match=r"do_image_spliting.*do_image_splitting"):
        AutoProcessor.from_pretrained("shapes-idefics2", do_image_spliting=True)


@pytest.mark.parametrize(
    "options", [{"padding_side": "middle"}, {"pad_to_multiple_of": 0}, {"pad_to_multiple_of": 1.5}], ids=str
)
def test_nonsense(processor, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        processor(**prompts(processor.name), padding=True, **options)


# ---- what other tools ask


def test_model_input_names(processor):
    inputs = processor(**prompts(processor.name), padding=True)
    assert set(processor.model_input_names) == set(inputs)


def test_model_input_names_equal_transformers(pair, reference):
    ours, theirs = pair
    assert ours.model_input_names == [name for name in theirs.model_input_names if name != "token_type_ids"]
    names = set(reference.model_input_names) - {"token_type_ids"}
    assert set(Idefics2Processor.from_pretrained("shapes-idefics2").model_input_names) == names


def test_to_dict(processor, tmp_path):
    described = processor.to_dict()
    assert json.loads(json.dumps(described)) == described
    assert described["processor_class"] == type(processor).__name__
    made = type(processor.image_processor).from_dict(described["image_processor"])
    assert made == processor.image_processor
    processor.save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "processor_config.json").read_text())
    assert {name: described[name] for name in theirs} == theirs


def test_to_dict_has_transformers_values(pair):
    ours, theirs = (processor.to_dict() for processor in pair)
    assert ours.keys() == theirs.keys()
    for name in ours["image_processor"].keys() & theirs["image_processor"].keys():
        assert ours["image_processor"][name] == json.loads(json.dumps(theirs["image_processor"][name])), name


def test_numbers_of_image_tokens(pair, processor):
    sizes = [(480, 640), (336, 336), (1, 1000)]
    ours, theirs = (each._get_num_multimodal_tokens(image_sizes=sizes) for each in pair)
    assert ours["num_image_tokens"] == theirs["num_image_tokens"]
    assert ours.num_image_patches == theirs.num_image_patches == [1, 1, 1]
    found = processor._get_num_multimodal_tokens(image_sizes=[(30, 40)])
    inputs = processor(**prompts(processor.name), padding=True)
    ids = np.asarray(inputs.input_ids if not isinstance(inputs.input_ids, torch.Tensor) else inputs.input_ids.tolist())
    assert found["num_image_tokens"] == [(ids == processor.image_token_id).sum()]
    assert pair[0]._get_num_multimodal_tokens().keys() == set()
    if processor.name == "shapes-idefics2":
        split = processor._get_num_multimodal_tokens(image_sizes=[(30, 40)], do_image_splitting=True)
        assert split.num_image_patches == [5]


# ---- images of data sets and of web APIs


def encoded(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    noise(9, 7).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_base64(kind):
    data = encoded(kind)
    text = base64.b64encode(data).decode()
    expected = np.asarray(load_image(data))
    for form in (text, f"data:image/png;base64,{text}", base64.encodebytes(data).decode(), {"bytes": data}):
        assert np.array_equal(np.asarray(load_image(form)), expected)


def test_images_as_data_sets_have_them(tmp_path):
    data = encoded()
    (tmp_path / "a.png").write_bytes(data)
    expected = np.asarray(load_image(data))
    for form in (
        {"bytes": data, "path": None},
        {"bytes": data, "path": "gone.png"},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        {"path": tmp_path / "a.png"},
    ):
        assert np.array_equal(np.asarray(load_image(form)), expected)
    for form in ({}, {"bytes": None, "path": None}, {"a": 1}, {"bytes": None}):
        with pytest.raises(TypeError, match="an image is a"):
            load_image(form)


def test_images_of_both_kinds_in_messages_and_calls(processor):
    data = encoded()
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}

    def asked(**item):
        content = [{"type": "image", **item}, {"type": "text", "text": "what?"}]
        return processor.apply_chat_template([{"role": "user", "content": content}], **options)

    expected = asked(image=Image.open(io.BytesIO(data)))
    text = base64.b64encode(data).decode()
    for item in (
        {"image": {"bytes": data, "path": None}},
        {"base64": text},
        {"base64": f"data:image/png;base64,{text}"},
        {"url": f"data:image/png;base64,{text}"},
        {"image": text},
    ):
        assert_equal(asked(**item), expected)
    if processor.name == "shapes-idefics":
        one = processor([["what", {"bytes": data, "path": None}]])
        assert torch.equal(one.pixel_values, processor([["what", data]]).pixel_values)


def test_base64_that_is_none():
    for text in ("iVBORw0KGgo", "/9j/" + "!" * 99, "R0lGODlh" + "A" * 40):
        with pytest.raises((ValueError, OSError)):
            load_image(text)
