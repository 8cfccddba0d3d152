"""Rows of every form, labels where the assistant speaks, and rows that cannot be trained on, named before step 1."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import torch
from PIL import Image

from minivlm.training import data
from minivlm.training.loss import IGNORED, token_loss
from minivlm.training.rows import read_rows


@pytest.fixture(scope="module")
def families(checkpoint: Any, llava: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name → (model, processor)."""
    makers = tiny_chat.families(checkpoint, llava, tmp_path_factory.mktemp("families"))
    made: dict[str, Any] = {}

    def family(name: str) -> Any:
        if name not in made:
            made[name] = makers[name]()
        return made[name]

    return family


FAMILIES = ("idefics2", "llava_next", "idefics")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    Image.new("RGB", (20, 16), "red").save(path)
    return path


def conversation(image: Any, *turns: tuple[str, str]) -> list[dict[str, Any]]:
    messages = []
    for number, (question, answer) in enumerate(turns):
        content = [{"type": "text", "text": question}]
        content[:0] = [{"type": "image", "image": image}] if image is not None and not number else []
        messages += [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    return messages


def learned_text(processor: Any, row: data.Row) -> str:
    inputs = data.encode(data.for_training(processor), [row])
    return processor.decode(inputs["input_ids"][inputs["labels"] != IGNORED].tolist())


# ---- Labels


@pytest.mark.parametrize("name", FAMILIES)
def test_learned_are_answers_and_their_ends(families: Any, image: Path, name: str) -> None:
    """Not questions, not typed roles and marks, not images: of several turns, each answer with its end mark."""
    _, processor = families(name)
    typed = "Assistant: blue<end_of_utterance> [/INST] <image> </s> what?"
    row = data.Row("line 1", conversation(str(image), (typed, "red"), ("Sure?", "blue what?")))
    text = learned_text(processor, row)
    end = {"llava_next": "</s>"}.get(name, "<end_of_utterance>")
    assert "".join(text.split()) == f"red{end}bluewhat?{end}"
    ids = data.encode(data.for_training(processor), [row])
    assert processor.image_token_id not in ids["labels"]
    assert "⟦red" in data.shown(data.for_training(processor), row).replace("⟦ ", "⟦")


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_is_no_label_whatever_its_id(families: Any, image: Path, name: str) -> None:
    """With the pad token of the end mark, ends are learned and padding is not, on either side, for the same loss."""
    model, processor = families(name)
    rows = [
        data.Row("1", conversation(str(image), ("What?", "red"))),
        data.Row("2", conversation(None, ("And a long question without an image?", "blue red red"))),
    ]
    losses = []
    for side, pad in (("right", processor.tokenizer.pad_token), ("right", "</s>"), ("left", "</s>")):
        padded = data.for_training(processor)
        padded.tokenizer.padding_side, padded.tokenizer.pad_token = side, pad
        inputs = data.encode(padded, rows)
        assert ("attention_mask" in inputs) == (side == "left")
        with torch.no_grad():
            losses.append(token_loss(model, inputs))
    singly = [token_loss(model, data.encode(data.for_training(processor), [row])) for row in rows]
    expected = (sum(loss.item() for loss, _ in singly), sum(count for _, count in singly))
    for loss, count in losses:
        assert count == expected[1]
        assert loss.item() == pytest.approx(expected[0], rel=1e-4)


# ---- Rows


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) if not isinstance(row, str) else row for row in rows))
    return path


QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
ANSWER = {"role": "assistant", "content": "red"}
FORMS: dict[str, dict[str, Any]] = {
    "image in the message": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": "image.png"}, {"type": "text", "text": "What?"}]},
            ANSWER,
        ]
    },
    "image beside": {"messages": [QUESTION, ANSWER], "images": ["image.png"]},
    "no place given": {"messages": [{"role": "user", "content": "What?"}, ANSWER], "images": ["image.png"]},
    "LLaVA": {
        "id": 3,
        "image": "image.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}],
    },
    "LLaVA, image after the text": {
        "image": ["image.png"],
        "conversations": [{"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "red"}],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_rows(families: Any, image: Path, form: str) -> None:
    _, processor = families("idefics2")
    rows = read_rows(write(image.parent, FORMS[form]), images=image.parent)
    inputs = data.encode(data.for_training(processor), rows)
    assert inputs["pixel_values"].shape[:2] == (1, 5)  # the whole and its quarters
    assert "".join(learned_text(processor, rows[0]).split()) == "red<end_of_utterance>"
    assert "What?" in data.shown(processor, rows[0])


@pytest.mark.parametrize("names", [("0.a.png", "0.b.png"), ("0.a.JPG", "0.b.tiff")])
def test_tar_files(names: tuple[str, str], families: Any, image: Path, tmp_path: Path) -> None:
    """As WebDataset has them: what belongs to a row shares its name up to the first dot."""
    _, processor = families("idefics2")
    path = tmp_path / "rows.tar"
    row = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}, ANSWER]}
    files = {"0.json": json.dumps(row).encode(), **dict.fromkeys(names, image.read_bytes())}
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"set/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    (row,) = read_rows(path)
    assert data.encode(processor, [row])["pixel_values"].shape[1] == 10


def test_parquet_files(families: Any, image: Path, tmp_path: Path) -> None:
    """Images as bytes or paths, messages as lists or LLaVA's; columns that are empty in a row are not there."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    _, processor = families("idefics2")
    plain = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}]
    typed = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    llava = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    stored, named = [{"bytes": image.read_bytes(), "path": None}], [{"bytes": None, "path": image.name}]
    for values in (
        [{"messages": plain, "images": stored}, {"messages": plain, "images": named}],
        [{"messages": typed, "images": stored}],
        [{"conversations": llava, "image": image.name}, {"conversations": llava[1:], "image": None}],
    ):
        path = tmp_path / "rows.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(values), path)
        rows = read_rows(path, tmp_path)
        assert [row.where for row in rows] == [f"rows.parquet, row {n + 1}" for n in range(len(values))]
        assert data.encode(data.for_training(processor), rows[:1])["pixel_values"].shape[1] == 5
        assert "".join(learned_text(processor, rows[0]).split()) == "red<end_of_utterance>"


BAD = {
    "not JSON": ('{"messages": [', "line 2.*JSON"),
    "a name twice": ('{"messages": [], "messages": []}', "line 2.*'messages' is given twice"),
    "no messages": ({"text": "hello"}, "line 2.*messages"),
    "too few images": ({"messages": [QUESTION, ANSWER]}, "line 2.*1 places.*0 images"),
    "too many images": ({"messages": [QUESTION, ANSWER], "images": ["a.png", "b.png"]}, "line 2.*1 places.*2 images"),
    "an unknown speaker": ({"conversations": [{"from": "robot", "value": "hi"}]}, "line 2.*robot"),
    "an image of a wrong type": ({"messages": [QUESTION, ANSWER], "images": [3]}, "line 2.*int"),
}


@pytest.mark.parametrize("fault", BAD)
def test_rows_that_cannot_be_read(tmp_path: Path, fault: str) -> None:
    row, message = BAD[fault]
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path, {"messages": [ANSWER]}, row))


@pytest.mark.parametrize("text", ["{", '{"messages": [], "messages": []}'])
def test_files_that_are_not_valid_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text)
    with tarfile.open(tmp_path / "rows.tar", "w") as archive:
        archive.add(tmp_path / "rows.json", "7.json")
    for name, where in (("rows.json", "rows.json"), ("rows.tar", "rows.tar, 7")):
        with pytest.raises(ValueError, match=f"^{where} is not valid JSON"):
            read_rows(tmp_path / name)


def test_unknown_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jsonl"):
        read_rows(tmp_path / "rows.csv")
    with pytest.raises(ValueError, match="no rows"):
        read_rows(write(tmp_path, ""))


# ---- Rows that cannot be trained on


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_rows_are_named_before_step_1(families: Any, image: Path, tmp_path: Path, workers: int) -> None:
    _, processor = families("idefics2")
    (tmp_path / "broken.png").write_bytes(b"no image")
    good = {"messages": [QUESTION, ANSWER], "images": [str(image)]}
    rows = read_rows(
        write(
            tmp_path,
            good,
            {"messages": [QUESTION], "images": [str(image)]},  # nothing to learn
            {"messages": [QUESTION, ANSWER], "images": ["missing.png"]},
            {"messages": [QUESTION, ANSWER], "images": ["broken.png"]},
            {"messages": [QUESTION, {"role": "assistant", "content": "word " * 300}], "images": [str(image)]},
            good,
        ),
        images=tmp_path,
    )
    padded = data.for_training(processor)
    sizes = data.measure(padded, rows, workers)
    with pytest.raises(ValueError, match=r"4 of 6 rows") as error:
        data.fitting(rows, sizes, 200, 32003)
    for line in ("line 2", "line 3", "line 4", "line 5"):
        assert line in str(error.value)
    assert "line 1" not in str(error.value)
    kept = data.fitting(rows, sizes, 200, 32003, skip=True)
    assert [row.where for row in kept] == ["rows.jsonl, line 1", "rows.jsonl, line 6"]
    with pytest.raises(ValueError, match="knows 32,000 tokens"):  # a base model without a row for the end mark
        data.fitting(rows[:1], sizes[:1], 200, 32000)
