"""Rows of texts and images to train an IDEFICS on: the shapes task in the prompts of the guide, answers marked.

    row = make_row(scenes, images, rng)      items as the processor takes them, answers in {braces}
    batch = labelled_batch(processor, [row])   what the processor makes of them; the braces become labels

The braces are tokens of the vocabulary that nothing else here writes. So ids, images and masks are the processor's
own, and what it tells apart (a separator between two texts, say) is what is trained.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

from idefics_tasks import (
    END,
    caption_prompt,
    classification_prompt,
    few_shot_prompt,
    prompted_caption_prompt,
    question_prompt,
    story_prompt,
)
from shapes import COLOURS, HELD_OUT_SEED, KINDS, STYLES, Scene, ask, describe, draw, make_scene, story, turns
from shapes_models import AND_THAT
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

BORDER = "</s><s>"  # between documents of a row: nothing after it attends to anything before
SHOTS = (0, 1, 2, 4)  # to be measured
# An image's questions are drawn from these. Where things are is learned last, so it is asked most.
MIX = ["colour", "shape", "count", "exists", "where", "where", "where", "where", "number", "describe", "layout"]


def chat_prompt(image: Any, question: str) -> list[Any]:
    """A question about an image as the chat template writes it."""
    return ["User:", image, f"{question}{END}", "\nAssistant:"]


def answered(prompt: list[Any], answer: str) -> list[Any]:
    """The prompt with its answer, which counts, and so does the mark of its end."""
    *before, last = [*prompt, ""] if not isinstance(prompt[-1], str) else prompt
    return [*before, f"{last} {{{answer}{END}}}"]


def joined(items: list[Any]) -> list[Any]:
    """The same items with neighbouring texts as one, between which the processor writes nothing."""
    row: list[Any] = []
    for item in items:
        if row and isinstance(item, str) and isinstance(row[-1], str):
            row[-1] += item
        else:
            row.append(item)
    return row


# ------------------------------------------------------------------------------------------------------ rows


def make_row(scenes: list[Scene], images: list[Any], rng: random.Random, questions: int = 7) -> list[Any]:
    """A conversation, examples of one style, or a few documents of other forms, about these scenes in this order."""
    form = rng.choices((conversation_row, few_shot_row, packed_row), weights=(5, 3, 3))[0]
    return form(scenes, images, rng, questions)


def conversation_row(scenes: list[Scene], images: list[Any], rng: random.Random, questions: int) -> list[Any]:
    """About `questions` questions in all; an image comes before its first one, or after it as in the guide."""
    row: list[Any] = []
    for number, (scene, image) in enumerate(zip(scenes, images, strict=True)):
        kinds = rng.sample(MIX, max(1, questions // len(scenes)))
        kinds[-1] = "other" if rng.random() < 0.15 else kinds[-1]
        asked = turns(scene, rng, kinds) or turns(scene, rng, ["describe"])
        if number and rng.random() < 0.3:
            asked[0] = AND_THAT, describe(scene)
        for turn, (question, answer) in enumerate(asked):
            shown = [] if turn else [image]
            shown = [question, *shown] if rng.random() < 0.3 else [*shown, question]
            row += ["\nUser: " if row else "User: ", *shown, f"{END}\nAssistant:", f" {{{answer}{END}}}"]
    return joined(row)


def few_shot_row(scenes: list[Scene], images: list[Any], rng: random.Random, questions: int) -> list[Any]:
    """Examples and a last image in one style. All answers count, but for the first where it cannot be foreseen."""
    style = "describe" if rng.random() < 0.3 or not telling(scenes[0]) else rng.choice(list(STYLES))
    texts = [STYLES[style](scene) for scene in scenes]
    if len(scenes) == 1:
        return answered(few_shot_prompt([], images[0]), describe(scenes[0]))
    shown = [text if style != "describe" and n == 0 else f"{{{text}}}" for n, text in enumerate(texts)]
    row = few_shot_prompt(list(zip(images[:-1], shown[:-1], strict=True)), images[-1])
    row = joined(row) if rng.random() < 0.2 else row  # as processors write it that know no separator
    return answered(row, texts[-1])


def telling(scene: Scene) -> bool:
    """Whether its answer in a style shows which style that is."""
    return len(scene.shapes) > 1 and scene.number is not None


def packed_row(scenes: list[Scene], images: list[Any], rng: random.Random, questions: int) -> list[Any]:
    """A document for each image: captions, a question, a category, a story."""
    row: list[Any] = []
    for scene, image in zip(scenes, images, strict=True):
        document = _document(scene, image, rng)
        row += [BORDER, *document] if row else document
    return joined(row)


def _document(scene: Scene, image: Any, rng: random.Random) -> list[Any]:
    form = rng.choices(("caption", "prompted", "question", "category", "story"), weights=(2, 3, 6, 6, 3))[0]
    if form == "category" and (found := _category(scene, rng)):
        return answered(classification_prompt(image, found[0]), found[1])
    if form in ("question", "category"):
        kind = rng.choice([*MIX, "other"])
        question, answer = ask(scene, kind, rng) or ask(scene, "describe", rng)
        return answered(question_prompt(image, question), answer)
    prompts = {"caption": caption_prompt, "prompted": prompted_caption_prompt, "story": story_prompt}
    return answered(prompts[form](image), story(scene) if form == "story" else describe(scene))


def _category(scene: Scene, rng: random.Random) -> tuple[list[str], str] | None:
    """Categories to choose from and the right one, where all shapes of the scene share it."""
    common = [
        (names, found.pop())
        for names, found in (
            (KINDS, {shape.kind for shape in scene.shapes}),
            (COLOURS, {shape.colour for shape in scene.shapes}),
        )
        if len(found) == 1
    ]
    if not common:
        return None
    names, right = rng.choice(common)
    others = [name for name in names if name != right]
    listed = [right, *rng.sample(others, rng.randint(2, len(others)))]
    return (sorted(listed, key=list(names).index) if rng.random() < 0.3 else rng.sample(listed, len(listed))), right


# ---------------------------------------------------------------------------------------------------- batches


def labelled_batch(processor: Any, rows: list[list[Any]]) -> dict[str, Tensor]:
    """input_ids and labels (B, T), pixel_values (B, N, 3, S, S), image_attention_mask (B, T, N).

    Rows are filled up on the right. What counts is text in braces, and a mark of an utterance's end right after them.
    """
    inputs = processor(rows, padding=True, return_tensors="pt")
    opens, closes, end = processor.tokenizer.convert_tokens_to_ids(["{", "}", END])
    columns: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "image_attention_mask": []}
    everything = inputs["input_ids"], inputs["attention_mask"].bool(), inputs["image_attention_mask"]
    for ids, real, seen in zip(*everything, strict=True):
        ids, seen = ids[real], seen[real]
        counted = ((ids == opens).long() - (ids == closes).long()).cumsum(0) > 0
        counted[1:] |= (ids[1:] == end) & (ids[:-1] == closes)
        kept = (ids != opens) & (ids != closes)
        columns["input_ids"].append(ids[kept])
        columns["labels"].append(ids.masked_fill(~counted, -100)[kept])
        columns["image_attention_mask"].append(seen[kept])
    filling = {"input_ids": processor.tokenizer.pad_token_id, "labels": -100, "image_attention_mask": 0}
    batch = {name: pad_sequence(parts, True, filling[name]) for name, parts in columns.items()}
    return {**batch, "pixel_values": inputs["pixel_values"]}


# ------------------------------------------------------------------------------------------------ few-shot tests


def held_out_shots(count: int, shots: int, styles: list[str]) -> list[tuple[list[Any], str]]:
    """`count` few-shot prompts with drawn images and the right answers, none of the scenes trained on.

    The last images are the same for every number of shots.
    """
    cases = []
    for index in range(count):
        rng = random.Random(index)
        style = rng.choice(styles)
        first = HELD_OUT_SEED + 50_000_000 + 100 * index
        last, later = make_scene(first), map(make_scene, itertools.count(first + 1))
        examples = [(draw(scene), STYLES[style](scene)) for scene in itertools.islice(filter(telling, later), shots)]
        cases.append((few_shot_prompt(examples, draw(last)), STYLES[style](last)))
    return cases
