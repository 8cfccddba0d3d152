"""Rank classification: the likelihoods of given answers, instead of an answer that the model writes.

    prompt and images ──prefill, once──► cache      to run for each candidate
                                           ├─ blue           nothing: the prefill scores every first token
                                           ├─ red circle     red
                                           └─ red square     nothing: "red" is still in the cache

Candidates are scored one after another with one cache, sorted by ids: those with a common beginning are neighbours, and
the cache is cropped only to where two of them differ. A candidate's last token never has to run.

B prompts, P prompt ids, T tokens to run, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minivlm.generation.diagnosis import explain
from minivlm.generation.settings import are_words, plain
from minivlm.generation.speculation import alike
from minivlm.generation.steps import forward, positions
from minivlm.modules.cache import KVCache
from minivlm.modules.config import text_config


@torch.no_grad()
def rank(model: Any, inputs: dict[str, Any], candidates: Sequence[Sequence[int]], mean: bool = False) -> Tensor:
    """log P(candidate | prompt, images) of every candidate after every prompt: (B, candidates) float32.

    `inputs` are a processor's, with padding on the left. A candidate is a list of token ids, such as
    `tokenizer("red circle", add_special_tokens=False).input_ids`. Longer candidates are less likely: end all of them
    the same way (with the id that ends an answer), or compare the `mean` over each one's tokens.

        best = rank(model, processor(prompts), labels).argmax(1)      # (B,)

    Raises ValueError for candidates that are empty or are not ids, for prompts that are padded on the right or do not
    fit the model, and for scores that are not finite.
    """
    inputs = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask", None)
    candidates = _checked(candidates)
    mask = _room(model, ids, mask, max(map(len, candidates)) - 1)
    cache, real = model.new_cache(*mask.shape), mask[:, : ids.shape[1]]
    prefill = partial(forward, model, ids, mask=real, positions=positions(real), **inputs)
    first = prefill(cache).logits[:, -1].float()  # (B, V)
    if (highest := max(map(max, candidates))) >= first.shape[-1]:
        raise ValueError(f"a candidate has the id {highest}, but the vocabulary has {first.shape[-1]} tokens")
    scores = first.new_empty(len(ids), len(candidates))
    cached, after = [], [first.log_softmax(-1)]  # after[k] (B, V): log-probabilities after k cached tokens
    for index in sorted(range(len(candidates)), key=candidates.__getitem__):
        *begin, _ = candidate = candidates[index]
        kept = alike(begin, cached)
        cache.crop(ids.shape[1] + kept)
        after = after[: kept + 1] + _run(model, cache, begin[kept:], mask)
        cached = begin
        scores[:, index] = sum(after[k][:, token] for k, token in enumerate(candidate))
    if not scores.isfinite().all():
        raise ValueError(f"scores are not finite: {explain(model, inputs, prefill)}")
    lengths = torch.tensor([len(candidate) for candidate in candidates], device=scores.device)
    return scores / lengths if mean else scores


def _run(model: Any, cache: KVCache, tokens: list[int], mask: Tensor) -> list[Tensor]:
    """Run the same tokens (T) after every row of the cache; returns the log-probabilities (B, V) after each of them."""
    if not tokens:
        return []
    end = cache.length + len(tokens)
    ids = torch.tensor(tokens, device=mask.device).expand(len(mask), -1)  # (B, T)
    at = positions(mask[:, :end])[:, cache.length :]
    output = forward(model, ids, cache, mask[:, :end], at, keep=0)
    return list(output.logits.float().log_softmax(-1).unbind(1))


def _checked(candidates: Any) -> list[list[int]]:
    candidates = plain(candidates)
    if not are_words(candidates):
        raise ValueError(
            "candidates are lists of token ids, none of them empty, such as "
            f'tokenizer(["cat", "dog"], add_special_tokens=False).input_ids; found {candidates!r:.80}'
        )
    return [list(candidate) for candidate in candidates]


def _room(model: Any, ids: Tensor, mask: Tensor | None, tokens: int) -> Tensor:
    """The padding mask (B, P + tokens) bool, with room for `tokens` more. ValueError if they do not fit."""
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if not mask[:, -1].all():
        raise ValueError('a prompt ends in padding, where its candidates would begin; set padding_side="left"')
    limit = text_config(model.config).max_position_embeddings
    if (length := int(mask.sum(1).max()) + tokens) > limit:
        raise ValueError(f"prompt and longest candidate have {length} tokens, this model has positions for {limit}")
    return torch.cat([mask, mask.new_ones(len(mask), tokens)], 1)
