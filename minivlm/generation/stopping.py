"""When a row ends: at an eos id, with a text, or by a rule of the caller's; and when all are cut, out of time.

R rows, S ids so far, prompt included. Each rule is called with the ids (R, S) after every new token; a row that has
ended stays ended. The loop itself counts tokens.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minivlm.generation.settings import GenerationConfig, check, is_number

Stop = Callable[[Tensor], Tensor | bool]  # ids (R, S) -> which rows end, (R,) bool, or one answer for all


def at_eos(ids: Tensor, eos: Tensor) -> Tensor:
    """The rows whose newest id is one of eos (E,)."""
    return torch.isin(ids[:, -1], eos)


def at_strings(ids: Tensor, strings: Sequence[str], decode: Callable[[list[int]], str]) -> Tensor:
    """The rows in which the newest token completes one of `strings`, be it that it goes on behind it.

    A string may begin in the prompt, and special tokens count as their text. Only as many tokens are decoded as can
    matter: each adds a byte at least.
    """
    window = max(len(string.encode()) for string in strings)
    rows = ids[:, -window - 4 :].tolist()
    return torch.tensor([_completes(row, strings, decode, window) for row in rows], device=ids.device)


def _completes(ids: list[int], strings: Sequence[str], decode: Callable[[list[int]], str], window: int) -> bool:
    for extra in (1, 2, 3, 4):  # 1: decoders drop a blank at the beginning; more, if it lies inside a character
        tail = ids[-window - extra :]
        text, before = decode(tail), decode(tail[:-1])
        unfinished = before.endswith("\ufffd")  # a part of a character, which the newest token may turn into a whole
        new = len(decode(tail[-1:])) if unfinished else len(text) - len(before)
        if any(string in text[max(0, len(text) - new - len(string) + 1) :] for string in strings):
            return True
        if "\ufffd" not in text:
            break
    return False


def stop_rules(
    settings: GenerationConfig,
    tokenizer: Any,
    criteria: Sequence[Callable[[Tensor, Any], Tensor | bool]],
    scores: list[Tensor] | None,
    device: Any,
) -> list[Stop]:
    """The rules that `settings` switches on.

    `criteria` are the caller's own, called as in the reference with the ids and a tuple of every step's scores, as far
    as the list `scores` keeps them (None: it does not). Raises ValueError for values that a rule cannot take.
    """
    rules: list[Stop] = []
    if settings.eos_ids:
        rules.append(partial(at_eos, eos=torch.tensor(settings.eos_ids, device=device)))
    if (strings := settings.stop_strings) is not None and strings != []:
        strings = [strings] if isinstance(strings, str) else strings
        fits = isinstance(strings, list | tuple) and all(isinstance(string, str) and string for string in strings)
        check("stop_strings", strings, fits, "a string or a list of strings, none of them empty")
        if not hasattr(tokenizer, "decode"):
            raise ValueError("stop_strings need the tokenizer to read the answer: pass tokenizer=processor.tokenizer")
        rules.append(partial(at_strings, strings=strings, decode=tokenizer.decode))
    return rules + [lambda ids, own=own: own(ids, None if scores is None else tuple(scores)) for own in criteria]


def deadline(settings: GenerationConfig) -> float:
    """When `max_time` is over, in seconds of `time.monotonic`, counted from now; infinity without a limit."""
    seconds = math.inf if settings.max_time is None else settings.max_time
    check("max_time", seconds, is_number(seconds) and seconds >= 0, "a number of seconds")
    return time.monotonic() + seconds


def finish_reasons(done: Tensor) -> list[str]:
    """For each row: "stop" if it is in `done` (R,), that is, ended by a rule; else "length": cut at a limit."""
    return ["stop" if ended else "length" for ended in done.tolist()]


def ended(rules: list[Stop], ids: Tensor) -> Tensor:
    """The rows of ids (R, S) that end by any of the rules, (R,) bool."""
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for rule in rules:
        done |= torch.as_tensor(rule(ids), device=ids.device)
    return done
