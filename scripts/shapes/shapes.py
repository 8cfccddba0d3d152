"""The shapes task: small drawn images, questions about them and their exact answers.

A scene is drawn from a seed, so is every question. Lengths are in units: the longer side of an image is 64
units, which is also its size in pixels once a model's processor has shrunk it. Nothing here knows about a model,
so each family can be trained and measured on the same images.

    scene = make_scene(seed)                   what is in the image, and where
    image = draw(scene)                        PIL image, 2 to 8 pixels per unit
    text, answer = ask(scene, "colour", rng)   one question and its only right answer
"""

from __future__ import annotations

import math
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (214, 38, 38),
    "orange": (245, 135, 20),
    "yellow": (250, 222, 50),
    "green": (36, 156, 64),
    "blue": (38, 84, 214),
    "purple": (140, 56, 176),
    "black": (18, 18, 18),
    "white": (246, 246, 246),
}
KINDS = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES = ((64, 64), (64, 48), (48, 64), (64, 32), (32, 64))  # width and height in units, all whole patches
COUNTS = ("zero", "one", "two", "three", "four")
NONE = "there is none."
OFF_TOPIC = "i only know about shapes."
HELD_OUT_SEED = 10_000_000  # scenes from here on are never trained on


@dataclass(frozen=True)
class Shape:
    """One shape: `x`, `y` its centre and `size` its diameter in units, `angle` a slight turn in degrees."""

    kind: str
    colour: str
    x: float
    y: float
    size: float
    angle: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Number:
    """A written number: `height` of its digits in units, `style` regular, bold or slanted."""

    text: str
    x: float
    y: float
    height: float
    style: str
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """An image's content. `shapes` run from left to right; `background` is a style and its two colours."""

    seed: int
    width: int
    height: int
    scale: float
    shapes: tuple[Shape, ...]
    number: Number | None
    background: str
    paper: tuple[tuple[int, int, int], tuple[int, int, int]]


# ---------------------------------------------------------------------------------------------------- scenes


def _near(rgb: tuple[int, ...], spread: int, rng: random.Random) -> tuple[int, int, int]:
    return tuple(min(255, max(0, c + rng.randint(-spread, spread))) for c in rgb)


def _paper(rng: random.Random, inks: list[tuple[int, int, int]]) -> tuple:
    """Two similar background colours, both well apart from every ink."""
    while True:
        grey = rng.randint(15, 240)
        first = _near((grey,) * 3, rng.choice((0, 20, 60)), rng)
        second = _near(first, rng.choice((12, 30)), rng)
        if all(math.dist(ink, paper) > 100 for ink in inks for paper in (first, second)):
            return first, second
        inks = inks[:-1] if rng.random() < 0.01 else inks  # black, grey and white inks together can exclude all


def _attributes(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """(kind, colour) pairs; some scenes repeat one kind or colour, so that there is something to count."""
    theme_kind, theme_colour = rng.choice(KINDS), rng.choice(list(COLOURS))
    same_kind, same_colour = rng.choice((0, 0, 0.7)), rng.choice((0, 0, 0.7))
    kinds = [theme_kind if rng.random() < same_kind else rng.choice(KINDS) for _ in range(count)]
    colours = [theme_colour if rng.random() < same_colour else rng.choice(list(COLOURS)) for _ in range(count)]
    return list(zip(kinds, colours, strict=True))


def _place(rng: random.Random, width: int, height: int, boxes: list[tuple[float, float]], shapes: int) -> list | None:
    """Centres for boxes that neither overlap nor leave the image; the first `shapes` differ clearly in x."""
    placed: list[tuple[float, float]] = []
    for index, (w, h) in enumerate(boxes):
        for _ in range(40):
            x = rng.uniform(w / 2 + 1, width - w / 2 - 1)
            y = rng.uniform(h / 2 + 1, height - h / 2 - 1)
            apart = all(
                abs(x - px) > (w + pw) / 2 + 1 or abs(y - py) > (h + ph) / 2 + 1
                for (px, py), (pw, ph) in zip(placed, boxes, strict=False)  # the boxes placed so far
            )
            ordered = index >= shapes or all(abs(x - px) >= 5 for px, _ in placed)
            if apart and ordered:
                placed.append((x, y))
                break
        else:
            return None
    return placed


def size_of(seed: int) -> tuple[int, int]:
    """Width and height of the scene of a seed, without making the rest of it."""
    return random.Random(seed).choice(SIZES)


def make_scene(seed: int) -> Scene:
    """The scene of a seed: 0 to 4 shapes, most often a number of one or two digits, on one of four backgrounds."""
    rng = random.Random(seed)
    width, height = rng.choice(SIZES)  # as in size_of
    narrow = min(width, height) < 40
    while True:
        count = rng.choices(range(5), weights=(3, 20, 25, 27, 25))[0]
        pairs = _attributes(rng, count)
        sizes = [rng.uniform(11, 15 if narrow else 20) for _ in pairs]
        text = str(rng.randint(0, 9) if rng.random() < 0.25 else rng.randint(10, 99))
        written = count == 0 or rng.random() < 0.8
        digits, style = rng.uniform(11, 14 if narrow else 18), rng.choice(("regular", "bold", "slanted"))
        boxes = [(size, size) for size in sizes]
        if written:
            mask = _number_mask(text, 64, style)
            boxes.append((mask.width / 64 * digits, mask.height / 64 * digits))
        places = _place(rng, width, height, boxes, count)
        if places:
            break
    inks = [_near(COLOURS[colour], 12, rng) for _, colour in pairs]
    paper = _paper(rng, inks)
    shapes = [
        Shape(kind, colour, x, y, size, rng.uniform(-7, 7), ink)
        for (kind, colour), (x, y), size, ink in zip(pairs, places[:count], sizes, inks, strict=True)
    ]
    number = Number(text, *places[-1], digits, style, _number_ink(rng, paper)) if written else None
    return Scene(
        seed=seed,
        width=width,
        height=height,
        scale=rng.choice((2, 3, 4, 5, 8)),
        shapes=tuple(sorted(shapes, key=lambda shape: shape.x)),
        number=number,
        background=rng.choice(("plain", "gradient", "noise", "checker")),
        paper=paper,
    )


def _number_ink(rng: random.Random, paper: tuple) -> tuple[int, int, int]:
    """A colour far from both papers: black, white or, where one stands out, a colour."""
    inks = [_near(rgb, 12, rng) for rgb in COLOURS.values()]
    contrast = [min(math.dist(ink, other) for other in paper) + abs(sum(ink) - sum(paper[0])) / 4 for ink in inks]
    clear = [ink for ink, value in zip(inks, contrast, strict=True) if value > 220]
    strongest = inks[contrast.index(max(contrast))]
    return rng.choice(clear) if clear and rng.random() < 0.5 else strongest


# --------------------------------------------------------------------------------------------------- drawing


@lru_cache(maxsize=4096)
def _number_mask(text: str, height: int, style: str) -> Image.Image:
    """The number as an L mask cropped to its ink, close to `height` pixels high."""
    font = ImageFont.load_default(size=round(height / 0.71))  # digits of Pillow's own font are 0.71 em high
    stroke = max(1, round(height / 22)) if style == "bold" else 0
    mask = Image.new("L", (2 * height * len(text) + 8, 3 * height))
    ImageDraw.Draw(mask).text((height // 2, height), text, fill=255, font=font, stroke_width=stroke)
    if style == "slanted":
        mask = mask.transform(mask.size, Image.Transform.AFFINE, (1, 0.2, -0.3 * height, 0, 1, 0), Image.BILINEAR)
    return mask.crop(mask.getbbox())


def _outline(shape: Shape) -> list[tuple[float, float]]:
    """Corner points in units; a circle is a polygon of 40."""
    radius = shape.size / 2
    star = [(a, 1.0 if a % 72 == 0 else 0.42) for a in range(0, 360, 36)]
    cross = [(-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33)]
    cross += [(-x, -y) for x, y in cross]
    points = {
        "circle": [(math.sin(a * math.pi / 20), -math.cos(a * math.pi / 20)) for a in range(40)],
        "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
        "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
        "star": [(r * math.sin(math.radians(a)) * 1.05, -r * math.cos(math.radians(a)) * 1.05) for a, r in star],
        "diamond": [(0, -1), (0.78, 0), (0, 1), (-0.78, 0)],
        "cross": cross,
        "hexagon": [(math.cos(a * math.pi / 3), math.sin(a * math.pi / 3)) for a in range(6)],  # see finetune_shapes.py
    }[shape.kind]
    sin, cos = math.sin(math.radians(shape.angle)), math.cos(math.radians(shape.angle))
    return [(shape.x + radius * (x * cos - y * sin), shape.y + radius * (x * sin + y * cos)) for x, y in points]


def _background(scene: Scene) -> Image.Image:
    """Plain, gradient, noise or checker paper at one pixel per unit, enlarged."""
    size = (round(scene.width * scene.scale), round(scene.height * scene.scale))
    if scene.background == "plain":
        return Image.new("RGB", size, scene.paper[0])
    rng = np.random.default_rng(scene.seed)
    first, second = np.array(scene.paper[0], np.float32), np.array(scene.paper[1], np.float32)
    y, x = np.mgrid[: scene.height, : scene.width].astype(np.float32)
    if scene.background == "gradient":
        blend = x / scene.width if scene.seed % 2 else y / scene.height
    elif scene.background == "checker":
        cell = rng.integers(4, 13)
        blend = (x // cell + y // cell) % 2
    else:
        blend = rng.random((scene.height, scene.width), dtype=np.float32)
    paper = first + (second - first) * blend[..., None]
    smooth = Image.BILINEAR if scene.background == "gradient" else Image.NEAREST
    return Image.fromarray(paper.round().astype(np.uint8)).resize(size, smooth)


def draw(scene: Scene) -> Image.Image:
    """The image, `scale` pixels per unit. Edges are smoothed when a processor shrinks it."""
    image = _background(scene)
    pen = ImageDraw.Draw(image)
    for shape in scene.shapes:
        pen.polygon([(x * scene.scale, y * scene.scale) for x, y in _outline(shape)], fill=shape.rgb)
    if scene.number is not None:
        number = scene.number
        mask = _number_mask(number.text, round(number.height * scene.scale), number.style)
        corner = (number.x * scene.scale - mask.width / 2, number.y * scene.scale - mask.height / 2)
        image.paste(number.rgb, (round(corner[0]), round(corner[1])), mask)
    return image


LABELS = {"kind": 8, "colour": 9, "x": 17, "y": 17, "tens": 12, "units": 11}  # classes of each per-patch label


def patch_labels(scene: Scene, patch: int = 8, square: bool = False) -> np.ndarray:
    """What each patch shows, (rows, columns, 6) in the order of LABELS; 0 is "nothing".

    Every patch of an object carries the whole object's labels (a number's both digits, the centre in 4 units), so
    that a tower trained on them gathers an object from its patches. `square`: of the image squeezed to 64 × 64.
    """
    width, height = (64, 64) if square else (scene.width, scene.height)

    def place(thing: Shape | Number) -> tuple[int, int]:
        return int(thing.x * (width / scene.width) // 4) + 1, int(thing.y * (height / scene.height) // 4) + 1

    owner = Image.new("L", (scene.width, scene.height))
    pen = ImageDraw.Draw(owner)
    rows = [(0, 0, 0, 0, 0, 0)]
    for shape in scene.shapes:
        pen.polygon(_outline(shape), fill=len(rows))
        kind, colour = KINDS.index(shape.kind) + 1, list(COLOURS).index(shape.colour) + 1
        rows.append((kind, colour, *place(shape), 0, 0))
    if scene.number is not None:
        number = scene.number
        mask = _number_mask(number.text, 64, number.style)
        half_w, half_h = mask.width / 128 * number.height, mask.height / 128 * number.height
        box = (number.x - half_w, number.y - half_h, number.x + half_w, number.y + half_h)
        pen.rectangle(box, fill=len(rows))
        tens = int(number.text[-2]) + 1 if len(number.text) > 1 else 11
        rows.append((7, 0, *place(number), tens, int(number.text[-1]) + 1))
    owner = owner.resize((width, height), Image.NEAREST)
    grid = np.asarray(owner).reshape(height // patch, patch, width // patch, patch)
    shares = np.stack([(grid == index).sum(axis=(1, 3)) for index in range(len(rows))])
    shares[0] = patch * patch // 8  # an object must cover an eighth of a patch to be its label
    return np.array(rows)[shares.argmax(axis=0)]


EXAMPLE = Scene(  # docs/shapes.png: python scripts/shapes/shapes.py docs/shapes.png
    seed=0,
    width=64,
    height=48,
    scale=7.5,
    shapes=(
        Shape("star", "orange", 12, 14, 17, 4, COLOURS["orange"]),
        Shape("circle", "blue", 27, 34, 15, 0, COLOURS["blue"]),
        Shape("triangle", "red", 49, 33, 19, -4, COLOURS["red"]),
    ),
    number=Number("47", 46, 12, 12, "bold", (30, 30, 30)),
    background="checker",
    paper=((226, 226, 214), (214, 216, 204)),
)


# ------------------------------------------------------------------------------------------------- questions

TYPES = ("colour", "shape", "count", "exists", "where", "number", "describe", "other")
PLURALS = {kind: kind + ("es" if kind == "cross" else "s") for kind in KINDS}
PREFIXES = ("", "", "", "", "please: ", "look at the picture. ", "tell me: ", "a question: ", "hello! ", "ok, ")
SCENERY = ("picture", "image", "drawing")
ELSEWHERE = (
    "tree",
    "cat",
    "dog",
    "car",
    "cars",
    "house",
    "man",
    "people",
    "city",
    "country",
    "year",
    "tea",
    "music",
    "story",
)

# Phrasings to train on, and phrasings kept for the evaluation only. {p} is an image, {a}, {b} things,
# {or} the sides to choose from, {w} a word that has no place here.
PHRASINGS = {
    "colour": (
        "what colour is {a}?|which colour is {a}?|what is the colour of {a}?|{a} is what colour?"
        "|tell me the colour of {a}.|name the colour of {a}.|what colour does {a} have?|say which colour {a} has."
        "|do you know what colour {a} is?|of what colour is {a}?|in this {p}, what colour is {a}?"
        "|{a}: which colour?|what colour was used for {a}?|what is {a}'s colour?|which colour is {a} in this {p}?"
        "|can you say which colour {a} has?|what colour has {a} in the {p}?|name the colour {a} has.",
        "which colour does {a} have?|can you tell me what colour {a} is?|what is the colour of {a} in this {p}?"
        "|please name {a}'s colour.|in this {p}, which colour is {a}?|what colour do you see {a} in?",
    ),
    "shape": (
        "what shape is {a}?|which shape is {a}?|what kind of shape is {a}?|{a} is what shape?"
        "|name the shape of {a}.|tell me the shape of {a}.|what is the shape of {a}?|what is {a}?"
        "|do you know what shape {a} is?|what shape does {a} have?|in this {p}, what is {a}?|{a}: which shape?"
        "|say which shape {a} has.|what form does {a} have?|which shape is {a} in this {p}?"
        "|can you name the shape of {a}?|what kind of shape is {a} in the {p}?|what is {a} in this {p}?",
        "which shape does {a} have?|can you tell me what shape {a} is?|what is the shape of {a} in this {p}?"
        "|please name {a}'s shape.|in this {p}, which shape is {a}?|say what shape {a} is.",
    ),
    "count": (
        "how many {a} are there?|count the {a}.|how many {a} do you see?|how many {a} are in the {p}?"
        "|how many {a}?|tell me how many {a} there are.|how many {a} does the {p} show?|what is the count of {a}?"
        "|do you know how many {a} there are?|how many {a} were drawn?|in this {p}, how many {a} are there?"
        "|give the count of {a}.|how many {a} do you see in this {p}?|can you count the {a}?"
        "|count all the {a} in this {p}.|how many {a} can you count?",
        "how many {a} can you see?|can you tell me how many {a} there are in this {p}?"
        "|please count the {a} in the {p}.|how many {a} does this {p} have?|in the {p}, how many {a} do you see?"
        "|say how many {a} are shown.",
    ),
    "exists": (
        "is there {a}?|is there {a} in the {p}?|do you see {a}?|does the {p} show {a}?|is {a} in the {p}?"
        "|are you able to see {a}?|tell me if there is {a}.|does this {p} have {a}?|was {a} drawn?"
        "|do you know if there is {a}?|in this {p}, is there {a}?|yes or no: is there {a}?|is {a} shown?"
        "|can you say if there is {a}?|is there {a} to see in this {p}?|{a}: do you see it?",
        "can you see {a}?|can you tell me if there is {a} in this {p}?|is {a} shown in the {p}?"
        "|yes or no: do you see {a}?|tell me if you see {a}.|in the {p}, do you see {a}?",
    ),
    "where": (
        "where is {a}?|in which corner is {a}?|which corner is {a} in?|where in the {p} is {a}?"
        "|tell me where {a} is.|where do you see {a}?|in which part of the {p} is {a}?|{a} is where?"
        "|do you know where {a} is?|where was {a} drawn?|in this {p}, where is {a}?"
        "|which corner is nearest to {a}?|can you say where {a} is?|where is {a} in this {p}?"
        "|in this {p}, which corner is {a} in?",
        "where can you see {a}?|can you tell me where {a} is?|in which corner of the {p} is {a}?"
        "|please say where {a} is.|say in which corner {a} is.|in the {p}, where do you see {a}?",
    ),
    "side": (
        "is {a} {or} {b}?|tell me if {a} is {or} {b}.|{a}: {or} {b}?|seen from {b}, is {a} {or} it?"
        "|was {a} drawn {or} {b}?|do you know if {a} is {or} {b}?|in this {p}, is {a} {or} {b}?"
        "|say if {a} is {or} {b}.|is {a} shown {or} {b}?|can you say if {a} is {or} {b}?"
        "|is {a} {or} {b} in this {p}?",
        "can you tell me if {a} is {or} {b}?|in the {p}, is {a} {or} {b}?|can you see if {a} is {or} {b}?"
        "|do you see {a} {or} {b}?|do you know if {a} was drawn {or} {b}?|tell me: {a}, is it {or} {b}?",
    ),
    "number": (
        "what number is written?|which number is it?|what number do you see?|read the number.|what is the number?"
        "|what number is in the {p}?|which number is written in the {p}?|tell me the number.|what is written?"
        "|do you know what number is written?|what number does the {p} show?|in this {p}, what is written?"
        "|name the number.|which digits are written?|what text is written in the {p}?|can you read the number?"
        "|what number is in this {p}?|can you say which number is written?|what number is shown in this {p}?",
        "which number do you see?|can you tell me what number is written in this {p}?"
        "|please read the number in the {p}.|which number is shown?|read the number in this {p}."
        "|tell me which number you see.",
    ),
    "describe": (
        "describe the {p}.|what is in the {p}?|what do you see?|what does the {p} show?|give a full description."
        "|list all you see.|what is shown?|tell me what is in the {p}.|tell me all about this {p}."
        "|do you know what is in the {p}?|what was drawn?|in this {p}, what do you see?|describe it."
        "|what are all the things in the {p}?|describe all the shapes and the number.|can you describe the {p}?"
        "|what is shown in this {p}?|what can you tell me of the {p}?|can you say what is in this {p}?"
        "|can you list all you see?|what can you see?|what can you see in the {p}?",
        "describe this {p}.|what things do you see?|please give a full description of the {p}."
        "|list all the things in this {p}.|tell me what you see.|give a description of this {p}.",
    ),
    "layout": (
        "where are all the things?|tell me where all the things are.|list where all the shapes are."
        "|where is all you see?|in this {p}, where are all the things?|where are the shapes and the number?"
        "|list all the things and where.",
        "can you tell me where all the things are?|list where all the things are.",
    ),
    "other": (
        "who are you?|what is your name?|how are you?|what time is it?|who is the president?|tell me a joke."
        "|what is the weather?|how old are you?|where do you live?|what is the capital of france?|is it raining?"
        "|do you like music?|write a poem.|how do i cook rice?|what is love?|can you help me with my homework?"
        "|is there a dog?|do you see a cat?|what animal is this?|how many people are there?|is there a car?"
        "|what is the man doing?|where is the dog?|what colour is the car?|is the woman happy?|who made you?"
        "|what is the meaning of life?|translate this to french.|how many trees are there?|what city is this?"
        "|what colour is the sky?|is there a house?|what is the woman wearing?|where was this photo taken?"
        "|is there a {w}?|where is the {w}?|how many {w} are there?|what colour is the {w}?|do you see the {w}?"
        "|what is a {w}?|who is {w}?|what is the {w} doing?|{w}?|{w} {w} {w}.|what {w} is it?"
        "|what {w} do you like?|can you cook?|can you write a story?"
        "|what is the time in this city?|in which corner is the {w}?|in this {p}, where is the {w}?",
        "do you see trees?|who is this?|which cat is this?|what does the dog like?|how many cars do you see?"
        "|can you see {w}?|where can you see the {w}?|can you tell me what {w} is?|which year is this?"
        "|do you like tea?|write a story.|what country is this?|of what colour is the house?|can you translate this?"
        "|where is the tree in this {p}?",
    ),
}


def _article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def _named(scene: Scene) -> list[tuple[str, Shape]]:
    """Every short name that fits exactly one shape of the scene, with that shape."""
    names = [(name, shape) for shape in scene.shapes for name in _names(shape)]
    return [(name, shape) for name, shape in names if sum(name == other for other, _ in names) == 1]


def _names(shape: Shape) -> tuple[str, str, str]:
    return shape.kind, f"{shape.colour} shape", f"{shape.colour} {shape.kind}"


def _absent(scene: Scene, rng: random.Random) -> str:
    """A name that fits no shape, though often its colour and its kind are both there."""
    present = {name for shape in scene.shapes for name in _names(shape)}
    while True:
        kind, colour = rng.choice(KINDS), rng.choice(list(COLOURS))
        if scene.shapes and rng.random() < 0.5:
            kind, colour = rng.choice(scene.shapes).kind, rng.choice(scene.shapes).colour
        name = rng.choice((kind, f"{colour} shape", f"{colour} {kind}"))
        if name not in present:
            return name
        if rng.random() < 0.02:
            return f"{colour} {rng.choice([k for k in KINDS if f'{colour} {k}' not in present])}"


def describe(scene: Scene) -> str:
    """Shapes from left to right, then the number: "a red star, an orange cross and the number 7."."""
    return f"{_listed(_things(scene))}."


def story(scene: Scene) -> str:
    """The same things: "once upon a time there was a red star. it met an orange cross and the number 7. the end."."""
    first, *others = _things(scene)
    return f"once upon a time there was {first}. it {f'met {_listed(others)}' if others else 'was alone'}. the end."


def _things(scene: Scene) -> list[str]:
    parts = [_article(f"{shape.colour} {shape.kind}") for shape in scene.shapes]
    return parts + ([f"the number {scene.number.text}"] if scene.number else [])


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _plurals(shape: Shape) -> tuple[str, ...]:
    kinds = PLURALS[shape.kind]
    return "shapes", kinds, f"{shape.colour} shapes", f"{shape.colour} {kinds}"


def layout(scene: Scene) -> str:
    """Each thing's quarter of the image, in the order of `describe`: "red star top left, number bottom right."."""
    things = [(f"{shape.colour} {shape.kind}", shape) for shape in scene.shapes]
    things += [("number", scene.number)] if scene.number else []
    return ", ".join(f"{name} {_quarter(scene, thing)}" for name, thing in things) + "."


def _quarter(scene: Scene, thing: Shape | Number) -> str:
    return f"{'top' if thing.y < scene.height / 2 else 'bottom'} {'left' if thing.x < scene.width / 2 else 'right'}"


def _of_shapes(scene: Scene, attribute: str) -> str:
    return f"{_listed([getattr(shape, attribute) for shape in scene.shapes])}." if scene.shapes else NONE


# What "describe this image" can mean: the first by itself, the others where examples show it.
STYLES: dict[str, Callable[[Scene], str]] = {
    "describe": describe,
    "layout": layout,
    "colours": lambda scene: _of_shapes(scene, "colour"),
    "shapes": lambda scene: _of_shapes(scene, "kind"),
    "count": lambda scene: f"{COUNTS[len(scene.shapes)]}.",
    "number": lambda scene: f"{scene.number.text}." if scene.number else NONE,
}


def _corner(scene: Scene, thing: Shape | Number) -> str | None:
    """The quarter of the image that holds the thing's centre, None when it is near a middle line."""
    dx, dy = thing.x - scene.width / 2, thing.y - scene.height / 2
    if min(abs(dx), abs(dy)) < 4:
        return None
    return f"{_quarter(scene, thing)}."


def _side(scene: Scene, rng: random.Random) -> tuple[dict[str, str], str] | None:
    """Two things clearly apart along one axis, the words to choose from, and the right one."""
    things = [(f"the {name}", shape) for name, shape in _named(scene)]
    things += [("the number", scene.number)] if scene.number else []
    pairs = [(a, b) for a in things for b in things if a[1] is not b[1]]
    rng.shuffle(pairs)
    for (a, first), (b, second) in pairs:
        axis, words, of = rng.choice((("x", ["left", "right"], " of"), ("y", ["above", "below"], "")))
        gap = getattr(first, axis) - getattr(second, axis)
        if abs(gap) >= 6:
            answer = words[gap > 0]
            if rng.random() < 0.2:
                asked = rng.choice(words)
                return {"a": a, "b": b, "or": asked + of}, "yes." if asked == answer else "no."
            rng.shuffle(words)
            return {"a": a, "b": b, "or": " or ".join(words) + of}, f"{answer}."
    return None


def _attribute(scene: Scene, kind: str, rng: random.Random) -> tuple[dict[str, str], str] | None:
    """The colour of the star, or the shape of the red shape."""
    if kind == "colour":
        options = [(name, shape.colour) for name, shape in _named(scene) if name == shape.kind]
    else:
        options = [(name, shape.kind) for name, shape in _named(scene) if name == f"{shape.colour} shape"]
    absent = _absent(scene, rng)
    if rng.random() < 0.25 and (absent in KINDS if kind == "colour" else absent.endswith(" shape")):
        return {"a": f"the {absent}"}, NONE
    if not options:
        return None
    name, answer = rng.choice(options)
    return {"a": f"the {name}"}, f"{answer}."


def _count(scene: Scene, rng: random.Random) -> tuple[dict[str, str], str]:
    """How many stars, red shapes, red stars or shapes; each count that the scene offers is equally likely."""
    names = {"shapes", PLURALS[rng.choice(KINDS)], f"{rng.choice(list(COLOURS))} shapes"}
    names.update(name for shape in scene.shapes for name in _plurals(shape))
    counts = {name: sum(name in _plurals(shape) for shape in scene.shapes) for name in sorted(names)}
    wanted = rng.choice(sorted(set(counts.values())))
    return {"a": rng.choice([name for name, count in counts.items() if count == wanted])}, f"{COUNTS[wanted]}."


def _exists(scene: Scene, rng: random.Random) -> tuple[dict[str, str], str]:
    if rng.random() < 0.06:
        return {"a": "a number"}, "yes." if scene.number else "no."
    if scene.shapes and rng.random() < 0.5:
        return {"a": _article(rng.choice(_names(rng.choice(scene.shapes))))}, "yes."
    return {"a": _article(_absent(scene, rng))}, "no."


def _where(scene: Scene, rng: random.Random) -> tuple[dict[str, str], str] | None:
    if rng.random() < 0.06:
        return {"a": f"the {_absent(scene, rng)}"}, NONE
    things = _named(scene) + ([("number", scene.number)] if scene.number else [])
    places = [(name, _corner(scene, thing)) for name, thing in things if _corner(scene, thing)]
    if not places:
        return None
    name, answer = rng.choice(places)
    return {"a": f"the {name}"}, answer


def ask(scene: Scene, kind: str, rng: random.Random, held_out: bool = False) -> tuple[str, str] | None:
    """A question of one of TYPES, or "layout", and its answer; None where the scene has no clear one.

    "layout" is for training only: its answer names every thing's place, which teaches "where" much faster.
    """
    wording = rng.choice(("where", "side")) if kind == "where" else kind
    found: tuple[dict[str, str], str] | None = None
    if wording in ("colour", "shape"):
        found = _attribute(scene, wording, rng)
    elif wording in ("count", "exists", "where", "side"):
        found = {"count": _count, "exists": _exists, "where": _where, "side": _side}[wording](scene, rng)
    elif wording == "number":
        found = {}, STYLES["number"](scene)
    else:
        found = {}, {"describe": describe, "layout": layout}.get(wording, lambda _: OFF_TOPIC)(scene)
    return found and (_phrase(wording, found[0], rng, held_out), found[1])


def _phrase(wording: str, fill: dict[str, str], rng: random.Random, held_out: bool) -> str:
    """The question in one of its phrasings; in training also with a prefix and careless writing."""
    unheard = "".join(rng.choice("aeiou" if i % 2 else "bcdfghklmnprstvz") for i in range(rng.randint(3, 7)))
    word = unheard if rng.random() < 0.5 else rng.choice(ELSEWHERE)
    fill = {"p": rng.choice(SCENERY), "w": word, **fill}
    text = rng.choice(PHRASINGS[wording][held_out].split("|")).format(**fill)
    if rng.random() < 0.3:
        text = text.replace("colour", "color")
    if not held_out:
        text = rng.choice(PREFIXES) + text
        text = text.rstrip("?.") if rng.random() < 0.15 else text
    return text[0].upper() + text[1:]


def vocabulary() -> list[str]:
    """Every word of every question and answer, sorted."""
    words = [*COLOURS, *KINDS, *PLURALS.values(), *COUNTS, *SCENERY, "color", "left", "right", "above", "below", "top"]
    words += ["bottom", "an", "or", "shape", "shapes", NONE, OFF_TOPIC, "the number and", *PREFIXES]
    words += [text for pair in PHRASINGS.values() for text in pair]
    return sorted(set(re.findall("[a-z]+", re.sub("{.*?}", " ", " ".join(words).lower()))))


def held_out(count: int, kinds: tuple[str, ...] = TYPES) -> list[tuple[int, str, str, str]]:
    """(seed, type, question, answer): `count` of each type, about images and in phrasings kept from training."""
    asked = []
    for index, kind in enumerate(kinds):
        rng, seed, wanted = random.Random(index), HELD_OUT_SEED + 1_000_000 * index, len(asked) + count
        while len(asked) < wanted:
            found = ask(make_scene(seed), kind, rng, held_out=True)
            asked += [(seed, kind, *found)] if found else []
            seed += 1
    return asked


def turns(scene: Scene, rng: random.Random, kinds: list[str]) -> list[tuple[str, str]]:
    """Training questions of these types in a random order, without those that the scene gives no clear answer to."""
    found = [ask(scene, kind, rng) for kind in rng.sample(kinds, len(kinds))]
    return [turn for turn in found if turn]


def conversation(asked: list[tuple[str, str | None]]) -> list[dict]:
    """Questions and answers as chat messages; the image comes first, an answer of None is left to the model."""
    messages: list[dict] = []
    for question, answer in asked:
        image = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


if __name__ == "__main__":
    draw(EXAMPLE).quantize(32).save(sys.argv[1], optimize=True)
