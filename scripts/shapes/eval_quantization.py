"""What four and eight bits cost in answers: accuracy by type of question, and how far next-token distributions move.

    python scripts/shapes/eval_quantization.py   every checkpoint that ships, as markdown tables
    python scripts/shapes/eval_quantization.py shapes-idefics2 --count 100   one of them, 100 questions of each type

Questions and images are those of `eval_shapes.py`, which no model was trained on. KL is the mean of
KL(bf16 ‖ quantised) in nats over the tokens of the right answers, each predicted from the right tokens before it.
The models are small, so they suffer more than large ones: their widths hold one to five blocks of 64 weights.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from eval_shapes import NAMES, Question, answers, question_inputs
from shapes import TYPES, conversation, draw, held_out, make_scene
from shapes_prompts import END, chat_prompt

from minivlm import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, Int4Config
from minivlm.checkpoint import hub
from minivlm.quantization import apply


def four_bits(kind: str, double: bool = False, head: bool = False) -> BitsAndBytesConfig:
    options = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double, "quantize_head": head}
    return BitsAndBytesConfig(load_in_4bit=True, **options)


FORMATS = {
    "bf16": None,
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": four_bits("nf4"),
    "nf4, doubly quantised": four_bits("nf4", double=True),
    "fp4": four_bits("fp4"),
    "int4, groups of 32": Int4Config(32),
    "int4, groups of 64": Int4Config(64),
    "int4, groups of 128": Int4Config(128),
    "int8, the head too": BitsAndBytesConfig(load_in_8bit=True, quantize_head=True),
    "nf4, doubly quantised, the head too": four_bits("nf4", double=True, head=True),
    "int4, groups of 128, the head too": Int4Config(128, quantize_head=True),
}


@torch.no_grad()
def distributions(model: Any, processor: Any, questions: list[Question], batch: int = 50) -> torch.Tensor:
    """Log-probabilities (tokens of all right answers, V) in fp32."""
    found = []
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        prompts, whole = question_inputs(processor, part), answered_inputs(processor, part)
        lengths = whole["attention_mask"].sum(1) - prompts["attention_mask"].sum(1)
        logits = model(**whole).logits.float()
        for row, length in enumerate(lengths.tolist()):  # padding is on the left
            found.append(logits[row, -length - 1 : -1].log_softmax(-1))
    return torch.cat(found)


def answered_inputs(processor: Any, questions: list[Question]) -> Any:
    """As `question_inputs`, each followed by its right answer."""
    images = [draw(make_scene(seed)) for seed, *_ in questions]
    if type(processor).__name__ == "IdeficsProcessor":
        prompts = [
            [*prompt[:-1], f"{prompt[-1]} {answer}{END}"]
            for (_, _, text, answer), image in zip(questions, images, strict=True)
            for prompt in (chat_prompt(image, text),)
        ]
        return processor(text=prompts, padding=True, return_tensors="pt")
    texts = [processor.apply_chat_template(conversation([(text, answer)])) for _, _, text, answer in questions]
    return processor(text=texts, images=[[image] for image in images], padding=True, return_tensors="pt")


def accuracy(questions: list[Question], replies: list[str]) -> dict[str, float]:
    """Per cent of exact matches by type; "all" leaves out the off-topic questions, as in `eval_shapes.py`."""
    right: dict[str, list[bool]] = {kind: [] for kind in TYPES}
    for (_, kind, _, answer), reply in zip(questions, replies, strict=True):
        right[kind].append(answer == reply)
    shares = {kind: 100 * sum(values) / len(values) for kind, values in right.items() if values}
    topical = [value for kind, values in right.items() if kind != "other" for value in values]
    return {**shares, "all": 100 * sum(topical) / len(topical)}


def evaluate(name: str, count: int) -> None:
    """Print the table of one checkpoint, a row as soon as it is known."""
    questions, processor = held_out(count), AutoProcessor.from_pretrained(name)
    reference, kinds = None, [kind for kind in TYPES if kind in {question[1] for question in questions}]
    heads = [*(NAMES[kind].split(" (")[0] for kind in kinds), "all but off topic", "KL, nats", "byte a weight"]
    print(f"\n{name}, {len(questions)} questions\n\n| format | {' | '.join(heads)} |\n|---|{'---:|' * len(heads)}")
    for form, config in FORMATS.items():
        model = AutoModelForImageTextToText.from_pretrained(name, dtype="bfloat16", quantization_config=config)
        shares = accuracy(questions, answers(model, processor, questions))
        logs = distributions(model, processor, questions)
        reference = logs if reference is None else reference
        kl = (reference.exp() * (reference - logs)).sum(-1).mean().item()
        layers = apply.layers(model).values()
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        size = sum(layer.format.nbytes(layer.shape) for layer in layers) / weights if layers else 2
        cells = [*(f"{shares[kind]:.1f} %" for kind in [*kinds, "all"]), f"{kl:.5f}", f"{size:.3f}"]
        print(f"| {form} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=hub.built_in(), help="folders or names; default: all that ship")
    parser.add_argument("--count", type=int, default=300, help="questions of each type")
    args = parser.parse_args()
    for name in args.models:
        evaluate(name, args.count)


if __name__ == "__main__":
    main()
