"""Generation settings, model options and images of the command line, as the library gets them."""

import argparse
import base64
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import processes
import pytest
import torch

import minivlm
from minivlm.app import cli, images, options, terminal

ROOT = Path(__file__).parents[2]
SHAPES = str(ROOT / "docs" / "shapes.png")


def settings_of(*argv):
    parser = argparse.ArgumentParser()
    options.add_generation_options(parser)
    return options.generation_settings(parser.parse_args(argv))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["--temperature", "0.7"], {"temperature": 0.7, "do_sample": True}),
        (["--temperature", "0", "--top-p", "0.9"], {"do_sample": False}),
        (["--top-k", "5", "--seed", "3"], {"top_k": 5, "seed": 3, "do_sample": True}),
        (["--seed", "3"], {"seed": 3}),
        (["--min-p", "0.1", "--set", "do_sample=false"], {"min_p": 0.1, "do_sample": False}),
        (["--num-beams", "3", "--repetition-penalty", "1.2"], {"num_beams": 3, "repetition_penalty": 1.2}),
        (["--stop", "a", "--stop", "b"], {"stop_strings": ["a", "b"]}),
        (["--set", "typical_p=0.5"], {"typical_p": 0.5, "do_sample": True}),
        (
            ["--set", "early_stopping=never", "--set", "use_cache=False"],
            {"early_stopping": "never", "use_cache": False},
        ),
        (["--set", "bad_words_ids=[[3, 4]]"], {"bad_words_ids": [[3, 4]]}),
        (["--max-new-tokens", "3", "--set", "max_new_tokens=4"], {"max_new_tokens": 4}),
    ],
)
def test_options_are_settings_of_generate(argv, expected):
    assert settings_of(*argv) == {"max_new_tokens": 256, **expected}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "2"], "top_p"),
        (["--top-k", "-3"], "top_k"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
        (["--seed", "-1"], "seed"),
        (["--stop", ""], "stop_strings"),
        (["--set", "max_time=soon"], "max_time"),
        (["--set", "temprature=1"], "did you mean 'temperature'"),
        (["--set", "guidance_scale=3"], "guidance_scale"),
        (["--set", "num_return_sequences=3"], "one answer"),
        (["--set", "output_scores=true"], "answers only"),
        (["--set", "max_length=30"], "use max_new_tokens"),
    ],
)
def test_settings_are_refused_before_any_weight_is_read(argv, words, capsys, monkeypatch):
    monkeypatch.setattr(options, "load_processor", None)
    for verb in (["ask", SHAPES, "what?"], ["chat"], ["batch", SHAPES, "--out", "-"]):
        assert cli.main([*verb, *argv]) == 1
        out, err = capsys.readouterr()
        assert not out
        assert err.count("\n") == 1
        assert words in err


def test_settings_reach_the_answer(capsys):
    def ask(*argv):
        assert cli.main(["ask", SHAPES, "describe the image.", "--json", "--device", "cpu", *argv]) == 0
        return json.loads(capsys.readouterr().out)

    processor = minivlm.AutoProcessor.from_pretrained("shapes-idefics2")
    model = minivlm.AutoModelForImageTextToText.from_pretrained("shapes-idefics2")
    chat = minivlm.Chat(model, processor, max_new_tokens=60)
    assert ask()["answer"] == chat.ask("describe the image.", SHAPES)
    for argv, changes in [
        (["--temperature", "3", "--seed", "5"], {"do_sample": True, "temperature": 3.0, "seed": 5}),
        (["--num-beams", "2", "--set", "length_penalty=-2"], {"num_beams": 2, "length_penalty": -2}),
        (["--stop", "star"], {"stop_strings": ["star"]}),
    ]:
        chat.reset()
        assert ask(*argv)["answer"] == chat.ask("describe the image.", SHAPES, **changes)
    assert ask("--stop", "star")["finish_reason"] == "stop"
    assert ask("--max-new-tokens", "3")["finish_reason"] == "length"
    told = minivlm.Chat(model, processor, system="be brief.").ask("describe the image.", SHAPES)
    assert ask("--system", "be brief.")["answer"] == told


@pytest.mark.parametrize("kind", options.FORMATS)
def test_weights_are_quantised_as_they_are_read(kind):
    arguments = argparse.Namespace(quantize=kind, quantize_head=False, attn=None, gpus=1, adapter=None)
    model = options.load_model("shapes-idefics2", arguments, "cpu", None)
    plain = minivlm.AutoModelForImageTextToText.from_pretrained("shapes-idefics2")
    assert len(list(model.parameters())) < len(list(plain.parameters()))


def test_verbose_says_what_an_answer_took(capsys):
    argv = ["ask", SHAPES, "What number is written?", "--device", "cpu", "--verbose"]
    assert cli.main(argv) == 0
    told = capsys.readouterr().err
    assert "29 prompt tokens, first token after" in told
    assert "tokens/s; stop" in told
    assert cli.main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["first_token_seconds"] <= found["seconds"]
    assert {"tokens_per_second", "peak_memory_bytes"} <= found.keys()


def test_without_the_resource_module_there_is_no_peak_memory(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert cli.main(["ask", "hello", "--device", "cpu", "--verbose", "--max-new-tokens", "2"]) == 0
    assert "peak memory" not in capsys.readouterr().err


def test_a_question_without_images(capsys):
    for model in ("shapes-idefics2", "shapes-llava-next", "shapes-idefics"):
        assert cli.main(["ask", "what is the capital of france?", "--model", model, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["answer"]


@pytest.mark.parametrize("form", ["bytes", "base64", "base64 in lines"])
def test_an_image_from_stdin(form, capsys, monkeypatch):
    data = Path(SHAPES).read_bytes()
    if form != "bytes":
        data = base64.b64encode(data) if form == "base64" else base64.encodebytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert cli.main(["ask", "-", "What number is written?", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "47.\n"


def test_an_image_in_base64(capsys):
    text = base64.b64encode(Path(SHAPES).read_bytes()).decode()
    for word in (text, f"data:image/png;base64,{text}"):
        assert cli.main(["ask", word, "What number is written?", "--device", "cpu"]) == 0
        assert capsys.readouterr().out == "47.\n"
    assert cli.main(["ask", text[:-1], "What?", "--device", "cpu"]) == 1
    assert "base64" in capsys.readouterr().err
    assert images.is_local("/9j/photos/of/a/summer/long/ago/in/the/country/side.jpg")


@pytest.mark.parametrize("word", ["photo.jpg", "http://x.org/a.PNG", "-"])
def test_an_image_is_no_question(word):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["ask", word])


# ---- Names


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("idefics2-8b", "HuggingFaceM4/idefics2-8b?"),
        ("idefics2-8b-chaty", "HuggingFaceM4/idefics2-8b-chatty?"),
        ("shapes-idefic2", "shapes-idefics2?"),
        ("llava-v1.6-mistral-7b", "llava-hf/llava-v1.6-mistral-7b-hf?"),
        ("gpt9", "owner/name"),
    ],
)
def test_a_mistyped_model_gets_a_suggestion(name, meant, capsys):
    for argv in (["ask", SHAPES, "q", "--model", name], ["inspect", name], ["quantize", name, "nowhere"]):
        assert cli.main(argv) == 1
        assert meant in capsys.readouterr().err


def test_a_chat_template_by_name_or_file(tmp_path, capsys):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for message in messages %}{{ message.content[0].text }}{% endfor %}")
    argv = ["ask", "hello", "--json", "--device", "cpu", "--chat-template"]
    counts = []
    for template in (str(path), "idefics2", path.read_text()):
        assert cli.main([*argv, template]) == 0
        counts.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    assert counts[0] == counts[2] < counts[1]
    assert cli.main([*argv, "nosuch"]) == 1
    assert "vicuna" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_on_a_cpu_is_told_to_use_another(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for argv in (["ask", "hello", "--attn", "triton"], ["parity", "--b", "attn=triton"]):
        assert cli.main(argv) == 1
        err = capsys.readouterr().err.splitlines()[-1]
        assert "need a GPU" in err
        assert "sdpa" in err


# ---- Whatever the terminal can show


@pytest.fixture
def run_in(monkeypatch):
    """`run_in("cp1252", "help")`: (exit code, what was written) to streams of an encoding."""

    def run(encoding, *argv):
        written = io.BytesIO()
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(written, encoding=encoding, write_through=True))
        try:
            code = cli.main(list(argv))
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush()
        return code, written.getvalue().decode(encoding)

    return run


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "latin-1", "utf-8"])
def test_words_survive_any_encoding(run_in, encoding):
    for argv in (["help"], *(["help", verb] for verb in cli.VERBS)):
        assert run_in(encoding, *argv)[0] == 0
    code, text = run_in(encoding, "ask", "nowhere\u0394\ud800.png", "q", "--device", "cpu")
    assert code == 1
    assert ("nowhere\u0394" if encoding in ("utf-8",) else "nowhere\\u0394") in text


def test_a_report_survives_cp1252(run_in):
    code, text = run_in("cp1252", "parity", "--reference", "minivlm", "--layers", "0", "--tokens", "1")
    assert code == 0
    assert "no stage diverges" in text
    assert "max |\\u0394|" in text


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
@pytest.mark.parametrize("argv", [["ask", "hello", "--device", "cpu"], ["help"]])
def test_a_full_disk_under_stdout_is_one_line(argv):
    with open("/dev/full", "w") as full, tempfile.TemporaryFile("w+") as err:
        assert processes.Program(processes.MINIVLM, *argv, stdout=full.fileno(), stderr=err.fileno()).wait(120) == 1
        err.seek(0)
        text = err.read()
    assert text.splitlines()[-1] == "minivlm: error: No space left on device"
    assert "Traceback" not in text


def test_a_warning_is_one_line(capsys):
    argv = ["ask", "hello", "--set", "length_penalty=2.0", "--device", "cpu", "--max-new-tokens", "2"]
    assert cli.main(argv) == 0
    err = capsys.readouterr().err
    assert "UserWarning" not in err
    terminal.prepare()


def test_other_letters_in_an_ascii_locale() -> None:
    """What was typed is UTF-8, whatever Python makes of the locale."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "import sys; from minivlm.app import cli; cli.main(sys.argv[1:]) or print('---', flush=True)\n"
    code += "sys.exit(cli.main(['chat', 'docs/shapes.png', '--max-new-tokens', '9']))"
    command = [sys.executable, "-c", code, "rank", "docs/shapes.png", "Où est-elle?", "--answers", "là", "ça", "--json"]
    found = subprocess.run(command, env=environment, input="Où?\n".encode(), capture_output=True, timeout=120)
    ranked, _, answer = found.stdout.decode().partition("---\n")
    assert {answer["answer"] for answer in json.loads(ranked)["answers"]} == {"là", "ça"}
    assert answer.strip()
    assert found.returncode == 0
