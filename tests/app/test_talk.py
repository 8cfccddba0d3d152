"""The conversation at the terminal: commands, files, several lines, and keys that stop an answer."""

import base64
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import processes
import pytest
import tiny_chat
from PIL import Image

from minivlm.app import prompt
from minivlm.app.chat import Chat
from minivlm.app.talk import COMMANDS, Talk

NEW = 4


@pytest.fixture(scope="module")
def pair(checkpoint):
    return tiny_chat.idefics2(checkpoint("idefics2-8b"), splitting=False, max_position_embeddings=300)


@pytest.fixture
def red(tmp_path):
    """The name of an image file with a blank in it."""
    Image.new("RGB", (20, 27), "red").save(tmp_path / "a red one.png")
    return str(tmp_path / "a red one.png")


@pytest.fixture
def talk(pair, capsys):
    """`talk("line", …)`: the same conversation goes on → (failed lines, answers, what commands replied)."""
    chat = Chat(*pair, max_new_tokens=NEW)
    shown = []
    conversation = Talk(chat, [], lambda pieces: shown.append("".join(pieces).strip()), watched=True, verbose=False)

    def lines(*given):
        conversation.failed = 0
        shown.clear()
        capsys.readouterr()
        rest = iter(given)
        failed = conversation.run(lambda _: next(rest, None))
        return failed, list(shown), capsys.readouterr().err

    lines.chat = chat
    return lines


def test_images_are_confirmed_and_listed(talk, red):
    assert "no image yet" in talk("/images")[2]
    failed, answers, told = talk(f"/image {red}", "/images", "What?", f'/image "{red}"', "/images")
    assert (failed, len(answers)) == (0, 1)
    assert told.count("a red one.png, 20×27 goes with the next question") == 2
    assert told.count("1. ") == 2
    assert "2. " in told
    escaped = red.replace(" ", "\\ ")  # as terminals write a file that is dropped on them
    assert talk(f"/image {escaped}")[0] == 0
    assert "no image yet" in talk("/reset", "/images")[2]


def test_help_lists_every_command(talk):
    told = talk("/help")[2]
    assert all(command in told for command in COMMANDS)
    failed, _, told = talk("/sing", "/image", "/save", "/load")
    assert failed == 4
    assert "there is no command /sing" in told


def test_a_path_at_the_beginning_of_a_question_is_no_command(talk):
    assert len(talk("/home/me/a.png is what?")[1]) == 1


def test_several_lines_are_one_question(talk):
    talk('"""One', "two", 'three"""', '"""four"""', '"""', "five", "six")
    texts = [message["content"][-1]["text"] for message in talk.chat.messages if message["role"] == "user"]
    assert texts == ["One\ntwo\nthree", "four", "five\nsix"]


def test_settings_and_the_system_message(talk):
    assert "no system message" in talk("/system")[2]
    talk("Hello", "/system Be brief.", "/set max_new_tokens 2", "Why?")
    assert talk.chat.messages[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert [message["role"] for message in talk.chat.messages].count("system") == 1
    assert talk.chat.last.limit == 2
    talk("/set temperature=0.5")
    assert talk.chat.settings == {"max_new_tokens": 2, "temperature": 0.5, "do_sample": True}
    talk("/set temperature 0")
    assert talk.chat.settings == {"max_new_tokens": 2, "do_sample": False}
    talk("/set temperature")
    assert talk.chat.settings == {"max_new_tokens": 2}
    failed, _, told = talk("/set colour red", "/set top_p 7", "/set max_length 9", "/set guidance_scale 3", "/set")
    assert failed == 4
    assert "max_new_tokens 2" in told
    assert talk.chat.settings == {"max_new_tokens": 2}
    talk("/reset")
    assert len(talk.chat.messages) == 1  # the system message stays


def test_a_saved_conversation_goes_on_as_if_it_had_never_ended(talk, red, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inline = "data:image/png;base64," + base64.b64encode(Path(red).read_bytes()).decode()
    talk(f"/image {os.path.basename(red)}", f"/image {inline}", "/system Be brief.", "What?", "Why?")
    expected = talk("/save talk.json", "And now?")[1]
    stored = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    sources = [item["image"] for message in stored["messages"] for item in message["content"] if "image" in item]
    assert sources[0] == red  # in full, for another folder
    assert sources[1].startswith("data:image/png")
    talk("/reset", "Something else")
    monkeypatch.chdir("/")
    failed, answers, told = talk(f"/load {tmp_path}/talk.json", "And now?", "/images")
    assert (failed, answers) == (0, expected)
    assert "7 messages" not in told
    assert told.count("20×27") == 2
    assert talk.chat.system == "Be brief."


def test_files_that_cannot_be_loaded_change_nothing(talk, tmp_path):
    talk("Hello")
    before = list(talk.chat.messages)
    for name, text in [
        ("a.json", "{"),
        ("b.json", "[]"),
        ("c.json", '{"messages": [{"role": "user", "content": [{"type": "image", "image": "nowhere.png"}]}]}'),
        ("d.json", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}'),
        ("e.json", '{"messages": [{"role": "king", "content": "hello"}]}'),
    ]:
        (tmp_path / name).write_text(text)
        assert talk(f"/load {tmp_path / name}")[0] == 1, name
    assert talk(f"/load {tmp_path / 'none.json'}", f"/save {tmp_path / 'none' / 'x' / 'a.json'}")[0] >= 1
    assert talk.chat.messages == before


def test_an_answer_stopped_midway_stays_and_costs_nothing_again(pair):
    chat = Chat(*pair, max_new_tokens=20, min_new_tokens=20)
    pieces = chat.stream("One", [Image.new("RGB", (20, 27), "red")])
    first = next(pieces)
    assert chat.stop()
    rest = "".join(pieces)
    assert chat.last.finish_reason == "interrupted"
    assert chat.last.new_tokens < 20
    assert chat.messages[-1]["content"][0]["text"] == (first + rest).strip() == chat.last.text
    assert not chat.stop()  # nothing is being read
    count = tiny_chat.Counter(chat.model)
    chat.ask("Two")
    assert count.look()[0] == 0
    assert chat.last.cached_tokens > 0
    assert chat.last.finish_reason == "length"


def test_beams_answer_as_generate_does(pair):
    model, processor = pair
    chat = Chat(model, processor, max_new_tokens=NEW, num_beams=3)
    for text, images in [("One", [Image.new("RGB", (20, 27), "red")]), ("Two", []), ("Three", [])]:
        answer = chat.ask(text, images)
        inputs = processor.apply_chat_template(
            chat.messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=NEW, num_beams=3)[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.decode(ids, skip_special_tokens=True).strip()


def test_finish_reasons(pair):
    model, processor = pair
    chat = Chat(model, processor, max_new_tokens=NEW)
    chat.ask("One")
    assert chat.last.finish_reason == "length"
    assert f"cut at {NEW} new tokens" in chat.last.cut()
    first = chat._ids[-NEW]
    chat.reset()
    chat.ask("One", eos_token_id=first)
    assert (chat.last.finish_reason, chat.last.new_tokens, chat.last.cut()) == ("stop", 1, None)
    chat.reset()
    chat.ask("One", max_time=0.0)
    assert chat.last.finish_reason == "time"
    assert "max_time" in chat.last.cut()


# ---- Reading lines


def test_completion(tmp_path, monkeypatch):
    (tmp_path / "a red one.png").touch()
    (tmp_path / "a redder").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    commands = [command.split()[0] for command in COMMANDS]

    def complete(line):
        """The lines that Tab may make of this one, whose last word begins after its last blank."""
        begin = line.rfind(" ") + 1
        return [line[:begin] + word for word in prompt.complete(line[begin:], line, begin, commands)]

    assert complete("/he") == ["/help "]
    assert complete("/im") == ["/image ", "/images "]
    assert complete("hel") == complete("what is a") == []
    both = [f"/image {tmp_path}/a red one.png", f"/image {tmp_path}/a redder/"]
    assert complete(f"/image {tmp_path}/a") == complete(f"/image {tmp_path}/a red") == both
    assert complete("/load ~/a red o") == ["/load ~/a red one.png"]


def test_lines_come_from_a_pipe_without_a_prompt(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    read = prompt.reader(False, [])
    assert [read("> "), read("> "), read("> ")] == ["one", "two", None]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("hidden", [False, True], ids=["readline", "no readline"])
def test_keys_at_a_real_terminal(tmp_path, hidden):
    """Ctrl-C stops an answer and keeps the conversation; pressed twice at the prompt it ends the program."""
    pty = pytest.importorskip("pty", reason="a pseudo-terminal")
    ours, theirs = pty.openpty()
    # where the tests run in the background, a shell has them ignore Ctrl-C, and so would this process
    code = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n" + (
        "sys.modules['readline'] = None\n" if hidden else ""
    )
    argv = [
        "chat",
        str(Path(__file__).parents[2] / "docs" / "shapes.png"),
        "--device",
        "cpu",
        "--max-new-tokens",
        "300",
        "--set",
        "min_new_tokens=300",
    ]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb", "TRITON_INTERPRET": "0"}
    process = processes.start(
        code + processes.MINIVLM, *argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    try:
        screen = Screen(ours)
        screen.wait_for("1 image; /help lists the commands")
        screen.type("What number is written?\n")
        screen.wait_for("47")
        process.send_signal(signal.SIGINT)
        screen.wait_for("keeps the answer")
        screen.type("/save " + str(tmp_path / "talk.json") + "\n")
        screen.wait_for("2 messages in")
        process.send_signal(signal.SIGINT)
        screen.wait_for("Ctrl-C again")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert (tmp_path / "talk.json").is_file()
    assert (tmp_path / "minivlm" / "history").is_file() != hidden


class Screen:
    """What a program has written to a pseudo-terminal."""

    def __init__(self, descriptor):
        self.descriptor, self.text = descriptor, ""
        os.set_blocking(descriptor, False)

    def type(self, text):
        os.write(self.descriptor, text.encode())

    def wait_for(self, wanted, seconds=60):
        """Until it appears; what stood before it is forgotten."""
        deadline = time.monotonic() + seconds
        while wanted not in self.text:
            assert time.monotonic() < deadline, f"{wanted!r} did not come; found {self.text!r}"
            try:
                self.text += os.read(self.descriptor, 4096).decode(errors="replace").replace("\r", "")
            except (BlockingIOError, OSError):
                time.sleep(0.02)
        self.text = self.text.partition(wanted)[2]
