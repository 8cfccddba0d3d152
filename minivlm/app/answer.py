"""One answer: its text, why it ended, what it took."""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minivlm.generation.settings import SETTINGS, GenerationConfig
from minivlm.generation.stopping import at_strings


@dataclass(frozen=True)
class Answer:
    """An answer and what it took.

    finish_reason: "stop", the model or a stop string ended it; "length", it was cut at `limit` new tokens; "time", it
    was cut by `max_time`; "interrupted", somebody stopped it.
    prompt_tokens: all of them.  cached_tokens: those kept from earlier turns.  first_token: seconds until it came.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int
    limit: int
    seconds: float
    first_token: float
    cached_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """New tokens after the first, per second: the speed of decoding, without reading the prompt."""
        elapsed = self.seconds - self.first_token
        return (self.new_tokens - 1) / elapsed if self.new_tokens > 1 and elapsed > 0 else 0.0

    def cut(self) -> str | None:
        """A sentence for the person who reads it, if it did not end by itself."""
        sentences = {
            "length": f"the answer was cut at {self.limit} new tokens; --max-new-tokens allows more",
            "time": "the answer was cut by max_time",
            "interrupted": "stopped; the conversation keeps what there is of the answer",
        }
        return sentences.get(self.finish_reason)


def finish_reason(
    prompt: Sequence[int],
    new: Sequence[int],
    limit: int,
    settings: GenerationConfig,
    decode: Callable[[list[int]], str] | None,
) -> tuple[str, int]:
    """Why a row ended, and how many of its new ids are its answer: what follows is filler.

    limit: the most new tokens it could have.  settings: with the checkpoint's own.  decode: reads `stop_strings`.
    """
    end = next((n for n, id in enumerate(new, 1) if id in settings.eos_ids), None)
    if end is not None:
        return "stop", end
    end = len(new)
    if settings.pad_token_id is not None and settings.eos_ids:
        while end and new[end - 1] == settings.pad_token_id:
            end -= 1
    strings = settings.stop_strings
    if strings and decode is not None:
        strings = [strings] if isinstance(strings, str) else strings
        # without eos ids, a row goes on after its stop string until all rows of the batch have ended
        for n in [end] if settings.eos_ids else range(1, end + 1):
            if at_strings(torch.tensor([[*prompt, *new[:n]]]), strings, decode):
                return "stop", n
    if end >= limit:
        return "length", end
    return ("stop" if settings.max_time is None else "time"), end


def settings_over(model: Any, settings: dict[str, Any]) -> GenerationConfig:
    """The settings of a call over those of the checkpoint; what is no setting (seed, tokenizer, …) is left out."""
    config = settings.get("generation_config") or GenerationConfig()
    given = {name: value for name, value in settings.items() if name in SETTINGS}
    return GenerationConfig(**given).over(config.over(model.generation_config))


def peak_memory(device: Any) -> int | None:
    """The most bytes in use so far: torch's on a GPU, else the whole process's; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):  # Windows has no `resource`
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    return None


class Clock:
    """A streamer for `generate` that notes when the first token came."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.first: float | None = None  # seconds
        self._puts = 0

    def put(self, _: Any) -> None:
        self._puts += 1
        if self._puts == 2:  # the first is the prompt
            self.first = time.perf_counter() - self.begin

    def end(self) -> None:
        pass
