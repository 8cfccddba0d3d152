"""What the processors of Idefics2 and LLaVA-NeXT refuse; they share their call. Of IDEFICS, in its own file."""

import numpy as np
import pytest
from PIL import Image

from minivlm.processing.idefics2 import Idefics2Processor
from minivlm.processing.llava_next import LlavaNextProcessor

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2, 2, 3), np.uint8))
REFUSED = [
    ({}, "pass text, images or both"),
    ({"text": "<image>"}, "0 images for 1 <image>"),
    ({"text": "<image>", "images": []}, "0 images for 1 <image>"),
    ({"text": "no", "images": [PICTURE]}, "1 images for 0 <image>"),
    ({"text": ["<image>", "<image><image>"], "images": [PICTURE] * 2}, "prompt 0: 1, prompt 1: 2"),
    ({"text": ["<image>", "<image>"], "images": [[PICTURE] * 2, []]}, "prompt 0 has 1 <image> but 2 images"),
    ({"text": ["<image>"], "images": [[PICTURE], []]}, "2 lists of images for 1 prompts"),
    ({"text": []}, "text is a string"),
    ({"text": 3}, "text is a string"),
    ({"text": ["a", 3]}, "text is a string"),
    ({"images": []}, "no image"),
    ({"images": [[], []]}, "no image"),
    ({"text": "<image>", "images": [PICTURE, [PICTURE]]}, "mixes"),
    ({"text": "<image> x", "images": PICTURE, "max_length": 50, "truncation": True}, "50 would cut into an image"),
    ({"text": "<image> x", "images": PICTURE, "max_length": 50}, r"prompt 0 has (329|1179) tokens"),
    ({"text": ["a", "a b"], "return_tensors": "pt"}, "padding=True"),
]


@pytest.fixture(params=["idefics2", "llava_next"])
def processor(request, processor_of, checkpoint, llava):
    if request.param == "idefics2":
        return processor_of(Idefics2Processor, checkpoint("idefics2-8b"))
    return processor_of(LlavaNextProcessor, llava("llava-v1.6-mistral-7b-hf"))


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refusals(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_wrong_types_and_names(processor):
    with pytest.raises(TypeError, match="an image is a"):
        processor(text="<image>", images=3)
    for arguments in ({"text": "a"}, {"images": PICTURE}):
        with pytest.raises(TypeError, match="pading"):
            processor(**arguments, pading=True)
    with pytest.raises(OSError, match=r"gone\.png"):
        processor(text="<image>", images="gone.png")


def test_a_prompt_in_the_place_of_pictures(processor_of, llava):
    processor = processor_of(LlavaNextProcessor, llava("llava-v1.6-mistral-7b-hf"))
    with pytest.raises(ValueError, match="0 images for 1 <image>"):
        processor(images="<image> What?")
