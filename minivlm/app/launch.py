"""`--gpus N`: one verb on N processes, each of which holds a share of the model (`minivlm.devices.parallel`).

`minivlm ask … --gpus 2` starts itself again under `torch.distributed.run --standalone`. All processes then run the same
verb in step. The first one alone reads stdin, fetches URLs, writes files and prints; what it reads is handed to the
others. If one process fails, its error is printed and torchrun ends the others; Ctrl-C ends all.
"""

import argparse
import atexit
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

MARK = "MINIVLM_GPUS"  # set in the processes that `start` has started
PATIENCE = timedelta(days=7)  # for a person to type the next line


def add_option(group: Any) -> None:
    text = "cut the model among N GPUs, one process each (on a CPU: N processes)"
    group.add_argument("--gpus", type=int, default=1, metavar="N", help=text)


def wanted(arguments: argparse.Namespace) -> bool:
    """Whether to start N processes: `--gpus` asks for them, and this is not one of them."""
    return arguments.gpus > 1 and MARK not in os.environ


def start(count: int, argv: list[str]) -> int:
    """Run `minivlm argv` on `count` processes; 1 if one of them failed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), MARK: str(count)}
    with subprocess.Popen([*command, "-m", "minivlm", *argv], env=environment, stderr=subprocess.PIPE) as process:
        try:
            for line in process.stderr:  # torchrun repeats at length what the failed process printed in one line
                if line.startswith(b"minivlm:"):
                    sys.stderr.buffer.write(line)
                    sys.stderr.buffer.flush()
        except KeyboardInterrupt:
            process.wait()
            return 130
    return 1 if process.returncode else 0


def join(arguments: argparse.Namespace) -> None:
    """In a started process: meet the others; all but the first print nothing and read what the first reads."""
    if MARK not in os.environ:
        return
    import torch.distributed as dist

    from minivlm.devices import parallel
    from minivlm.processing import images

    rank, _ = parallel.start()
    group = dist.new_group(timeout=PATIENCE, backend="gloo")
    fetch = images.fetch
    images.fetch = lambda *given, **more: shared(lambda: fetch(*given, **more))
    sys.stdin = _SharedInput(sys.stdin, group)
    if rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.stderr = io.StringIO()  # notes are the first one's; errors: see `leave`
    if getattr(arguments, "out", None) is not None and str(arguments.out) != "-":
        arguments.out = _own_copy(arguments.out, rank)


def leave() -> None:
    """Called before a started process prints its error. Only the first one's is of use: the others' are usually the
    same or follow from it, so they wait, and torchrun ends them meanwhile."""
    if MARK in os.environ and int(os.environ.get("RANK", 0)):
        time.sleep(10)
        sys.stderr = sys.__stderr__


def part() -> None:
    """Called before a started process ends well: wait for the others, who may still be reading what this one sent."""
    if MARK not in os.environ:
        return
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()


def _own_copy(out: Path, rank: int) -> Path:
    """Where a process writes its answers: the first one to `out`; the others, which continue from the same state, to a
    temporary folder."""
    part = out.with_name(out.name + ".part")
    begun = shared(lambda: part.read_bytes() if part.exists() else None)
    if not rank:
        return out
    folder = tempfile.mkdtemp(prefix="minivlm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    mine = Path(folder) / out.name
    if begun is not None:
        mine.with_name(part.name).write_bytes(begun)
    return mine


class _SharedInput(io.TextIOBase):
    """stdin of the first process, for all: what it reads goes to everybody."""

    def __init__(self, source: Any, group: Any) -> None:
        self._source, self._group = source, group

    def isatty(self) -> bool:
        return shared(self._source.isatty)

    def readline(self, *_: Any) -> str:
        return shared(self._source.readline, self._group)

    def read(self, *_: Any) -> str:
        return shared(self._source.read, self._group)

    @property
    def buffer(self) -> io.BytesIO:
        return io.BytesIO(shared(self._source.buffer.read, self._group))


def shared(make: Any, group: Any = None) -> Any:
    """The result of `make`, called in the first process alone, in all of them. If it raises there, all raise."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return make()
    found: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            found[0] = make()
        except Exception as error:
            found[1] = error
    dist.broadcast_object_list(found, group=group, group_src=0)
    if found[1] is not None:
        raise found[1]
    return found[0]
