"""What a call of `generate` asks for, checked before any work: prompt, padding, limits, settings, room in the cache.

B rows, n copies of each, P prompt ids, K prompt keys (P, or the length of `inputs_embeds`), N new tokens.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minivlm.generation.sampling import Rule, logits_rules
from minivlm.generation.settings import GenerationConfig, check, is_whole, settings_of, vocab_size
from minivlm.generation.stopping import Stop, deadline, stop_rules
from minivlm.modules.cache import KVCache
from minivlm.modules.config import text_config

NEW_TOKENS = 20  # when neither max_new_tokens nor max_length is set anywhere


@dataclass
class Run:
    """A checked request: everything the loop needs, on the model's device, with room for N new tokens."""

    settings: GenerationConfig
    copies: int  # n
    ids: Tensor  # (B·n, P + N): the prompt, then what has been generated
    prompt: int  # P
    keys: int  # K
    mask: Tensor | None  # (B·n, K + N) bool, True = real; None if the prompt has no pads
    positions: Tensor  # (B·n, K + N)
    finite: Tensor  # (B·n,) bool: all logits of the row have been finite so far
    done: Tensor  # (B·n,) bool: the row has ended by one of `stops`
    inputs: dict[str, Any]  # images and the like of the B rows, for the prefill
    cache: KVCache | None  # of B rows until the prompt is in it, then of B·n; None: every step recomputes everything
    rules: list[Rule]
    stops: list[Stop]
    deadline: float  # in `time.monotonic` seconds; the token that passes it is the last
    generator: torch.Generator | None
    scores: list[Tensor] | None  # of every step, if they are asked for
    logits: list[Tensor] | None
    captured: Any = None  # on CUDA, from the second new token on: the decode step as a graph


def positions(mask: Tensor) -> Tensor:
    """Rotary positions (B, S) of a padding mask (B, S): real tokens count from 0, pads before them are 0."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def prepare(
    model: Any,
    input_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    tokenizer: Any = None,
    logits_processor: list[Callable] | None = None,
    stopping_criteria: list[Callable] | None = None,
    **kwargs: Any,
) -> Run:
    """Check the arguments of `generation.generate`, and make what its loop needs. Errors as described there."""
    settings, inputs = settings_of(model, generation_config, kwargs)
    device = next(model.parameters()).device
    for name, value in inputs.items():
        fits = not value.is_meta if isinstance(value, Tensor) else not hasattr(value, "__array__")
        check(name, value, fits, 'a tensor with numbers; processors make them with return_tensors="pt"')
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    cache, embeds = inputs.pop("past_key_values", None), inputs.get("inputs_embeds")
    ids = _prompt(settings, input_ids, inputs, vocab_size(model)).to(device, torch.long)
    (B, P), n = ids.shape, settings.copies
    K = P if embeds is None else embeds.shape[1]
    mask = _mask(settings, attention_mask, ids, K).to(device)
    place = inputs.pop("position_ids", None)
    place = positions(mask) if place is None else place.expand(B, -1)
    N = _new_tokens(settings, K, int(place.max()) + 1, text_config(model.config).max_position_embeddings)
    if settings.eos_ids and B * n > 1:  # rows that have ended go on with pads
        pad, V = settings.pad_token_id, vocab_size(model)
        check("pad_token_id", pad, is_whole(pad) and pad < V, f"one of the {V} tokens of the vocabulary")
    cache = _cache(model, settings, cache, B, K, K + N if n == 1 else K, embeds is not None)
    ids, mask, place = (each.repeat_interleave(n, 0) for each in (ids, mask, place))
    after = place[:, -1:] + 1 + torch.arange(N, device=device)  # (B·n, N)
    padding, least = _padding(mask, embeds), _least_new_tokens(settings, K, N)
    own_rules = _functions("logits_processor", logits_processor)
    own_stops = _functions("stopping_criteria", stopping_criteria)
    scores = [] if settings.return_dict_in_generate and settings.output_scores else None
    return Run(
        settings=settings,
        copies=n,
        ids=torch.cat([ids, ids.new_zeros(len(ids), N)], 1),
        prompt=P,
        keys=K,
        mask=None if mask.all() else torch.cat([mask, mask.new_ones(len(ids), N)], 1),
        positions=torch.cat([place, after], 1),
        finite=torch.ones(len(ids), dtype=torch.bool, device=device),
        done=torch.zeros(len(ids), dtype=torch.bool, device=device),
        inputs=inputs,
        cache=cache,
        rules=logits_rules(settings, vocab_size(model), padding, device, least and P + least, own_rules),
        stops=stop_rules(settings, tokenizer, own_stops, scores, device),
        deadline=deadline(settings),
        generator=_generator(generator, seed, device),
        scores=scores,
        logits=[] if settings.return_dict_in_generate and settings.output_logits else None,
    )


def _prompt(settings: GenerationConfig, ids: Tensor | None, inputs: dict[str, Any], vocab_size: int) -> Tensor:
    """The prompt's ids (B, P): as given, or none beside `inputs_embeds`, or just bos."""
    if ids is None:
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        B = len(tensors[0]) if tensors else 1
        if "inputs_embeds" in inputs:
            return torch.zeros(len(inputs["inputs_embeds"]), 0, dtype=torch.long)
        if (bos := settings.bos_token_id) is None:
            raise ValueError("nothing to continue: pass input_ids, inputs_embeds, or bos_token_id to start from")
        fits = is_whole(bos) and bos < vocab_size
        check("bos_token_id", bos, fits, f"one of the {vocab_size} tokens of the vocabulary")
        return torch.full((B, 1), bos)
    if not isinstance(ids, Tensor):
        raise ValueError(f"input_ids should be a tensor (B, P), found {type(ids).__name__}; write generate(**inputs)")
    if ids.ndim != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise ValueError(f"input_ids should be integers (B, P), found {ids.dtype} of shape {tuple(ids.shape)}")
    least, most = (int(id) for id in ids.long().aminmax())
    if least < 0 or most >= vocab_size:
        raise ValueError(
            f"input_ids has the id {least if least < 0 else most}, but the vocabulary has {vocab_size} tokens; is the "
            "tokenizer of another checkpoint?"
        )
    return ids


def _mask(settings: GenerationConfig, mask: Tensor | None, ids: Tensor, K: int) -> Tensor:
    """The prompt's padding mask (B, K), True = real: the caller's, or every token that is not a pad id."""
    B, pad = len(ids), settings.pad_token_id
    if mask is None:
        tells = pad is not None and pad not in settings.eos_ids and ids.shape[1] == K
        return ids != pad if tells else torch.ones(B, K, dtype=torch.bool, device=ids.device)
    if mask.shape != (B, K):
        raise ValueError(f"attention_mask should have one entry per prompt token, {(B, K)}, found {tuple(mask.shape)}")
    mask = mask.bool()
    if not mask[:, -1].all():
        warnings.warn("a prompt ends in padding and its answer comes after it; pad on the left", stacklevel=4)
    return mask


def _padding(mask: Tensor, embeds: Tensor | None) -> Tensor | None:
    """Left pads of each row, (B,); None if there are none among the ids."""
    return None if mask.all() or embeds is not None else mask.int().argmax(1)


def _new_tokens(settings: GenerationConfig, K: int, length: int, limit: int) -> int:
    """N, from the limit that applies. `length`: the longest row without pads, `limit`: positions of the decoder."""
    if length >= limit:
        raise ValueError(
            f"the prompt has {length} tokens, but this model has positions for {limit} with the answer; "
            "use fewer or smaller images (or no image splitting), or a shorter text"
        )
    if (N := settings.max_new_tokens) is not None:
        check("max_new_tokens", N, is_whole(N, 1), "an integer > 0")
    elif settings.max_length is not None:
        check("max_length", settings.max_length, is_whole(settings.max_length, 1), "an integer > 0")
        N = settings.max_length - K
        if N <= 0:
            raise ValueError(f"max_length={settings.max_length} includes the prompt's {K} tokens; pass max_new_tokens")
    else:
        N = min(NEW_TOKENS, limit - length)
    if length + N > limit:
        raise ValueError(
            f"{length} prompt tokens and {N} new ones need {length + N} positions, but this model has {limit}; "
            f"pass max_new_tokens={limit - length} or less, or a shorter prompt"
        )
    return N


def _least_new_tokens(settings: GenerationConfig, K: int, N: int) -> int:
    """How many new tokens come before any row may end."""
    least, length = settings.min_new_tokens, settings.min_length or 0
    check("min_new_tokens", least, least is None or is_whole(least), "an integer ≥ 0")
    check("min_length", length, is_whole(length), "an integer ≥ 0")
    least = max(length - K, 0) if least is None else least
    if least > N:
        warnings.warn(f"the answer ends after {N} tokens, though it should have at least {least}", stacklevel=4)
    return least


def _cache(
    model: Any, settings: GenerationConfig, cache: KVCache | None, B: int, K: int, slots: int, embeds: bool
) -> KVCache | None:
    """The caller's cache if it leaves something to run, else a new one (None for use_cache=False)."""
    if cache is None:
        return _new_cache(model, B, slots) if settings.use_cache or embeds else None
    if not isinstance(cache, KVCache):
        found = f"{type(cache).__module__.split('.')[0]}'s {type(cache).__name__}"
        raise ValueError(f"past_key_values should be a cache of minivlm's, model.new_cache(rows, slots), found {found}")
    if not cache.length < K:
        raise ValueError(f"past_key_values holds {cache.length} tokens, input_ids only {K}; pass all ids so far")
    if cache.batch != B:
        raise ValueError(f"past_key_values has {cache.batch} rows, the prompt {B}; they are multiplied only afterwards")
    return cache


def _new_cache(model: Any, B: int, slots: int) -> KVCache:
    try:
        return model.new_cache(B, slots)
    except RuntimeError as error:  # torch's word for a CPU's memory; of a GPU's it speaks by itself
        if isinstance(error, torch.OutOfMemoryError) or "memory" not in str(error):
            raise
        raise MemoryError(f"a cache of {B} rows of {slots:,} tokens does not fit; pass max_new_tokens") from error


def _functions(name: str, given: list[Callable] | None) -> list[Callable]:
    given = [] if given is None else given
    fits = isinstance(given, list | tuple) and all(callable(each) for each in given)
    check(name, given, fits, "a list of functions (ids, scores)")
    return list(given)


def _generator(generator: torch.Generator | None, seed: int | None, device: torch.device) -> torch.Generator | None:
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("pass seed or generator, not both")
    check("seed", seed, is_whole(seed, -(2**63)), "an integer")
    return torch.Generator(device).manual_seed(int(seed))
