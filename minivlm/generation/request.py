"""Joins the arguments of `generate` and its settings into a `Run`, and checks both before any work.

B rows, n copies of each, P prompt ids, K prompt keys (P, or the length of `inputs_embeds`), N new tokens, V vocabulary.
"""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minivlm.generation.sampling import Rule, logits_rules
from minivlm.generation.settings import OUTPUTS, GenerationConfig, check, is_whole, resolve
from minivlm.generation.speculation import Guess, guess_rule
from minivlm.generation.steps import positions
from minivlm.generation.stopping import Stop, stop_rules
from minivlm.modules.cache import KVCache
from minivlm.modules.config import text_config

DEFAULT_NEW_TOKENS = 20  # if neither max_new_tokens nor max_length is set


@dataclass(frozen=True)
class Run:
    """A checked request, on the model's device."""

    settings: GenerationConfig
    copies: int  # n
    ids: Tensor  # (B·n, P): the prompt
    new_tokens: int  # N at most
    keys: int  # K
    mask: Tensor | None  # (B·n, K + N) bool, True = real; None if the prompt has no pads
    positions: Tensor  # (B·n, K + N)
    inputs: dict[str, Any]  # images and the like of the B rows, for the prefill
    cache: KVCache | None  # of B rows; None: every step recomputes everything
    rules: list[Rule]
    stops: list[Stop]
    deadline: float  # in seconds of `time.monotonic`; no token is started after it
    generator: torch.Generator | None
    guess: Guess | None  # guesses the next tokens, for speculative decoding
    outputs: list[str]  # kept of every step: scores, logits, attentions, hidden_states


def prepare(
    model: Any,
    input_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: KVCache | None = None,
    generation_config: GenerationConfig | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    tokenizer: Any = None,
    logits_processor: list[Callable] | None = None,
    stopping_criteria: list[Callable] | None = None,
    prefix_allowed_tokens_fn: Callable | None = None,
    assistant_model: Any = None,
    **options: Any,
) -> Run:
    """Check the arguments of `loop.generate` and build its `Run`. Errors as described there."""
    device, V = next(model.parameters()).device, vocab_size(model)
    settings, inputs = _settings(model, generation_config, options, V, device)
    ids, mask, at = _prompt(settings, input_ids, attention_mask, position_ids, inputs, V, device)
    (B, K), n = mask.shape, settings.copies
    N = _new_tokens(settings, K, int(at.max()) + 1, text_config(model.config).max_position_embeddings)
    cache = _cache(model, settings, past_key_values, B, K, N, inputs)
    least = _least_ids(settings, K, N, ids.shape[1])
    ids, mask, at = (each.repeat_interleave(n, 0) for each in (ids, mask, at))
    padding = None if mask.all() or "inputs_embeds" in inputs else mask.int().argmax(1)  # (B·n,): left pads of the ids
    mask = None if mask.all() else torch.cat([mask, mask.new_ones(B * n, N)], 1)  # (B·n, K + N)
    at = torch.cat([at, at[:, -1:] + 1 + torch.arange(N, device=device)], 1)  # (B·n, K + N)
    processors = _functions("logits_processor", logits_processor)
    kept = OUTPUTS if settings.return_dict_in_generate else ()
    return Run(
        settings=settings,
        copies=n,
        ids=ids,
        new_tokens=N,
        keys=K,
        mask=mask,
        positions=at,
        inputs=inputs,
        cache=cache,
        rules=logits_rules(settings, V, padding, device, least, processors, prefix_allowed_tokens_fn),
        stops=stop_rules(settings, tokenizer, _functions("stopping_criteria", stopping_criteria), device),
        deadline=time.monotonic() + (math.inf if settings.max_time is None else settings.max_time),
        generator=_generator(model, settings, generator, seed, device),
        guess=guess_rule(model, settings, assistant_model, cache, inputs, at, mask),
        outputs=[name.removeprefix("output_") for name in kept if getattr(settings, name)],
    )


def _settings(
    model: Any, config: GenerationConfig | None, options: dict[str, Any], V: int, device: torch.device
) -> tuple[GenerationConfig, dict[str, Any]]:
    """The settings of this call, and the model's inputs besides ids, both from the `options`."""
    names = {*model.prompt_inputs, "inputs_embeds"}
    given = {name: value for name, value in options.items() if name not in names}
    also = {"input_ids", "attention_mask", "position_ids", "past_key_values", *names}
    settings = resolve(model.generation_config, config, given, also)
    settings.eos_token_id = [id for id in settings.eos_ids if 0 <= id < V]
    if settings.pad_token_id in (None, -1):  # files write −1 for none
        settings.pad_token_id = settings.eos_token_id[0] if settings.eos_token_id else None
    inputs = {name: options[name] for name in names if options.get(name) is not None}
    return settings, _inputs(inputs, device)


def _prompt(
    settings: GenerationConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    inputs: dict[str, Any],
    V: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (B, P), padding mask (B, K) bool and positions (B, K) of the prompt."""
    embeds = inputs.get("inputs_embeds")
    ids = _ids(settings, input_ids, inputs, V).to(device, torch.long)
    mask = _mask(settings, attention_mask, ids, ids.shape[1] if embeds is None else embeds.shape[1]).to(device)
    if settings.eos_ids and len(ids) * settings.copies > 1:  # ended rows continue with pads
        _check_token("pad_token_id", settings.pad_token_id, V)
    return ids, mask, positions(mask) if position_ids is None else position_ids.to(device).expand(len(ids), -1)


# ---- Checks and defaults ---------------------------------------------------------------------------------------------


def vocab_size(model: Any) -> int:
    """The number of logits: IDEFICS counts its image tokens separately."""
    return text_config(model.config).vocab_size + getattr(model.config, "additional_vocab_size", 0)


def _inputs(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The inputs besides ids, on the model's device. ValueError for arrays of other libraries and meta tensors."""
    for name, value in given.items():
        fits = not value.is_meta if isinstance(value, Tensor) else not hasattr(value, "__array__")
        check(name, value, fits, 'a tensor with numbers; processors make them with return_tensors="pt"')
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}


def _ids(settings: GenerationConfig, ids: Tensor | None, inputs: dict[str, Any], vocab_size: int) -> Tensor:
    """The prompt's ids (B, P): the given ones, none with `inputs_embeds`, or only bos."""
    if ids is None and "inputs_embeds" in inputs:
        return torch.zeros(len(inputs["inputs_embeds"]), 0, dtype=torch.long)
    if ids is None:
        if settings.bos_token_id is None:
            raise ValueError("nothing to continue: pass input_ids, inputs_embeds, or bos_token_id to start from")
        _check_token("bos_token_id", settings.bos_token_id, vocab_size)
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        return torch.full((len(tensors[0]) if tensors else 1, 1), settings.bos_token_id)
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


def _check_token(name: str, id: Any, vocab_size: int) -> None:
    check(name, id, is_whole(id) and id < vocab_size, f"one of the {vocab_size} tokens of the vocabulary")


def _mask(settings: GenerationConfig, mask: Tensor | None, ids: Tensor, K: int) -> Tensor:
    """The prompt's padding mask (B, K), True = real: the caller's, or True except at pad ids."""
    B, pad = len(ids), settings.pad_token_id
    if mask is None:
        pads = pad is not None and pad not in settings.eos_ids and ids.shape[1] == K
        return ids != pad if pads else torch.ones(B, K, dtype=torch.bool, device=ids.device)
    if mask.shape != (B, K):
        raise ValueError(f"attention_mask should have one entry per prompt token, {(B, K)}, found {tuple(mask.shape)}")
    mask = mask.bool()
    if not mask[:, -1].all():
        warnings.warn("a prompt ends in padding and its answer comes after it; pad on the left", stacklevel=5)
    return mask


def _new_tokens(settings: GenerationConfig, K: int, length: int, limit: int) -> int:
    """N, the most new tokens. `length`: of the longest row without pads, `limit`: the decoder's positions."""
    if length >= limit:
        raise ValueError(
            f"the prompt has {length} tokens, but this model has positions for {limit} with the answer; "
            "use fewer or smaller images (or no image splitting), or a shorter text"
        )
    N = settings.max_new_tokens
    if N is None and settings.max_length is None:
        N = min(DEFAULT_NEW_TOKENS, limit - length)
    elif N is None:
        check("max_length", settings.max_length, is_whole(settings.max_length, 1), "an integer > 0")
        if (N := settings.max_length - K) <= 0:
            raise ValueError(f"max_length={settings.max_length} includes the prompt's {K} tokens; pass max_new_tokens")
    if length + N > limit:
        raise ValueError(
            f"{length} prompt tokens and {N} new ones need {length + N} positions, but this model has {limit}; "
            f"pass max_new_tokens={limit - length} or less, or a shorter prompt"
        )
    return N


def _least_ids(settings: GenerationConfig, K: int, N: int, P: int) -> int:
    """The number of ids, prompt included, before any row may end; 0 for any number."""
    least = settings.min_new_tokens
    least = max((settings.min_length or 0) - K, 0) if least is None else least
    if least > N:
        warnings.warn(f"the answer ends after {N} tokens, though it should have at least {least}", stacklevel=4)
    return least and P + least


def _cache(
    model: Any, settings: GenerationConfig, cache: KVCache | None, B: int, K: int, N: int, inputs: dict[str, Any]
) -> KVCache | None:
    """The caller's cache if it leaves tokens to run, else a new one (None without `use_cache`).

    Beams and samples share the prompt's slots; theirs are added when the prompt has run.
    """
    if cache is None:
        wanted = settings.use_cache or "inputs_embeds" in inputs
        return _new_cache(model, B, K + N if settings.copies == 1 else K) if wanted else None
    if not isinstance(cache, KVCache):
        found = f"a {type(cache).__name__} of {type(cache).__module__.split('.')[0]}"
        raise ValueError(
            f"past_key_values should be a cache of minivlm, from model.new_cache(rows, slots), found {found}"
        )
    if not cache.length < K:
        raise ValueError(f"past_key_values holds {cache.length} tokens, input_ids only {K}; pass all ids so far")
    if cache.batch != B:
        raise ValueError(f"past_key_values has {cache.batch} rows, the prompt {B}; they are multiplied only afterwards")
    return cache


def _new_cache(model: Any, B: int, slots: int) -> KVCache:
    try:
        return model.new_cache(B, slots)
    except RuntimeError as error:  # on a CPU; a full GPU has a clear error already
        if isinstance(error, torch.OutOfMemoryError) or "memory" not in str(error):
            raise
        raise MemoryError(f"a cache of {B} rows of {slots:,} tokens does not fit; pass max_new_tokens") from error


def _functions(name: str, given: list[Callable] | None) -> list[Callable]:
    given = [] if given is None else given
    fits = isinstance(given, list | tuple) and all(callable(each) for each in given)
    check(name, given, fits, "a list of functions (ids, scores)")
    return list(given)


def _generator(
    model: Any, settings: GenerationConfig, generator: torch.Generator | None, seed: int | None, device: torch.device
) -> torch.Generator | None:
    """The random source of sampling; None = torch's own. Processes sharing a model draw alike (`devices.parallel`)."""
    if seed is None and generator is None and settings.do_sample and hasattr(model, "agreed"):
        seed = model.agreed(int(torch.randint(2**62, ())))
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("pass seed or generator, not both")
    check("seed", seed, is_whole(seed, -(2**63)), "an integer")
    return torch.Generator(device).manual_seed(int(seed))
