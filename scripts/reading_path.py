"""The files to open to follow a forward pass: a table of files and lines for each family.

    python scripts/reading_path.py            the table
    python scripts/reading_path.py --rooms    the files and lines of every room, with the kernels' and the tests'
    python scripts/reading_path.py --write    both, into README and docs/reading.md

Follows imports of minivlm's own modules, inside functions too, from models/<family>.py through models/ and modules/.
Rooms that no forward pass enters are left out: files, settings and loops around it (checkpoint, generation, …).
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("models", "modules")
FAMILIES = ("idefics2", "llava_next", "idefics")


@dataclass(frozen=True)
class ReadingPath:
    """files: in import order.  first_module: the line of the family's first nn.Module."""

    files: list[Path]
    lines: int
    first_module: int


def reading_path(family: str) -> ReadingPath:
    """The files from models/<family>.py on."""
    found: list[Path] = []
    todo = [ROOT / "minivlm" / "models" / f"{family}.py"]
    while todo:
        path = todo.pop(0)
        if path not in found:
            found.append(path)
            todo += [target for target in imports(path) if target.parent.name in ROOMS]
    return ReadingPath(found, sum(map(lines_of, found)), first_module(found[0]))


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def imports(path: Path) -> Iterator[Path]:
    """The files of minivlm's own modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
        else:
            continue
        for name in names:
            target = ROOT.joinpath(*name.split(".")).with_suffix(".py")
            if name.startswith("minivlm.") and target.is_file():
                yield target


def first_module(path: Path) -> int:
    """The line in which the first class that is an nn.Module begins."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and any(getattr(base, "attr", "") == "Module" for base in node.bases):
            return node.lineno
    raise ValueError(f"{path} has no nn.Module")


def table() -> str:
    """The table of README and docs/reading.md."""
    rows = [
        "| family | files | lines | first module at line | in the order of imports |",
        "| --- | --- | --- | --- | --- |",
    ]
    for family in FAMILIES:
        path = reading_path(family)
        files = ", ".join(file.relative_to(ROOT / "minivlm").as_posix() for file in path.files)
        rows.append(f"| {family} | {len(path.files)} | {path.lines:,} | {path.first_module} | {files} |")
    return "\n".join(rows)


def rooms() -> dict[str, tuple[int, int]]:
    """Room → its Python files and their lines; the package as a whole under its own name."""
    package = ROOT / "minivlm"
    folders = [path.parent for path in sorted(package.glob("*/__init__.py"))]
    files = {f"minivlm/{folder.name}/": folder.rglob("*.py") for folder in folders}
    files |= {"minivlm/*.py": package.glob("*.py"), "minivlm/ in all": package.rglob("*.py")}
    files |= {f"{name}/": (ROOT / name).rglob("*.py") for name in ("kernels", "scripts", "tests")}
    lines = {room: [lines_of(path) for path in paths] for room, paths in files.items()}
    return {room: (len(each), sum(each)) for room, each in lines.items()}


def rooms_table() -> str:
    """The table of docs/reading.md: lines to the nearest hundred, so that it need not follow every edit."""
    rows = ["| room | files | lines |", "| --- | ---: | ---: |"]
    rows += [f"| `{room}` | {files} | {round(lines, -2):,} |" for room, (files, lines) in rooms().items()]
    return "\n".join(rows)


def write() -> None:
    """Put both tables between their marks in README and docs/reading.md."""
    for page in (ROOT / "README.md", ROOT / "docs" / "reading.md"):
        text = page.read_text(encoding="utf-8")
        for mark, made in (("path", table()), ("rooms", rooms_table())):
            text = re.sub(f"<!-- {mark} -->.*?<!-- end", f"<!-- {mark} -->\n{made}\n<!-- end", text, flags=re.S)
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if "--write" in sys.argv:
        write()
    else:
        print(rooms_table() if "--rooms" in sys.argv else table())
