"""Runs chat templates: known ones in this process, untrusted ones in a child process with limits.

A template is a program, written by whoever made the checkpoint. jinja2's immutable sandbox keeps it from Python's
internals and from changing its arguments, but not from `'x' * 10**12`, nested loops, or crashing the interpreter. So an
unknown template runs in a child process, limited to SECONDS of processor time and MEMORY bytes per prompt, and is
killed after PATIENCE seconds in any case. The first prompt that needs the child starts it (a quarter of a second); it
serves all later ones, and is replaced after a template had to be stopped. Where the operating system has no such limits
(Windows, in part macOS), only the clock ends a template.

Templates are recognised by content: those of the released checkpoints, and the files in `templates/`. These need no
limits: they read each character of the messages a few times, whatever the messages contain.
"""

import atexit
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.debug  # which jinja2 imports at the first error
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minivlm.text.shown import printable

try:
    import resource
except ImportError:  # on Windows
    resource = None

SECONDS = 2.0  # of processor time for one request; the released templates take well under a millisecond
PATIENCE = 10.0  # seconds of wall-clock time for one request
START = 60.0  # seconds for a child to start on a busy machine
MEMORY = 2**28  # bytes for one request, beyond the child's own at its start
MAX_SOURCE = 2**16  # characters of a template; the released ones have under 2**10
MAX_PROMPT = 2**24  # characters a template may write, more than any model has positions for
GENERATION = ("generation_begins", "generation_ends")  # variables written around {% generation %} blocks
RELEASED = {  # SHA-256 of the released checkpoints' templates
    "ad18adf35123e30b9da6c5e45f617d965ea54ebaa8efec8a478a26ab66505c2f",  # idefics2-8b, -chatty; the built-in ones
    "2c17243a977fd0643fb549a509a8e2684f45517df0f9f608d5893b719f16569f",  # llava-v1.6-mistral-7b-hf
    "6fef09c05345e88b9f85e80bcb3491003332050750586568bdf91cfa81965d0c",  # llava-v1.6-vicuna-7b-hf, -13b-hf
    "226cddf019684887ff1dd1c1ad1bfb585f84ae41658c979901d3f090a4dc0367",  # llava-v1.6-34b-hf
    "2256b43f759a69210e5e1f75b227a6c21609be47dfb1f12d79cf936628474fd6",  # llama3-llava-next-8b-hf
    "dd4400dc01d2e909b63c36ff9e400a6da17ba38e758a00bc83edcc323aa04b57",  # llava-next-72b-hf, -110b-hf
}


def render(template: str, calls: Sequence[dict[str, Any]]) -> list[str]:
    """A template's output for each set of variables. ValueError if it is broken, raises or is stopped."""
    if is_known(template):
        compiled = _compile(template, known=True)
        return ["".join(compiled.generate(variables)) for variables in calls]
    return _CHILD.ask({"template": template, "calls": calls})["prompts"]


@lru_cache(maxsize=64)
def mentioned(template: str) -> frozenset[str]:
    """Names of the variables that a template uses but does not set."""
    request = {"template": template, "calls": None}
    return frozenset((_answer(request) if is_known(template) else _CHILD.ask(request))["names"])


@lru_cache(maxsize=64)
def is_known(template: str) -> bool:
    """Whether a template is in `templates/` or belongs to a released checkpoint."""
    if hashlib.sha256(template.encode(errors="surrogatepass")).hexdigest() in RELEASED:
        return True
    return any(template == path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("templates/*.jinja"))


# ---- In any process


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """Answer a request: prompts, or without `calls` the names of variables. ValueError if the template fails."""
    try:
        compiled = _compile(request["template"])
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid jinja: line {error.lineno}: {_reason(error)}") from error
    except Exception as error:
        raise ValueError(f"the chat template cannot be used: {_reason(error)}") from error
    if request["calls"] is None:
        known = compiled.environment.globals.keys() | set(GENERATION)
        names = meta.find_undeclared_variables(compiled.environment.parse(request["template"]))
        return {"names": sorted(names - known)}
    try:
        return {"prompts": [_written(compiled, variables) for variables in request["calls"]]}
    except Exception as error:  # a template can raise anything
        raise ValueError(f"the chat template fails on these messages: {_reason(error)}") from error


def _written(compiled: jinja2.Template, variables: dict[str, Any]) -> str:
    parts, length = [], 0
    for part in compiled.generate(variables):
        parts.append(part)
        length += len(part)
        if length > MAX_PROMPT:
            raise SecurityError(f"it writes more than {MAX_PROMPT:,} characters")
    return "".join(parts)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or calls itself without end"
    if isinstance(error, MemoryError):
        return f"it takes more than {MEMORY // 2**20} MiB of memory"
    return printable(str(error), 500) or type(error).__name__


@lru_cache(maxsize=16)
def _compile(template: str, known: bool = False) -> jinja2.Template:
    if len(template) > MAX_SOURCE:
        raise ValueError(f"it has {len(template):,} characters, and at most {MAX_SOURCE:,} are read")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=None if known else _plain,
        extensions=[loopcontrols, _Generation],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = lambda **items: items  # the class has methods
    del environment.globals["lipsum"]
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks an assistant's words for training; see GENERATION."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.Name(name, "load", lineno=line)], lineno=line) for name in GENERATION)
        return [begin, *body, end]


def _plain(value: Any) -> Any:
    """Allow only data to be printed: jinja2 would print a function's or iterator's memory address."""
    if not isinstance(value, str | int | float | list | tuple | dict | Undefined | None):
        raise SecurityError(f"a chat template may not print a {type(value).__name__}")
    if isinstance(value, list | tuple | dict):
        for item in value:
            _plain(item)
    if isinstance(value, dict):
        for item in value.values():
            _plain(item)
    return value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, as in transformers; jinja2's own filter escapes <, > and & for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message if isinstance(message, str) else f"a {type(message).__name__} is not a message")


# ---- The child


def _serve() -> None:
    """The child's main loop: one request per line of JSON, one answer per line, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's Ctrl-C
    set_alarm = getattr(signal, "setitimer", lambda *_: None)  # not on Windows
    profile = getattr(signal, "ITIMER_PROF", None)
    _set_limits()
    sys.stdout.buffer.raw.write(b"{}\n")  # ready
    for line in sys.stdin.buffer:
        try:
            request = json.loads(line)
            set_alarm(profile, request["seconds"])  # of processor time; then SIGPROF ends the process
            line = _line(_answer(request))
        except ValueError as error:
            line = _line({"error": str(error), "last": isinstance(error.__cause__, MemoryError)})
        except MemoryError as error:
            line = _line({"error": f"the chat template fails on these messages: {_reason(error)}", "last": True})
        set_alarm(profile, 0)
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def _line(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def _set_limits() -> None:
    """Limit memory to MEMORY more bytes, and forbid opening files: code that escapes the sandbox can read nothing."""
    for template in ("{{ 'é' | tojson }}{{ strftime_now('%c') }}", "{{ a.b }}", "{{"):
        # makes Python open files that it loads lazily
        with contextlib.suppress(ValueError):
            _answer({"template": template, "calls": [{}]})
    if resource is None:
        return
    with contextlib.suppress(OSError, ValueError):  # no /proc, or there is a lower limit already
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


# ---- In the parent process


class _Child:
    """The process that runs untrusted templates, one request at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The child's answer. ValueError if the template failed or had to be stopped."""
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._start()
                answer = self._exchange({**request, "seconds": SECONDS}, PATIENCE)
            except BaseException:  # an interrupted exchange must not leave its answer to the next one
                self.stop()
                raise
            if answer is None:
                raise ValueError(f"the chat template was stopped: {self._how_it_ended()}")
            if answer.get("last"):
                self.stop()
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def stop(self) -> None:
        """End the child, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(OSError):  # of a request that was cut off
                process.stdin.close()

    def forget(self) -> None:
        """After a fork: the child belongs to the other process."""
        if self._process is not None:
            self._process.returncode = 0  # so this process does not wait for it
        self._lock, self._process = threading.Lock(), None

    def _start(self) -> None:
        self.stop()
        folders = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
        kept = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ")  # and no tokens
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        command = [sys.executable or "python", "-P", "-m", "minivlm.text.template_sandbox"]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**environment, "PYTHONPATH": os.pathsep.join(folders)},
            )
        except OSError as error:
            raise ValueError(f"the process for chat templates cannot be started: {error}") from error
        if self._exchange(None, START) is None:
            raise ValueError(f"the process for chat templates does not start: {' '.join(command)}")

    def _exchange(self, request: dict[str, Any] | None, seconds: float) -> dict[str, Any] | None:
        """Send a request and read a line; None if the child has ended or was killed after `seconds`."""
        process = self._process
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            if request is not None:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            line = process.stdout.readline()
            return json.loads(line) if line.endswith(b"\n") else None
        except OSError:  # the child has closed its pipe
            return None
        finally:
            timer.cancel()

    def _how_it_ended(self) -> str:
        process = self._process
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        ended = process.returncode
        self.stop()
        if ended is None or -ended in (getattr(signal, "SIGPROF", 0), getattr(signal, "SIGKILL", 0)):
            return f"it takes more than {SECONDS:g} seconds of processor time, or {PATIENCE:g} of any"
        return f"it makes the interpreter fail (exit code {ended})"


_CHILD = _Child()
atexit.register(_CHILD.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_CHILD.forget)

if __name__ == "__main__":
    _serve()
