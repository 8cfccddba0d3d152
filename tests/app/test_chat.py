"""Conversations that keep their cache, against the same conversations recomputed from the beginning."""

import io
import sys

import pytest
import tiny_chat
import torch
from PIL import Image

import minivlm
from minivlm.app import cli, terminal
from minivlm.app.chat import Chat

NEW = 6
NAMES = ["idefics2", "idefics2, whole pictures, window 7", "llava_next", "idefics"]
RED, BLUE = Image.new("RGB", (20, 27), "red"), Image.effect_mandelbrot((33, 12), (-2, -1, 1, 1), 9).convert("RGB")


@pytest.fixture(scope="module")
def pair(request, checkpoint, llava, tmp_path_factory):
    """(model, processor) by name, each made once."""
    makers, made = tiny_chat.families(checkpoint, llava, tmp_path_factory.mktemp("chat")), {}

    def by_name(name="idefics2"):
        if name not in made:
            made[name] = makers[name]()
        return made[name]

    return by_name


def render(processor, messages):
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, **options)


def scratch(chat, messages=None, new=NEW):
    """(prompt length, new ids) of the last turn, or of messages that end in a question, without any cache before."""
    inputs = render(chat.processor, chat.messages[:-1] if messages is None else messages)
    ids = chat.model.generate(**inputs, max_new_tokens=new)[0].tolist()
    return inputs["input_ids"].shape[1], ids[inputs["input_ids"].shape[1] :]


def assert_as_from_scratch(chat, answer, new=NEW):
    """The last turn's ids and text."""
    prompt, ids = scratch(chat, new=new)
    assert chat._ids[prompt:] == ids
    text = chat.processor.decode(ids, skip_special_tokens=True).strip()
    assert answer == text == chat.messages[-1]["content"][0]["text"]


@pytest.mark.parametrize("name", NAMES)
def test_turns_cost_what_is_new_and_equal_recomputation(pair, name):
    model, processor = pair(name)
    chat, count = Chat(model, processor, max_new_tokens=NEW), tiny_chat.Counter(model)
    turns = [("What is this?", [RED]), ("And now?", []), ("And this, next to it?", [BLUE, RED]), ("Why?", [])]
    before, runs = 0, []
    for text, pictures in turns:
        count.look()
        answer = chat.ask(text, pictures)
        seen, ids = count.look()
        assert_as_from_scratch(chat, answer)
        prompt = len(chat._ids) - NEW
        assert ids <= prompt - before + NEW - 1  # what stood in the last prompt is not run again
        before = prompt
        runs.append(seen)
    full = [tower(count, chat, turn) for turn in (1, 3)]
    assert runs[1] == runs[3] == 0
    assert runs[0] == full[0]
    assert runs[2] == full[1] - full[0]
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 4


def tower(count, chat, turns):
    """How many pictures go through the tower when the first `turns` turns are computed at once."""
    count.look()
    inputs = render(chat.processor, chat.messages[: 2 * turns])
    with torch.no_grad():
        chat.model(**inputs)
    return count.look()[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_may_come_later_or_never(pair, name):
    chat = Chat(*pair(name), system="Be brief.", max_new_tokens=NEW)
    for text, pictures in [("Hello", []), ("Look", RED), ("So?", [])]:
        assert_as_from_scratch(chat, chat.ask(text, pictures))
    chat.reset()
    assert len(chat.messages) == 1
    assert_as_from_scratch(chat, chat.ask("Hello", []))


@pytest.mark.parametrize("name", NAMES)
def test_edited_conversations(pair, name):
    """Another picture of the same size has the same ids; a shorter past; another answer put into the model's mouth."""
    chat = Chat(*pair(name), max_new_tokens=NEW)
    chat.ask("One", [RED])
    chat.ask("Two", [BLUE])
    chat.messages[0]["content"][0]["image"] = Image.new("RGB", RED.size, "green")
    assert_as_from_scratch(chat, chat.ask("Three"))
    chat.messages = chat.messages[:2]
    assert_as_from_scratch(chat, chat.ask("Four"))
    chat.messages[1]["content"] = "no idea"
    assert_as_from_scratch(chat, chat.ask("Five", [RED]))


def test_streams_tell_the_answer(pair):
    chat, again = Chat(*pair(), max_new_tokens=NEW), Chat(*pair(), max_new_tokens=NEW)
    for text, pictures in [("What?", [RED]), ("Why <image></s>?", [])]:
        assert "".join(chat.stream(text, pictures)).strip() == again.ask(text, pictures)
    assert chat.messages[-1] == again.messages[-1]


def test_a_stream_left_early_leaves_the_conversation_as_it_was(pair):
    chat = Chat(*pair(), max_new_tokens=NEW)
    chat.ask("One", [RED])
    messages = list(chat.messages)
    unread, cut = chat.stream("Two", [BLUE]), chat.stream("Three", [BLUE])
    next(cut)
    answer = chat.ask("Four")
    assert chat.messages[:-2] == messages
    assert_as_from_scratch(chat, answer)
    assert list(unread) == list(cut) == []  # ended by the turns after them


@pytest.mark.parametrize("name", ["idefics2", "idefics"])
def test_errors_in_the_middle_of_a_pass_lose_no_conversation(pair, name):
    model, processor = pair(name)
    chat = Chat(model, processor, max_new_tokens=NEW)
    chat.ask("One", [RED])
    messages = list(chat.messages)

    passes = []

    def fail(*_):  # in the second pass: there IDEFICS has exchanged the pictures in the cache
        passes.append(None)
        if len(passes) == 2:
            raise OSError("power cut")

    hook = model.model.text_model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(OSError, match="power cut"):
        chat.ask("Two", [BLUE])
    hook.remove()
    for text, options, message in [
        ("Two", {"images": "nowhere.png"}, "no image at 'nowhere.png'"),
        ("Two", {"max_length": 9}, "pass max_new_tokens"),
        ("Two", {"max_new_tokens": 0}, "max_new_tokens should be an integer > 0"),
        ("Two", {"num_beams": 2, "num_return_sequences": 2}, "goes on with one answer"),
        ("Two", {"num_return_sequences": 2, "do_sample": True}, "goes on with one answer"),
        ("Two", {"colour": "red"}, "unknown setting 'colour'"),
        (2, {}, "message 2"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            chat.ask(text, **options)
    assert chat.messages == messages
    assert_as_from_scratch(chat, chat.ask("Three"))


def test_a_conversation_ends_where_positions_do(checkpoint):
    model, processor = tiny_chat.idefics2(checkpoint("idefics2-8b"), splitting=False, max_position_embeddings=60)
    chat = Chat(model, processor)
    answer = chat.ask("What?", [RED])  # the default is cut to the room there is
    assert len(chat._ids) == 60
    assert_as_from_scratch(chat, answer, new=60 - scratch(chat, new=1)[0])
    messages = list(chat.messages)
    with pytest.raises(ValueError, match=r"the conversation has \d+ tokens .* positions for 60 .* \(reset\)"):
        chat.ask("Why?")
    assert chat.messages == messages
    chat.reset()
    chat.ask("Why?")


def test_rotary_frequencies_that_follow_the_length_are_recomputed(checkpoint):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    files = checkpoint("idefics2-8b")
    model, processor = tiny_chat.idefics2(files, splitting=False, max_position_embeddings=100, rope_parameters=scaling)
    assert model.config.text_config.rope_scaling.rope_type == "dynamic"
    chat, count = Chat(model, processor, max_new_tokens=NEW), tiny_chat.Counter(model)
    for text, pictures in [("One", [RED]), ("Two", []), ("Three", [])]:
        count.look()
        answer = chat.ask(text, pictures)
        assert count.look()[1] == len(chat._ids) - 1  # all but the last token, which is never run
        assert_as_from_scratch(chat, answer)


def test_settings_of_a_turn_win_and_stop_strings_need_no_tokenizer(pair):
    chat = Chat(*pair(), max_new_tokens=2, stop_strings=["\ue000"])
    chat.ask("One", [RED])
    assert_as_from_scratch(chat, chat.ask("Two", max_new_tokens=5), new=5)


def test_without_a_template_there_is_no_chat(pair, checkpoint):
    processor = minivlm.Idefics2Processor.from_pretrained(checkpoint("idefics2-8b-base"))
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        minivlm.Chat(pair()[0], processor)


# ---- The command ----


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    """A checkpoint on disk, and two pictures in it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in pair():
        part.save_pretrained(folder)
    RED.save(folder / "red.png")
    BLUE.save(folder / "blue.png")
    return folder


def typed(monkeypatch, capsys, folder, *lines, pictures=()):
    """(exit code, stdout lines, stderr lines) of a piped conversation."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    options = ["--model", str(folder), "--max-new-tokens", str(NEW), "--device", "cpu"]
    code = cli.main(["chat", *pictures, *options])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def test_a_piped_conversation(monkeypatch, capsys, folder, pair):
    red, blue = str(folder / "red.png"), str(folder / "blue.png")
    lines = ["What?", "", f"/image {blue}", "And this?", "/reset", "Hello", "/quit", "unheard"]
    code, out, err = typed(monkeypatch, capsys, folder, *lines, pictures=[red])
    chat = Chat(*pair(), max_new_tokens=NEW)
    answers = [chat.ask("What?", [red]), chat.ask("And this?", [blue])]
    chat.reset()
    answers.append(chat.ask("Hello"))
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    for answer in answers:
        terminal.print_pieces([answer])
    assert [line.rstrip() for line in out.splitlines()] == [line.rstrip() for line in shown.getvalue().splitlines()]
    assert code == 0
    assert err == ["minivlm: the answer was cut at 6 new tokens; --max-new-tokens allows more"] * 3


def test_errors_are_a_line_each_and_the_conversation_goes_on(monkeypatch, capsys, folder):
    red = str(folder / "red.png")
    _, plain, _ = typed(monkeypatch, capsys, folder, "One", "Two", pictures=[red])
    lines = ["One", "/image nowhere.png", "/sing", "Two"]
    code, out, err = typed(monkeypatch, capsys, folder, *lines, pictures=[red])
    assert (code, out) == (1, plain)
    err = [line for line in err if " error:" in line]
    assert "no image at 'nowhere.png'" in err[0]
    assert "there is no command /sing" in err[1]
    assert len(err) == 2


def test_a_bad_picture_on_the_command_line_ends_it(monkeypatch, capsys, folder):
    code, out, err = typed(monkeypatch, capsys, folder, "One", pictures=["nowhere.png"])
    assert (code, out, len(err)) == (1, "", 1)
