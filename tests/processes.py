"""Other processes for tests. None is left when a test ends.

    run(code, "a", "b")        what `python -c code a b` does, without the seconds that importing torch takes
    together(script, folder, 2)  a script in two processes that torch.distributed joins

Both are forked from one process that has imported torch and minivlm and done nothing else: no thread, no tensor. A
forked program has an environment, streams and an end of its own, and the interpreter ends it as any other.
What depends on how the interpreter starts (the locale, what is not installed, memory) needs a `subprocess`.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MINIVLM = "import sys; from minivlm.app import cli; sys.exit(cli.main(sys.argv[1:]))"  # what `minivlm …` does
FORKS = sys.platform == "linux"  # elsewhere libraries of the system do not survive it


class Program:
    """A running program, with the part of subprocess.Popen that tests use; for Linux. Streams are descriptors."""

    def __init__(
        self,
        code: str,
        *argv: str,
        stdin: int = 0,
        stdout: int = 1,
        stderr: int = 2,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> None:
        self.returncode: int | None = None
        request = {"code": code, "argv": argv, "env": dict(env or os.environ), "cwd": str(cwd or Path.cwd())}
        self._report, theirs = os.pipe()
        socket.send_fds(_server(), [json.dumps(request).encode()], [stdin, stdout, stderr, theirs])
        os.close(theirs)
        self.pid = self._number()

    def _number(self) -> int:
        return int.from_bytes(os.read(self._report, 4), "little", signed=True)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; -N after signal N."""
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked program", timeout or 0)
            self.returncode = self._number()
            os.close(self._report)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To all that it has started, too."""
        if self.returncode is None:
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """End it and what it has started."""
        self.send_signal(signal.SIGKILL)


def start(code: str, *argv: str, **options: Any) -> Any:
    """A running program; where none can be forked, a subprocess.Popen."""
    if FORKS:
        return Program(code, *argv, **options)
    return subprocess.Popen([sys.executable, "-c", code, *argv], start_new_session=True, **options)


def run(
    code: str, *argv: str, input: str = "", timeout: float = 300, check: bool = False, **options: Any
) -> subprocess.CompletedProcess:
    """As subprocess.run, of `python -c code argv…`, with what it wrote as text. options: env, cwd."""
    if not FORKS:
        command = [sys.executable, "-c", code, *argv]
        return subprocess.run(
            command, input=input, timeout=timeout, check=check, capture_output=True, text=True, **options
        )
    (given, writes), *pipes = os.pipe(), os.pipe(), os.pipe()
    program = Program(code, *argv, stdin=given, stdout=pipes[0][1], stderr=pipes[1][1], **options)
    for descriptor in (given, pipes[0][1], pipes[1][1]):
        os.close(descriptor)
    with ThreadPoolExecutor(3) as pool:
        pool.submit(_write, writes, input)
        out, err = (pool.submit(_text, reads) for reads, _ in pipes)
        try:
            status = program.wait(timeout)
        finally:
            program.kill()
    done = subprocess.CompletedProcess(["python", "-c", code, *argv], status, out.result(), err.result())
    if check:
        done.check_returncode()
    return done


def _write(descriptor: int, text: str) -> None:
    with contextlib.suppress(BrokenPipeError), open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def _text(descriptor: int) -> str:
    with open(descriptor, encoding="utf-8") as file:
        return file.read()


def together(script: Path, folder: Path, size: int, limit: float) -> str:
    """What `script FOLDER` printed in `size` processes that meet as under torchrun: its `main` runs in each."""
    paths = [ROOT, ROOT / "kernels", ROOT / "tests", script.parent]
    code = (
        f"import sys; sys.path[:0] = {list(map(str, paths))}\nimport processes; processes.fork({str(script)!r}, {size})"
    )
    done = run(code, str(folder), timeout=limit)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def fork(script: str, size: int) -> None:
    """Import a script once and run its `main` in `size` processes, in an environment as torchrun makes it."""
    import torch.distributed as dist

    main = runpy.run_path(script)["main"]
    reads, writes = os.pipe()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # the processes meet in the store of this one
    for rank in range(size):
        if os.fork() == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": os.read(reads, 5).decode()}
            return main()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # its threads survive no fork
    os.write(writes, f"{store.port:05}".encode() * size)
    for _ in range(size):
        _, status = os.wait()
        if status:
            os.killpg(0, signal.SIGKILL)


def torchrun(script: Path, folder: Path, size: int, limit: float, **environment: str) -> str:
    """What `script FOLDER` printed in `size` processes; however they end, none is left. One thread each, the project's
    packages and the tests' own modules in reach."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests", script.parent)))
    process = subprocess.Popen(
        [*command, str(script), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-3000:]
    return output


# ---- The process that others are forked from


_lock = threading.Lock()


def _server() -> socket.socket:
    with _lock:
        return _start()


@functools.cache
def _start() -> socket.socket:
    """The socket on which it takes requests: one for each pytest process, started when it is first needed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, str(theirs.fileno())],
        env=environment | {"OMP_NUM_THREADS": "1"},
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
    )
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


def _serve(requests: socket.socket) -> str:
    """Forks for every request, until there can be none. Returns in each new process alone, with its program."""
    import minivlm
    from minivlm.app import batch, cli  # noqa: F401

    for name in minivlm.__all__:
        getattr(minivlm, name)
    assert not {"huggingface_hub", "triton"} & set(sys.modules), "they read the environment when they are imported"
    assert "transformers" not in sys.modules
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.freeze()  # else every fork would visit all of it
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 2**18, 4)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            break
        for descriptor in descriptors:
            os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    requests.close()
    *streams, report = descriptors
    if pid := os.fork():  # this process waits for the program and reports how it ended
        for stream in streams:
            os.close(stream)
        os.write(report, pid.to_bytes(4, "little"))
        _, status = os.waitpid(pid, 0)
        os.write(report, os.waitstatus_to_exitcode(status).to_bytes(4, "little", signed=True))
        os._exit(0)
    os.close(report)
    return _become(json.loads(message), streams)


def _become(request: dict[str, Any], streams: Sequence[int]) -> str:
    """Gives this process its streams, environment, folder and arguments; its program."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = ["-c", *request["argv"]]
    sys.path.insert(0, "")
    return request["code"]


if __name__ == "__main__":
    exec(_serve(socket.socket(fileno=int(sys.argv[1]))), {"__name__": "__main__"})
