"""From a conversation to the model's inputs, and one answer with its finish reason, token counts and times."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from minivlm.modules.inputs import Inputs

ERRORS = (ValueError, TypeError, OSError, MemoryError, torch.OutOfMemoryError)  # of one question, not of the program


@dataclass(frozen=True)
class Answer:
    """An answer with token counts and times.

    finish_reason: as `generate` gives it ("stop", "length" or "time"), or "interrupted" if the caller stopped it.
    limit: the most new tokens.  prompt_tokens: all of them.  cached_tokens: those kept from earlier turns.
    first_token: seconds until it came.
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
        """New tokens after the first, per second: the speed of decoding without the prefill."""
        elapsed = self.seconds - self.first_token
        return (self.new_tokens - 1) / elapsed if self.new_tokens > 1 and elapsed > 0 else 0.0

    def cut(self) -> str | None:
        """A sentence for the user if the answer did not end by itself."""
        sentences = {
            "length": f"the answer was cut at {self.limit} new tokens; --max-new-tokens allows more",
            "time": "the answer was cut by max_time",
            "interrupted": "stopped; the conversation keeps the answer so far",
        }
        return sentences.get(self.finish_reason)


def encoded(processor: Any, messages: list[Any], *, answered: bool = False, **options: Any) -> Inputs:
    """Conversations as the model's inputs, up to where an answer begins; with `answered`, as they are."""
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=not answered,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )


def setting_of(model: Any, settings: dict[str, Any], name: str) -> Any:
    """A setting of a call, else of its `generation_config`, else of the checkpoint."""
    configs = (settings.get("generation_config"), model.generation_config)
    found = [settings.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in found if value is not None), None)


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
