"""Loops of evaluation harnesses, as lmms-eval and VLMEvalKit write them, over the small trained checkpoints: a batch
gives the ids of single calls."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from minivlm import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics2ForConditionalGeneration,
    IdeficsForVisionText2Text,
    IdeficsProcessor,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)

SHAPES = Path(__file__).parents[2] / "docs" / "shapes.png"
QUESTIONS = ["What number is written?", "Describe the picture.", "What is this?", "Which shapes are there?"]


def images() -> list[Image.Image]:
    """One of the task, and sizes and colours of other kinds."""
    first = Image.open(SHAPES)
    drawn = Image.linear_gradient("L").resize((160, 120))
    return [first, drawn, first.resize((120, 300)), first.crop((10, 20, 170, 100)).convert("P")]


@pytest.fixture(scope="module", params=["shapes-idefics2", "shapes-llava-next", "shapes-idefics"])
def loaded(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    name = request.param
    return AutoModelForImageTextToText.from_pretrained(name), AutoProcessor.from_pretrained(name)


def prompts(processor: Any) -> list[str]:
    """One image token in each, before the question."""
    made = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        made.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    return made


def encode(processor: Any, rows: slice = slice(None), answer: str = "") -> Any:
    """A processor's call for some of the rows. IDEFICS takes texts and images in turn, as in transformers."""
    if isinstance(processor, IdeficsProcessor):
        marks = ("<end_of_utterance>", f"\nAssistant:{answer}")
        items = [["User:", image, text, *marks] for image, text in zip(images(), QUESTIONS, strict=True)][rows]
        return processor(items, padding=True, add_end_of_utterance_token=False, return_tensors="pt")
    texts = [prompt + answer for prompt in prompts(processor)][rows]
    return processor(text=texts, images=[[image] for image in images()][rows], padding=True, return_tensors="pt")


SETTINGS = [  # as tasks give them
    {"max_new_tokens": 24},
    {"max_new_tokens": 24, "do_sample": False, "temperature": 0, "top_p": None, "num_beams": 1, "use_cache": True},
    {"max_new_tokens": 12, "num_beams": 3, "length_penalty": 0.8},
    {"max_new_tokens": 24, "until": ["\n", "."]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ", ".join(settings))
def test_batches_give_the_ids_of_single_calls(loaded: Any, settings: dict[str, Any]) -> None:
    """lmms-eval's loop: chat template to text, one processor call for all rows, the prompt's length cut off."""
    model, processor = loaded
    tokenizer = processor.tokenizer
    settings = dict(settings)
    until = settings.pop("until", None)
    if until:
        settings |= {"stop_strings": until, "tokenizer": tokenizer}
    given = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, **settings}
    tokenizer.padding_side = "left"
    inputs = {name: value.to(model.device) for name, value in encode(processor).items()}
    found = model.generate(**inputs, **given)
    rows = [row[len(prompt) :] for row, prompt in zip(found, inputs["input_ids"], strict=True)]
    for index, row in enumerate(rows):
        single = encode(processor, slice(index, index + 1)).to(model.device, model.dtype)
        ids = model.generate(**single, **given)[0, single["input_ids"].shape[-1] :]
        assert torch.equal(row[: len(ids)], ids)
        assert set(row[len(ids) :].tolist()) <= {tokenizer.pad_token_id}
        answer = tokenizer.decode(row, skip_special_tokens=True)
        assert answer == processor.batch_decode(ids[None], skip_special_tokens=True)[0]


def test_answers_are_those_of_the_task(loaded: Any) -> None:
    model, processor = loaded
    inputs = encode(processor, slice(1))
    found = model.generate(**inputs, max_new_tokens=8)
    text = processor.batch_decode(found[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)[0]
    assert text.strip() == "47."


def test_likelihoods(loaded: Any) -> None:
    """lmms-eval's `loglikelihood`: the loss of a continuation, its greedy tokens, under inference_mode."""
    model, processor = loaded
    losses = {}
    for answer in (" 47.", " 31."):
        inputs = encode(processor, slice(1), answer).to(model.device, model.dtype)
        labels = inputs["input_ids"].clone()
        start = encode(processor, slice(1))["input_ids"].shape[1]
        labels[0, :start] = -100
        with torch.inference_mode():
            outputs = model(**inputs, labels=labels)
        greedy = outputs["logits"].argmax(dim=-1)[:, start - 1 : -1]
        losses[answer] = outputs["loss"].item()
        assert greedy.equal(inputs["input_ids"][:, start:]) is (answer == " 47.")
    assert losses[" 47."] < 0.1 < losses[" 31."]


def test_idefics2_as_vlmevalkit_has_it() -> None:
    """A prompt of its own making, images in a flat list, bf16."""
    processor = AutoProcessor.from_pretrained("shapes-idefics2")
    model = Idefics2ForConditionalGeneration.from_pretrained(
        "shapes-idefics2", torch_dtype=torch.bfloat16, _attn_implementation="sdpa", device_map="cpu"
    ).to("cpu")
    prompt = f"User:<image>{QUESTIONS[0]}<end_of_utterance>\nAssistant:"
    inputs = processor(text=prompt, images=[images()[0]], return_tensors="pt")
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    found = model.generate(**inputs, max_new_tokens=24)
    answers = processor.batch_decode(found[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
    assert answers[0].strip() == "47."


def test_llava_next_as_vlmevalkit_has_it() -> None:
    """Prompt and images by position, settings that are off."""
    processor = LlavaNextProcessor.from_pretrained("shapes-llava-next", use_fast=False)
    model = LlavaNextForConditionalGeneration.from_pretrained(
        "shapes-llava-next", torch_dtype=torch.float32, low_cpu_mem_usage=True, use_flash_attention_2=False
    ).eval()
    settings = {"do_sample": False, "temperature": 0, "max_new_tokens": 24, "top_p": None, "num_beams": 1}
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]}]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = processor(prompt, [images()[0]], return_tensors="pt").to("cpu", torch.float32)
    answer = processor.decode(model.generate(**inputs, **settings)[0], skip_special_tokens=True)
    assert answer.strip().endswith("47.")


def test_idefics_as_vlmevalkit_has_it() -> None:
    """A prompt of texts and images in turn; the marks that must not be written."""
    processor = AutoProcessor.from_pretrained("shapes-idefics")
    model = IdeficsForVisionText2Text.from_pretrained("shapes-idefics", torch_dtype=torch.bfloat16, device_map="auto")
    prompt = ["User:", images()[0], QUESTIONS[0], "<end_of_utterance>", "\nAssistant:"]
    inputs = processor(prompt, add_end_of_utterance_token=False, return_tensors="pt").to("cpu")
    stop = processor.tokenizer("<end_of_utterance>", add_special_tokens=False).input_ids
    banned = processor.tokenizer(["<image>", "<fake_token_around_image>"], add_special_tokens=False).input_ids
    found = model.generate(**inputs, eos_token_id=stop, bad_words_ids=banned, max_new_tokens=24)
    text = processor.batch_decode(found, skip_special_tokens=True)
    assert text[0].split("assistant:")[-1].strip() == "47."  # its tokenizer writes small letters
