"""Rules that end a row: an eos id, a stop string, or a rule of the caller's. The loop itself counts tokens and time.

R rows, S ids so far, prompt included. Every rule is called after every new token, with the ids (R, S) and the scores of
all steps so far (None if they are not kept), as in the reference. A row that has ended stays ended.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minivlm.generation.settings import GenerationConfig

Stop = Callable[[Tensor, tuple[Tensor, ...] | None], Tensor | bool]  # → which rows end, (R,) bool, or one for all


def at_eos(ids: Tensor, eos: Tensor) -> Tensor:
    """The rows whose newest id is one of eos (E,)."""
    return torch.isin(ids[:, -1], eos)


def at_strings(ids: Tensor, strings: Sequence[str], decode: Callable[[list[int]], str]) -> Tensor:
    """The rows in which the newest token completes one of `strings`, even if the token continues past it.

    A string may begin in the prompt, and special tokens count as their text. Each token adds at least one byte, so it
    suffices to decode as many tokens as the longest string has bytes, and a few more.
    """
    window = max(len(string.encode()) for string in strings)
    rows = ids[:, -window - 4 :].tolist()
    return torch.tensor([_completes(row, strings, decode, window) for row in rows], device=ids.device)


def _completes(ids: list[int], strings: Sequence[str], decode: Callable[[list[int]], str], window: int) -> bool:
    for extra in (1, 2, 3, 4):  # 1: decoders drop a leading blank; more if the window begins inside a character
        tail = ids[-window - extra :]
        text, before = decode(tail), decode(tail[:-1])
        unfinished = before.endswith("\ufffd")  # part of a character, which the newest token may complete
        new = len(decode(tail[-1:])) if unfinished else len(text) - len(before)
        if any(string in text[max(0, len(text) - new - len(string) + 1) :] for string in strings):
            return True
        if "\ufffd" not in text:
            break
    return False


def stop_rules(settings: GenerationConfig, tokenizer: Any, criteria: Sequence[Stop], device: Any) -> list[Stop]:
    """The rules that `settings` enables, then the caller's own. ValueError for stop strings without tokenizer."""
    rules: list[Stop] = []
    if settings.eos_ids:
        eos = torch.tensor(settings.eos_ids, device=device)
        rules.append(lambda ids, scores: at_eos(ids, eos))
    if (strings := settings.active("stop_strings")) is not None:
        if not hasattr(tokenizer, "decode"):
            raise ValueError("stop_strings need a tokenizer to decode the answer: pass tokenizer=processor.tokenizer")
        strings = [strings] if isinstance(strings, str) else strings
        rules.append(lambda ids, scores: at_strings(ids, strings, tokenizer.decode))
    return [*rules, *criteria]


def ended(rules: Sequence[Stop], ids: Tensor, scores: tuple[Tensor, ...] | None = None) -> Tensor:
    """The rows of ids (R, S) that end by any of the rules, (R,) bool."""
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for rule in rules:
        done |= torch.as_tensor(rule(ids, scores), device=ids.device)
    return done


def finish_reasons(done: Tensor, limit: str) -> list[str]:
    """For each row: "stop" if a rule ended it, done (R,); else the `limit` that cut it, "length" or "time"."""
    return ["stop" if ended else limit for ended in done.tolist()]
