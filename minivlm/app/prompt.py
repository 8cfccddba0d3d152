"""Lines from the person at the terminal: history, line editing and completion where Python has `readline`."""

import contextlib
import glob
import os
from collections.abc import Callable
from pathlib import Path

try:
    import readline
except ImportError:  # Windows; its console edits lines and remembers them by itself
    readline = None

HISTORY = 1000  # lines
TAKE_PATHS = ("/image ", "/save ", "/load ")


def reader(watched: bool, commands: list[str]) -> Callable[[str], str | None]:
    """A function that reads one line after a prompt, None at the end. Without a terminal it prints no prompt.

    At a terminal, Ctrl-C gives up the line, and twice in a row is a KeyboardInterrupt.
    """
    if not watched:
        return lambda _: _line("")
    if readline is not None:
        _prepare([command.split()[0] for command in commands])

    def read(prompt: str) -> str | None:
        try:
            return _line(prompt)
        except KeyboardInterrupt:
            print("\n(Ctrl-C again, Ctrl-D or /quit ends)")
        return _line(prompt)

    return read


def _line(prompt: str) -> str | None:
    try:
        return input(prompt)
    except EOFError:
        if prompt:
            print()
        return None


# ---- readline


def history_file() -> Path:
    """Where questions are remembered from one conversation to the next."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "minivlm" / "history"


def _prepare(commands: list[str]) -> None:
    import atexit

    path = history_file()
    with contextlib.suppress(OSError):  # no history yet
        readline.read_history_file(path)
    readline.set_history_length(HISTORY)
    atexit.register(_remember, path)

    def completion(word: str, number: int) -> str | None:
        return [*complete(word, readline.get_line_buffer(), readline.get_begidx(), commands), None][number]

    readline.set_completer(completion)
    readline.set_completer_delims(" ")
    editline = "libedit" in (readline.__doc__ or "")  # macOS
    readline.parse_and_bind("bind ^I rl_complete" if editline else "tab: complete")


def _remember(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        readline.write_history_file(path)


def complete(word: str, line: str, begin: int, commands: list[str]) -> list[str]:
    """What the last `word` of a line, which begins at `begin`, may become: a command, or after some the path of a file.

    A path with blanks is several words, of which only the last is completed.
    """
    if begin == 0:
        return [f"{command} " for command in commands if command.startswith(word)] if word.startswith("/") else []
    if not line.startswith(TAKE_PATHS):
        return []
    start = line.index(" ") + 1
    path = line[start : begin + len(word)]
    found = sorted(glob.glob(glob.escape(os.path.expanduser(path)) + "*"))
    if path.startswith("~"):
        home = os.path.expanduser("~")
        found = [f"~{name.removeprefix(home)}" for name in found]
    return [(name + "/" if os.path.isdir(os.path.expanduser(name)) else name)[begin - start :] for name in found]
