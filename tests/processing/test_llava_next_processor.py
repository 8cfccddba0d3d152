"""LLaVA-NeXT's processor against recorded transformers 4.57.6 outputs and against transformers 5.23 side by side."""

import functools
import hashlib
import json
import shutil

import numpy as np
import oracle_llava
import pytest
import torch
from committed import LLAVA, PHOTOGRAPHS
from PIL import Image

from minivlm.checkpoint import hub
from minivlm.modules.anyres import image_token_count
from minivlm.processing.common import expand
from minivlm.processing.llava_next import LlavaNextImageProcessor, LlavaNextProcessor
from minivlm.text import chat_template as chat
from minivlm.text.tokenizer import Tokenizer

MISTRAL, VICUNA, VICUNA_13B = (f"llava-v1.6-{name}-hf" for name in ("mistral-7b", "vicuna-7b", "vicuna-13b"))
YI, LLAMA3, QWEN, QWEN_110B = "llava-v1.6-34b-hf", "llama3-llava-next-8b-hf", "llava-next-72b-hf", "llava-next-110b-hf"
QUESTION = "[INST] <image>\nWhat is shown in this image? [/INST]"
SIZES = [
    *((336, 336), (899, 1024), (480, 640), (640, 480), (1000, 1000), (200, 1000), (1000, 200), (503, 316), (333, 500)),
    *((500, 333), (37, 1000), (1080, 1920), (337, 672), (808, 1100), (110, 352), (328, 205), (1, 1000)),
    *((1000, 1), (1, 1), (2, 2000)),
]
SMALL = {"crop_size": {"height": 18, "width": 18}, "image_grid_pinpoints": [[18, 36], [36, 18], [36, 36]]}


@pytest.fixture
def processor(processor_of, llava):
    return processor_of(LlavaNextProcessor, llava(MISTRAL))


@pytest.fixture
def reference(llava_reference):
    return llava_reference


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def assert_equal(ours, theirs) -> None:
    assert list(ours) == list(theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


# ---- recorded outputs


def recorded(data) -> list[dict]:
    cases = json.loads((data / "processors_4.57.6.json").read_text(encoding="utf-8"))["cases"]
    return [case for case in cases if case["checkpoint"].startswith("llava-hf/")]


def unpacked(row: list) -> list[int]:
    return [i for entry in row for i in ([entry] if isinstance(entry, int) else [entry[0]] * entry[1])]


@pytest.mark.parametrize("number", range(7))
def test_recorded_cases(processor_of, llava, data, pictures, number):
    case = recorded(data)[number]
    processor = processor_of(LlavaNextProcessor, llava(case["checkpoint"].split("/")[1]))
    images = [pictures / name for name in case["images"]]
    inputs = processor(text=case["text"], images=images, return_tensors="pt", **case["kwargs"])
    assert inputs.input_ids.tolist() == [unpacked(row) for row in case["input_ids"]]
    assert inputs.attention_mask.sum(1).tolist() == case["attention_mask"]
    for name in ("pixel_values", "image_sizes"):
        assert list(inputs[name].shape) == case[name]["shape"]
        assert str(inputs[name].dtype) == case[name]["dtype"]
        assert hashlib.sha256(inputs[name].numpy().tobytes()).hexdigest() == case[name]["sha256"]


def test_recorded_run_of_the_released_checkpoint(processor):
    """A user's printout: a picture of 808x1100, 2369 ids, 5 squares."""
    prompt = "[INST] <image>\nIs this artwork created by linard, jacques? Please answer yes or no. [/INST]"
    inputs = processor(text=prompt, images=noise(808, 1100), return_tensors="pt")
    assert inputs.input_ids.shape == (1, 2369)
    assert inputs.pixel_values.shape == (1, 5, 3, 336, 336)
    assert inputs.image_sizes.tolist() == [[808, 1100]]


# ---- transformers 5.23, side by side


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs(processor, reference, pictures, name):
    arguments = {"text": QUESTION, "images": str(pictures / name), "return_tensors": "pt"}
    theirs = reference(**arguments)
    assert_equal(processor(**arguments), theirs)
    arrays = processor.image_processor(str(pictures / name), return_tensors="np")
    assert np.array_equal(arrays.pixel_values, theirs["pixel_values"].numpy())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(processor, reference, size):
    arguments = {"text": QUESTION, "images": noise(*size), "return_tensors": "pt"}
    inputs = processor(**arguments)
    assert_equal(inputs, reference(**arguments))
    assert inputs.input_ids.eq(32000).sum() == processor.image_tokens(*size)


@pytest.mark.parametrize("counts", [(1, 2, 3), (0, 3), (2, 0, 1), (0, 0, 1)])
def test_batches(processor, reference, counts):
    images = [[noise(60 + 97 * n, 50 + 211 * row, n) for n in range(count)] for row, count in enumerate(counts)]
    texts = ["x <image>" * count + "y" for count in counts]
    flat = [image for row in images for image in row]
    ours = processor(text=texts, images=images, padding=True, return_tensors="pt")
    assert_equal(ours, reference(text=texts, images=flat, padding=True, return_tensors="pt"))
    again = processor(text=texts, images=flat, padding=True, return_tensors="pt")
    assert all(torch.equal(again[name], ours[name]) for name in ours)
    assert ours.image_sizes.tolist() == [[image.height, image.width] for image in flat]
    for row, pictures in enumerate(images):
        places = sum(processor.image_tokens(image.height, image.width) for image in pictures)
        assert ours.input_ids[row].eq(32000).sum() == places
        assert ours.attention_mask[row].tolist() == sorted(ours.attention_mask[row].tolist())  # zeros on the left


def test_missing_tiles_are_zero_and_padding_is_black(processor):
    pixels = processor.image_processor([noise(336, 336), noise(900, 900)], return_tensors="pt").pixel_values
    assert pixels.shape == (2, 5, 3, 336, 336)
    assert pixels[0, 3:].eq(0).all()
    assert pixels[1].ne(0).all()
    black = -torch.tensor(processor.image_processor.image_mean) / torch.tensor(processor.image_processor.image_std)
    assert torch.equal(pixels[0, 1, :, :, :168], black[:, None, None].expand(3, 336, 168))


@pytest.mark.parametrize(
    "change",
    [
        {"do_resize": False},
        {"do_center_crop": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_pad": False},
        {"rescale_factor": 0.01},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.8, 0.7]},
        {"resample": 2},
        {"resample": 0},
        {"image_grid_pinpoints": [[672, 1344], [336, 336]]},
        {"image_grid_pinpoints": [[336, 336]]},
        {"size": {"shortest_edge": 18}, **SMALL},
        {"size": {"shortest_edge": 20}, **SMALL},
        {"size": {"height": 15, "width": 15}, **SMALL},
        {"size": {"shortest_edge": 21}, "do_resize": False, **SMALL},
        {"size": 18, **SMALL, "crop_size": 18},
    ],
    ids=str,
)
def test_every_field(reference, change):
    processor = LlavaNextImageProcessor(**change)
    for images in (noise(100, 140), [noise(50, 30), noise(45, 17)]):
        theirs = reference.image_processor(images, return_tensors="pt", **change)
        ours = processor(images, return_tensors="pt")
        assert torch.equal(ours.pixel_values, theirs["pixel_values"].float())
        assert torch.equal(ours.image_sizes, theirs["image_sizes"])


def test_named_differences_from_5_23(processor, reference, pictures):
    """1: open Pillow pictures are treated as their files are: turned upright, transparency dropped. 2: a processor that
    is not told about CLIP's class token expects it. 3: the image processor's defaults are the checkpoints' values."""
    rotated = Image.open(pictures / "exif_landscape_6.jpg")
    assert processor.image_processor(rotated).image_sizes.tolist() == [[1200, 1800]]
    assert np.array(reference.image_processor(rotated)["image_sizes"]).tolist() == [[1800, 1200]]
    clear = noise(50, 60).convert("RGBA")
    clear.putalpha(0)
    ours, theirs = processor.image_processor(clear), reference.image_processor(clear, return_tensors="np")
    assert np.array_equal(ours.pixel_values, processor.image_processor(clear.convert("RGB")).pixel_values)
    assert theirs["pixel_values"][0, 0].min() > 1.9  # white
    made = LlavaNextProcessor(processor.image_processor, processor.tokenizer, 14, "default")
    theirs = type(reference)(reference.image_processor, reference.tokenizer, 14, "default")
    picture = noise(503, 316)
    assert made(text="<image>", images=picture).input_ids[0].count(32000) == 1526
    assert theirs(text="<image>", images=picture)["input_ids"][0].count(32000) == 1525
    assert LlavaNextImageProcessor() == processor.image_processor
    assert type(reference.image_processor)().size == {"shortest_edge": 224}


def test_documentation_snippets(processor, pictures):
    """The calls of transformers' LLaVA-NeXT page."""
    image = Image.open(pictures / "llava_v1_5_radar.jpg")
    inputs = processor(QUESTION, image, return_tensors="pt").to("cpu")
    assert inputs.input_ids.shape == (1, 2652)
    assert processor.decode(inputs.input_ids[0], skip_special_tokens=True).endswith(
        "What is shown in this image? [/INST]"
    )
    prompt = [
        "[INST] <image>\nWhat is shown in this image? [/INST] There is a red stop sign in the image. [INST] <image>\n"
        "What about this image? How many cats do you see [/INST]",
        QUESTION,
    ]
    names = ("waterview.jpg", "coco_000000039769.jpg", "china.jpg")
    images = [Image.open(pictures / name) for name in names]
    inputs = processor(text=prompt, images=images, padding=True, return_tensors="pt")
    assert inputs.pixel_values.shape == (3, 5, 3, 336, 336)
    texts = processor.batch_decode(inputs.input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert texts[1] == "[INST]  \nWhat is shown in this image? [/INST]"
    for first, second in ((QUESTION, str(pictures / names[0])), ([QUESTION], [images[0]])):
        swapped, named = processor(first, second), processor(text=first, images=second)
        assert swapped.input_ids == named.input_ids
        assert np.array_equal(swapped.pixel_values, named.pixel_values)


# ---- prompts of the seven checkpoints

CHAT = [
    {"role": "system", "content": [{"type": "text", "text": "S."}]},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Q1"},
            {"type": "image"},
            {"type": "image"},
            {"type": "text", "text": "Q2"},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
    {"role": "user", "content": [{"type": "text", "text": "Q3"}]},
]
SINGLE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown in this image?"}]}]
YI_CHAT = (
    "<|im_start|>system\nS.<|im_end|>\n<|im_start|>user\n<image>\n<image>\nQ1Q2<|im_end|>\n<|im_start|>assistant\nA."
    "<|im_end|>\n<|im_start|>user\nQ3<|im_end|>\n<|im_start|>assistant\n"
)
QWEN_CHAT = (
    "<|im_start|>system\n\nS.<|im_end|>\n<|im_start|>user\n<image><image>\nQ1\nQ2<|im_end|>\n<|im_start|>assistant\n\n"
    "A.<|im_end|>\n<|im_start|>user\n\nQ3<|im_end|>\n<|im_start|>assistant\n"
)
LLAMA3_CHAT = (
    "<|start_header_id|>system<|end_header_id|>\n\n\nS.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "<image><image>\nQ1<|eot_id|>\nQ2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n\nA.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n\nQ3<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
VICUNA_CHAT = "S. USER: <image>\n<image>\nQ1 Q2 ASSISTANT: A. USER: Q3 ASSISTANT:"
RENDERED = {
    MISTRAL: "<<SYS>>\nS.\n<</SYS>>\n\n[INST] <image>\n<image>\nQ1Q2 [/INST] A.</s> [INST] Q3 [/INST]",
    VICUNA: VICUNA_CHAT,
    VICUNA_13B: VICUNA_CHAT,
    YI: YI_CHAT,
    LLAMA3: LLAMA3_CHAT,
    QWEN: QWEN_CHAT,
    QWEN_110B: QWEN_CHAT,
}
ADDED = {
    YI: ["<|im_start|>", "<|im_end|>"],
    QWEN: ["<|im_start|>", "<|im_end|>"],
    QWEN_110B: ["<|im_start|>", "<|im_end|>"],
    LLAMA3: ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}


@pytest.fixture(scope="module")
def speaker(llava):
    """`speaker(name)`: a processor with that checkpoint's template and special tokens, over Mistral's vocabulary."""

    @functools.cache
    def make(name: str) -> LlavaNextProcessor:
        folder = LLAVA / name
        tokenizer = Tokenizer.from_pretrained(llava(MISTRAL))
        tokenizer.add_tokens(ADDED.get(name, []), special=True)
        template = chat.find_template(hub.source(folder), {}, {})
        image_processor = LlavaNextImageProcessor.from_pretrained(folder)
        return LlavaNextProcessor(image_processor, tokenizer, patch_size=14, chat_template=template)

    return make


@pytest.mark.parametrize("name", RENDERED)
def test_templates(speaker, name):
    from transformers.utils.chat_template_utils import render_jinja_template

    processor = speaker(name)
    assert processor.apply_chat_template(CHAT, add_generation_prompt=True) == RENDERED[name]
    for conversation in (CHAT, SINGLE):
        for add in (False, True):
            theirs, _ = render_jinja_template(
                [conversation], chat_template=processor.chat_template, add_generation_prompt=add
            )
            assert processor.apply_chat_template(conversation, add_generation_prompt=add) == theirs[0]


def test_templates_write_the_documented_prompts(speaker):
    said = {name: speaker(name).apply_chat_template(SINGLE, add_generation_prompt=True) for name in RENDERED}
    assert said[MISTRAL] == QUESTION
    assert said[VICUNA] == "USER: <image>\nWhat is shown in this image? ASSISTANT:"
    assert said[YI] == "<|im_start|>user\n<image>\nWhat is shown in this image?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", RENDERED)
def test_conversations_to_ids(speaker, name):
    """The ids of the rendered string for ordinary words; typed special tokens stay text."""
    processor = speaker(name)
    images = [noise(30, 40), noise(40, 30)]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(CHAT, images=images, **options)
    assert_equal(inputs, processor(text=RENDERED[name], images=images, return_tensors="pt"))
    special = [*ADDED.get(name, []), "</s>", "<image>"]
    typed = [
        {"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "a" + t}]}
        for t in special
    ]
    for message, token in zip(typed, special, strict=True):
        ids = processor.apply_chat_template([message], **options).input_ids[0].tolist()
        plain = processor.apply_chat_template(
            [{"role": "user", "content": [message["content"][0], {"type": "text", "text": "a"}]}], **options
        )
        token_id = processor.tokenizer.convert_tokens_to_ids(token)
        assert ids.count(token_id) == plain.input_ids[0].tolist().count(token_id)
        assert token in processor.decode(ids).replace("<image>", "", processor.image_tokens(30, 40))


def test_roles_that_a_template_refuses(speaker):
    processor = speaker(MISTRAL)
    with pytest.raises(ValueError, match="role is one of"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])
    template = processor.chat_template.replace("'system'", "'nobody'")
    with pytest.raises(ValueError, match="Only user and assistant roles are supported!"):
        processor.apply_chat_template([{"role": "system", "content": "x"}], chat_template=template)


def test_ids_around_pictures(llava, processor):
    places = processor.image_tokens(30, 40)
    ids = processor(text=QUESTION, images=noise(30, 40)).input_ids[0]
    assert ids[:5] == [1, 733, 16289, 28793, 28705]
    assert ids[5 : 5 + places] == [32000] * places
    assert ids[5 + places :] == [28705, 13, 3195, 349, 4894, 297, 456, 3469, 28804, 733, 28748, 16289, 28793]


@pytest.mark.parametrize("name", [VICUNA, VICUNA_13B])
def test_ids_of_vicuna(llava, name):
    processor = LlavaNextProcessor.from_pretrained(llava(name))
    places = processor.image_tokens(30, 40)
    text = "USER: <image>\nWhat is shown in this image? ASSISTANT:"
    ids = processor(text=text, images=noise(30, 40)).input_ids[0]
    assert ids[:5] == [1, 3148, 1001, 29901, 29871]
    assert ids[5 : 5 + places] == [32000] * places
    assert ids[5 + places :] == [13, 5618, 338, 4318, 297, 445, 1967, 29973, 319, 1799, 9047, 13566, 29901]
    options = {"add_generation_prompt": True, "tokenize": True}
    assert processor.apply_chat_template(SINGLE, images=noise(30, 40), **options)[0] == ids


def test_expand():
    blocks = iter([[9] * 2, [9], [], [9] * 3])
    found = [expand(ids, list(range(len(ids))), 9, blocks) for ids in ([1, 9, 2, 9], [], [9, 9])]
    assert [ids for ids, _ in found] == [[1, 9, 9, 2, 9], [], [9, 9, 9]]
    assert [marks for _, marks in found] == [[0, 1, 1, 2, 3], [], [1, 1, 1]]


def test_repeating_ids_is_repeating_text(processor):
    """The reference writes `<image>` thousands of times and encodes that."""
    for text in ("<image>", "a<image> b", "[INST] <image>\n<image><image>x [/INST]\n", "</s><image></s>"):
        written = text.replace("<image>", "<image>" * 7)
        ids = processor.tokenizer.encode(text)
        assert expand(ids, ids, 32000, iter([[32000] * 7] * 3))[0] == processor.tokenizer.encode(written)


# ---- text and image counts


def test_text_alone(processor):
    for images in (None, [], [[]]):
        inputs = processor(text="Hello", images=images, return_tensors="pt")
        assert inputs.input_ids.tolist() == [[1, 22557]]
        assert list(inputs) == ["input_ids", "attention_mask"]
    assert processor(text=["Hello", "a b"], images=[[], None]).input_ids == [[1, 22557], [1, 264, 287]]
    assert processor(text="Hello", add_special_tokens=False).input_ids == [[22557]]
    assert list(processor(images=noise(9, 9))) == ["pixel_values", "image_sizes"]


def test_truncation_of_text_behind_the_picture_is_fine(processor):
    places = processor.image_tokens(9, 9)
    inputs = processor(text="<image> " + "word " * 200, images=noise(9, 9), max_length=places + 9, truncation=True)
    assert len(inputs.input_ids[0]) == places + 9
    assert inputs.input_ids[0].count(32000) == places


# ---- configuration


def refused(folder, file, change, message):
    """The checkpoint in `folder` is refused with `change` in one of its files."""
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    with pytest.raises(ValueError, match=message):
        LlavaNextProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_grid_pinpoints": None}, "lack image_grid_pinpoints"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[336, 500]]}, "multiples of the tile's side of 336"),
        ({"image_grid_pinpoints": [[336, 0]]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[336 * 10**6, 336]]}, "4096"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints"),
        ({"crop_size": {"height": 240, "width": 240}}, "multiples of the tile's side of 240"),
        ({"crop_size": 224, "size": 224, "do_center_crop": False}, "do_center_crop=True"),
        ({"crop_size": {"height": 336, "width": 672}}, "crop_size is a square"),
        ({"crop_size": {"height": 336}}, "crop_size is a square"),
        ({"crop_size": {}}, "crop_size is a square"),
        ({"size": {"shortest_edge": 0}}, "size is a square"),
        ({"size": {"shortest_edge": 10**9}}, "size is a square"),
        ({"size": "336"}, "size is a square"),
        ({"size": {"shortest_edge": 224}, "do_center_crop": False}, "do_center_crop=True"),
        ({"resample": 9}, "resample"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": [0.5, 0, 0.5]}, "must not be 0"),
        ({"rescale_factor": float("nan")}, "NaN is no number in JSON"),
    ],
    ids=str,
)
def test_nonsense_in_the_image_processor(llava, tmp_path, change, message):
    refused(shutil.copytree(llava(MISTRAL), tmp_path / "x"), "preprocessor_config.json", change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy is one of default, full"),
        ({"patch_size": 0}, "patch_size"),
        ({"patch_size": 337}, "patch_size"),
        ({"patch_size": "14"}, "patch_size"),
        ({"num_additional_image_tokens": -1}, "num_additional_image_tokens"),
        ({"image_token": ""}, "image_token"),
        ({"image_token": 32000}, "image_token"),
    ],
    ids=str,
)
def test_nonsense_in_the_processor(llava, tmp_path, change, message):
    refused(shutil.copytree(llava(MISTRAL), tmp_path / "x"), "processor_config.json", change, message)


@pytest.mark.parametrize(
    "change",
    [
        {},  # the reference's own default: tiles of 224, canvases of multiples of 336
        {"size": {"height": 224, "width": 224}},
        {"size": {"shortest_edge": 250}},
        {"size": {"shortest_edge": 200}},
        {"do_resize": False},
        {"image_grid_pinpoints": [[100, 300], [224, 448], [333, 250]]},
    ],
    ids=str,
)
def test_tiles_at_the_edge_of_a_canvas(tmp_path, change):
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    theirs = LlavaNextImageProcessorPil(**change)
    theirs.save_pretrained(tmp_path)
    ours = LlavaNextImageProcessor.from_pretrained(tmp_path)
    for size in ((336, 336), (480, 640), (640, 480), (200, 1000), (1000, 200), (37, 1000), (503, 316), (1, 1)):
        expected = theirs(noise(*size), return_tensors="pt")
        inputs = ours(noise(*size), return_tensors="pt")
        assert torch.equal(inputs.pixel_values, expected["pixel_values"].float()), size
        assert inputs.image_sizes.tolist() == expected["image_sizes"].tolist()


@torch.no_grad()
def test_features_where_some_canvases_are_no_whole_tiles(tmp_path):
    """Tower of 12, canvases of multiples of 18: those of 36x36 work in the reference, the others fail in its model."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    from minivlm.models.llava_next import LlavaNextForConditionalGeneration

    pinpoints = [[18, 36], [36, 18], [36, 36]]
    reference = oracle_llava.random_llava(oracle_llava.llava_config(pinpoints=pinpoints))
    reference.save_pretrained(tmp_path)
    theirs = LlavaNextImageProcessorPil(size={"shortest_edge": 12}, crop_size=12, image_grid_pinpoints=pinpoints)
    theirs.save_pretrained(tmp_path)
    ours = LlavaNextForConditionalGeneration.from_pretrained(tmp_path)
    inputs = LlavaNextImageProcessor.from_pretrained(tmp_path)(noise(30, 40), return_tensors="pt")
    expected = theirs(noise(30, 40), return_tensors="pt")
    assert torch.equal(inputs.pixel_values, expected["pixel_values"].float())
    count = image_token_count((30, 40), pinpoints, 12, 4)
    ids = torch.tensor([[1, *[oracle_llava.IMAGE] * count, 5]])
    logits = reference(ids, **expected).logits
    assert (ours(ids, **inputs).logits - logits).abs().max() <= 1e-5 * logits.abs().max()
    flat = LlavaNextImageProcessor.from_pretrained(tmp_path)(noise(4, 40), return_tensors="pt")
    ids = torch.tensor([[1, *[oracle_llava.IMAGE] * image_token_count((4, 40), pinpoints, 12, 4), 5]])
    with pytest.raises(ValueError, match="whole tiles of 12"):
        ours(ids, **flat)
    with pytest.raises(RuntimeError):
        reference(ids, **flat)


def test_fields_set_later_are_checked_when_used(processor):
    processor.image_processor.crop_size = {"height": 240, "width": 240}
    with pytest.raises(ValueError, match="multiples of the tile"):
        processor(text="<image>", images=noise(9, 9))


def test_pictures_with_unequal_numbers_of_tiles_need_padding():
    with pytest.raises(ValueError, match="do_pad=True"):
        LlavaNextImageProcessor(do_pad=False)([noise(336, 336), noise(900, 900)])


@pytest.mark.parametrize("missing", [["patch_size"], ["patch_size", "vision_feature_select_strategy"], None])
def test_processor_files_without_patch_size(llava, tmp_path, missing):
    """Those of 2024, or none at all: the model's config says it; without that, the first picture's error does."""
    folder = shutil.copytree(llava(MISTRAL), tmp_path / "x")
    config = json.loads((folder / "processor_config.json").read_text())
    if missing is None:
        (folder / "processor_config.json").unlink()
    else:
        known = {name: value for name, value in config.items() if name not in missing}
        (folder / "processor_config.json").write_text(json.dumps(known))
    (folder / "config.json").unlink(missing_ok=True)
    processor = LlavaNextProcessor.from_pretrained(folder)
    assert processor(text="Hello").input_ids == [[1, 22557]]
    with pytest.raises(ValueError, match="patch_size=14 to from_pretrained"):
        processor(text="<image>", images=noise(30, 40))
    assert LlavaNextProcessor.from_pretrained(folder, patch_size=14).image_tokens(480, 640) == 2340
    processor.patch_size = 14  # what transformers' own advice says
    assert processor.image_tokens(480, 640) == 2340
    model = {"vision_config": {"patch_size": 28}, "vision_feature_select_strategy": "full"}
    (folder / "config.json").write_text(json.dumps(model))
    derived = LlavaNextProcessor.from_pretrained(folder)
    assert derived.patch_size == 28
    assert derived.vision_feature_select_strategy == ("default" if missing == ["patch_size"] else "full")


@pytest.mark.parametrize("model", [{}, {"vision_config": None}, {"vision_config": 14}])
def test_model_files_without_patch_size(llava, tmp_path, model):
    folder = shutil.copytree(llava(MISTRAL), tmp_path / "x")
    (folder / "processor_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(model))
    assert LlavaNextProcessor.from_pretrained(folder).patch_size is None


def test_padding_is_on_the_left_unless_something_says_otherwise(llava, tmp_path):
    folder = shutil.copytree(llava(MISTRAL), tmp_path / "x")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for side, expected in ((None, "left"), ("left", "left"), ("right", "right")):
        (folder / "tokenizer_config.json").write_text(
            json.dumps(
                config | {"padding_side": side} if side else {k: v for k, v in config.items() if k != "padding_side"}
            )
        )
        assert LlavaNextProcessor.from_pretrained(folder).tokenizer.padding_side == expected
    processor = LlavaNextProcessor.from_pretrained(folder, padding_side="left")
    inputs = processor(text=["a b c", "a"], padding=True, return_tensors="pt")
    assert inputs.input_ids.tolist() == [[1, 264, 287, 277], [32001, 32001, 1, 264]]
    assert inputs.attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_from_pretrained_options(llava):
    folder = llava(MISTRAL)
    pinpoints = [[336, 336], [672, 672]]
    processor = LlavaNextProcessor.from_pretrained(folder, image_grid_pinpoints=pinpoints, use_fast=True, do_pad=None)
    assert processor(text="<image>", images=noise(60, 50)).pixel_values.shape == (1, 2, 3, 336, 336)
    assert LlavaNextProcessor.from_pretrained(folder, chat_template="{{ x }}").chat_template == "{{ x }}"
    assert LlavaNextProcessor.from_pretrained(folder, image_token="<pad>").image_token_id == 32001
    with pytest.raises(TypeError, match="patch_sise"):
        LlavaNextProcessor.from_pretrained(folder, patch_sise=14)


def test_a_tokenizer_without_the_image_token_gets_it(processor):
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"))
    tokenizer = Tokenizer(backend, {"unk_token": "<unk>"})
    made = LlavaNextProcessor(processor.image_processor, tokenizer, patch_size=168)
    assert made.image_token_id == 2
    assert made(text="a<image>a", images=noise(9, 9)).input_ids == [[0, *[2] * (4 + 2 * 3), 0]]


def test_an_image_token_that_is_not_special_is_refused(processor):
    """Otherwise one that a user typed could become a picture's place."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<unk>": 1, "<": 2}, [], unk_token="<unk>"))
    backend.add_tokens(["<image>"])
    with pytest.raises(ValueError, match="<image> as ordinary text"):
        LlavaNextProcessor(processor.image_processor, Tokenizer(backend))


def test_missing_files(tmp_path):
    for name in ("preprocessor_config.json", "tokenizer.json"):
        with pytest.raises(OSError, match=name):
            LlavaNextProcessor.from_pretrained(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text('{"image_grid_pinpoints": [[336, 336]]}')


def test_saved_processors_load_in_transformers_and_here(llava, tmp_path):
    from transformers import AutoProcessor

    changes = {"image_grid_pinpoints": [[336, 336], [672, 336]], "resample": 2}
    ours = LlavaNextProcessor.from_pretrained(llava(MISTRAL), **changes)
    ours.save_pretrained(tmp_path / "saved")
    again = LlavaNextProcessor.from_pretrained(tmp_path / "saved")
    theirs = AutoProcessor.from_pretrained(tmp_path / "saved")
    original = AutoProcessor.from_pretrained(llava(MISTRAL), **changes)
    arguments = {
        "text": ["a <image>b", "c"],
        "images": [noise(400, 390)],
        "padding": True,
        "return_tensors": "pt",
    }
    saved, expected, back, before = again(**arguments), ours(**arguments), theirs(**arguments), original(**arguments)
    assert all(torch.equal(saved[key], expected[key]) for key in expected)
    assert_equal(saved, back)
    assert all(torch.equal(back[key], before[key]) for key in before)
    assert again.image_processor == ours.image_processor
    assert vars(again) | {"image_processor": 0, "tokenizer": 0} == vars(ours) | {"image_processor": 0, "tokenizer": 0}
    assert again.chat_template == theirs.chat_template
    # the other way round: what transformers 5 writes
    theirs.save_pretrained(tmp_path / "theirs")
    from_theirs = LlavaNextProcessor.from_pretrained(tmp_path / "theirs")(**arguments)
    assert all(torch.equal(from_theirs[key], expected[key]) for key in expected)


def test_the_seven_checkpoints_have_one_image_processor(data):
    for name in RENDERED:
        assert LlavaNextImageProcessor.from_pretrained(data / "hub" / "llava-hf" / name) == LlavaNextImageProcessor()
