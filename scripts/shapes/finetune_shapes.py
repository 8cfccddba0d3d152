"""The demonstrations of docs/finetuning.md: each trains an adapter in minutes on a CPU, and measures before and after.

    python scripts/shapes/finetune_shapes.py json      shapes-idefics2 learns to answer in JSON
    python scripts/shapes/finetune_shapes.py nf4       the same from weights in four bits, then merged to 16 bits
    python scripts/shapes/finetune_shapes.py hexagon   shapes-llava-next learns a new shape
    python scripts/shapes/finetune_shapes.py few-shot  shapes-idefics learns JSON and keeps its few-shot prompts
    python scripts/shapes/finetune_shapes.py json --plot curves.png    also draw the losses of all demonstrations so far

A demonstration writes rows.jsonl and its images to a folder, runs the commands that it prints (`minivlm finetune`, and
for nf4 `quantize` and `merge`), and prints a table of right answers, and of old questions by their type. Half of the
rows are questions that the model knew before, which keeps them known. Images, and the wording of old questions, are
held out for measuring.
"""

import argparse
import json
import random
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from eval_shapes import few_shot_share, inputs_of, replies
from shapes import (
    HELD_OUT_SEED,
    STYLES,
    TYPES,
    Scene,
    _corner,
    ask,
    conversation,
    describe,
    draw,
    held_out,
    make_scene,
    turns,
)
from shapes_prompts import MIX
from tqdm import tqdm

from minivlm import AutoModelForImageTextToText, AutoProcessor
from minivlm.app import cli

JSON_QUESTIONS = ("The leftmost shape as JSON?", "Give the leftmost shape as JSON.", "JSON of the leftmost shape.")
OLD = TYPES[:-1]  # all but off-topic questions
UNSEEN = HELD_OUT_SEED + 70_000_000  # scenes for measuring the new task
Case = tuple[Scene, str, str]  # a scene, a question about it, the right answer


# ---- What is learned


def json_case(seed: int) -> Case:
    """The leftmost shape of the first scene from this seed on where it is clearly in one quarter."""
    scenes = map(make_scene, range(seed, seed + 1000))
    scene = next(scene for scene in scenes if scene.shapes and _corner(scene, scene.shapes[0]))
    shape = scene.shapes[0]
    answer = {"shape": shape.kind, "colour": shape.colour, "where": _corner(scene, shape).rstrip(".")}
    return scene, JSON_QUESTIONS[seed // 1000 % len(JSON_QUESTIONS)], json.dumps(answer)


def hexagon_case(seed: int) -> Case:
    """A scene with a hexagon in place of one of its shapes; asked is that shape, or a description of everything."""
    rng = random.Random(seed)
    scene = next(scene for scene in map(make_scene, range(seed, seed + 1000)) if scene.shapes)
    shapes, chosen = list(scene.shapes), rng.randrange(len(scene.shapes))
    shapes[chosen] = replace(shapes[chosen], kind="hexagon")
    if len(shapes) > 1 and rng.random() < 0.5:  # what it is most easily taken for
        shapes[chosen - 1] = replace(shapes[chosen - 1], kind="circle")
    scene, colour = replace(scene, shapes=tuple(shapes)), shapes[chosen].colour
    if rng.random() < 0.5 and sum(shape.colour == colour for shape in shapes) == 1:
        return scene, f"What shape is the {colour} shape?", "hexagon."
    return scene, ask(scene, "describe", rng, held_out=seed >= HELD_OUT_SEED)[0], describe(scene)


def write_rows(folder: Path, demo: "Demo", count: int) -> Path:
    """rows.jsonl and its images: `count` conversations about the new task, and `demo.replay` times as many about old
    questions alone."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows, path = [], folder / "rows.jsonl"

    def add(name: str, scene: Scene, asked: list[tuple[str, str]]) -> None:
        draw(scene).save(folder / "images" / f"{name}.png")
        rows.append(json.dumps({"messages": conversation(asked), "images": [f"images/{name}.png"]}))

    for number in tqdm(range(count), "drawing", delay=2, leave=False):
        rng = random.Random(number)
        scene, question, answer = demo.case(1000 * number)
        add(f"new{number}", scene, [(question, answer), *turns(scene, rng, list(demo.beside))])
        for other in range(demo.replay):
            known = make_scene(1000 * number + 500 + other)
            asked = turns(known, rng, rng.sample(MIX, 4)) or turns(known, rng, ["describe"])
            add(f"old{number}-{other}", known, asked)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


# ---- What is measured


def right(reply: str, answer: str) -> bool:
    """Exactly right. JSON is compared as what it says: the tokenizer puts blanks around punctuation."""
    if not answer.startswith("{"):
        return reply == answer
    try:
        found = json.loads(reply)
    except ValueError:
        return False
    return isinstance(found, dict) and {str(k).strip(): str(v).strip() for k, v in found.items()} == json.loads(answer)


def share(model: Any, processor: Any, cases: list[Case], batch: int = 50) -> float:
    """Right answers among the cases."""
    good = 0
    for begin in range(0, len(cases), batch):
        scenes, questions, answers = zip(*cases[begin : begin + batch], strict=True)
        found = replies(model, processor, inputs_of(processor, [draw(scene) for scene in scenes], list(questions)))
        good += sum(map(right, found, answers))
    return good / len(cases)


def measured(name: str | Path, demo: "Demo", count: int, adapter: Path | None = None) -> dict[str, float]:
    """Shares of right answers: of the new task, of old questions (`count` of each of 7 types), of few-shot prompts."""
    model = AutoModelForImageTextToText.from_pretrained(name, adapter=adapter)
    processor = AutoProcessor.from_pretrained(name)
    old = {kind: [] for kind in OLD}
    for seed, kind, question, answer in held_out(count, OLD):
        old[kind].append((make_scene(seed), question, answer))
    shares = {kind: share(model, processor, cases) for kind, cases in old.items()}
    found = {
        f"the new task ({3 * count})": share(
            model, processor, [demo.case(UNSEEN + 1000 * n) for n in range(3 * count)]
        ),
        f"old questions ({len(OLD) * count})": sum(shares.values()) / len(OLD),
    }
    if demo.few_shot:
        others = list(STYLES)[1:]  # what only examples show
        found[f"two examples show the task ({2 * count})"] = few_shot_share(model, processor, 2, others, 2 * count)
    return found | shares


# ---- The demonstrations


@dataclass(frozen=True)
class Demo:
    """A model, what it learns, and options of `minivlm finetune`."""

    title: str
    model: str
    case: Callable[[int], Case]
    options: tuple[str, ...] = ()
    lr: float = 4e-3
    steps: int = 300
    r: int = 8
    replay: int = 1  # conversations about old questions for each new one
    beside: tuple[str, ...] = ()  # types of old questions asked about a new scene
    four_bits: bool = False
    few_shot: bool = False


DEMOS = {
    "json": Demo("JSON, shapes-idefics2", "shapes-idefics2", json_case),
    "nf4": Demo("the same from NF4", "shapes-idefics2", json_case, four_bits=True),
    "hexagon": Demo(
        "hexagon, shapes-llava-next",
        "shapes-llava-next",
        hexagon_case,
        ("--targets", "all"),
        lr=2e-3,
        r=32,
        beside=("describe", "layout", "shape", "exists"),
    ),
    "few-shot": Demo("JSON, shapes-idefics", "shapes-idefics", json_case, lr=2e-3, steps=200, few_shot=True),
}


def run(*command: object) -> None:
    """A command of minivlm, printed as it would be typed."""
    words = list(map(str, command))
    print("$ minivlm " + shlex.join(words), flush=True)
    if code := cli.main(words):
        raise SystemExit(code)


def demonstrate(name: str, work: Path, arguments: argparse.Namespace) -> str:
    """Write rows, train, measure; a markdown table of per cent right."""
    demo, adapter = DEMOS[name], work / "adapter"
    base, columns = demo.model, {}
    columns["before"] = measured(base, demo, arguments.count)
    if demo.four_bits:
        base = work / "base"
        run("quantize", demo.model, base, "--dtype", "auto")
        columns["before, in NF4"] = measured(base, demo, arguments.count)
    rows = write_rows(work, demo, arguments.rows)
    begun = time.process_time()
    count, lr = arguments.steps or demo.steps, arguments.lr or demo.lr
    steps = ("--steps", count, "--batch", 16, "--accumulate", 1, "--lr", lr, "--warmup", 10)
    data = ("--image-folder", work, "--r", demo.r, "--train", "lm_head", "--save-every", 0)
    run("finetune", rows, adapter, "--model", base, *data, *steps, *demo.options)
    seconds = time.process_time() - begun
    columns["after"] = measured(base, demo, arguments.count, adapter)
    if demo.four_bits:
        run("merge", base, adapter, work / "merged", "--dtype", "bfloat16")
        columns["merged to bf16"] = measured(work / "merged", demo, arguments.count)
    lines = [f"| {demo.title} | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for what in columns["before"]:
        shares = [f"{100 * column[what]:.1f} %" for column in columns.values()]
        lines.append(f"{what}: {' → '.join(shares)}" if what in OLD else f"| {what} | {' | '.join(shares)} |")
    lines.sort(key=lambda line: not line.startswith("|"))  # old questions by type come after the table
    return "\n".join([*lines, "", f"{seconds:.0f} CPU seconds for checking the rows and {count} steps"])


def plot(work: Path, path: Path) -> None:
    """The losses of every demonstration that has run in `work`, each the mean of its last ten steps."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4.5), dpi=100)
    for name, demo in DEMOS.items():
        log = work / name / "adapter" / "log.jsonl"
        losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()] if log.exists() else []
        if losses:
            means = [sum(losses[max(0, end - 10) : end]) / min(end, 10) for end in range(1, len(losses) + 1)]
            axis.semilogy(range(1, len(losses) + 1), means, linewidth=1.5, label=demo.title)
    axis.set(xlabel="step", ylabel="loss of a learned token")
    axis.legend(fontsize=9)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", choices=DEMOS)
    parser.add_argument("--work", type=Path, default=Path("runs/finetune"), help="folder of rows, adapters and logs")
    parser.add_argument("--steps", type=int, help="in place of the demonstration's own")
    parser.add_argument("--rows", type=int, default=1500, help="of the new task, and as many of old questions")
    parser.add_argument("--lr", type=float, help="in place of the demonstration's own")
    parser.add_argument("--count", type=int, default=100, help="held-out questions of each old type")
    parser.add_argument("--plot", type=Path, help="PNG file for the losses")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    work = arguments.work / arguments.demo
    if work.exists():
        parser.error(f"{work} exists already; remove it, or name another folder by --work")
    print(demonstrate(arguments.demo, work, arguments))
    if arguments.plot:
        plot(arguments.work, arguments.plot)


if __name__ == "__main__":
    main()
