"""A conversation at the terminal: its commands, and keys that stop an answer or end it."""

import base64
import contextlib
import io
import json
import os
import shlex
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from minivlm.app import images, terminal
from minivlm.app.answer import ERRORS
from minivlm.app.chat import Chat
from minivlm.app.options import check_settings, parse_value, with_sampling
from minivlm.checkpoint.files import write_json
from minivlm.generation.settings import SAMPLING
from minivlm.processing.common import fetch_image
from minivlm.text.messages import make_message, normalise

COMMANDS = {
    "/help": "this list",
    "/image PATH": "add an image (file or URL) to the next question",
    "/images": "list the images of the conversation",
    "/reset": "forget the conversation and its images",
    "/system TEXT": "set the system message; without TEXT, show it",
    "/set NAME VALUE": "change a generation setting, as temperature 0.7; without VALUE, back to its default",
    "/save FILE.json": "write the conversation to a file",
    "/load FILE.json": "go on with a saved conversation",
    "/quit": "end (so does Ctrl-D)",
}
FENCE = '"""'
HINTS = 'A line with """ begins and ends a question of several lines. Ctrl-C stops an answer.'


class Talk:
    """Answers line after line.

    first: images for the first question, each with its name.  show: prints the pieces of an answer.
    watched: a person is at the terminal, so commands confirm on stderr what they did.
    verbose: print time and memory of each answer on stderr.
    """

    def __init__(
        self,
        chat: Chat,
        first: Iterable[tuple[Any, str]],
        show: Callable[[Iterator[str]], None],
        *,
        watched: bool,
        verbose: bool,
    ) -> None:
        self.chat, self.show, self.watched, self.verbose = chat, show, watched, verbose
        self.failed = 0
        self._names: dict[int, tuple[Any, str]] = {}  # by id: an image and where it came from
        self._waiting: list[Any] = []
        for image, name in first:
            self._add(image, name)

    def run(self, read: Callable[[str], str | None]) -> int:
        """Answer line after line until `read(prompt)` returns None or a line says /quit.

        Return the number of lines that failed; the conversation goes on as if they had not been there.
        """
        while (line := _question(read)) is not None:
            word, _, argument = line.partition(" ")
            try:
                if word in ("/quit", "/exit", "/bye"):
                    break
                if line:
                    self._command(word, argument.strip()) if _is_command(line) else self._ask(line)
            except BrokenPipeError:  # an OSError, but there is no reader left
                raise
            except ERRORS as error:
                terminal.fail(error)
                self.failed += 1
        return self.failed

    def banner(self, model: str, device: str, dtype: str) -> str:
        """The first line: what runs where, on which images."""
        count = len(self._waiting)
        kept = f"{count} image{'s' * (count != 1)}" if count else "no image yet"
        return f"{model} on {device} in {dtype}, {kept}; /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends"

    # ---- Questions

    def _ask(self, text: str) -> None:
        try:
            with _stoppable(self.chat) if self.watched else contextlib.nullcontext():
                self.show(self.chat.stream(text, self._waiting))
        except KeyboardInterrupt:
            if not self.watched:
                raise
            terminal.note("stopped; the question is not part of the conversation")
            return
        self._waiting = []
        terminal.report(self.chat.last, self.chat.model.device, self.verbose)

    # ---- Commands

    def _command(self, word: str, argument: str) -> None:
        commands = {
            "/help": self._help,
            "/image": self._image,
            "/images": self._images,
            "/reset": self._reset,
            "/system": self._system,
            "/set": self._set,
            "/save": self._save,
            "/load": self._load,
        }
        if word not in commands:
            raise ValueError(f"there is no command {word}; /help lists them")
        commands[word](argument)

    def _help(self, _: str) -> None:
        terminal.tell("\n".join([*terminal.columns(list(COMMANDS.items())), HINTS]))

    def _image(self, argument: str) -> None:
        if not argument:
            raise ValueError("/image takes a file or URL")
        name = _path(argument)
        image = fetch_image(self.chat.processor, images.source(name))
        self._add(image, name)
        self._confirm(f"{_described(self._name(image), image)} goes with the next question")

    def _add(self, image: Any, name: str) -> None:
        self._names[id(image)] = image, name
        self._waiting.append(image)

    def _images(self, _: str) -> None:
        said = normalise(self.chat.messages)[1] if self.chat.messages else []
        lines = [f"{n}. {_described(self._name(image), image)}" for n, image in enumerate(said, 1)]
        lines += [
            f"{n}. {_described(self._name(image), image)}, with the next question"
            for n, image in enumerate(self._waiting, len(said) + 1)
        ]
        terminal.tell("\n".join(lines) or "no image yet; /image PATH adds one")

    def _name(self, image: Any) -> str:
        return self._names.get(id(image), (image, "an image"))[1]

    def _reset(self, _: str) -> None:
        self.chat.reset()
        self._waiting, self._names = [], {}
        self._confirm("a new conversation")

    def _system(self, argument: str) -> None:
        if not argument:
            terminal.tell(self.chat.system or "no system message")
            return
        self.chat.system = argument
        said = [message for message in self.chat.messages if message["role"] != "system"]
        self.chat.messages = [make_message("system", argument), *said]
        self._confirm("the system message from now on")

    def _set(self, argument: str) -> None:
        name, _, text = argument.replace("=", " ", 1).partition(" ")
        settings = dict(self.chat.settings)
        if not name:
            shown = [f"{name} {json.dumps(value)}" for name, value in settings.items()]
            terminal.tell("\n".join(shown) or "every setting has its default")
            return
        settings.pop(name, None)
        if text.strip():
            settings[name] = parse_value(text.strip())
        if name in SAMPLING:
            settings.pop("do_sample", None)
            settings = with_sampling(settings)
        check_settings(settings)
        self.chat.settings = settings
        self._confirm(f"{name}: {text.strip() or 'back to its default'}")

    # ---- Files

    def _save(self, argument: str) -> None:
        if not argument:
            raise ValueError("/save takes the name of a file")
        path = Path(_path(argument)).expanduser()
        messages = [
            {"role": message["role"], "content": [self._stored(item) for item in message["content"]]}
            for message in self.chat.messages
        ]
        write_json(path, {"messages": messages})
        self._confirm(f"{len(messages)} messages in {path}")

    def _stored(self, item: dict[str, Any]) -> dict[str, Any]:
        """An item as JSON has it: an image by its address, or whole if it has none."""
        if item["type"] != "image":
            return item
        address = self._name(item["image"])
        if "://" not in address:
            path = os.path.expanduser(address)
            address = os.path.abspath(path) if os.path.exists(path) else _data_url(item["image"])  # else it was base64
        return {"type": "image", "image": address}

    def _load(self, argument: str) -> None:
        if not argument:
            raise ValueError("/load takes the name of a file that /save wrote")
        path = Path(_path(argument)).expanduser()
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or "messages" not in found:
            raise ValueError(f'{path} should hold {{"messages": […]}}, as /save writes it')
        normal, sources = normalise(found["messages"]) if found["messages"] else ([], [])
        items = [item for message in normal for item in message["content"] if item["type"] == "image"]
        for item, source in zip(items, sources, strict=True):
            if not isinstance(source, str):
                raise ValueError(f"{path}: an image in it has neither a path nor a URL")
            item["image"] = fetch_image(self.chat.processor, source)
            self._names[id(item["image"])] = item["image"], source
        self.chat.reset()
        self.chat.messages = normal
        self.chat.system = next((_text(m) for m in normal[:1] if m["role"] == "system"), self.chat.system)
        self._waiting = []
        self._confirm(f"{len(normal)} messages, {len(items)} images from {path}")

    def _confirm(self, text: str) -> None:
        if self.watched:
            terminal.tell(text)


def _is_command(line: str) -> bool:
    """`/help` and `/image x`, but not `/home/me/a.png is what?`."""
    return line.startswith("/") and line.split()[0][1:].isalpha()


def _question(read: Callable[[str], str | None]) -> str | None:
    '''The next line without blanks around it; those between two lines with """ as one. None at the end.'''
    line = read("> ")
    if line is None or not line.lstrip().startswith(FENCE):
        return line if line is None else line.strip()
    text, fence, _ = line.lstrip().removeprefix(FENCE).partition(FENCE)
    lines = [text]
    while not fence and (line := read("... ")) is not None:
        text, fence, _ = line.partition(FENCE)
        lines.append(text)
    return "\n".join(lines).strip()


def _path(text: str) -> str:
    """A path as people type, paste or drop it: in quotes, or with backslashes before its blanks."""
    if os.path.exists(os.path.expanduser(text)):
        return text
    with contextlib.suppress(ValueError):
        words = shlex.split(text)
        if len(words) == 1:
            return words[0]
    return text


def _described(name: str, image: Any) -> str:
    return f"{name if len(name) < 200 else 'an image'}, {image.width}×{image.height}"


def _data_url(image: Any) -> str:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _text(message: dict[str, Any]) -> str:
    return "".join(item.get("text", "") for item in message["content"])


@contextlib.contextmanager
def _stoppable(chat: Chat) -> Iterator[None]:
    """In this block, Ctrl-C ends the answer after its next token. Before the first token, and the second time, it is a
    KeyboardInterrupt."""
    pressed = False

    def interrupt(*_: Any) -> None:
        nonlocal pressed
        if pressed or not chat.stop():
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
