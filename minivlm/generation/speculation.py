"""Speculative decoding: several tokens in one decode step, if the next ones can be guessed.

    … the cat sat. the cat │ sat . the            the newest token, then guesses: what followed "the cat" before
                       └───┴─────────────► one forward pass ──► logits after "cat", "sat", ".", "the"
                                                 a guess that the loop also chooses needs no pass of its own

The loop chooses every token as usual, from the model's own logits, so the answer is the same as without guesses, except
if two tokens are equally likely within rounding: sums over several tokens round differently from sums over one.
arXiv 2211.17192 (a smaller model guesses), section 2.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minivlm.generation.settings import GenerationConfig, check
from minivlm.generation.steps import forward
from minivlm.modules.cache import KVCache
from minivlm.modules.config import text_config

Guess = Callable[[list[int]], list[int]]  # all ids so far → guesses of the next ones
LONGEST_MATCH = 2  # newest ids to look up if max_matching_ngram_size is not set


class SpeculativeStep:
    """A decode step for a cache of one row, with guesses.

        step = SpeculativeStep(model, cache, guess, prompt_ids, positions)
        logits = step(token)      # (1,) → (1, V) float32

    positions: (1, slots), of the tokens in the cache and all later ones. attention_mask: (1, slots), True = real token.
    The cache's `length` excludes guesses until the loop has chosen them, so the cache may be used at any time.
    """

    def __init__(
        self, model: Any, cache: KVCache, guess: Guess, ids: list[int], positions: Tensor, attention_mask: Tensor | None
    ) -> None:
        self.model, self.cache, self.guess, self.ids = model, cache, guess, list(ids)
        self.positions, self.mask = positions, attention_mask
        self.ahead: list[tuple[int, Tensor]] = []  # guesses already run, and the logits (V,) after each

    def __call__(self, token: Tensor, _: Any = None) -> Tensor:
        """Logits after one more token, at the next of `positions`."""
        newest, cache = int(token), self.cache
        self.ids.append(newest)
        if self.ahead and self.ahead[0][0] == newest:
            cache.advance(1)  # its keys and values are already there
            return self.ahead.pop(0)[1][None]
        length, room = cache.length, min(cache.slots, self.positions.shape[1]) - cache.length - 1
        guesses = self.guess(self.ids)[: max(room, 0)]
        first, *later = _run(self.model, cache, [newest, *guesses], self.positions, self.mask, 1 + len(guesses))
        cache.crop(length + 1)
        self.ahead = list(zip(guesses, later, strict=True))
        return first[None]


def _run(
    model: Any, cache: KVCache, ids: list[int], positions: Tensor, mask: Tensor | None, keep: int, **inputs: Any
) -> Tensor:
    """Run `ids` after those in the cache; returns the logits of the last `keep` of them, (keep, V) float32."""
    start, end = cache.length, cache.length + len(ids)
    new, mask = torch.tensor([ids], device=positions.device), None if mask is None else mask[:, :end]
    return forward(model, new, cache, mask, positions[:, start:end], keep, **inputs).logits[0].float()


# ---- Guesses ----


def guess_rule(
    model: Any,
    settings: GenerationConfig,
    assistant: Any,
    cache: KVCache | None,
    inputs: dict[str, Any],
    positions: Tensor,
    mask: Tensor | None,
) -> Guess | None:
    """The function that guesses tokens, if requested. ValueError if guesses cannot be used."""
    count = settings.prompt_lookup_num_tokens
    if assistant is None and count is None:
        return None
    name = "prompt_lookup_num_tokens" if assistant is None else "assistant_model"
    if len(positions) > 1 or settings.num_beams > 1:
        raise ValueError(f"{name} guesses for one row; pass one prompt, without beams and num_return_sequences")
    if cache is None or settings.output_attentions or settings.output_hidden_states:
        raise ValueError(f"{name} needs use_cache=True, and goes without output_attentions and output_hidden_states")
    check("assistant_model", assistant, assistant is None or hasattr(assistant, "new_cache"), "a model of minivlm")
    scaling = text_config(model.config).rope_scaling
    if scaling is not None and scaling.rope_type in ("dynamic", "longrope"):
        return lambda ids: []  # guesses would lengthen the text, and with it change the rotary frequencies
    if assistant is None:
        return partial(look_up, most=count, longest=settings.max_matching_ngram_size or LONGEST_MATCH)
    if text_config(assistant.config).vocab_size != text_config(model.config).vocab_size or "inputs_embeds" in inputs:
        raise ValueError("assistant_model needs a prompt of ids, and a model with the same vocabulary")
    return Assistant(assistant, settings, inputs, positions, mask)


def look_up(ids: list[int], most: int, longest: int) -> list[int]:
    """Up to `most` ids that followed the first earlier occurrence of the newest `longest` ids, or of fewer of them."""
    for n in range(min(longest, len(ids) - 1), 0, -1):
        newest = ids[-n:]
        for start in range(len(ids) - n):
            if ids[start : start + n] == newest:
                return ids[start + n : start + n + most]
    return []


class Assistant:
    """Guesses by a smaller model with the same vocabulary on the same device: its likeliest tokens, until unsure."""

    def __init__(
        self, model: Any, settings: GenerationConfig, inputs: dict[str, Any], positions: Tensor, mask: Tensor | None
    ) -> None:
        self.inputs, self.cache, self.known = inputs, model.new_cache(*positions.shape), []  # known: ids in the cache
        self.most, self.threshold = settings.num_assistant_tokens, settings.assistant_confidence_threshold
        self.logits = lambda ids, inputs: _run(model, self.cache, ids, positions, mask, 1, **inputs)[0]

    def __call__(self, ids: list[int]) -> list[int]:
        kept = min(alike(ids, self.known), len(ids) - 1)
        self.cache.crop(kept)
        guesses, new, inputs = [], ids[kept:], {} if kept else self.inputs  # images enter with the prompt
        for _ in range(min(self.most, self.cache.slots - len(ids))):
            probability, token = self.logits(new, inputs).softmax(-1).max(-1)
            guesses.append(int(token))
            if probability < self.threshold:
                break
            new, inputs = guesses[-1:], {}
        self.known = (ids + guesses)[: self.cache.length]
        return guesses


def alike(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of ids two texts share at their beginning, where the cache of one serves the other."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
