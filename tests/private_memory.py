"""The most private memory that a process holds while it does something; Linux tells it of each process.

VmHWM would count pages of mapped files too, which the system takes back when it needs them.
"""

import threading
import time
from pathlib import Path
from typing import Any


def held() -> int:
    """Bytes that belong to this process alone."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Watched:
    """`with Watched() as watched: …`: `before`, and `highest` so far, in bytes."""

    def __enter__(self) -> "Watched":
        self.before = self.highest = held()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.is_set():
            self.highest = max(self.highest, held())
            time.sleep(0.001)
