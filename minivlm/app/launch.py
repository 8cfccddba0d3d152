"""`--gpus N`: one verb on N processes, each of which holds a share of the model (`minivlm.parallel`).

`minivlm ask … --gpus 2` starts itself again under `torch.distributed.run --standalone`. All processes then run the same
verb in step. The first one alone reads stdin, fetches URLs and prints; what it reads is handed to the others, so that
all of them run the same prompt. If one fails, its error is printed and torchrun ends the others.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from minivlm.app import terminal

MARK = "MINIVLM_GPUS"  # set in the processes that `start` has started
PATIENCE = timedelta(days=7)  # for a person to type the next line


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="cut the model among N GPUs (or processes)")


def wanted(arguments: argparse.Namespace) -> bool:
    """Whether this process should start N others; those see that they were started."""
    return getattr(arguments, "gpus", 1) > 1 and MARK not in os.environ


def start(count: int, argv: list[str]) -> int:
    """Run `minivlm argv` on `count` processes; the exit code of the first that failed, else 0."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment = {**os.environ, **quiet, MARK: str(count)}
    with subprocess.Popen([*command, "-m", "minivlm", *argv], env=environment, stderr=subprocess.PIPE) as process:
        try:
            for line in process.stderr:  # torchrun tells at length what the failed process has told in one line
                if not line.startswith((b"[", b"W", b"E", b"Traceback", b" ", b"-", b"=", b"\n", b"torch.")):
                    sys.stderr.buffer.write(line)
                    sys.stderr.buffer.flush()
        except KeyboardInterrupt:
            process.terminate()
            return 130
    return 1 if process.returncode else 0


def join() -> None:
    """In a started process: meet the others; all but the first print nothing and read what the first reads."""
    if MARK not in os.environ:
        return
    import torch.distributed as dist

    from minivlm import parallel

    rank, _ = parallel.start()
    group = dist.new_group(timeout=PATIENCE, backend="gloo")
    if rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.stdin = _SharedLines(sys.stdin, group, rank)


class _SharedLines:
    """stdin of the first process, for all: each line that it reads goes to everybody."""

    def __init__(self, source: Any, group: Any, rank: int) -> None:
        self.source, self.group, self.rank = source, group, rank

    def isatty(self) -> bool:
        return self.rank == 0 and self.source.isatty()

    def readline(self) -> str:
        return shared(self.source.readline, self.group)

    def read(self) -> str:
        return shared(self.source.read, self.group)

    def __iter__(self) -> Iterator[str]:
        return iter(self.readline, "")


def shared(make: Any, group: Any = None) -> Any:
    """What the first process makes, on all of them. If it raises, all do."""
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


def fail(error: Exception) -> int:
    """Print an error once: the others wait a moment, in which the first one's error ends them if it is the same."""
    if int(os.environ.get("RANK", 0)) and MARK in os.environ:
        time.sleep(1)
        return terminal.fail(f"process {os.environ['RANK']}: {error}")
    return terminal.fail(error)
