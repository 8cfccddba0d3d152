"""README and docs say what is so: Python blocks run, links lead somewhere, commands exist, tables are the scripts'."""

import re
import shutil
from pathlib import Path

import processes
import pytest
import reading_path
import walk
from PIL import Image

from minivlm.app.cli import VERBS, parser_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [page for page in PAGES if page.stem in ("README", "start", "inside", "research", "transformers")]


@pytest.mark.parametrize("page", SCRIPTS, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, as a reader would paste them; the images they save are those that the page shows."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        assert len(block.splitlines()) < 30 or page.stem != "inside"
        exec(compile(block, page.name, "exec"), names)
    shown = set(re.findall(r"!\[.*?\]\((.*?)\)", page.read_text(encoding="utf-8")))
    made = {path.name for path in tmp_path.glob("*.png")}
    assert made <= shown
    for name in made:
        assert Image.open(name).size == Image.open(page.parent / name).size


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_exist(page: Path) -> None:
    """Verbs, their options and scripts in code blocks and in backticks."""
    text = page.read_text(encoding="utf-8")
    for script in re.findall(r"(?:python|torchrun[^`\n]*?) (scripts/[\w/]+\.py)", text):
        assert (ROOT / script).is_file(), script
    verbs = "|".join(VERBS)
    for verb, rest in re.findall(rf"minivlm ({verbs})\b([^\n`#|]*)", text):
        module = __import__(f"minivlm.app.verbs.{verb}", fromlist=["add_arguments"])
        known = parser_of(verb, module).format_help()
        for option in re.findall(r"(?<!\S)--[a-z][\w-]*", rest):
            assert option in known, f"minivlm {verb} {option}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "reading.md"], ids=lambda page: page.stem)
def test_the_reading_path_is_the_script_s(page: Path) -> None:
    assert f"<!-- path -->\n{reading_path.table()}\n<!-- end of path -->" in page.read_text(encoding="utf-8")


def test_the_rooms_have_the_lines_that_reading_says() -> None:
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    table = text.partition("<!-- rooms -->")[2].partition("<!-- end of rooms -->")[0]
    stated = {
        room: int(lines.replace(",", "")) for room, lines in re.findall(r"^\| `(.+)` \| \d+ \| ([\d,]+)", table, re.M)
    }
    counted = {room: lines for room, (_, lines) in reading_path.rooms().items()}
    assert stated.keys() == counted.keys()
    for room, lines in counted.items():
        assert abs(lines - stated[room]) <= max(100, lines / 8), room


def test_the_walk_is_a_real_run() -> None:
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    assert f"{walk.START}\n{walk.markdown(walk.rows('shapes-idefics2')[0])}\n{walk.END}" in text


def test_readme_is_short_and_names_every_room() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    tree = re.search(r"```\nminivlm/\n(.*?)```", text, re.S)[1]
    rooms = [path.name for path in (ROOT / "minivlm").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert sorted(re.findall(r"^  (\w+)/", tree, re.M)) == sorted(rooms)


def test_the_readme_s_main_job() -> None:
    """Its question about its image, as a program of its own."""
    command = re.search(
        r"minivlm ask (docs/shapes.png) \"(.*)\"\n# (.*)\n", (ROOT / "README.md").read_text(encoding="utf-8")
    )
    done = processes.run(processes.MINIVLM, "ask", command[1], command[2], cwd=ROOT)
    assert done.stdout.strip() == command[3]
