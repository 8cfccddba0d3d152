"""The shapes task is deterministic and its answers are right; the checkpoints that ship have learned it."""

import contextlib
import functools
import itertools
import json
import random
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import shapes
import shapes_lessons
import torch
import train_shapes as train
from eval_shapes import answers, small_numbers
from PIL import Image, ImageDraw, ImageFont
from shapes import COLOURS, COUNTS, KINDS, NONE, PHRASINGS, PLURALS, TYPES, Scene, ask, make_scene
from shapes_models import (
    FAMILIES,
    PINPOINTS,
    SPECIAL,
    base_alone,
    build_tokenizer,
    save_package,
    squares,
    start_from_idefics2,
    write_processor,
)

from minivlm import AutoModelForImageTextToText, AutoProcessor
from minivlm.checkpoint.hub import BUILT_IN
from minivlm.processing.llava_next import LlavaNextImageProcessor
from minivlm.training import data
from minivlm.training.loss import IGNORED

END = SPECIAL[-1]
SCENES = [make_scene(seed) for seed in range(200)]


def matching(scene: Scene, text: str) -> list[shapes.Shape]:
    """The shapes that the colour and kind words of a text fit; an independent, literal reading."""
    words = re.findall("[a-z]+", text.lower())
    kinds = [kind for kind in KINDS if kind in words or PLURALS[kind] in words]
    colours = [colour for colour in COLOURS if colour in words]
    return [s for s in scene.shapes if (not kinds or s.kind in kinds) and (not colours or s.colour in colours)]


def test_a_seed_gives_one_scene_and_one_picture():
    assert make_scene(7) == make_scene(7)
    assert make_scene(7) != make_scene(8)
    assert shapes.draw(make_scene(7)).tobytes() == shapes.draw(make_scene(7)).tobytes()
    assert all(shapes.size_of(scene.seed) == (scene.width, scene.height) for scene in SCENES)


def test_shapes_are_inside_ordered_and_apart():
    for scene in SCENES:
        xs = [shape.x for shape in scene.shapes]
        assert all(b - a >= 5 for a, b in itertools.pairwise(xs))
        for shape in scene.shapes:
            assert shape.size / 2 < shape.x < scene.width - shape.size / 2
            assert shape.size / 2 < shape.y < scene.height - shape.size / 2


@pytest.mark.parametrize("kind", ["colour", "shape", "count", "exists"])
@pytest.mark.parametrize("held_out", [False, True])
def test_answers_follow_from_the_scene(kind, held_out):
    rng = random.Random(0)
    for scene in SCENES:
        text, answer = ask(scene, kind, rng, held_out) or ("", None)
        found = matching(scene, text)
        if answer is None or "a number" in text:
            continue
        if kind == "count":
            assert answer == f"{COUNTS[len(found)]}."
        elif kind == "exists":
            assert answer == ("yes." if found else "no.")
        elif answer == NONE:
            assert not found
        else:
            assert [f"{getattr(shape, 'kind' if kind == 'shape' else 'colour')}." for shape in found] == [answer]


def test_corners_and_sides_follow_from_the_scene():
    rng = random.Random(0)
    for scene in SCENES:
        text, answer = ask(scene, "where", rng) or ("", NONE)
        found = [scene.number] if "the number" in text.lower() else matching(scene, text)
        if answer.count(" ") == 1 and len(found) == 1:  # "top left."
            assert ("top" in answer) == (found[0].y < scene.height / 2)
            assert ("left" in answer) == (found[0].x < scene.width / 2)


def test_description_and_number():
    scene = next(scene for scene in SCENES if len(scene.shapes) == 3 and scene.number)
    first, second, third = (f"{shape.colour} {shape.kind}" for shape in scene.shapes)
    plain = re.sub(r"\ban? ", "", shapes.describe(scene))
    assert plain == f"{first}, {second}, {third} and the number {scene.number.text}."
    assert ask(scene, "number", random.Random(0))[1] == f"{scene.number.text}."


def test_patches_are_labelled_with_their_object():
    for scene in SCENES[:50]:
        labels = shapes.patch_labels(scene)
        assert labels.shape == (scene.height // 8, scene.width // 8, len(shapes.LABELS))
        for shape in scene.shapes:
            kind, colour = labels[int(shape.y // 8), int(shape.x // 8), :2]
            near = {KINDS.index(other.kind) + 1 for other in scene.shapes if abs(other.x - shape.x) < 20} | {7}
            assert kind in near or kind == 0
            assert kind != KINDS.index(shape.kind) + 1 or list(COLOURS)[colour - 1] in {s.colour for s in scene.shapes}


def test_no_held_out_question_is_ever_trained_on():
    """Letter by letter, apart from punctuation, with all prefixes, sceneries and names."""

    def plain(text: str) -> str:
        return " ".join(re.findall("[a-z0-9]+", text.lower().replace("color", "colour")))

    for trained_on, kept in PHRASINGS.values():
        assert not set(trained_on.split("|")) & set(kept.split("|"))
    asked, rng = shapes.held_out(100), random.Random(0)
    assert len(asked) == 100 * len(TYPES)
    assert all(seed >= shapes.HELD_OUT_SEED for seed, *_ in asked)
    held_out = {plain(question) for _, _, question, _ in asked}
    turns = [turn for scene in SCENES for _ in range(20) for turn in shapes.turns(scene, rng, [*TYPES, "layout"])]
    assert not held_out & {plain(question) for question, _ in turns}


def test_the_tokenizer_knows_every_word_and_spells_the_others():
    tokenizer = build_tokenizer()
    assert all(len(tokenizer.encode(word).ids) == 2 for word in shapes.vocabulary())  # <s> and the word
    for text in ("a red star, an orange cross and the number 47.", "there is none.", "zebra? yes: no!"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert 0 not in tokenizer.encode("What's THIS: a zebra (2)?").ids


def between_marks(ids, tokenizer):
    """Labels as they were made when the shipped checkpoints were trained: from "assistant" ":" to the next end mark."""
    assistant, colon, end = (tokenizer.token_to_id(token) for token in ("assistant", ":", END))
    labels = torch.full_like(ids, IGNORED)
    for row, found in zip(ids.tolist(), labels, strict=True):
        opened = False
        for place, token in enumerate(row):
            if opened:
                found[place] = token
            if row[place - 1 : place + 1] == [assistant, colon]:
                opened = True
            opened = opened and token != end
    return labels


@pytest.mark.parametrize("name", ["idefics2", "llava_next"])
def test_labels_are_those_that_the_shipped_checkpoints_learned_from(name, tmp_path):
    """And so is all else of a batch: ids, pixels, no mask."""
    write_processor(FAMILIES[name], tmp_path)
    processor, rng = FAMILIES[name].processor.from_pretrained(tmp_path), random.Random(0)
    asked = [shapes.turns(scene, rng, [*TYPES, "layout"]) for scene in SCENES[:8]]
    pictures = [shapes.draw(scene) for scene in SCENES[:8]]
    rows = [shapes_lessons.talk("", picture, each) for picture, each in zip(pictures, asked, strict=True)]
    found = data.encode(data.for_training(processor), rows)
    text = [processor.apply_chat_template(shapes.conversation(each)) for each in asked]
    processor.tokenizer.padding_side = "right"
    wanted = processor(text=text, images=[[picture] for picture in pictures], padding=True, return_tensors="pt")
    del wanted["attention_mask"]
    wanted["labels"] = between_marks(wanted["input_ids"], build_tokenizer())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert (found["labels"] != IGNORED).sum() > 100


def pixels_of(found):
    """An image processor's answer is a dict, but for IDEFICS's, which is the pixels."""
    return found if isinstance(found, torch.Tensor) else found["pixel_values"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_pool_holds_what_the_processor_makes(name, tmp_path):
    """Pictures are shrunk once, when the pool is drawn; the processor would have made the same pixels of them."""
    write_processor(FAMILIES[name], tmp_path)
    shrink = FAMILIES[name].processor.from_pretrained(tmp_path).image_processor
    square = FAMILIES[name].square
    for scene in SCENES[:20]:
        pooled = shapes_lessons._drawn(scene.seed, square)[0]
        pooled = Image.fromarray(pooled if square else pooled[: scene.height, : scene.width])
        whole, small = (pixels_of(shrink([picture], return_tensors="pt")) for picture in (shapes.draw(scene), pooled))
        if name == "llava_next":  # the base is shrunk once more
            assert (whole[:, 0] - small[:, 0]).abs().mean() < 0.02
            whole, small = whole[:, 1:], small[:, 1:]
        assert torch.equal(whole, small)


class _Stopped(Exception):
    pass


def both_stages(family, folder, monkeypatch, stops=()):
    """The weights after four steps of each stage, and the logs; stopped and begun anew at `stops`, (stage, step)."""
    write_processor(family, folder / "processor")
    pool = shapes_lessons.make_pool(folder, 60, family.square)
    recipe = train.recipe_of
    monkeypatch.setattr(train, "recipe_of", lambda *sizes: replace(recipe(*sizes), warmup=1, save_every=1))
    # Its iteration multiplies bf16 matrices, which is slow where no instruction does it: once instead of five times.
    monkeypatch.setattr(torch.optim, "Muon", partial(torch.optim.Muon, ns_steps=1))
    finetune = train.loop.finetune
    for stop in (*stops, None):

        def steps(*args, stop=stop, **options):
            for step in finetune(*args, **options):
                if (args[4].name, step.number) == stop:
                    raise _Stopped
                yield step

        monkeypatch.setattr(train.loop, "finetune", steps)
        torch.manual_seed(0)
        model = family.model(family.config(), attn_implementation="eager")
        with contextlib.suppress(_Stopped):
            train.train_vision(folder, family, model, pool, 4, batch=2)
            train.train_answers(folder, family, model, pool, 4, batch=2, turns=7, lr=1e-3)
    monkeypatch.undo()
    logs = [(folder / stage / "log.jsonl").read_text().splitlines() for stage in ("vision", "joint")]
    return model.state_dict(), [[json.loads(line) for line in log] for log in logs]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole("idefics2")`: weights and logs of a run that is never stopped, made once."""

    @functools.cache
    def run(name):
        with pytest.MonkeyPatch.context() as patch:
            return both_stages(FAMILIES[name], tmp_path_factory.mktemp(name), patch)

    return run


@pytest.mark.parametrize("name", FAMILIES)
def test_both_stages_train(name, whole):
    _, logs = whole(name)
    for log in logs:
        assert [line["number"] for line in log] == [1, 2, 3, 4]
        assert all(0 < line["loss"] < 20 for line in log)


def test_resuming_equals_not_stopping(whole, tmp_path, monkeypatch):
    """Bit by bit: weights and losses, the optimisers' memories and the learning rate with them."""
    weights, logs = whole("llava_next")
    cut, again = both_stages(FAMILIES["llava_next"], tmp_path, monkeypatch, (("vision", 2), ("joint", 3)))
    assert all(torch.equal(weights[name], cut[name]) for name in weights)
    assert [[line["loss"] for line in log] for log in again] == [[line["loss"] for line in log] for log in logs]


@pytest.mark.parametrize(("width", "height"), shapes.SIZES)
def test_tiles_are_cut_as_the_processor_cuts_them(width, height):
    scene = next(scene for scene in SCENES if (scene.width, scene.height) == (width, height) and scene.shapes)
    picture = shapes.draw(scene).resize((width, height), Image.BILINEAR)
    options = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 2}
    options |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_grid_pinpoints": PINPOINTS}
    wanted = LlavaNextImageProcessor(**options)(picture, return_tensors="pt")["pixel_values"][0]
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    patches = torch.from_numpy(shapes.patch_labels(scene))[None].long()
    found, labels = squares(pixels, patches)
    torch.testing.assert_close(found[1:], wanted[1:])
    torch.testing.assert_close(found[:1], wanted[:1], atol=1.01 / 127.5, rtol=0)  # the processor rounds to whole greys
    assert labels.shape == (len(wanted), 16, 4, 6)
    assert all(labels[..., i].max() < n for i, n in enumerate(shapes.LABELS.values()))
    colours = labels[1:, :, 0, 1].flatten()  # of the tiles' patches: those of the picture, none lost and none new
    assert colours[colours > 0].sort().values.equal(patches[..., 1][patches[..., 1] > 0].sort().values)


@pytest.fixture(scope="module")
def small_idefics2(tmp_path_factory):
    """A folder with random weights, to start from."""
    folder = tmp_path_factory.mktemp("idefics2")
    save_package(FAMILIES["idefics2"], FAMILIES["idefics2"].model(FAMILIES["idefics2"].config()), folder)
    return folder


def test_llava_next_begins_with_the_parts_of_an_idefics2(small_idefics2):
    family = FAMILIES["llava_next"]
    llava = family.model(family.config())
    start_from_idefics2(family, llava, small_idefics2)
    ids = torch.arange(10, 60)[None]
    wanted = AutoModelForImageTextToText.from_pretrained(small_idefics2)(input_ids=ids).logits
    torch.testing.assert_close(llava(input_ids=ids).logits, wanted)  # of text alone they say the same


def test_idefics_begins_with_the_parts_of_an_idefics2(small_idefics2):
    """Of text alone they say the same, token by token, though three tokens and two key heads are elsewhere."""
    family = FAMILIES["idefics"]
    idefics, theirs = family.model(family.config()), AutoModelForImageTextToText.from_pretrained(small_idefics2)
    start_from_idefics2(family, idefics, small_idefics2)
    text = "User: how many stars?<end_of_utterance> Assistant: two.<end_of_utterance>"
    before, now = build_tokenizer(), build_tokenizer(decoupled=True)
    ids, others = (torch.tensor([tokenizer.encode(text).ids]) for tokenizer in (before, now))
    no_picture = {"pixel_values": torch.zeros(1, 1, 3, 64, 64), "image_attention_mask": torch.zeros(*ids.shape, 1)}
    logits = idefics(input_ids=others, **no_picture).logits
    known = [now.token_to_id(before.id_to_token(index)) for index in range(before.get_vocab_size())]
    torch.testing.assert_close(logits[..., known], theirs(input_ids=ids).logits)
    tower, siglip = idefics.model.vision_model, theirs.model.vision_model
    pictures = torch.randn(1, 3, 64, 64)
    patches = tower.embeddings(pictures)[:, 1:]
    torch.testing.assert_close(patches, siglip.embeddings(pictures, None))


@pytest.fixture(scope="module", params=["shapes-idefics2", "shapes-llava-next", "shapes-idefics"])
def checkpoint(request):
    return BUILT_IN / request.param


@pytest.fixture(scope="module")
def ours(checkpoint):
    return AutoModelForImageTextToText.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)


def test_the_checkpoint_is_small(checkpoint):
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) <= 4_000_000


@pytest.mark.parametrize("name", FAMILIES)
def test_the_script_still_writes_the_vocabulary_that_was_trained(name):
    shipped = BUILT_IN / f"shapes-{name.replace('_', '-')}" / "tokenizer.json"
    tokenizer = build_tokenizer(FAMILIES[name].decoupled)
    assert json.loads(tokenizer.to_str()) == json.loads(shipped.read_text())


def test_the_checkpoint_has_learned_the_task(ours):
    questions = shapes.held_out(20)
    found = answers(*ours, questions)
    right = [answer == reply for (*_, answer), reply in zip(questions, found, strict=True)]
    assert sum(right) / len(right) >= 0.95


def test_a_hand_drawn_picture(ours):
    model, processor = ours
    picture = Image.new("RGB", (640, 480), (225, 225, 215))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((80, 80, 220, 220), fill=(220, 40, 40))
    pen.rectangle((420, 260, 550, 390), fill=(40, 90, 210))
    pen.text((120, 300), "47", fill=(20, 20, 20), font=ImageFont.load_default(size=150))
    expected = {
        "What colour is the circle?": "red.",
        "What shape is the blue shape?": "square.",
        "How many shapes are there?": "two.",
        "Is there a green star?": "no.",
        "Where is the circle?": "top left.",
        "What number is written?": "47.",
        "Describe the picture.": "a red circle, a blue square and the number 47.",
    }
    found = {}
    for question in expected:
        messages = shapes.conversation([(question, None)])
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(messages, images=[[picture]], **options)
        ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        found[question] = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert found == expected


def test_transformers_gives_the_same_answers(ours, checkpoint):
    transformers = pytest.importorskip("transformers")
    questions = shapes.held_out(5)
    reference = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    theirs = answers(reference, transformers.AutoProcessor.from_pretrained(checkpoint), questions)
    assert answers(*ours, questions) == theirs


def test_small_numbers_need_tiles(ours):
    model, processor = ours
    if not hasattr(model.config, "image_grid_pinpoints"):
        pytest.skip("no tiles")
    questions, config = small_numbers(40), model.config
    assert all(make_scene(seed).number.height < 14 for seed, *_ in questions)

    def right() -> int:
        return sum(answer == reply for (*_, answer), reply in zip(questions, answers(*ours, questions), strict=True))

    with base_alone(model, processor):
        assert processor.image_tokens(64, 64) == 16 + 4 * (4 + 1)
        without = right()
    assert model.config is model.model.config is config
    assert processor.image_tokens(64, 64) == 16 + 8 * (8 + 1)
    assert right() >= without + 8
