"""Exact-match accuracy on the shapes task: images and phrasings that no model was trained on.

    python scripts/shapes/eval_shapes.py                        shapes-idefics2, as a markdown table
    python scripts/shapes/eval_shapes.py shapes-llava-next      the same, with and without tiles
    python scripts/shapes/eval_shapes.py shapes-idefics         the same, and few-shot prompts
    python scripts/shapes/eval_shapes.py FOLDER --show 20       any other, with some of its mistakes
    python scripts/shapes/eval_shapes.py --reference            also the same questions through transformers

Every question starts a conversation of its own, with its image; decoding is greedy. A LLaVA-NeXT is also asked to
read small numbers, less than 14 of the 64 units of an image's longer side high, as always and with the base image
alone, in which they are less than 7 pixels high. An IDEFICS also gets the guide's few-shot prompts, "Describe this
image." with 0, 1, 2 and 4 examples: of descriptions, and of something else that only the examples show (`STYLES`);
and all of the guide's tasks.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from idefics_tasks import TASKS, from_shapes
from shapes import HELD_OUT_SEED, OFF_TOPIC, STYLES, TYPES, conversation, draw, held_out, make_scene
from shapes_models import base_alone
from shapes_prompts import SHOTS, chat_prompt, held_out_shots

Question = tuple[int, str, str, str]  # seed of the scene, type, question, right answer

NAMES = {
    "colour": "colour",
    "shape": "shape",
    "count": "how many",
    "exists": "is there",
    "where": "where (corner; left, right, above, below)",
    "number": "which number is written",
    "describe": "full description",
    "other": f'off topic ("{OFF_TOPIC}")',
}


def answers(model: Any, processor: Any, questions: list[Question], batch: int = 50) -> list[str]:
    """The model's answers to (seed, type, question, right answer), in the same order."""
    found = []
    for start in range(0, len(questions), batch):
        found += replies(model, processor, question_inputs(processor, questions[start : start + batch]))
    return found


def question_inputs(processor: Any, questions: list[Question]) -> Any:
    """What this processor, ours or the reference's, makes of each question and its image as a conversation."""
    return inputs_of(
        processor, [draw(make_scene(seed)) for seed, *_ in questions], [text for _, _, text, _ in questions]
    )


def inputs_of(processor: Any, images: list[Any], texts: list[str]) -> Any:
    """The same of drawn images, with one question each."""
    if type(processor).__name__ == "IdeficsProcessor":
        prompts = [chat_prompt(image, text) for image, text in zip(images, texts, strict=True)]
        return processor(text=prompts, padding=True, return_tensors="pt")
    prompts = [
        processor.apply_chat_template(conversation([(text, None)]), add_generation_prompt=True) for text in texts
    ]
    return processor(text=prompts, images=[[image] for image in images], padding=True, return_tensors="pt")


def replies(model: Any, processor: Any, inputs: Any) -> list[str]:
    """What the model continues with, greedily."""
    ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    found = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in found]


def table(questions: list[Question], found: list[str], **others: tuple[list[Question], list[str]]) -> str:
    """A markdown table of exact matches by type; off-topic and `other` questions stay out of the overall figure."""
    right: dict[str, list[bool]] = {kind: [] for kind in TYPES}
    for (_, kind, _, answer), reply in zip(questions, found, strict=True):
        right[kind].append(answer == reply)
    rows = [(NAMES[kind], right[kind]) for kind in TYPES if kind != "other" and right[kind]]
    rows.append(("**all of these**", [value for _, values in rows for value in values]))
    rows += [(NAMES["other"], right["other"])] if right["other"] else []
    for name, (asked, replies) in others.items():
        rows.append((name, [answer == reply for (*_, answer), reply in zip(asked, replies, strict=True)]))
    lines = [f"| {name} | {len(values)} | {100 * sum(values) / len(values):.1f} % |" for name, values in rows]
    return "\n".join(["| question | asked | exactly right |", "|---|---|---|", *lines])


def small_numbers(count: int) -> list[Question]:
    """Held-out questions about written numbers that are less than 14 units high."""
    numbers = [(question, make_scene(question[0]).number) for question in held_out(4 * count, ("number",))]
    return [question for question, number in numbers if number and number.height < 14][:count]


def with_and_without_tiles(model: Any, processor: Any, count: int) -> dict[str, tuple[list[Question], list[str]]]:
    """The small numbers, read by a LLaVA-NeXT as always and by its base image alone."""
    questions = small_numbers(count)
    rows = {"small number, with tiles": (questions, answers(model, processor, questions))}
    with base_alone(model, processor):
        rows["small number, base image alone"] = questions, answers(model, processor, questions)
    return rows


def few_shot_share(model: Any, processor: Any, shots: int, styles: list[str], count: int) -> float:
    """Share of right answers to few-shot prompts with so many examples of one of these styles."""
    right: list[bool] = []
    cases = held_out_shots(count, shots, styles)
    for start in range(0, count, 50):
        prompts, wanted = zip(*cases[start : start + 50], strict=True)
        inputs = processor(text=list(prompts), padding=True, return_tensors="pt")
        right += [a == b for a, b in zip(replies(model, processor, inputs), wanted, strict=True)]
    return sum(right) / len(right)


def few_shot_table(model: Any, processor: Any, count: int) -> str:
    """A markdown table: right answers to "Describe this image." by the number of examples and what they show."""
    first, *others = STYLES
    lines = ["| examples | asked | a description | something else, known from the examples only |", "|---|---|---|---|"]
    for shots in SHOTS:
        shares = [few_shot_share(model, processor, shots, styles, count) for styles in ([first], others)]
        lines.append(f"| {shots} | 2 × {count} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |")
    return "\n".join(lines)


def task_right(name: str, found: list[str], right: str) -> bool:
    """Whether a task of the guide, which answers with its prompts before the answers, has the right ones."""
    if name == "rank_classification":
        return found[0].split()[1] == right
    return all(f" {answer}".endswith(f" {one}") for answer, one in zip(found, right.split(" | "), strict=True))


def task_table(model: Any, processor: Any, count: int) -> str:
    """A markdown table: the tasks of the guide on `count` sets of scenes."""
    shows = [from_shapes(HELD_OUT_SEED + 60_000_000 + 1000 * number) for number in range(count)]
    lines = ["| task of the guide | asked | right |", "|---|---|---|"]
    for name, task in TASKS.items():
        right = [task_right(name, task(model, processor, show), show.right[name]) for show in shows]
        lines.append(f"| {name.replace('_', ' ')} | {count} | {100 * sum(right) / count:.0f} % |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default="shapes-idefics2", help="folder or name; default: the one that ships"
    )
    parser.add_argument("--count", type=int, default=300, help="questions of each type")
    parser.add_argument("--show", type=int, default=0, help="how many wrong answers to print")
    parser.add_argument("--reference", action="store_true", help="compare with transformers, answer by answer")
    args = parser.parse_args()

    from minivlm import AutoModelForImageTextToText, AutoProcessor
    from minivlm.checkpoint import hub

    questions, begun = held_out(args.count), time.monotonic()
    model = AutoModelForImageTextToText.from_pretrained(args.model)
    processor = AutoProcessor.from_pretrained(args.model)
    found = answers(model, processor, questions)
    tiled = hasattr(model.config, "image_grid_pinpoints")
    print(table(questions, found, **(with_and_without_tiles(model, processor, args.count) if tiled else {})))
    print(f"\n{len(questions)} questions in {time.monotonic() - begun:.0f} s")
    if model.config.model_type == "idefics":
        print(f"\n{few_shot_table(model, processor, args.count)}\n\n{task_table(model, processor, args.count // 3)}")
    wrong = [(question, reply) for question, reply in zip(questions, found, strict=True) if question[3] != reply]
    for (seed, kind, text, answer), reply in wrong[:: max(1, len(wrong) // args.show) if args.show else len(wrong) + 1]:
        print(f"scene {seed}, {kind}: {text!r} is {answer!r}, the model said {reply!r}")
    if args.reference:
        import transformers

        folder = hub.source(args.model).folder
        reference = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
        theirs = answers(reference, transformers.AutoProcessor.from_pretrained(folder), questions)
        same = sum(ours == reply for ours, reply in zip(found, theirs, strict=True))
        print(f"transformers {transformers.__version__} gives the same answer to {same} of {len(questions)}")


if __name__ == "__main__":
    main()
