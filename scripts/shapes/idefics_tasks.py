"""The eight tasks of the IDEFICS guide, each in a few lines to copy.

    python scripts/shapes/idefics_tasks.py   shapes-idefics, which ships here
    python scripts/shapes/idefics_tasks.py few_shot story   only these
    python scripts/shapes/idefics_tasks.py --model HuggingFaceM4/idefics-9b   with the guide's own images (fetched)
    python scripts/shapes/idefics_tasks.py --model HuggingFaceM4/idefics-9b-instruct conversation

The guide is transformers' "Image tasks with IDEFICS". A prompt is a list of texts and images; the functions of the
first part write the prompts of each task, and what trains or measures a model on these tasks writes them the same way.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

END = "<end_of_utterance>"

# --------------------------------------------------------------------------------------------------- prompts


def caption_prompt(image: Any) -> list[Any]:
    """Nothing but the image: the model begins to describe it."""
    return [image]


def prompted_caption_prompt(image: Any) -> list[Any]:
    """The image and the beginning of a sentence."""
    return [image, "This is an image of "]


def few_shot_prompt(examples: list[tuple[Any, str]], image: Any) -> list[Any]:
    """Images with the description that we would like, then one without."""
    shown: list[Any] = []
    for example, text in examples:
        shown += ["User:", example, f"Describe this image.\nAssistant: {text}\n"]
    return [*shown, "User:", image, "Describe this image.\nAssistant:"]


def question_prompt(image: Any, question: str) -> list[Any]:
    """A question about an image."""
    instruction = "Instruction: Provide an answer to the question. Use the image to answer.\n"
    return [instruction, image, f"Question: {question} Answer:"]


def classification_prompt(image: Any, categories: list[str]) -> list[Any]:
    """Which of these is it?"""
    instruction = "Instruction: Classify the following image into a single category from the following list: "
    return [f"{instruction}{categories}.\n", image, "Category: "]


def story_prompt(image: Any) -> list[Any]:
    """An image as the seed of a longer text."""
    return ["Instruction: Use the image to write a story. \n", image, "Story: \n"]


def conversation_prompt(first: Any, answer: str, second: Any, question: str) -> list[Any]:
    """Two turns about two images, the first already answered; every utterance has its mark of an end."""
    opening = ["User: What is in this image?", first, END, f"\nAssistant: {answer}{END}"]
    return [*opening, "\nUser:", second, f"{question}{END}", "\nAssistant:"]


# ----------------------------------------------------------------------------------------------------- tasks


def complete(model: Any, processor: Any, prompts: list[Any], **settings: Any) -> list[str]:
    """What every task does: prompts to text that goes on from them. The two marks of images are never written."""
    inputs = processor(prompts, return_tensors="pt").to(model.device)
    bad_words_ids = processor.tokenizer(["<image>", "<fake_token_around_image>"], add_special_tokens=False).input_ids
    ids = model.generate(**inputs, bad_words_ids=bad_words_ids, **settings)
    return processor.batch_decode(ids, skip_special_tokens=True)


def captioning(model: Any, processor: Any, show: Show) -> list[str]:
    return complete(model, processor, caption_prompt(show.pet), max_new_tokens=30)


def prompted_captioning(model: Any, processor: Any, show: Show) -> list[str]:
    return complete(model, processor, prompted_caption_prompt(show.tower), max_new_tokens=30)


def few_shot(model: Any, processor: Any, show: Show) -> list[str]:
    prompt = few_shot_prompt([(show.tower, show.tower_text)], show.statue)
    return complete(model, processor, prompt, max_new_tokens=30)


def question_answering(model: Any, processor: Any, show: Show) -> list[str]:
    return complete(model, processor, question_prompt(show.people, show.question), max_new_tokens=20)


def classification(model: Any, processor: Any, show: Show) -> list[str]:
    return complete(model, processor, classification_prompt(show.goods, show.categories), max_new_tokens=6)


def rank_classification(model: Any, processor: Any, show: Show) -> list[str]:
    """The second half of classification: how likely each category is, by the mean over its tokens; best first."""
    from minivlm.generation.ranking import rank

    inputs = processor(classification_prompt(show.goods, show.categories))
    labels = processor.tokenizer(show.categories, add_special_tokens=False).input_ids
    scores = rank(model, inputs, labels, mean=True)[0]
    order = scores.argsort(descending=True).tolist()
    return ["\n".join(f"{scores[i]:8.2f}  {show.categories[i]}" for i in order)]


def story(model: Any, processor: Any, show: Show) -> list[str]:
    return complete(model, processor, story_prompt(show.door), num_beams=2, max_new_tokens=show.story_tokens)


def batch(model: Any, processor: Any, show: Show) -> list[str]:
    """Several prompts at once; they may differ in length and in their number of images."""
    prompts = [prompted_caption_prompt(image) for image in (show.tower, show.people, show.goods)]
    return complete(model, processor, prompts, max_new_tokens=30)


def conversation(model: Any, processor: Any, show: Show) -> list[str]:
    """For models tuned to converse: the answer ends with the mark of an utterance's end."""
    if END not in processor.tokenizer.all_special_tokens:
        return [f"(this checkpoint does not know {END}; take an -instruct one)"]
    exit_condition = processor.tokenizer(END, add_special_tokens=False).input_ids
    prompts = [conversation_prompt(show.dog, show.dog_text, show.owner, show.owner_question)]
    return complete(model, processor, prompts, eos_token_id=exit_condition, max_new_tokens=40)


TASKS: dict[str, Callable[[Any, Any, Any], list[str]]] = {
    task.__name__: task
    for task in (
        *(captioning, prompted_captioning, few_shot, question_answering, classification, rank_classification),
        *(story, batch, conversation),
    )
}


# ----------------------------------------------------------------------------------- what the tasks are shown


@dataclass(frozen=True)
class Show:
    """Images, by what they are in the guide, and the words that go with them; `right` holds the known answers."""

    pet: Any
    tower: Any
    tower_text: str
    statue: Any
    people: Any
    question: str
    goods: Any
    categories: list[str]
    door: Any
    dog: Any
    dog_text: str
    owner: Any
    owner_question: str
    story_tokens: int = 200
    right: dict[str, str] = field(default_factory=dict)


PHOTOGRAPH = (
    "https://images.unsplash.com/photo-{}?ixlib=rb-4.0.3&ixid=M3wxMjA3fDB8MHxwaG90by1wYWdlfHx8fGVufDB8fHx8fA%3D%3D"
    "&auto=format&fit=crop&w={}&q=80"
)
EIFFEL_TOWER = (
    "An image of the Eiffel Tower at night. Fun fact: the Eiffel Tower is the same height as an 81-storey building."
)
IDEFIX = "This picture depicts Idefix, the dog of Obelix in Asterix and Obelix. Idefix is running on the ground."


def from_the_guide() -> Show:
    """The guide's photographs (of Unsplash, shown there with their authors) by URL, and its words."""
    return Show(
        pet=PHOTOGRAPH.format("1583160247711-2191776b4b91", 3542),
        tower=PHOTOGRAPH.format("1543349689-9a4d426bee8e", 3501),
        tower_text=EIFFEL_TOWER,
        statue=PHOTOGRAPH.format("1524099163253-32b7f0256868", 3387),
        people=PHOTOGRAPH.format("1623944889288-cd147dbb517c", 3540),
        question="Where are these people and what's the weather like?",
        goods=PHOTOGRAPH.format("1471193945509-9ad0617afabf", 3540),
        categories=["animals", "vegetables", "city landscape", "cars", "office"],
        door=PHOTOGRAPH.format("1517086822157-2b0358e7684a", 2203),
        dog="https://upload.wikimedia.org/wikipedia/commons/8/86/Id%C3%A9fix.JPG",
        dog_text=IDEFIX,
        owner="https://static.wikia.nocookie.net/asterix/images/2/25/R22b.gif/revision/latest?cb=20110815073052",
        owner_question="And who is that?",
    )


def from_shapes(seed: int | None = None) -> Show:
    """Scenes that no model was trained on, drawn on the spot, with one of their questions; the one shape of a scene is
    its category."""
    import shapes

    first = shapes.HELD_OUT_SEED if seed is None else seed
    scenes = [shapes.make_scene(number) for number in range(first, first + 60)]
    single = next(scene for scene in scenes if len(scene.shapes) == 1)
    asked = ((scene, shapes.ask(scene, "colour", random.Random(first), held_out=True)) for scene in scenes)
    people, (question, answer) = next((scene, ask) for scene, ask in asked if ask and ask[1] != shapes.NONE)
    others = iter(scene for scene in scenes if len(scene.shapes) > 1 and scene not in (single, people))
    pet, tower, statue, door, dog, owner = (next(others) for _ in range(6))
    text, draw = shapes.describe, shapes.draw
    return Show(
        pet=draw(pet),
        tower=draw(tower),
        tower_text=text(tower),
        statue=draw(statue),
        people=draw(people),
        question=question,
        goods=draw(single),
        categories=list(shapes.KINDS),
        door=draw(door),
        dog=draw(dog),
        dog_text=text(dog),
        owner=draw(owner),
        owner_question="And what is in that?",
        story_tokens=40,
        right={
            "captioning": text(pet),
            "prompted_captioning": text(tower),
            "few_shot": text(statue),
            "question_answering": answer,
            "classification": single.shapes[0].kind,
            "rank_classification": single.shapes[0].kind,
            "story": shapes.story(door),
            "batch": " | ".join(map(text, (tower, people, single))),
            "conversation": text(owner),
        },
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"one of {', '.join(TASKS)}; default: all")
    parser.add_argument("--model", default="shapes-idefics", help="folder, built-in name or Hub id")
    parser.add_argument("--show", choices=["shapes", "guide"], help="default: guide for models of the Hub, else shapes")
    parser.add_argument("--device", default="auto", help="cpu, cuda, … (default: cuda if there is one)")
    parser.add_argument("--dtype", help="of the weights, such as bfloat16 (default: the checkpoint's own)")
    args = parser.parse_args(argv)
    if unknown := [task for task in args.tasks if task not in TASKS]:
        parser.error(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")

    from minivlm import AutoModelForImageTextToText, AutoProcessor

    guide = args.show == "guide" or (args.show is None and args.model.startswith("HuggingFaceM4/"))
    show = from_the_guide() if guide else from_shapes()
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model, device_map=args.device, dtype=args.dtype)
    for name in args.tasks or TASKS:
        begun = time.perf_counter()
        answers = TASKS[name](model, processor, show)
        right = f"   [{show.right[name]}]" if name in show.right else ""
        print(f"\n== {name.replace('_', ' ')}, {time.perf_counter() - begun:.1f} s{right}")
        print("\n---\n".join(answers))


if __name__ == "__main__":
    main()
