"""`minivlm demo`: one local page, built with NiceGUI, which brings its scripts and fonts along and sends nothing home.

    image dropped ─► question ─► `Chat.stream`, piece by piece ─► "Look inside" ─► the page of `minivlm explain`

One model answers one question at a time; a second tab waits for its turn.
"""

import importlib.util
import os
import socket
import tempfile
from importlib.resources import files
from threading import Lock
from typing import Any

from minivlm.app.answer import ERRORS
from minivlm.app.chat import Chat
from minivlm.app.terminal import one_line
from minivlm.processing.common import fetch_image

HOST = "127.0.0.1"  # this machine alone
KEPT = 50  # answers that can still be looked into
LARGEST = 50_000_000  # bytes of a file that is dropped
LONGEST = 960  # pixels of the image on the page
QUESTIONS = ("What is in this image?", "What is unusual here?", "What is written?")
SHAPES = ("Describe the picture.", "What number is written?", "What colour is the star?", "Where is the circle?")


def check(port: int) -> None:
    """ValueError if NiceGUI is missing or the port number too large, OSError if the port is taken."""
    if importlib.util.find_spec("nicegui") is None:
        raise ValueError("`minivlm demo` needs NiceGUI, which is not installed: pip install 'nicegui>=3.18,<4'")
    if port > 65535:
        raise ValueError(f"--port takes a number up to 65535, found {port}")
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except OSError as error:
            raise OSError(f"port {port} cannot be used ({error.strerror}); --port takes another one") from error


class Desk:
    """A model that answers one question at a time, and the questions whose answers can be looked into."""

    def __init__(self, model: Any, processor: Any, name: str, new_tokens: int) -> None:
        self.model, self.processor, self.name = model, processor, name
        self.settings = {"max_new_tokens": new_tokens, "do_sample": False}
        self.lock = Lock()
        self.asked: dict[int, tuple[Any, str]] = {}  # number → image and question
        self._count = 0

    def chat(self) -> Chat:
        return Chat(self.model, self.processor, **self.settings)

    def keep(self, image: Any, question: str) -> int:
        """The number under which this question can be looked into; the oldest is forgotten."""
        self._count += 1
        self.asked[self._count] = image, question
        self.asked.pop(self._count - KEPT, None)
        return self._count

    def inside(self, number: int) -> str:
        """The page of `minivlm explain`. ValueError for a number that is not kept."""
        from minivlm.app import explain

        if number not in self.asked:
            raise ValueError(f"answer {number} is not kept (the last {KEPT} are); ask once more")
        image, question = self.asked[number]
        with self.lock:
            found = explain.gather(self.model, self.processor, [image], question, **self.settings)
        found["model"]["name"] = self.name
        return explain.page(found)

    def about(self) -> str:
        count = self.model.num_parameters()
        size = f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"minivlm demo · {self.name} · {size} parameters · {dtype} · {self.model.device}"


def serve(desk: Desk, image: Any, port: int) -> None:
    """Serve the page until Ctrl-C. image: to begin with, or None."""
    os.environ.setdefault("NICEGUI_STORAGE_PATH", tempfile.gettempdir())  # nothing is stored there
    from nicegui import app, ui
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, PlainTextResponse, Response

    @app.get("/inside/{number}")
    def inside(number: int) -> Response:
        try:
            return HTMLResponse(desk.inside(number))
        except ERRORS as error:
            return PlainTextResponse(one_line(error), status_code=404)

    @ui.page("/")
    def index() -> None:
        Page(desk, image).build()

    # refuses requests under any other host name, which a page of another site could make (DNS rebinding)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    ui.run(
        host=HOST,
        port=port,
        title="minivlm demo",
        reload=False,
        show=False,
        tailwind=False,
        show_welcome_message=False,
    )


class Page:
    """The page of one visitor: an image, a question, the answers so far."""

    def __init__(self, desk: Desk, image: Any) -> None:
        self.desk, self.image = desk, image
        self.answering: Chat | None = None

    def build(self) -> None:
        from nicegui import ui

        ui.add_css(files("minivlm.app").joinpath("demo.css").read_text(encoding="utf-8"))
        ui.colors(primary="#1d1c1a")
        ui.label(self.desk.about()).classes("about")
        ui.html("<h1>Ask about an image</h1>", sanitize=False)
        with ui.element("main").classes("desk"):
            label = "Drop an image here, or choose one with +"
            upload = ui.upload(
                label=label,
                auto_upload=True,
                max_file_size=LARGEST,
                on_upload=self.dropped,
                on_rejected=lambda: ui.notify(f"One image of at most {LARGEST // 1_000_000} MB", type="warning"),
            )
            upload.props('accept="image/*" flat').classes("card")
            with upload.add_slot("list"):
                self.shown = ui.element("div")
            with ui.element("div"):
                with ui.element("div").classes("card"):
                    with ui.element("div").classes("line"):
                        self.question = ui.input("Question").props("outlined").on("keydown.enter", self.ask)
                        self.button = ui.button("Ask", on_click=self.ask).props("no-caps unelevated")
                    with ui.element("div").classes("ideas"):
                        for text in SHAPES if self.desk.name.startswith("shapes-") else QUESTIONS:
                            ui.button(text, on_click=lambda text=text: self.idea(text)).props("flat dense no-caps")
                self.answers = ui.element("div").props('aria-live="polite"')
        self.show()

    def show(self) -> None:
        from nicegui import ui

        self.shown.clear()
        with self.shown:
            if self.image is None:
                ui.label("No image yet.").classes("empty")
                return
            small = self.image.copy()
            small.thumbnail((LONGEST, LONGEST))
            ui.image(small).classes("shown").props('alt="The image that is asked about" no-spinner no-transition')

    async def dropped(self, event: Any) -> None:
        from nicegui import run, ui

        data = await event.file.read()
        event.sender.reset()
        try:
            self.image = await run.io_bound(fetch_image, self.desk.processor, data)
        except ERRORS as error:
            ui.notify(one_line(error), type="negative", multi_line=True)
            return
        self.show()

    async def idea(self, text: str) -> None:
        self.question.value = text
        await self.ask()

    async def ask(self) -> None:
        """Ask, or stop the answer that is being read."""
        from nicegui import ui

        text = (self.question.value or "").strip()
        if self.answering is not None:
            self.answering.stop()
        elif self.image is None or not text:
            ui.notify("Drop an image first." if self.image is None else "Type a question first.", type="warning")
        else:
            with self.answers, ui.element("article").classes("card turn") as turn:
                ui.label(text).classes("asked")
                answer, took = ui.label("…").classes("answer"), ui.element("div").classes("took")
            turn.move(target_index=0)
            self.answering = self.desk.chat()
            self.button.text = "Stop"
            try:
                await self.stream(self.answering, text, answer, took)
            except ERRORS as error:
                answer.text = one_line(error)
                answer.classes("failed")
            finally:
                self.answering = None
                self.button.text = "Ask"

    async def stream(self, chat: Chat, text: str, answer: Any, took: Any) -> None:
        from nicegui import run, ui

        image, lock = self.image, self.desk.lock
        await run.io_bound(lock.acquire)
        try:
            pieces, so_far = await run.io_bound(chat.stream, text, [image]), ""
            while (piece := await run.io_bound(next, pieces, None)) is not None:
                so_far += piece
                answer.text = so_far.lstrip() or "…"
        finally:
            lock.release()
        last = chat.last
        answer.text = last.text
        with took:
            ui.label(f"{last.new_tokens} tokens in {last.seconds:.1f} s")
            if last.finish_reason != "stop":
                ui.label("stopped" if last.finish_reason == "interrupted" else f"cut at {last.limit} tokens")
            ui.link("Look inside this answer", f"/inside/{self.desk.keep(image, text)}", new_tab=True)
