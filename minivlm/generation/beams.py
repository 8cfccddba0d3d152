"""Beam search and beam sampling: of every prompt several continuations are followed, the likeliest ones so far.

    scores (B·n, V) ──+ what each beam has──► C candidates a prompt ──► those that end ──► pool of the n best
                                                       └── the n best of the others: the beams of the next step

It knows neither models nor caches: `next_scores` gives the log-probabilities, `reorder` is told which beam took the
place of which. What ends, what enters the pool and when all is done follow transformers 5.23 to the last tie, so sums
and orders of candidates are those of the reference: a score that must not win gets −1e9, not −inf.

B prompts, n beams each, P prompt ids, N new tokens at most, V vocabulary, C candidates, R sequences returned.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minivlm.generation.settings import GenerationConfig
from minivlm.generation.stopping import Stop, ended

NEVER = -1e9


@dataclass
class Beams:
    """m continuations of each prompt."""

    tokens: Tensor  # (B, m, N): new tokens, filler behind them
    scores: Tensor  # (B, m): sums of log-probabilities; in the pool divided by length ** length_penalty
    sources: Tensor  # (B, m, N) int32: the row out of B·n in which each token was found, −1 behind them
    ends: Tensor  # (B, m) bool: whether the newest token ends it, by a rule or because it is the last
    done: Tensor  # (B, m) bool: whether a rule ends it

    def pick(self, index: Tensor) -> "Beams":
        """The continuations index (B, k) of each prompt."""
        row = torch.arange(len(index), device=index.device)[:, None]
        return Beams(*(part[row, index] for part in vars(self).values()))

    def beside(self, others: "Beams") -> "Beams":
        """Both, (B, m + k)."""
        pairs = zip(vars(self).values(), vars(others).values(), strict=True)
        return Beams(*(torch.cat(pair, 1) for pair in pairs))


def beam_search(
    next_scores: Callable[[int], Tensor],
    reorder: Callable[[Tensor], None],
    ids: Tensor,
    prompt: int,
    settings: GenerationConfig,
    stops: list[Stop],
    deadline: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Beams]:
    """Follow n = `settings.num_beams` beams: the best ids (B·R, P + M), best first, and the rest of their `Beams`.

    ids (B·n, P + N): every prompt n times, P = `prompt`; the beams' tokens are written behind. M is the longest
    answer; shorter ones are filled with the pad id (0 counts as none, as in the reference), or else the first eos id.
    next_scores(step): processed log-probabilities (B·n, V) after ids[:, : P + step]. reorder(rows): row i of all that
    these depend on, but for `ids`, becomes what row rows[i] was.
    """
    n, N = settings.num_beams, ids.shape[1] - prompt
    running, pool = _start(ids, prompt, settings)
    improvable = torch.ones(len(pool.scores), 1, dtype=torch.bool, device=ids.device)
    for step in range(N):
        scores = next_scores(step)
        candidates = _candidates(running, scores, step, settings, generator)
        candidates.done = _done(candidates, ids[::n, :prompt], step, stops)
        candidates.ends = candidates.done | (step + 1 == N) | (time.monotonic() > deadline)
        running = _next_beams(candidates, n)
        pool = _next_pool(pool, candidates, improvable, step, settings)
        improvable &= _may_improve(running, pool, step, N, settings)
        done = candidates.ends.all() | ~improvable.any()
        if done | (pool.ends.all() & (settings.early_stopping is True)):
            break
        reorder(running.sources[..., step].flatten())
        ids[:, prompt : prompt + step + 1] = running.tokens[..., : step + 1].flatten(0, 1)
    best = Beams(*(part[:, : settings.num_return_sequences].flatten(0, 1) for part in vars(pool).values()))
    longest = int((best.sources >= 0).sum(-1).max())
    best.sources = best.sources[:, :longest]
    prompts = ids[::n, :prompt].repeat_interleave(settings.num_return_sequences, 0)
    return torch.cat([prompts, best.tokens[:, :longest]], 1), best


def _start(ids: Tensor, prompt: int, settings: GenerationConfig) -> tuple[Beams, Beams]:
    """The beams before the first token, of which only the first counts, for they are all alike; an empty pool."""
    n, N = settings.num_beams, ids.shape[1] - prompt
    B = len(ids) // n
    tokens = ids.new_full((B, n, N), _filler(settings))
    sources = torch.full((B, n, N), -1, dtype=torch.int32, device=ids.device)
    scores = torch.full((B, n), NEVER, dtype=torch.float32, device=ids.device)
    none = torch.zeros(B, n, dtype=torch.bool, device=ids.device)
    first = scores.clone()
    first[:, 0] = 0
    return Beams(tokens, first, sources, none, none), Beams(tokens, scores, sources, none, none)


def _filler(settings: GenerationConfig) -> int:
    """What stands behind an answer: pad or the first eos. The reference tests `pad or …`, so a pad id of 0 is none.

    Without eos ids only stop strings and the like end a beam: then pad, or −1 if there is none (there always −1).
    """
    pad, eos = settings.pad_token_id, settings.eos_ids
    if eos:
        return pad or eos[0]
    return -1 if pad is None else pad


def _candidates(
    running: Beams, scores: Tensor, step: int, settings: GenerationConfig, generator: torch.Generator | None
) -> Beams:
    """The C best (or as many drawn) out of n·V beams that are one token longer: enough for n that do not end."""
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


def _done(candidates: Beams, prompts: Tensor, step: int, stops: list[Stop]) -> Tensor:
    """Which candidates a rule ends with their newest token, (B, C) bool."""
    B, C = candidates.scores.shape
    new = candidates.tokens[..., : step + 1].flatten(0, 1)
    return ended(stops, torch.cat([prompts.repeat_interleave(C, 0), new], 1)).view(B, C)


def _next_beams(candidates: Beams, n: int) -> Beams:
    """The n best candidates that do not end."""
    going = candidates.scores + candidates.ends.float() * NEVER
    best = going.topk(n).indices
    beams = candidates.pick(best)
    beams.scores = going.gather(1, best)
    return beams


def _next_pool(pool: Beams, candidates: Beams, improvable: Tensor, step: int, settings: GenerationConfig) -> Beams:
    """The n best of the pool and of those that have just ended, if they are among the first n candidates.

    A prompt that cannot improve (or, with early_stopping, has a full pool) takes in nothing more.
    """
    n, C = settings.num_beams, candidates.scores.shape[1]
    closed = pool.ends.all(1, keepdim=True) & (settings.early_stopping is True)
    ends = candidates.ends & (torch.arange(C, device=closed.device) < n)
    scores = candidates.scores / (step + 1) ** settings.length_penalty
    for excluded in (closed, ~improvable, ~ends):
        scores = scores + excluded.float() * NEVER
    both = pool.beside(Beams(candidates.tokens, scores, candidates.sources, ends, candidates.done))
    return both.pick(both.scores.topk(n).indices)


def _may_improve(running: Beams, pool: Beams, step: int, N: int, settings: GenerationConfig) -> Tensor:
    """Whether the best beam could still beat the worst of the pool, (B, 1) bool.

    A guess, since scores may grow with length: it takes the beam's length as it is, or as long as it may become for
    early_stopping="never" where the penalty favours length.
    """
    penalty = settings.length_penalty
    length = N if settings.early_stopping == "never" and penalty > 0 else step + 1
    hope = running.scores[:, :1] / length**penalty
    worst = torch.where(pool.ends, pool.scores.amin(1, keepdim=True), NEVER)  # (B, n): an empty place is worst of all
    return (hope > worst).any(1, keepdim=True)
