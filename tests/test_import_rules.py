"""Imports point one way: from the command line down to the kernels, never back."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from minivlm.families import FAMILIES

ROOT = Path(__file__).parents[1]

# room → rooms of ours that it may import from. A room is a module of `minivlm`, or a folder of them.
MAY_IMPORT = {
    "minivlm_kernels": set(),
    "minivlm.modules": {"minivlm_kernels"},
    "minivlm.devices": {"minivlm.modules", "minivlm_kernels"},
    "minivlm.families": {"minivlm.modules"},  # classes by reference, see `Family`
    "minivlm.quantization": {"minivlm.modules", "minivlm.families", "minivlm_kernels"},
    "minivlm.generation": {"minivlm.modules", "minivlm.checkpoint"},
    "minivlm.checkpoint": {
        "minivlm.training",  # adapters, where one is asked for
        "minivlm.devices",
        "minivlm.families",
        "minivlm.generation",
        "minivlm.modules",
        "minivlm.quantization",
    },
    "minivlm.models": {"minivlm.modules", "minivlm.generation", "minivlm.checkpoint", "minivlm.training"},
    "minivlm.text": {"minivlm.modules", "minivlm.checkpoint"},
    "minivlm.processing": {"minivlm.families", "minivlm.text", "minivlm.modules", "minivlm.checkpoint"},
    "minivlm.auto": {"minivlm.checkpoint", "minivlm.families"},
    "minivlm.inside": {"minivlm.modules", "minivlm.families", "minivlm.processing"},
    "minivlm.parity": {
        "minivlm",  # its version
        "minivlm.auto",
        "minivlm.checkpoint",
        "minivlm.devices",
        "minivlm.families",
        "minivlm.generation",
        "minivlm.inside",
        "minivlm.modules",
        "minivlm.quantization",
    },
    "minivlm.training": {
        "minivlm.checkpoint",
        "minivlm.families",
        "minivlm.modules",
        "minivlm.devices",
        "minivlm.processing",
        "minivlm.quantization",
        "minivlm.text",
    },
    "minivlm.trainer": {"minivlm.models"},
    "minivlm.app": None,  # anything; and nothing imports it
}
# Third-party packages that only some rooms may see; `transformers` is the oracle of tests and of the parity instrument.
ONLY_IN = {
    "transformers": {"minivlm.parity", "minivlm.trainer"},
    "tokenizers": {"minivlm.text"},
    "PIL": {"minivlm.processing", "minivlm.inside", "minivlm.parity", "minivlm.app"},
    "jinja2": {"minivlm.text"},
    "huggingface_hub": {"minivlm.checkpoint"},
    "safetensors": {"minivlm.checkpoint", "minivlm.parity", "minivlm.training"},
    "matplotlib": {"minivlm.parity"},
    "nicegui": {"minivlm.app"},
    "triton": {"minivlm_kernels"},
}
FILES = [path for top in ("minivlm", "kernels/minivlm_kernels") for path in sorted((ROOT / top).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts).removesuffix(".__init__").replace("minivlm.__main__", "minivlm.app.__main__")


def room(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "minivlm" else parts[0]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found |= {
                f"{node.module}.{alias.name}" if node.module == "minivlm" else node.module for alias in node.names
            }
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_direction(path: Path) -> None:
    here = room(module_name(path))
    if here == "minivlm":
        return  # the front door names everything, as strings
    allowed = MAY_IMPORT[here]
    for module in imports(path):
        if module.split(".")[0] in ("minivlm", "minivlm_kernels"):
            target = room(module)
            assert target == here or allowed is None or target in allowed, f"{here} may not import {target}"
            assert target != "minivlm.app.cli" or here == target, "nothing imports the applications"
        top = module.split(".")[0]
        assert top not in ONLY_IN or here in ONLY_IN[top], f"{here} may not import {top}"


def test_families_do_not_know_each_other() -> None:
    """However many there are: no model and no processor imports that of another family."""
    for part in ("model", "processor"):
        modules = {getattr(family, part).split(":")[0] for family in FAMILIES.values()}
        for module in modules:
            assert not imports(ROOT / f"{module.replace('.', '/')}.py") & (modules - {module})


def test_import_is_light() -> None:
    """`import minivlm` loads neither torch nor any of its friends; every public name can be reached."""
    code = (
        "import sys, minivlm\n"
        "heavy = {'torch', 'transformers', 'PIL', 'tokenizers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "for name in minivlm.__all__: getattr(minivlm, name)\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_read_and_written_in_utf8(path: Path) -> None:
    """Whatever the locale: every text file is opened with an encoding of its own."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        mode = next(
            (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)), ""
        )
        ours = getattr(getattr(node.func, "value", None), "id", "") == "hub"  # our own reader, which says UTF-8
        text = (name in ("read_text", "write_text") and not ours) or (
            isinstance(node.func, ast.Name) and name == "open"
        )
        if text and "b" not in mode:
            assert any(keyword.arg == "encoding" for keyword in node.keywords), f"{path}:{node.lineno}"
