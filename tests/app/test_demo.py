"""`minivlm demo`: what it refuses, what it keeps, and the page in a real browser."""

import base64
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_inside
from pages import CONTRAST

from minivlm.app import cli, demo

ROOT = Path(__file__).parents[2]
NICEGUI = "pip install 'nicegui>=3.18,<4'"
# The program, where a connection to another machine is an error that is written down.
ALONE = """
import sys
def watch(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1"):
        open(sys.argv[1], "a").write(f"{arguments[1]}\\n")
        raise PermissionError("no network here")
    if event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "localhost", None):
        open(sys.argv[1], "a").write(f"{arguments[0]}\\n")
sys.addaudithook(watch)
from minivlm.app.cli import main
sys.exit(main(sys.argv[2:]))
"""
# Drops a file on the page as a hand would
DROP = """async ([name, type, data]) => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), items = new DataTransfer();
  items.items.add(new File([bytes], name, { type }));
  const fire = (where, kind) => document.querySelector(where).dispatchEvent(
    new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: items }));
  fire(".q-uploader", "dragover");
  await new Promise(done => setTimeout(done, 100));
  fire(".q-uploader__dnd", "drop"); }"""


def test_without_its_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo"]) == 1
    err = capsys.readouterr().err
    assert "pip install" in err
    assert len(err.splitlines()) == 1


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: True)
    with socket.socket() as other:
        other.bind((demo.HOST, 0))
        other.listen()
        assert cli.main(["demo", "--port", str(other.getsockname()[1])]) == 1
    assert "--port takes another" in capsys.readouterr().err
    assert cli.main(["demo", "--port", "70000"]) == 1
    assert "65535" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["shapes-idefics2", "shapes-llava-next", "shapes-idefics"])
def test_what_can_be_looked_into(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page explains the answer that was given; old questions are forgotten."""
    monkeypatch.setattr(demo, "KEPT", 2)
    model, processor, _ = tiny_inside.asked(name)
    desk, image = demo.Desk(model, processor, name, 20), tiny_inside.drawn_image()
    answer = desk.chat().ask("Describe the picture.", [image])
    numbers = [desk.keep(image, f"{text} picture.") for text in ("No", "Some", "Describe the")]
    page = desk.inside(numbers[-1])
    assert f'"answer":"{answer}"' in page
    assert f'"name":"{name}"' in page
    with pytest.raises(ValueError, match="is not kept"):
        desk.inside(numbers[0])
    assert f"{name} · 1.9 million" in desk.about() or name != "shapes-idefics2"


# ---- In a browser


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The page's address, and the file that lists connections to other machines."""
    pytest.importorskip("nicegui", reason=NICEGUI)
    folder = tmp_path_factory.mktemp("demo")
    with socket.socket() as free:
        free.bind((demo.HOST, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", ALONE, str(folder / "connections"), "demo", "--port", str(port)]
    environment = {**demo.os.environ, "PYTHONPATH": f"{ROOT}{demo.os.pathsep}{ROOT / 'kernels'}"}
    # not those of pytest: NiceGUI would take itself for a test
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST")}
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(command, cwd=folder, stderr=log, env=environment) as process,
    ):
        for _ in range(600):
            with socket.socket() as knock:
                if knock.connect_ex((demo.HOST, port)) == 0:
                    break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"http://{demo.HOST}:{port}", folder / "connections"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)  # Ctrl-C
    log = (folder / "log").read_text()
    assert "Traceback" not in log, log
    assert "open http://127.0.0.1" in log
    assert [path.name for path in folder.iterdir() if path.name not in ("log", "connections")] == []


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_real_browser(width: int, served: tuple[str, Path], browser: Any) -> None:
    address, connections = served
    page, wrong, asked = browser.new_page(viewport={"width": width, "height": 844}), [], []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.get_by_role("button", name="Ask").click()
    page.wait_for_selector("text=Drop an image first")
    page.evaluate(DROP, ["note.png", "image/png", base64.b64encode(b"no image").decode()])
    page.wait_for_selector("text=is not a JPEG")
    image = base64.b64encode((ROOT / "docs" / "shapes.png").read_bytes()).decode()
    page.evaluate(DROP, ["shapes.png", "image/png", image])
    page.wait_for_selector(".shown img")
    page.evaluate(
        """() => { window.texts = new Set(); new MutationObserver(() => {
          const answer = document.querySelector(".answer"); if (answer) window.texts.add(answer.innerText); })
          .observe(document.body, { subtree: true, childList: true, characterData: true }); }"""
    )
    page.get_by_label("Question").fill("Describe the picture.")
    page.keyboard.press("Enter")
    link = page.get_by_role("link", name="Look inside this answer")
    link.wait_for()
    answer = "an orange star, a blue circle, a red triangle and the number 47."
    assert page.inner_text(".answer") == answer
    parts = [text for text in page.evaluate("[...window.texts]") if answer.startswith(text)]
    assert len(parts) > 3, parts  # it came in pieces
    with page.expect_popup() as opened:
        link.click()
    inside = opened.value
    inside.wait_for_selector("#answer button[aria-pressed=true]")
    assert inside.inner_text("h1") == "Describe the picture."
    inside.close()
    page.get_by_role("button", name="What number is written?").click()
    page.wait_for_function("document.querySelectorAll('.turn a').length === 2")
    assert page.inner_text(".answer") == "47."  # the newest comes first
    page.wait_for_function("!document.querySelector('.q-notification')", timeout=15_000)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(CONTRAST) == []
    assert wrong == []
    assert [
        url for url in asked if not url.startswith((address, address.replace("http", "ws"), "data:", "blob:"))
    ] == []
    assert not connections.exists(), connections.read_text()
    page.close()


def test_visitors_wait_for_each_other(served: tuple[str, Path], browser: Any) -> None:
    """One model for all: two ask at once, one leaves in the middle, one asks too much."""
    address, _ = served
    data = base64.b64encode((ROOT / "docs" / "shapes.png").read_bytes()).decode()
    first, second, leaves = (browser.new_page() for _ in range(3))
    for page in (first, second, leaves):
        page.goto(address)
        page.evaluate(DROP, ["shapes.png", "image/png", data])
        page.wait_for_selector(".shown img")
    leaves.get_by_role("button", name="Describe the picture.").click()
    leaves.close()
    first.get_by_role("button", name="Describe the picture.").click()
    second.get_by_role("button", name="What number is written?").click()
    for page, answer in ((first, "an orange star"), (second, "47.")):
        page.wait_for_selector(".turn a")
        assert page.inner_text(".answer").startswith(answer)
    second.get_by_label("Question").fill("what colour is the star? " * 400)
    second.keyboard.press("Enter")
    second.wait_for_selector(".answer.failed")
    assert "positions" in second.inner_text(".answer.failed")
    assert second.evaluate(CONTRAST) == []
    second.get_by_role("button", name="Where is the circle?").click()
    second.wait_for_function("document.querySelector('.answer').innerText === 'bottom left.'")
    first.close()
    second.close()


def test_other_names_for_this_machine_are_refused(served: tuple[str, Path]) -> None:
    """A page of another site whose name points here (DNS rebinding) gets nothing; an unknown answer is one line."""
    import urllib.error
    import urllib.request

    address, _ = served
    for request, status, words in (
        (urllib.request.Request(address, headers={"Host": "example.org"}), 400, "host"),
        (urllib.request.Request(f"{address}/inside/999"), 404, "not kept"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code == status
        assert words in refused.value.read().decode()
