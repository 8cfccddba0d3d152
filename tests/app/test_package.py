"""The package as people install it and as editors see it: what is in it, its names, its types."""

import ast
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import minivlm

ROOT = Path(__file__).parents[2]


# ---- Names


def test_editors_see_the_names_that_there_are():
    """The literal `__all__`, the imports for type checkers and the table of homes name the same."""
    tree = ast.parse((ROOT / "minivlm" / "__init__.py").read_text(encoding="utf-8"))
    literal = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    checked = next(node for node in tree.body if isinstance(node, ast.If)).body
    imported = {alias.name: node.module for node in checked for alias in node.names}
    assert ast.literal_eval(literal) == sorted(imported) == minivlm.__all__
    assert {name: home for home, names in minivlm._HOME.items() for name in names} == imported
    assert {*minivlm.__all__, "__version__"} == set(dir(minivlm))


@pytest.mark.parametrize("name", minivlm._INSTEAD)
def test_names_of_transformers_say_what_to_use(name):
    with pytest.raises(ImportError, match=f"has no {name}; use "):
        exec(f"from minivlm import {name}")
    used = minivlm._INSTEAD[name].partition(".")[0].partition("(")[0].partition(",")[0].partition(";")[0]
    assert used in minivlm.__all__ or " " in used or used == "generate"


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(minivlm, "Nothing")
    with pytest.raises(ImportError):
        exec("from minivlm import Nothing")


# ---- Types

SCRIPT = """
from minivlm import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    Chat,
    Idefics2ForConditionalGeneration,
    Idefics2Processor,
)

name = "shapes-idefics2"
processor = AutoProcessor.from_pretrained(name)
model = AutoModelForImageTextToText.from_pretrained(name, dtype="bfloat16")
messages = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
ids = model.generate(**inputs, max_new_tokens=64)
found = model.generate(**inputs, return_dict_in_generate=True)
text = processor.decode(ids[0, 3:], skip_special_tokens=True)
texts = processor.batch_decode(ids, skip_special_tokens=True)
output = model(**inputs)
loss, logits = output.loss, output.logits
config = BitsAndBytesConfig(load_in_4bit=True)
named = Idefics2ForConditionalGeneration.from_pretrained(name, quantization_config=config)
own = Idefics2Processor.from_pretrained(name, do_image_splitting=False)
encoded = own(text="<image>", images="a.png", return_tensors="pt").to(model.device)
chat = Chat(model, processor, max_new_tokens=100)
answer = chat.ask("What?", ["a.png"])
for piece in chat.stream("Why?"):
    print(piece.upper(), chat.last.finish_reason if chat.last else None)
"""
REVEALED = {
    "inputs": "Inputs",
    "ids": "Tensor",
    "found": "GenerateOutput",
    "texts": "list[str]",
    "output": "Output",
    "loss": "Tensor | None",
    "logits": "Tensor | None",
    "named": "Idefics2ForConditionalGeneration",
    "own": "Idefics2Processor",
    "encoded": "Inputs",
    "answer": "str",
    "model.device": "device",
}
KNOWN = ("processor", "model", "prompt", "text", "config", "chat")


def test_type_checkers_know_what_calls_return(tmp_path):
    """Pyright on a user's script: no errors, and no Any where README's example calls."""
    if shutil.which("pyright") is None:
        pytest.skip("pyright is not installed")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "".join(f"reveal_type({name})\n" for name in (*REVEALED, *KNOWN)))
    settings = {"extraPaths": [str(ROOT), str(ROOT / "kernels")], "pythonVersion": "3.11"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = ["pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if not done.stdout.startswith("{"):
        pytest.skip(f"pyright cannot start here: {done.stderr[-200:]}")
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = [entry for entry in found if entry["severity"] == "error"]
    assert not errors, errors
    types = dict(entry["message"].split('"')[1::2] for entry in found if entry["message"].startswith("Type of "))
    assert {name: types[name] for name in REVEALED} == REVEALED
    assert not any("Any" in types[name] or "Unknown" in types[name] for name in KNOWN), types


# ---- What is built


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist."""
    backend = pytest.importorskip("hatchling.build", reason="the build backend is not installed")
    folder = tmp_path_factory.mktemp("dist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return folder / backend.build_wheel(str(folder)), folder / backend.build_sdist(str(folder))


def test_the_wheel_has_every_file_of_the_package(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        about = wheel.read("minivlm-0.1.0.dist-info/METADATA").decode()
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "minivlm").rglob("*") if path.is_file()}
    kernels = ROOT / "kernels"
    there |= {path.relative_to(kernels).as_posix() for path in (kernels / "minivlm_kernels").rglob("*.[pc]*")}
    assert names == {name for name in there if "__pycache__" not in name}
    assert "minivlm/py.typed" in names
    assert "License-Expression: Apache-2.0" in about
    assert "Typing :: Typed" in about


def test_the_sdist_ships_no_tests_that_it_cannot_run(built):
    with tarfile.open(built[1]) as sdist:
        names = [name.partition("/")[2] for name in sdist.getnames()]
    assert not [name for name in names if name.startswith(("tests", "docs", "scripts"))]
    assert {"pyproject.toml", "README.md", "LICENSE", "minivlm/py.typed"} <= set(names)


def test_the_wheel_answers_without_the_source_tree(built, tmp_path):
    """Nor is there anything that the package can do without, or that Windows lacks."""
    zipfile.ZipFile(built[0]).extractall(tmp_path / "site")
    hidden = ("transformers", "triton", "matplotlib", "resource", "fcntl", "readline")
    code = f"import sys\nsys.path.insert(0, {str(tmp_path / 'site')!r})\nsys.modules |= dict.fromkeys({hidden!r})\n"
    code += "import minivlm; assert 'site' in minivlm.__file__\n"
    code += "from minivlm.app import cli\nfew = ['--device', 'cpu', '--max-new-tokens', '4', '--verbose']\n"
    code += "assert not cli.main(['ask', 'shapes.png', 'What number is written?', *few])\n"
    code += "assert not cli.main(['batch', 'q.jsonl', '--out', 'a.jsonl', *few])\n"
    code += "assert not cli.main(['chat', *few])"
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(ROOT / "docs" / "shapes.png", work)
    (work / "q.jsonl").write_text('{"question": "hello"}\n')
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], input="hello\n", capture_output=True, text=True, cwd=work, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("47.\n")
    assert done.stdout.count("\n") == 2
    assert {path.name for path in work.iterdir()} == {"shapes.png", "q.jsonl", "a.jsonl"}
