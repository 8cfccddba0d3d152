"""The command line, on a tiny random checkpoint with Idefics2's real tokenizer and chat template."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import oracle
import processes
import pytest
import torch
from hypothesis import given, settings
from minivlm_kernels import selfcheck
from PIL import Image

import minivlm
from minivlm.app import cli, options, terminal
from minivlm.app.chat import incremental_text
from minivlm.app.verbs import inspect as inspect_verb
from minivlm.auto import PRESETS
from minivlm.checkpoint import hub, loading

PICTURES = Path(__file__).parents[1] / "data" / "images"
SMALL_FILES = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "special_tokens_map.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, request):
    """A folder with random weights, pictures of at most 56 pixels, and everything else as Idefics2-8b has it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    released = request.path.parents[1] / "data" / "hub" / "HuggingFaceM4" / "idefics2-8b"
    for name in SMALL_FILES:
        shutil.copy(released / name, folder)
    pictures = json.loads((released / "preprocessor_config.json").read_text())
    pictures["size"] = {"longest_edge": 56, "shortest_edge": 28}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    config = oracle.idefics2_config(window=None, image_size=56, patch_size=14)
    config.perceiver_config.resampler_n_latents = 64
    config.text_config.vocab_size, config.image_token_id = 32003, 32001
    oracle.save(oracle.random_reference(config), folder)
    (folder / "generation_config.json").write_bytes((released / "generation_config.json").read_bytes())
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two picture files."""
    folder = tmp_path_factory.mktemp("pictures")
    names = [str(folder / "red.png"), str(folder / "blue.jpg")]
    Image.new("RGB", (40, 30), "red").save(names[0])
    Image.new("RGB", (30, 50), "blue").save(names[1])
    return names


def expected(checkpoint, pictures, question, splitting=True, **options):
    """(prompt tokens, new ids, answer) by the library alone."""
    processor = minivlm.AutoProcessor.from_pretrained(checkpoint, do_image_splitting=splitting)
    model = minivlm.AutoModelForImageTextToText.from_pretrained(checkpoint, **options)
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    return inputs["input_ids"].shape[1], ids, processor.decode(ids, skip_special_tokens=True)


def fails(capsys, *argv):
    """The one line on stderr of a call that prints nothing else and exits with 1."""
    assert cli.main(list(argv)) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert err.startswith("minivlm: error: ")
    return err


def misused(capsys, *argv):
    """The one line on stderr of a wrong usage, which exits with 2."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    return err


# ---- ask ----


def test_ask_streams_the_answer_of_the_library(checkpoint, pictures, capsys):
    assert cli.main(["ask", *pictures, "What is it?", "--model", checkpoint, "--max-new-tokens", "6"]) == 0
    out, err = capsys.readouterr()
    answer = expected(checkpoint, pictures, "What is it?")[2]
    assert out == answer.lstrip() + "\n"
    assert err == "minivlm: the answer was cut at 6 new tokens; --max-new-tokens allows more\n"


def test_ask_prints_json_and_takes_options_anywhere(checkpoint, pictures, capsys):
    options = ["--json", pictures[0], "--max-new-tokens", "6", "What is it?", "--model", checkpoint, "--attn", "eager"]
    assert cli.main(["ask", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    prompt, ids, answer = expected(checkpoint, pictures[:1], "What is it?")
    assert found.pop("seconds") > 0
    sizes = {"prompt_tokens": prompt, "new_tokens": len(ids), "finish_reason": "length"}
    assert found == {"answer": answer.strip(), "model": checkpoint, **sizes}


def test_no_split_and_dtype_reach_the_library(checkpoint, pictures, capsys):
    options = ["--model", checkpoint, "--max-new-tokens", "6", "--no-split", "--dtype", "bfloat16", "--json"]
    assert cli.main(["ask", pictures[0], "What is it?", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    prompt, _, answer = expected(checkpoint, pictures[:1], "What is it?", splitting=False, dtype=torch.bfloat16)
    assert (found["prompt_tokens"], found["answer"]) == (prompt, answer.strip())


def test_a_typed_image_token_is_plain_text(checkpoint, pictures, capsys):
    options = ["--model", checkpoint, "--max-new-tokens", "2", "--json"]
    assert cli.main(["ask", pictures[0], "What is <image>?", *options]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 2


def test_ask_names_the_default_model_on_stderr(pictures, capsys, monkeypatch, checkpoint):
    monkeypatch.setattr(options, "DEFAULT_MODEL", checkpoint)
    assert cli.main(["ask", pictures[0], "What is it?", "--max-new-tokens", "1"]) == 0
    assert f"no --model given, asking {checkpoint}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sing"], "there is no verb 'sing'"),
        (["inspct", "x"], "did you mean 'inspect'?"),
        (["ask", "RED", "q", "--max-new-token", "3", "--modle", "x"], "did you mean '--model'?"),
        (["ask"], "required: IMAGE… QUESTION"),
        (["ask", "RED", " "], "the question is empty"),
        (["ask", "photo.jpg"], "'photo.jpg' looks like an image"),
        (["ask", "RED", "q", "--set", "colour"], "--set takes NAME=VALUE"),
        (["chat", "-"], "no image can"),
        (["batch", "x.jsonl", "--out", "y", "--question", "what?"], "go together"),
        (["ask", "RED"], "the last argument is the question, but 'RED' is a file"),
        (["ask", "RED", "RED"], "the last argument is the question, but 'RED' is a file"),
        (["ask", "RED", "q", "--max-new-tokens", "0"], "expected a whole number above 0, found '0'"),
        (["ask", "RED", "q", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["ask", "RED", "q", "--colour"], "unrecognized arguments: --colour"),
        (["ask", "RED", "q", "--model", ""], "argument --model: the value is empty"),
        (["ask", "RED", "q", "--device="], "argument --device: the value is empty"),
        (["ask", "", "q"], "argument IMAGE… QUESTION: the value is empty"),
        (["inspect", "x", "--image", ""], "argument --image: the value is empty"),
        (["parity", "--prompt", ""], "argument --prompt: the value is empty"),
        (["quantize", "x", ""], "argument out: the value is empty"),
        (["batch", ".", "--out", "y", "--question", ""], "the question is empty"),
        (["inspect"], "required: model"),
    ],
)
def test_wrong_usage_exits_with_2(capsys, pictures, argv, message):
    argv = [pictures[0] if word == "RED" else word for word in argv]
    assert message.replace("RED", pictures[0]) in misused(capsys, *argv)


def test_bad_pictures_exit_with_1(capsys, tmp_path, checkpoint):
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    assert "no image at 'nowhere.png'" in fails(capsys, "ask", "nowhere.png", "q", "--model", checkpoint)
    assert "notes.png is not a JPEG, PNG" in fails(capsys, "ask", str(text), "q", "--model", checkpoint)


def test_long_questions_are_no_file_names(checkpoint, pictures):
    argv = ["ask", pictures[0], "Why? " * 200, "--model", checkpoint, "--max-new-tokens", "1", "--json"]
    assert cli.main(argv) == 0


def test_bad_models_and_devices_exit_with_1(capsys, tmp_path, pictures):
    question = ["ask", pictures[0], "q", "--model"]
    assert "no such folder" in fails(capsys, *question, str(tmp_path / "nowhere"))
    assert "has no config.json" in fails(capsys, *question, str(tmp_path))
    assert "CUDA devices; use --device cpu" in fails(capsys, *question, str(tmp_path), "--device", "cuda:99")
    assert "is not a device" in fails(capsys, *question, str(tmp_path), "--device", "toaster")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "model_type 'bert'; minivlm implements idefics" in fails(capsys, *question, str(tmp_path))


def test_a_prompt_too_long_for_the_model_exits_with_1(capsys, checkpoint, pictures, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 100
    (folder / "config.json").write_text(json.dumps(config))
    assert "positions for 100" in fails(capsys, "ask", pictures[0], "q", "--model", str(folder))


def test_interrupts_exit_with_130(monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_verb, "run", interrupt)
    assert cli.main(["inspect", "x"]) == 130


def test_running_out_of_memory_is_one_line_and_a_bug_is_a_traceback(monkeypatch, capsys):
    def fail(arguments):
        raise RuntimeError("CUDA out of memory. Tried to allocate" if arguments.model == "big" else "a bug")

    monkeypatch.setattr(inspect_verb, "run", fail)
    assert "CUDA out of memory; try --dtype bfloat16" in fails(capsys, "inspect", "big")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["inspect", "small"])


def run_apart(*argv, **options):
    """The program in a process of its own."""
    return subprocess.run([sys.executable, "-m", "minivlm", *argv], capture_output=True, text=True, **options)


def test_help_and_version_need_no_torch():
    code = """
import sys
from minivlm.app import cli
cli.main(["--version"])
for verb in cli.VERBS:
    try:
        cli.main([verb, "--help"])
    except SystemExit:
        pass
cli.main(["help"])
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"minivlm {minivlm.__version__}\n")
    assert done.stdout.endswith("\nFalse\n")
    assert run_apart("ask", "--help").stdout.startswith("usage: minivlm ask [IMAGE…] QUESTION [options]")


def test_help_says_what_each_verb_does(capsys):
    assert cli.main(["--help"]) == cli.main(["help"]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert cli.main([]) == 2
    nothing, shown = capsys.readouterr()
    assert not nothing
    assert out == 2 * shown
    for verb in cli.VERBS:
        assert f"\n  {verb} " in shown
    assert shown.count("minivlm ask ") == 1


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb_has_examples_and_defaults(verb, capsys):
    for argv in ([verb, "--help"], ["help", verb]):
        with pytest.raises(SystemExit, match="0"):
            cli.main(argv)
    out = capsys.readouterr().out
    assert out[: len(out) // 2] * 2 == out
    assert out.count(f"  minivlm {verb} ") >= 4
    if verb not in ("inspect",):
        assert "default" in out


def test_a_reader_that_leaves_early_is_no_error(checkpoint, pictures):
    argv = ["ask", *map(str, pictures), "q", "--model", str(checkpoint), "--device", "cpu", "--max-new-tokens", "9"]
    reads, writes = os.pipe()
    with tempfile.TemporaryFile() as err:
        program = processes.Program(processes.MINIVLM, *argv, stdout=writes, stderr=err.fileno())
        os.close(writes)
        os.close(reads)
        assert program.wait(120) == 1
        err.seek(0)
        assert err.read() == b""


# ---- Text as it comes ----


def as_bytes(ids):
    return bytes(ids).decode(errors="replace")


@given(st.text(max_size=12).map(lambda text: list(text.encode())) | st.lists(st.integers(0, 255), max_size=12))
def test_pieces_are_the_whole_text(ids):
    """Bytes as tokens, whole characters and broken ones."""
    assert "".join(incremental_text(as_bytes, ids)) == as_bytes(ids)


def test_no_piece_is_half_a_character():
    assert list(incremental_text(as_bytes, "aé🙂b".encode())) == ["a", "é", "🙂", "b"]


pieces_of_text = st.text(max_size=8) | st.sampled_from(["</s>", "<image>", "\n", "é🙂", " a"])


@settings(deadline=None)
@given(st.lists(st.integers(259, 32002), max_size=4), st.lists(pieces_of_text, max_size=4))
def test_pieces_of_a_real_tokenizer_are_the_whole_text(real_tokenizer, ids, texts):
    """Any tokens but bytes, then bytes that form characters, leading blanks, special tokens that vanish."""
    ids = [*ids, *(id for text in texts for id in real_tokenizer.encode(text, add_special_tokens=False))]
    whole = real_tokenizer.decode(ids, skip_special_tokens=True)
    pieces = list(incremental_text(partial(real_tokenizer.decode, skip_special_tokens=True), ids))
    assert "".join(pieces) == whole
    assert "\ufffd" in whole or not any("\ufffd" in piece for piece in pieces)


@pytest.fixture(scope="module")
def real_tokenizer(checkpoint):
    return minivlm.AutoProcessor.from_pretrained(checkpoint).tokenizer


def test_control_characters_do_not_reach_the_terminal(capsys):
    terminal.print_pieces(["  ", " \x1b[31mred", "\x07\nline\t", "\x9b2J🙂\u200d"])
    assert capsys.readouterr().out == "[31mred\nline\t2J🙂\u200d\n"


# ---- inspect ----


@pytest.mark.parametrize("name", PRESETS)
def test_inspect_counts_the_parameters_of_released_checkpoints(name, capsys):
    assert cli.main(["inspect", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    with loading.shapes_only():
        model = minivlm.AutoModelForImageTextToText.from_config(PRESETS[name])
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["bytes"]["bfloat16"] == 2 * found["parameters"]


def test_inspect_describes_the_machine(capsys, monkeypatch):
    """Without a GPU, and with one on which some kernels have been tried."""
    assert cli.main(["inspect", "--machine", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0] or found["versions"]["torch"]
    assert all(row["path"] and row["why"] for row in found["layers"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(selfcheck, "_about", lambda device: [])
    assert cli.main(["inspect", "--machine"]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA H200, sm_90; Triton by default for nothing" in text
    assert "decode attention" in text
    assert "bfloat16 not tried" in text


def test_inspect_names_the_parts(capsys):
    assert cli.main(["inspect", "HuggingFaceM4/idefics2-8b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [part["part"] for part in found["parts"]] == ["vision_model", "connector", "text_model", "lm_head"]
    assert found["tokens_per_image"] == {"whole": 64, "split": 320}
    assert found["cache_bytes_per_token"]["bfloat16"] == 2 * 2 * 32 * 8 * 128
    assert cli.main(["inspect", "llava-hf/llava-v1.6-mistral-7b-hf", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"image_newline", "multi_modal_projector"} < {part["part"] for part in found["parts"]}
    assert found["tokens_per_image"]["672×672"] == 576 + 48 * 49


def test_inspect_prints_a_table(capsys):
    assert cli.main(["inspect", "HuggingFaceM4/idefics2-8b"]) == 0
    out = capsys.readouterr().out
    assert "8,402,768,112  31.30 GiB  15.65 GiB" in out
    assert "tokens per image: 64 (whole), 320 (split)" in out
    assert max(map(len, out.splitlines())) < 160


def test_inspect_needs_the_config_alone(checkpoint, tmp_path, capsys):
    shutil.copy(f"{checkpoint}/config.json", tmp_path)
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert cli.main(["inspect", checkpoint, "--json"]) == 0
    assert {**alone, "model": checkpoint} == json.loads(capsys.readouterr().out)


def test_inspect_checks_every_number_when_asked(checkpoint, tmp_path, capsys):
    assert cli.main(["inspect", checkpoint, "--check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["checked"]
    assert found["tensors"] > 80
    assert found["tokens"] == 32003
    assert cli.main(["inspect", checkpoint, "--check"]) == 0
    assert "checked: 32,003 tokens" in capsys.readouterr().out
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x00\xc0\x7f")  # NaN, in the last tensor
    assert cli.main(["inspect", str(folder)]) == 0
    capsys.readouterr()
    assert "1 tensors with NaN or infinity:" in fails(capsys, "inspect", str(folder), "--check")


def test_inspect_says_what_pictures_cost(capsys):
    """As many tokens as the model will get, in the prompt that `ask` writes; before any weight is read."""
    pictures = [str(PICTURES / name) for name in ("china.jpg", "portrait_tall_1x4.jpg")]
    assert cli.main(["inspect", "shapes-llava-next", "--json", "--image", *pictures]) == 0
    found = json.loads(capsys.readouterr().out)["pictures"]
    processor = minivlm.AutoProcessor.from_pretrained("shapes-llava-next")
    sizes = [Image.open(picture).size[::-1] for picture in pictures]
    assert found["tokens"] == [processor.image_tokens(*size) for size in sizes]
    assert cli.main(["ask", *pictures, "What is this?", "--model", "shapes-llava-next", "--json"]) == 0
    assert found["prompt_tokens"] == json.loads(capsys.readouterr().out)["prompt_tokens"]
    assert "README.md" in fails(capsys, "inspect", "shapes-idefics2", "--image", "README.md")


@pytest.mark.parametrize("name", ["shapes-idefics2", "shapes-llava-next", "shapes-idefics"])
def test_inspect_finds_out_whether_the_model_looks(name, tmp_path, capsys):
    picture = str(PICTURES / "china.jpg")
    assert cli.main(["inspect", name, "--check", "--image", picture]) == 0
    assert "the images matter" in capsys.readouterr().out
    model = minivlm.AutoModelForImageTextToText.from_pretrained(name)
    between = {"shapes-idefics2": "model.connector", "shapes-llava-next": "model.multi_modal_projector"}
    for weight in model.get_submodule(between.get(name, "model.perceiver_resampler")).parameters():
        weight.data.zero_()
    folder = shutil.copytree(hub.source(name).folder, tmp_path / "blind")
    model.save_pretrained(folder)
    told = fails(capsys, "inspect", str(folder), "--check", "--image", picture)
    assert "answers the same whatever its images show" in told


def test_inspect_refuses_in_one_line(tmp_path, capsys):
    assert "is not in the local cache" in fails(capsys, "inspect", "nobody/nothing")
    (tmp_path / "config.json").write_text('{"model_type": "idefics2", "text_config": {"hidden_size": "wide"}}')
    assert "hidden_size should be int" in fails(capsys, "inspect", str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    assert "should hold a JSON object" in fails(capsys, "inspect", str(tmp_path))


def test_memory_is_printed_in_readable_units():
    assert [terminal.memory(size) for size in (12, 1536, 5 * 2**20, 3 * 2**30)] == [
        "12 B",
        "1.5 KiB",
        "5 MiB",
        "3.00 GiB",
    ]


@pytest.mark.parametrize(
    ("closed", "code", "out", "err"),
    [("<&-", 1, "", "is empty"), (">&-", 1, "", "error: stdout is closed"), ("2>&-", 0, "47.", "")],
)
def test_a_closed_stream(closed, code, out, err):
    image = "-" if closed == "<&-" else Path(__file__).parents[2] / "docs" / "shapes.png"
    command = f'"{sys.executable}" -m minivlm ask {image} "What number is written?" {closed}'
    child = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert child.returncode == code
    assert child.stdout.strip() == out
    assert err in child.stderr
    assert "Traceback" not in child.stderr
