"""Hostile cases run in a child process that may be killed: a limit on time and memory for each, one child for many.

    outcome = Child().run(function, argument)      # ("returned", value), ("raised", "ValueError: …") or ("died", why)

The child is forked, so it knows the test modules, and what it imported costs nothing; after a death there is a new one.
"""

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from typing import Any

SECONDS = 8  # of CPU; ten times as much may pass
CLOCKS = (signal.SIGPROF, signal.SIGALRM)  # of CPU time, of all time
MEMORY = 2**30  # bytes above what the process has when it is forked


class Child:
    """A forked process that calls functions of a test module. `seconds` and `memory` are for each call."""

    def __init__(self, seconds: int = SECONDS, memory: int = MEMORY) -> None:
        self.seconds, self.memory = seconds, memory
        self._process: Any = None

    def run(self, function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
        """How the call ended. Its result, and `arguments`, must be small enough to be pickled."""
        if self._process is None:
            self._start()
        self._pipe.send((function, arguments))
        try:
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            code, self._process = self._process.exitcode, None
            return "died", f"took longer than {self.seconds} s" if -code in CLOCKS else f"exit code {code}"

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=self._serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def _serve(self, pipe: Any) -> None:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + self.memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for sign in CLOCKS:
            signal.signal(sign, signal.SIG_DFL)  # it ends the process, whatever that is doing
        while True:
            function, arguments = pipe.recv()
            signal.setitimer(signal.ITIMER_PROF, self.seconds)
            signal.setitimer(signal.ITIMER_REAL, 10 * self.seconds)
            try:
                outcome = "returned", function(*arguments)
            except BaseException as error:
                outcome = "raised", f"{type(error).__name__}: {error}"
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(outcome)
