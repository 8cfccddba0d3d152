"""Beam search and beam sampling: several continuations of every prompt, the likeliest ones so far.

    scores (B·n, V) ──+ the sum of each beam──► C candidates a prompt ──► those that end ──► pool of the n best
                                                         └── the n best of the others: the beams of the next step

Ends, pool and stopping follow transformers 5.23 to the last tie, so sums and candidate order are those of the
reference: a score that must not win gets −1e9, not −inf.

B prompts, n beams each, P prompt ids, N new tokens at most, V vocabulary, C candidates, R sequences returned.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minivlm.generation.settings import GenerationConfig

NEVER = -1e9


@dataclass
class Beams:
    """m continuations of each prompt."""

    tokens: Tensor  # (B, m, N): new tokens, then filler
    scores: Tensor  # (B, m): sums of log-probabilities; in the pool divided by length ** length_penalty
    sources: Tensor  # (B, m, N) int32: the row out of B·n in which each token was found, then −1
    done: Tensor  # (B, m) bool: a rule has ended it
    ends: Tensor  # (B, m) bool: the newest token is its last: by a rule, or at a limit

    def pick(self, index: Tensor) -> "Beams":
        """The continuations index (B, k) of each prompt."""
        row = torch.arange(len(index), device=index.device)[:, None]
        return Beams(*(part[row, index] for part in vars(self).values()))

    def beside(self, others: "Beams") -> "Beams":
        """Both, (B, m + k)."""
        pairs = zip(vars(self).values(), vars(others).values(), strict=True)
        return Beams(*(torch.cat(pair, 1) for pair in pairs))


@torch.no_grad()
def beam_search(decoding: Any) -> tuple[Tensor, Beams]:
    """Follow n = `num_beams` beams: the best sequences (B·R, P + M), best first, and their `Beams`.

    decoding: a `loop.Decoding`, whose rows are the beams. M is the longest answer; shorter ones are filled with the pad
    id (0 counts as none, as in the reference), or else the first eos id.
    """
    settings, prompts = decoding.run.settings, decoding.run.ids[:: decoding.run.settings.num_beams]  # (B, P)
    running, pool = _start(len(prompts), decoding.run.new_tokens, settings, prompts.device)
    improvable = torch.ones(len(prompts), 1, dtype=torch.bool, device=prompts.device)
    for step in range(decoding.run.new_tokens):
        candidates = _candidates(running, decoding.next_scores(), step, settings, decoding.run.generator)
        candidates.done = decoding.ended(_sequences(prompts, candidates, step + 1)).view_as(candidates.done)
        candidates.ends = candidates.done | decoding.is_last_step()
        running = _next_beams(candidates, settings.num_beams)
        pool = _next_pool(pool, candidates, improvable, step, settings)
        improvable &= _may_improve(running, pool, step, decoding.run.new_tokens, settings)
        done = candidates.ends.all() | ~improvable.any()
        if done | (pool.ends.all() & (settings.early_stopping is True)):
            break
        decoding.append(running.tokens[..., step].flatten(), rows=running.sources[..., step].flatten())
    decoding.check_finite(decoding.count)
    best = pool.pick(torch.arange(settings.num_return_sequences, device=prompts.device).expand(len(prompts), -1))
    longest = int((best.sources >= 0).sum(-1).max())
    sequences = _sequences(prompts, best, longest)
    best = Beams(*(part.flatten(0, 1) for part in vars(best).values()))
    best.sources = best.sources[:, :longest]
    return sequences, best


def _sequences(prompts: Tensor, beams: Beams, length: int) -> Tensor:
    """Prompts (B, P) with the first `length` new tokens of their beams, (B·m, P + length)."""
    new = beams.tokens[..., :length].flatten(0, 1)
    return torch.cat([prompts.repeat_interleave(beams.tokens.shape[1], 0), new], 1)


def _start(B: int, N: int, settings: GenerationConfig, device: torch.device) -> tuple[Beams, Beams]:
    """The beams before the first token, of which only the first counts because all are equal; an empty pool."""
    n = settings.num_beams
    tokens = torch.full((B, n, N), _filler(settings), device=device)
    sources = torch.full((B, n, N), -1, dtype=torch.int32, device=device)
    scores = torch.full((B, n), NEVER, device=device)
    no = torch.zeros(B, n, dtype=torch.bool, device=device)
    first = scores.clone()
    first[:, 0] = 0
    return Beams(tokens, first, sources, no, no), Beams(tokens, scores, sources, no, no)


def _filler(settings: GenerationConfig) -> int:
    """The id after the end of an answer: pad or the first eos. The reference tests `pad or …`, so 0 is ignored.

    Without eos ids, where only other rules end a beam: pad, or −1 without one (the reference: −1).
    """
    pad, eos = settings.pad_token_id, settings.eos_ids
    if eos:
        return pad or eos[0]
    return -1 if pad is None else pad


def _candidates(
    running: Beams, scores: Tensor, step: int, settings: GenerationConfig, generator: torch.Generator | None
) -> Beams:
    """The C best (or C drawn) of the n·V beams one token longer: enough that n of them do not end."""
    B, n = running.scores.shape
    V = scores.shape[-1]
    C = min(max(2, 1 + len(settings.eos_ids)), V) * n
    sums = (scores.view(B, n, V) + running.scores[..., None]).flatten(1)  # (B, n·V)
    if not settings.do_sample:
        index = sums.topk(C).indices  # (B, C)
    else:
        index = torch.multinomial(sums.softmax(-1), C, generator=generator)  # in the order drawn
    beam = index // V
    candidates = running.pick(beam)
    candidates.scores = sums.gather(1, index)
    candidates.tokens[..., step] = index % V
    candidates.sources[..., step] = beam + n * torch.arange(B, device=beam.device)[:, None]
    return candidates


def _next_beams(candidates: Beams, n: int) -> Beams:
    """The n best candidates that do not end."""
    going = candidates.scores + candidates.ends.float() * NEVER
    best = going.topk(n).indices
    beams = candidates.pick(best)
    beams.scores = going.gather(1, best)
    return beams


def _next_pool(pool: Beams, candidates: Beams, improvable: Tensor, step: int, settings: GenerationConfig) -> Beams:
    """The n best of the pool and of those among the first n candidates that have just ended.

    The pool of a prompt that cannot improve (or, with early_stopping, is full) is closed.
    """
    n = settings.num_beams
    closed = pool.ends.all(1, keepdim=True) & (settings.early_stopping is True)
    ends = candidates.ends & (torch.arange(candidates.ends.shape[1], device=closed.device) < n)
    scores = candidates.scores / (step + 1) ** settings.length_penalty
    for excluded in (closed, ~improvable, ~ends):
        scores = scores + excluded.float() * NEVER
    both = pool.beside(replace(candidates, scores=scores, ends=ends))
    return both.pick(both.scores.topk(n).indices)


def _may_improve(running: Beams, pool: Beams, step: int, N: int, settings: GenerationConfig) -> Tensor:
    """Whether the best beam could still beat the worst of the pool, (B, 1) bool.

    A heuristic, since scores may grow with length: it uses the beam's current length, or the longest possible for
    early_stopping="never" if the penalty favours length.
    """
    penalty = settings.length_penalty
    length = N if settings.early_stopping == "never" and penalty > 0 else step + 1
    hope = running.scores[:, :1] / length**penalty
    worst = torch.where(pool.ends, pool.scores.amin(1, keepdim=True), NEVER)  # (B, n): an unfilled entry is the worst
    return (hope > worst).any(1, keepdim=True)
