"""From scores to a token: the rules applied to scores, in order, and the random draw.

B rows, S ids so far, V vocabulary. Scores (B, V) are float32; forbidden tokens get -inf. The rules follow
transformers 5.23, including its oddities. Sampling rules keep at least `keep` tokens: 1, and with beams one more than
there are eos ids, so that not every candidate ends.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minivlm.generation.settings import GenerationConfig, check

Rule = Callable[[Tensor, Tensor], Tensor]  # (scores (B, V), ids (B, S)) -> scores (B, V)


def repetition_penalty(scores: Tensor, ids: Tensor, penalty: float, padding: Tensor | None = None) -> Tensor:
    """Penalise every id so far, prompt included: negative scores × penalty, others ÷ penalty.

    The first `padding` (B,) ids of a row are left pads and are ignored. CTRL (arXiv 1909.05858), section 4.1.
    """
    V = scores.shape[-1]
    if padding is not None:
        ids = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) < padding[:, None], V)
    return torch.where(_among(ids, V), torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def no_repeat_ngram(scores: Tensor, ids: Tensor, n: int) -> Tensor:
    """Ban every id that would repeat n consecutive ids from earlier, prompt and its pads included."""
    S, V = ids.shape[1], scores.shape[-1]
    if n > S:
        return scores
    grams = ids.unfold(1, n, 1)  # (B, S - n + 1, n)
    begun = (grams[..., :-1] == ids[:, None, S - n + 1 :]).all(-1)  # begins as the ids so far end
    return scores.masked_fill(_among(grams[..., -1].masked_fill(~begun, V), V), -torch.inf)


def _among(ids: Tensor, V: int) -> Tensor:
    """The tokens of V that occur in ids (B, S), (B, V) bool; ids ≥ V are ignored."""
    found = torch.zeros(len(ids), V + 1, dtype=torch.bool, device=ids.device)
    return found.scatter_(1, ids.clamp(max=V), True)[:, :V]


def ban_words(scores: Tensor, ids: Tensor, words: list[Tensor]) -> Tensor:
    """Ban each word's last id where the ids so far end with the ones before it; a word of one id is always banned."""
    banned = torch.zeros_like(scores, dtype=torch.bool)
    for word in words:
        start = word[:-1]  # (n - 1,)
        if len(start) <= ids.shape[1]:
            banned[:, word[-1]] |= (ids[:, ids.shape[1] - len(start) :] == start).all(1)
    return scores.masked_fill(banned, -torch.inf)


def ban_early_end(scores: Tensor, ids: Tensor, eos: Tensor, length: int) -> Tensor:
    """Ban the eos ids while there are fewer than `length` ids."""
    return scores.index_fill(1, eos, -torch.inf) if ids.shape[1] < length else scores


def allow_only(scores: Tensor, ids: Tensor, allowed: Callable[[int, Tensor], Sequence[int]], beams: int = 1) -> Tensor:
    """Ban all ids but allowed(prompt number, ids (S,)); `beams` rows belong to one prompt (arXiv 2010.00904).

    If all allowed tokens of all beams of a prompt have -inf, they get 0, as in the reference.
    """
    banned = torch.ones_like(scores, dtype=torch.bool)
    for row, row_ids in enumerate(ids):
        few = torch.as_tensor(allowed(row // beams, row_ids), dtype=torch.long, device=scores.device)
        if few.numel() == 0 or few.min() < 0 or few.max() >= scores.shape[-1]:
            raise ValueError(
                "prefix_allowed_tokens_fn should return some of the ids from 0 to "
                f"{scores.shape[-1] - 1}, found {few.tolist()!r:.80} for prompt {row // beams}"
            )
        banned[row, few] = False
    scores = scores.masked_fill(banned, -torch.inf)
    stuck = scores.amax(-1).isneginf().view(-1, beams).all(-1).repeat_interleave(beams)  # (B,)
    return scores.masked_fill(stuck[:, None] & ~banned, 0)


def remove_invalid(scores: Tensor) -> Tensor:
    """NaN becomes 0, and infinities the largest and smallest finite numbers."""
    return scores.nan_to_num(0.0)


def top_k(scores: Tensor, k: int, keep: int = 1) -> Tensor:
    """Keep the k highest scores, and whatever ties with the k-th."""
    return scores.masked_fill(scores < _highest(scores, max(k, keep)), -torch.inf)


def top_p(scores: Tensor, p: float, keep: int = 1) -> Tensor:
    """Keep the likeliest tokens that together reach p; a tail of mass ≤ 1 − p is removed (arXiv 1904.09751)."""
    ascending, order = scores.sort()
    tail = ascending.softmax(-1).cumsum(-1) <= 1 - p
    tail[:, -keep:] = False
    return scores.masked_fill(tail.scatter(1, order, tail), -torch.inf)


def min_p(scores: Tensor, p: float, keep: int = 1) -> Tensor:
    """Keep tokens at least p times as likely as the likeliest (arXiv 2407.01082)."""
    probabilities = scores.softmax(-1)
    unlikely = probabilities < p * probabilities.amax(-1, keepdim=True)
    best = probabilities.topk(min(keep, scores.shape[-1])).indices
    return scores.masked_fill(unlikely.scatter(1, best, False), -torch.inf)


def typical_p(scores: Tensor, p: float, keep: int = 1) -> Tensor:
    """Keep the tokens whose surprise −log p is nearest the mean surprise, until they reach p (arXiv 2202.00666)."""
    surprise = -scores.log_softmax(-1)
    mean = (surprise * (-surprise).exp()).nansum(-1, keepdim=True)  # a banned token: ∞ · 0
    distance, order = (surprise - mean).abs().sort()
    reached = scores.gather(1, order).softmax(-1).cumsum(-1)
    last = (reached < p).sum(1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    far = distance > distance.gather(1, last)
    far[:, :keep] = False
    return scores.masked_fill(far.scatter(1, order, far), -torch.inf)


def epsilon_cutoff(scores: Tensor, epsilon: float, keep: int = 1) -> Tensor:
    """Keep tokens with a probability of at least epsilon (arXiv 2210.15191)."""
    unlikely = scores.softmax(-1) < epsilon
    return scores.masked_fill(unlikely & (scores < _highest(scores, keep)), -torch.inf)


def eta_cutoff(scores: Tensor, epsilon: float, keep: int = 1) -> Tensor:
    """Keep tokens with p ≥ min(ε, √ε · exp(−entropy)), a lower threshold for flat distributions (arXiv 2210.15191)."""
    probabilities = scores.softmax(-1)
    entropy = torch.special.entr(probabilities).sum(-1, keepdim=True)
    unlikely = probabilities < (epsilon**0.5 * (-entropy).exp()).clamp(max=epsilon)
    return scores.masked_fill(unlikely & (scores < _highest(scores, keep)), -torch.inf)


def _highest(scores: Tensor, k: int) -> Tensor:
    """The k-th highest score of each row, (B, 1)."""
    return scores.topk(min(k, scores.shape[-1])).values[:, -1:]


def logits_rules(
    settings: GenerationConfig,
    vocab_size: int,
    padding: Tensor | None,
    device: Any,
    min_length: int = 0,
    processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = (),
    allowed: Callable[[int, Tensor], Sequence[int]] | None = None,
) -> list[Rule]:
    """The rules that `settings` enables, in the reference's order.

    padding: (B,) left pads of each row.  min_length: no row ends with fewer ids.  processors: the caller's rules,
    called with (ids, scores) as in the reference.  allowed: the reference's `prefix_allowed_tokens_fn`.
    ValueError for bad words outside the vocabulary.
    """
    check("prefix_allowed_tokens_fn", allowed, allowed is None or callable(allowed), "a function (prompt number, ids)")
    rules: list[Rule] = []
    if (penalty := settings.active("repetition_penalty")) is not None:
        rules.append(lambda scores, ids: repetition_penalty(scores, ids, penalty, padding))
    if (n := settings.active("no_repeat_ngram_size")) is not None:
        rules.append(lambda scores, ids: no_repeat_ngram(scores, ids, n))
    if settings.bad_words_ids is not None:
        words = [torch.tensor(word, device=device) for word in _bad_words(settings, vocab_size)]
        rules.append(lambda scores, ids: ban_words(scores, ids, words))
    if min_length and settings.eos_ids:
        eos = torch.tensor(settings.eos_ids, device=device)
        rules.append(lambda scores, ids: ban_early_end(scores, ids, eos, min_length))
    if allowed is not None:
        rules.append(lambda scores, ids: allow_only(scores, ids, allowed, settings.num_beams))
    if settings.remove_invalid_values:
        rules.append(lambda scores, ids: remove_invalid(scores))
    rules += [partial(_own_rule, processor=processor) for processor in processors]
    return rules + _sampling_rules(settings) if settings.do_sample else rules


def _own_rule(scores: Tensor, ids: Tensor, processor: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Call a rule of the caller's, whose arguments are in the other order, and check its result."""
    processed = processor(ids, scores)
    if not isinstance(processed, Tensor) or processed.shape != scores.shape:
        found = tuple(processed.shape) if isinstance(processed, Tensor) else processed
        raise ValueError(f"a logits_processor should return scores of shape {tuple(scores.shape)}, found {found!r:.80}")
    return processed


def _sampling_rules(settings: GenerationConfig) -> list[Rule]:
    rules: list[Rule] = []
    keep = 1 if settings.num_beams in (None, 1) else max(2, len(settings.eos_ids) + 1)
    if (temperature := settings.active("temperature")) is not None:
        rules.append(lambda scores, ids: scores / temperature)
    cuts = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
    cuts |= {"epsilon_cutoff": epsilon_cutoff, "eta_cutoff": eta_cutoff}
    for name, cut in cuts.items():
        if (value := settings.active(name)) is not None:
            rules.append(lambda scores, ids, cut=cut, value=value: cut(scores, value, keep))
    return rules


def _bad_words(settings: GenerationConfig, vocab_size: int) -> list[list[int]]:
    """The words, except single eos ids (banning these would keep rows from ending)."""
    if (highest := max(id for word in settings.bad_words_ids for id in word)) >= vocab_size:
        raise ValueError(f"bad_words_ids has the id {highest}, but the vocabulary has {vocab_size} tokens")
    return [list(word) for word in settings.bad_words_ids if not (len(word) == 1 and word[0] in settings.eos_ids)]


def sample(scores: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One id (B,) for each row of scores (B, V), with the probabilities softmax(scores)."""
    return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)
