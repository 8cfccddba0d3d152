"""Files of questions: every line answered once, in order, whatever is wrong with it and whenever the run is killed."""

import base64
import dataclasses
import errno
import json
import os
import signal
import socket
from pathlib import Path

import processes
import pytest
import tiny_chat
from PIL import Image

from minivlm.app import batch, cli, lock, options, parts, questions

ROOT = Path(__file__).parents[2]
NEW = 4
ABOUT = {"model": "tiny"}


@pytest.fixture(scope="module")
def pair(checkpoint):
    """(model, processor) of a tiny Idefics2."""
    return tiny_chat.idefics2(checkpoint("idefics2-8b"), splitting=False, max_position_embeddings=200)


@pytest.fixture
def pictures(tmp_path):
    """The names of two pictures."""
    names = [str(tmp_path / "red.png"), str(tmp_path / "blue.png")]
    Image.new("RGB", (20, 27), "red").save(names[0])
    Image.new("RGB", (33, 12), "blue").save(names[1])
    return names


def lines_of(pictures):
    """Questions of all forms, long and short, with and without pictures."""
    red, blue = pictures
    content = [{"type": "image", "path": red}, {"type": "text", "text": "Or this?"}, {"type": "image", "url": blue}]
    return [
        {"question": "What is this?", "images": [red], "id": "first"},
        {"prompt": "Hello"},
        {"messages": [{"role": "user", "content": content}], "id": 7},
        {"question": "A longer one: what is in these two <image>?", "images": [red, blue]},
        {"question": "And this?", "images": [blue]},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    ]


def write(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(pair, prompts, out, batch_size=2, about=ABOUT):
    return batch.run(job(pair, batch_size), prompts.read_bytes(), out, about).failed


def job(pair, batch_size=2, **settings):
    return batch.Job(*pair, {"max_new_tokens": NEW, **settings}, batch_size)


def alone(pair, line):
    """The answer to one line by itself and why it ended, from messages in the form of the library."""
    model, processor = pair
    pictures = [{"type": "image", "image": name} for name in line.get("images", [])]
    text = {"type": "text", "text": line.get("question", line.get("prompt"))}
    messages = line.get("messages", [{"role": "user", "content": [*pictures, text]}])
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :]
    ended = int(ids[-1]) in model.generation_config.eos_ids
    return {
        "answer": processor.decode(ids, skip_special_tokens=True).strip(),
        "finish_reason": "stop" if ended else "length",
    }


def expected(pair, lines):
    ids = [{"id": line["id"]} if "id" in line else {} for line in lines]
    numbered = enumerate(zip(lines, ids, strict=True), 1)
    return [{"line": number, **id, **alone(pair, line)} for number, (line, id) in numbered]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batches_give_the_answers_of_single_questions_in_order(pair, pictures, tmp_path, batch_size):
    lines = lines_of(pictures)
    prompts, out = write(tmp_path / "prompts.jsonl", lines), tmp_path / "answers.jsonl"
    assert run(pair, prompts, out, batch_size) == 0
    assert read(out) == expected(pair, lines)
    assert {path.name for path in tmp_path.glob("answers*")} == {"answers.jsonl"}


@pytest.mark.parametrize("family", ["llava_next", "idefics"])
def test_other_families(family, pictures, tmp_path, checkpoint, llava):
    pair = tiny_chat.families(checkpoint, llava, tmp_path)[family]()
    lines = [line for line in lines_of(pictures) if "messages" not in line]
    prompts, out = write(tmp_path / "prompts.jsonl", lines), tmp_path / "answers.jsonl"
    assert run(pair, prompts, out, 4) == 0
    assert read(out) == expected(pair, lines)


def test_batches_are_of_like_length(pair, pictures, tmp_path, monkeypatch):
    """Most pictures first, then most text, so that little is padding and a lack of memory shows at once."""
    sizes = []

    def noted(job, rows, images, summary):
        sizes.append([len(row) for row in images])
        return [("", "stop")] * len(rows)

    monkeypatch.setattr(batch, "_texts", noted)
    run(pair, write(tmp_path / "prompts.jsonl", lines_of(pictures)), tmp_path / "answers.jsonl")
    assert sizes == [[2, 2], [1, 1], [0, 0]]


BAD = [
    ("{", "not valid JSON: Expecting property name"),
    ('{"question": "a", "question": "b"}', "not valid JSON: 'question' is given twice"),
    ('"what?"', "a line is a JSON object"),
    ({"question": "a", "picture": "x"}, "unknown key 'picture'"),
    ({"images": []}, 'either "messages"'),
    ({"question": "a", "prompt": "b"}, 'either "messages"'),
    ({"messages": [], "images": []}, 'either "messages"'),
    ({"messages": []}, "a conversation is a list"),
    ({"question": 3}, "message 0"),
    ({"question": "a", "images": 5}, '"images" is a list'),
    ({"question": "a", "image": "x.png", "images": ["x.png"]}, 'either "messages"'),
    ({"question": "a", "images": ["nowhere.png"], "id": "gone"}, "no image at 'nowhere.png'"),
    ({"question": "a", "images": [None]}, "NoneType"),
    ({"question": "very long " * 200}, "positions for 200"),
    ({"question": "half a \ud800 pair", "id": "\ud800"}, "cannot be encoded"),
]


def test_bad_lines_say_why_and_the_others_are_answered(pair, pictures, tmp_path):
    good = lines_of(pictures)
    lines = [*good[:3], *(line for line, _ in BAD), "", *good[3:]]
    prompts, out = write(tmp_path / "prompts.jsonl", lines), tmp_path / "answers.jsonl"
    assert run(pair, prompts, out, batch_size=4) == len(BAD)
    found = read(out)
    assert [record["line"] for record in found] == [n for n, line in enumerate(lines, 1) if line]
    failed = found[3 : 3 + len(BAD)]
    for record, (line, message) in zip(failed, BAD, strict=True):
        assert message in record["error"]
        assert record.get("id") == (line.get("id") if isinstance(line, dict) and "picture" not in line else None)
    answers = [record["answer"] for record in found if "answer" in record]
    assert answers == [alone(pair, line)["answer"] for line in good]


# ---- Forms of questions ----


def test_near_misses_are_read_as_they_were_meant(pair, pictures, tmp_path):
    red, blue = pictures
    inline = base64.b64encode(Path(blue).read_bytes()).decode()
    same = [
        {"question": "What?", "images": [red, blue]},
        {"prompt": "What?", "image": [red, blue]},
        {"text": "What?", "images": [red, inline], "question_id": 5, "category": "conv"},
    ]
    single = [
        {"question": "And?", "images": [red]},
        {"question": "And?", "images": red},
        {"text": "And?", "image": red, "id": "x"},
    ]
    prompts, out = write(tmp_path / "prompts.jsonl", same + single), tmp_path / "answers.jsonl"
    assert run(pair, prompts, out) == 0
    found = read(out)
    for group, line in ((found[:3], same[0]), (found[3:], single[0])):
        assert {record["answer"] for record in group} == {alone(pair, line)["answer"]}
    assert [record.get("id") for record in found] == [None, None, 5, None, None, "x"]
    assert found[2]["category"] == "conv"


def test_a_folder_of_images_and_one_question(pair, pictures, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    text = questions.about_folder(tmp_path, "What is it?")
    out = tmp_path / "answers.jsonl"
    assert batch.run(job(pair), text, out, ABOUT).failed == 0
    found = read(out)
    assert [record["id"] for record in found] == ["blue.png", "red.png"]
    assert found[1]["answer"] == alone(pair, {"question": "What is it?", "images": [pictures[0]]})["answer"]
    with pytest.raises(ValueError, match="has no image"):
        questions.about_folder(Path(__file__).parent, "What is it?")


def test_images_start_from_the_folder_that_is_named(pictures, tmp_path):
    lines = write(tmp_path / "q.jsonl", [{"question": "a", "image": "red.png"}, {"question": "a", "image": "x.png"}])
    assert list(questions.bad_lines(lines.read_bytes(), tmp_path)) == [2]
    assert list(questions.bad_lines(lines.read_bytes(), tmp_path / "nowhere")) == [1, 2]


def test_into_a_pipe_in_order(pair, pictures, tmp_path):
    lines = [*lines_of(pictures), {"question": "Gone?", "images": ["nowhere.png"]}]
    text, written = write(tmp_path / "prompts.jsonl", lines).read_bytes(), []
    summary = batch.run_to(job(pair), text, written.append)
    found = [json.loads(line) for line in written]
    assert found[:-1] == expected(pair, lines[:-1])
    assert "error" in found[-1]
    assert (summary.answered, summary.failed) == (6, 1)
    assert summary.cut == sum(record.get("finish_reason") == "length" for record in found)


def test_a_system_message_is_told_first_where_there_is_none(pair, tmp_path):
    lines = [
        {"question": "Hi"},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hi"}]},
    ]
    prompts, out = write(tmp_path / "prompts.jsonl", lines), tmp_path / "answers.jsonl"
    batch.run(dataclasses.replace(job(pair), system="Be brief."), prompts.read_bytes(), out, ABOUT)
    answers = [record["answer"] for record in read(out)]
    assert answers == [alone(pair, line)["answer"] for line in (lines[1], lines[1], lines[2])]


def test_sampling_repeats_with_its_seed_and_beams_are_followed(pair, pictures, tmp_path):
    text, found = write(tmp_path / "prompts.jsonl", lines_of(pictures)).read_bytes(), []
    for number, settings in enumerate(2 * [{"do_sample": True, "seed": 1}] + [{"num_beams": 2}]):
        batch.run(job(pair, **settings), text, tmp_path / f"{number}.jsonl", ABOUT)
        found.append([record["answer"] for record in read(tmp_path / f"{number}.jsonl")])
    assert found[0] == found[1]
    assert len(found[2]) == 6


# ---- Interruptions ----


class Cut(BaseException):
    """The power goes."""


def test_a_run_goes_on_where_it_was_cut_at_any_byte(pair, pictures, tmp_path):
    """Whatever is left of the part file, the rest is done and nothing twice."""
    prompts, out = write(tmp_path / "prompts.jsonl", lines_of(pictures)), tmp_path / "answers.jsonl"
    assert run(pair, prompts, tmp_path / "whole.jsonl") == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    header = json.dumps({"prompts": batch.hashlib.sha256(prompts.read_bytes()).hexdigest(), **ABOUT}).encode() + b"\n"
    answers = whole.splitlines(keepends=True)
    part = header + answers[3] + answers[1] + answers[0]
    done = len(header) + len(answers[3])
    for size in (0, 5, len(header) - 1, len(header), done - 1, done, done + 1, len(part)):
        out.with_name("answers.jsonl.part").write_bytes(part[:size])
        assert run(pair, prompts, out) == 0
        assert out.read_bytes() == whole
        out.unlink()


def test_what_is_done_is_not_asked_again(pair, pictures, tmp_path, monkeypatch):
    prompts, out = write(tmp_path / "prompts.jsonl", lines_of(pictures)), tmp_path / "answers.jsonl"
    asked, texts = [], batch._texts

    def counted(*args):
        if len(asked) == 4:
            raise Cut
        asked.extend(str(row.messages) for row in args[1])
        return texts(*args)

    monkeypatch.setattr(batch, "_texts", counted)
    with pytest.raises(Cut):
        run(pair, prompts, out)
    assert not out.exists()
    asked.append("the rest")
    assert run(pair, prompts, out) == 0
    assert len(asked) == len(set(asked)) == 7
    assert read(out) == expected(pair, lines_of(pictures))


def test_a_run_cut_while_it_finishes_finishes(pair, pictures, tmp_path, monkeypatch):
    prompts, out = write(tmp_path / "prompts.jsonl", lines_of(pictures)), tmp_path / "answers.jsonl"
    for owner, name in [(os, "fsync"), (os, "replace"), (batch.Path, "unlink")]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *_, **__: (_ for _ in ()).throw(Cut))
            with pytest.raises(Cut):
                run(pair, prompts, out)
        assert run(pair, prompts, out) == 0
        assert [record["line"] for record in read(out)] == [1, 2, 3, 4, 5, 6]
        assert {path.name for path in tmp_path.glob("answers*")} == {"answers.jsonl"}
        out.unlink()


def test_a_write_that_fails_loses_nothing(pair, pictures, tmp_path, monkeypatch):
    """The k-th of all writes fails, for every k: no answers, or all; and what is done is not asked again."""
    text, append = write(tmp_path / "prompts.jsonl", lines_of(pictures)).read_bytes(), parts.append
    batch.run(job(pair), text, tmp_path / "whole.jsonl", ABOUT)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for k in range(1, 6):  # header, three batches, all in order
        out, calls = tmp_path / f"{k}.jsonl", []

        def failing(file, records, calls=calls, k=k):
            calls.append(records)
            if len(calls) == k:
                file.write(b'{"line": 1, "ans')
                file.flush()
                raise OSError(errno.ENOSPC, "No space left on device")
            append(file, records)

        with monkeypatch.context() as patch:
            patch.setattr(parts, "append", failing)
            with pytest.raises(OSError, match="No space left"):
                batch.run(job(pair), text, out, ABOUT)
        assert len(calls) == k
        assert {path.name for path in tmp_path.glob(f"{k}.*")} == {f"{k}.jsonl.part"}
        assert batch.run(job(pair), text, out, ABOUT).failed == 0
        assert out.read_bytes() == whole


def test_answers_are_never_overwritten_nor_mixed(pair, pictures, tmp_path):
    prompts, out = write(tmp_path / "prompts.jsonl", lines_of(pictures)), tmp_path / "answers.jsonl"
    out.write_text("mine")
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere; make it first"):
        parts.check_new(tmp_path / "nowhere" / "answers.jsonl")
    with pytest.raises(ValueError, match=r"answers\.jsonl exists already"):
        run(pair, prompts, out)
    assert out.read_text() == "mine"
    out.unlink()
    part = out.with_name("answers.jsonl.part")
    part.write_text(json.dumps({"prompts": "others", **ABOUT}) + "\n")
    with pytest.raises(ValueError, match=r"\.part was begun with other prompts"):
        run(pair, prompts, out)
    part.write_text(json.dumps({"prompts": batch.hashlib.sha256(prompts.read_bytes()).hexdigest(), **ABOUT}) + "\n")
    with pytest.raises(ValueError, match="begun with model='tiny', not 'large'"):
        run(pair, prompts, out, about={"model": "large"})


# ---- The command ----

KILLED = """
import os, signal, sys
from minivlm.app import batch, cli, parts
append, calls = parts.append, []

def dying(part, records):
    calls.append(part)
    if len(calls) == 3:  # the header, one batch, and then half of a line
        part.write(batch.json.dumps(records[0]).encode()[:11])
        part.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    append(part, records)

parts.append = dying
cli.main(sys.argv[1:])
"""


def test_the_command_survives_sigkill(pair, pictures, tmp_path, capsys):
    for part in pair:
        part.save_pretrained(tmp_path / "model")
    lines = [*lines_of(pictures), {"question": "Gone?", "images": ["nowhere.png"]}]
    prompts, out = write(tmp_path / "prompts.jsonl", lines), tmp_path / "answers.jsonl"
    argv = ["batch", str(prompts), "--out", str(out), "--model", str(tmp_path / "model"), "--device", "cpu"]
    argv += ["--max-new-tokens", str(NEW), "--batch-size", "3"]
    done = processes.run(KILLED, *argv)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = out.with_name("answers.jsonl.part").read_bytes()
    assert left.count(b"\n") == 4
    assert not left.endswith(b"\n")
    assert cli.main(argv) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2  # what is wrong is told before the first answer
    assert err[0].startswith("minivlm: line 7: no image at 'nowhere.png'")
    assert err[1].startswith("minivlm: 6 answered, 1 failed, ")
    assert err[1].endswith(f"tokens/s; {out}")
    found = read(out)
    assert found[:-1] == expected(pair, lines[:-1])
    assert "no image at 'nowhere.png'" in found[-1]["error"]
    assert all(line in out.read_bytes().splitlines() for line in left.splitlines()[1:-1])
    assert cli.main(argv) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_second_job_on_the_same_file_is_refused_before_any_weight_is_read(tmp_path, capsys, monkeypatch):
    prompts, out = write(tmp_path / "prompts.jsonl", [{"question": "Hi"}]), tmp_path / "answers.jsonl"
    monkeypatch.setattr(options, "load_processor", None)
    argv = ["batch", str(prompts), "--out", str(out), "--model", "shapes-idefics2", "--device", "cpu"]
    with lock.held(tmp_path / "answers.jsonl.lock"):
        assert cli.main(argv) == 1
        err = capsys.readouterr().err
        assert f"process {os.getpid()} on {socket.gethostname()}" in err
        assert "answers.jsonl" in err
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.jsonl"}


def test_a_whole_run_through_pipes(pictures):
    question = {"question": "What number is written?", "image": "docs/shapes.png"}
    text = f"{json.dumps(question)}\nnonsense\n"
    argv = ["batch", "-", "--out", "-", "--device", "cpu", "--verbose"]
    done = processes.run(processes.MINIVLM, *argv, input=text, cwd=ROOT)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert found[0] == {"line": 1, "answer": "47.", "finish_reason": "stop"}
    assert "not valid JSON" in found[1]["error"]
    assert "line 2: not valid JSON" in done.stderr
    assert "1 answered, 1 failed, 0 cut" in done.stderr
    assert "first token after" in done.stderr


# Runs under several limits of a file's size, and prints how each ended and what it left.
FULL = """
import json, os, resource, sys
from pathlib import Path
from minivlm.app import cli

folder = Path(sys.argv[sys.argv.index("--out") + 1]).parent
for limit in (0, 100, 500, 900):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    code = cli.main(sys.argv[1:])
    print(json.dumps([code, [path.name for path in folder.glob("answers*")]]))
"""


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(pictures, tmp_path):
    """Every write in turn fails: what is there is nothing, or whole lines that the next run keeps."""
    rows = [{"question": "What number is written?", "images": [name], "id": "x" * 400} for name in pictures]
    prompts, out = write(tmp_path / "prompts.jsonl", rows), tmp_path / "answers.jsonl"
    argv = ["batch", str(prompts), "--out", str(out), "--model", "shapes-idefics2", "--device", "cpu"]
    argv += ["--batch-size", "1"]
    done = processes.run(FULL, *argv)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert json.loads(line) in ([1, []], [1, ["answers.jsonl.part"]])
    assert len(done.stdout.splitlines()) == done.stderr.count("minivlm: error: File too large") == 4
    assert "Traceback" not in done.stderr
    assert cli.main(argv) == 0
    assert [record["line"] for record in read(out)] == [1, 2]


def test_no_prompts_no_model_is_read(tmp_path, capsys):
    argv = ["batch", str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "out"), "--model", str(tmp_path)]
    assert cli.main(argv) == 1
    assert "No such file" in capsys.readouterr().err


def test_another_adapter_or_folder_of_images_is_another_run(tmp_path, capsys, monkeypatch):
    abouts = []
    for name in ("load_processor", "load_model"):
        monkeypatch.setattr(options, name, lambda *_: None)
    monkeypatch.setattr(batch, "run", lambda job, text, out, about, shard: abouts.append(about) or batch.Summary())
    prompts = write(tmp_path / "prompts.jsonl", [{"question": "?"}])
    command = ["batch", str(prompts), "--out", str(tmp_path / "out.jsonl"), "--model", "shapes-idefics2"]
    for more in ([], ["--adapter", "one"], ["--adapter", "two"], ["--image-folder", "here"]):
        assert cli.main(command + more) == 0
    assert all(abouts.count(about) == 1 for about in abouts)


def test_answers_into_a_folder(tmp_path, capsys):
    assert cli.main(["batch", os.devnull, "--out", str(tmp_path)]) == 1
    assert "is a folder" in capsys.readouterr().err
