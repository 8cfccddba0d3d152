"""From scores to a token: the rules that scores go through, in their order, and the draw.

B rows, S ids so far, V vocabulary. Scores (B, V) are float32; a token that may not come gets -inf. The rules follow
transformers 5.23, including its oddities.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minivlm.generation_config import GenerationConfig

Rule = Callable[[Tensor, Tensor], Tensor]  # (scores (B, V), ids (B, S)) -> scores (B, V)


def repetition_penalty(scores: Tensor, ids: Tensor, penalty: float, padding: Tensor | None = None) -> Tensor:
    """Make every id seen so far, prompt included, less likely: negative scores × penalty, others ÷ penalty.

    The first `padding` (B,) ids of a row are left pads and do not count. CTRL (arXiv 1909.05858), section 4.1.
    """
    V = scores.shape[-1]
    ids = ids.clamp(max=V)  # column V stands for "no token"
    if padding is not None:
        ids = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) < padding[:, None], V)
    seen = torch.zeros(len(scores), V + 1, dtype=torch.bool, device=scores.device).scatter_(1, ids, True)[:, :V]
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def ban_words(scores: Tensor, ids: Tensor, words: list[Tensor]) -> Tensor:
    """Ban each word's last id where the ids so far end with the ones before it; a word of one id is always banned."""
    banned = torch.zeros_like(scores, dtype=torch.bool)
    for word in words:
        start = word[:-1]  # (n - 1,)
        if len(start) <= ids.shape[1]:
            banned[:, word[-1]] |= (ids[:, ids.shape[1] - len(start) :] == start).all(1)
    return scores.masked_fill(banned, -torch.inf)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Keep the k highest scores, and whatever ties with the k-th."""
    return scores.masked_fill(scores < scores.topk(min(k, scores.shape[-1])).values[:, -1:], -torch.inf)


def top_p(scores: Tensor, p: float) -> Tensor:
    """Keep the likeliest tokens that reach p together, at least one: a tail of mass ≤ 1 − p goes (arXiv 1904.09751)."""
    ascending, order = scores.sort()
    tail = ascending.softmax(-1).cumsum(-1) <= 1 - p
    tail[:, -1] = False
    return scores.masked_fill(tail.scatter(1, order, tail), -torch.inf)


def min_p(scores: Tensor, p: float) -> Tensor:
    """Keep tokens at least p times as likely as the likeliest (arXiv 2407.01082)."""
    probabilities = scores.softmax(-1)
    return scores.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def logits_rules(settings: GenerationConfig, vocab_size: int, padding: Tensor | None, device: Any) -> list[Rule]:
    """The rules that `settings` switches on, in the order in which the reference applies them.

    `padding` (B,) counts each row's left pads. Raises ValueError for a value that a rule cannot take.
    """
    rules: list[Rule] = []
    if (penalty := settings.repetition_penalty) not in (None, 1):
        check("repetition_penalty", penalty, isinstance(penalty, float) and penalty > 0, "a float > 0, such as 1.2")
        rules.append(lambda scores, ids: repetition_penalty(scores, ids, penalty, padding))
    if settings.bad_words_ids is not None:
        words = [torch.tensor(word, device=device) for word in _bad_words(settings, vocab_size)]
        rules.append(lambda scores, ids: ban_words(scores, ids, words))
    if not settings.do_sample:
        return rules
    if (temperature := settings.temperature) not in (None, 1):
        fits = isinstance(temperature, float) and temperature > 0
        check("temperature", temperature, fits, "a float > 0 (for greedy search, pass do_sample=False)")
        rules.append(lambda scores, ids: scores / temperature)
    if (k := settings.top_k) not in (None, 0):
        check("top_k", k, isinstance(k, int) and k > 0, "an integer > 0, or 0 to switch it off")
        rules.append(lambda scores, ids: top_k(scores, k))
    if (p := settings.top_p) is not None and p != 1:
        check("top_p", p, 0 <= p < 1, "between 0 and 1")
        rules.append(lambda scores, ids: top_p(scores, p))
    if (floor := settings.min_p) is not None:
        check("min_p", floor, 0 <= floor <= 1, "between 0 and 1")
        rules.append(lambda scores, ids: min_p(scores, floor))
    return rules


def check(name: str, value: Any, fits: bool, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name} should be {expected}, found {value!r}")


def _bad_words(settings: GenerationConfig, vocab_size: int) -> list[list[int]]:
    """The checked words, without those that are just an eos id (which would never let a row end)."""
    words = settings.bad_words_ids
    lists = isinstance(words, list | tuple) and len(words) > 0 and all(isinstance(word, list | tuple) for word in words)
    ids = [id for word in words for id in word] if lists else []
    fits = lists and all(words) and all(isinstance(id, int) and id >= 0 for id in ids)
    check("bad_words_ids", words, fits, "a list of words, each a list of token ids, such as [[32000], [5, 7]]")
    if max(ids) >= vocab_size:
        raise ValueError(f"bad_words_ids has the id {max(ids)}, but the vocabulary has {vocab_size} tokens")
    return [list(word) for word in words if not (len(word) == 1 and word[0] in settings.eos_ids)]


def sample(scores: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One id (B,) for each row of scores (B, V), with the probabilities softmax(scores)."""
    return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)
