"""Text from logits, one token at a time: `prefill` the prompt, then `decode_step` after `decode_step`.

    ids (B, P) ──prefill──► logits (B, V) ──rules──► scores ──argmax or sample──► token (B,) ──decode_step──► logits …
                    └──────────── KVCache, P + N slots, allocated once ────────────┘

Everything here is a plain function over a model; it knows token ids, not text or images: whatever else the model takes
(`pixel_values`, …) goes to the prefill as it is, and never to a decode step, so that an image placeholder which the
model writes itself is just a token. `generate` collects what `stream` yields.

B rows, P prompt ids, K prompt keys (P, or the length of `inputs_embeds`), N new tokens, S ids so far, V vocabulary.
The rules act on float32 scores in the order of `logits_rules`; they follow transformers 5.23, including its oddities.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minivlm.generation_config import GenerationConfig, settings_of
from minivlm.modules.cache import KVCache
from minivlm.sampling import Rule, check, logits_rules, sample

NEW_TOKENS = 20  # when neither max_new_tokens nor max_length is set anywhere


# ---- The model's two steps ----


def positions(mask: Tensor) -> Tensor:
    """Rotary positions (B, S) of a padding mask (B, S): real tokens count from 0, pads before them are 0."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def prefill(
    model: Any,
    input_ids: Tensor | None,
    cache: KVCache | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **inputs: Any,
) -> Tensor:
    """Run ids (B, T), and the images with them, into `cache`; the last position's logits, (B, V) float32.

    `attention_mask` (B, cached + T) is True at real tokens; None if there are no pads. `position_ids` is (B, T).
    """
    if position_ids is None and attention_mask is not None:
        position_ids = positions(attention_mask)[:, 0 if cache is None else cache.length :]
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
        logits_to_keep=1,
        **inputs,
    )
    return output.logits[:, -1].float()


def decode_step(
    model: Any, token: Tensor, cache: KVCache, position: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Run one more token (B,) at `position` (B,); the logits for the one after it, (B, V) float32."""
    return prefill(model, token[:, None], cache, attention_mask, position[:, None])


# ---- The loop ----


@dataclass
class _Run:
    """A checked request: everything the loop needs, on the model's device, with room for N new tokens."""

    settings: GenerationConfig
    ids: Tensor  # (B, P + N): the prompt, then what has been generated
    prompt: int  # P
    keys: int  # K
    mask: Tensor | None  # (B, K + N) bool, True = real; None if the prompt has no pads
    positions: Tensor  # (B, K + N)
    inputs: dict[str, Any]  # images and the like, for the prefill
    cache: KVCache | None  # None: every step recomputes everything
    rules: list[Rule]
    generator: torch.Generator | None


def stream(
    model: Any,
    input_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Iterator[Tensor]:
    """The new tokens as they come, (B,) a step; arguments and errors as in `generate`. The prompt is not repeated."""
    return _steps(model, _prepare(model, input_ids, attention_mask, generation_config, generator, seed, kwargs))


def generate(
    model: Any,
    input_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: Any = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Continue `input_ids` (B, P) by at most N tokens: (B, P + N) ids, ended rows filled with the pad id.

    `kwargs` are settings (the fields of `GenerationConfig`; they win over `generation_config`, which wins over the
    checkpoint's) and the model's own inputs (`pixel_values`, `inputs_embeds`, …). With `inputs_embeds` and no ids only
    the new tokens come back. Rows of different lengths are padded on the left and told apart by `attention_mask`
    (without it, by the pad id). Sampling draws from `generator`, or from one seeded with `seed`, or from torch's own.
    `streamer` gets the prompt and then each step's tokens by `put`, and `end` at the end.

    Raises ValueError for unknown, unsupported or impossible settings, for a prompt that does not fit the model, and
    for logits that are not finite.
    """
    run = _prepare(model, input_ids, attention_mask, generation_config, generator, seed, kwargs)
    if streamer is not None:
        streamer.put(run.ids[:, : run.prompt].cpu())
    tokens = []
    for token in _steps(model, run):
        tokens.append(token)
        if streamer is not None:
            streamer.put(token.cpu())
    if streamer is not None:
        streamer.end()
    return torch.cat([run.ids[:, : run.prompt], torch.stack(tokens, 1)], 1)


@torch.no_grad()
def _steps(model: Any, run: _Run) -> Iterator[Tensor]:
    """Yield up to N tokens (B,), fewer once every row has ended."""
    settings, ids = run.settings, run.ids
    eos = torch.tensor(settings.eos_ids, device=ids.device)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for step in range(ids.shape[1] - run.prompt):
        end = run.prompt + step
        logits = _next_logits(model, run, step)
        if step == 0 or logits.device.type == "cpu":  # the check waits for the device: once is enough there
            _check_finite(logits, step)
        scores = logits
        for rule in run.rules:
            scores = rule(scores, ids[:, :end])
        token = sample(scores, run.generator) if settings.do_sample else scores.argmax(-1)
        if len(eos):
            token = token.masked_fill(ended, settings.pad_token_id)
            ended |= torch.isin(token, eos)
        ids[:, end] = token
        yield token
        if len(eos) and ended.all():
            return


def _next_logits(model: Any, run: _Run, step: int) -> Tensor:
    """Logits after the prompt and `step` new tokens, (B, V)."""
    S = run.keys + step
    mask = None if run.mask is None else run.mask[:, :S]
    if step and run.cache is not None:
        return decode_step(model, run.ids[:, run.prompt + step - 1], run.cache, run.positions[:, S - 1], mask)
    start = run.cache.length if run.cache is not None else 0  # ids that an earlier call has left in the cache
    ids = None if "inputs_embeds" in run.inputs else run.ids[:, start : run.prompt + step]
    return prefill(model, ids, run.cache, mask, run.positions[:, start:S], **run.inputs)


def _check_finite(logits: Tensor, step: int) -> None:
    highest = logits.amax(-1)  # NaN wins a maximum, so one pass sees NaN and inf
    if not highest.isfinite().all():
        rows = (~highest.isfinite()).nonzero().flatten().tolist()
        raise ValueError(
            f"the logits of row {', '.join(map(str, rows))} are not finite at new token {step + 1}: weights or "
            "activations overflow; load with dtype=torch.bfloat16 or torch.float32, and check the inputs for NaN"
        )


# ---- Checking a request ----


def _prepare(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    config: GenerationConfig | None,
    generator: torch.Generator | None,
    seed: int | None,
    kwargs: dict[str, Any],
) -> _Run:
    settings, inputs = settings_of(model, config, kwargs)
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    cache, embeds = inputs.pop("past_key_values", None), inputs.get("inputs_embeds")
    ids = _prompt(settings, input_ids, inputs).to(device, torch.long)
    B, P = ids.shape
    K = P if embeds is None else embeds.shape[1]
    mask = _mask(settings, attention_mask, ids, K).to(device)
    place = inputs.pop("position_ids", None)
    place = positions(mask) if place is None else place
    N = _new_tokens(settings, K, int(place.max()) + 1, _text_config(model).max_position_embeddings)
    after = place[:, -1:] + 1 + torch.arange(N, device=device)  # (B, N)
    return _Run(
        settings=settings,
        ids=torch.cat([ids, ids.new_zeros(B, N)], 1),
        prompt=P,
        keys=K,
        mask=None if mask.all() else torch.cat([mask, mask.new_ones(B, N)], 1),
        positions=torch.cat([place, after], 1),
        inputs=inputs,
        cache=_cache(model, settings, cache, B, K, N, embeds is not None),
        rules=logits_rules(settings, _vocab_size(model), _padding(mask, embeds), device),
        generator=_generator(generator, seed, device),
    )


def _prompt(settings: GenerationConfig, ids: Tensor | None, inputs: dict[str, Any]) -> Tensor:
    """The prompt's ids (B, P): as given, or none beside `inputs_embeds`, or just bos."""
    if ids is None:
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        B = len(tensors[0]) if tensors else 1
        if "inputs_embeds" in inputs:
            return torch.zeros(len(inputs["inputs_embeds"]), 0, dtype=torch.long)
        if settings.bos_token_id is None:
            raise ValueError("nothing to continue: pass input_ids, inputs_embeds, or bos_token_id to start from")
        return torch.full((B, 1), settings.bos_token_id)
    if not isinstance(ids, Tensor):
        raise ValueError(f"input_ids should be a tensor (B, P), found {type(ids).__name__}; write generate(**inputs)")
    if ids.ndim != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise ValueError(f"input_ids should be integers (B, P), found {ids.dtype} of shape {tuple(ids.shape)}")
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
        check("max_new_tokens", N, isinstance(N, int) and N > 0, "an integer > 0")
    elif settings.max_length is not None:
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


def _cache(
    model: Any, settings: GenerationConfig, cache: KVCache | None, B: int, K: int, N: int, embeds: bool
) -> KVCache | None:
    """The caller's cache if it has room and leaves something to run, else a new one (None for use_cache=False)."""
    if cache is None:
        return model.new_cache(B, K + N) if settings.use_cache or embeds else None
    if not cache.length < K:
        raise ValueError(f"past_key_values holds {cache.length} tokens, input_ids only {K}; pass all ids so far")
    return cache


def _generator(generator: torch.Generator | None, seed: int | None, device: torch.device) -> torch.Generator | None:
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("pass seed or generator, not both")
    return torch.Generator(device).manual_seed(seed)


def _text_config(model: Any) -> Any:
    return getattr(model.config, "text_config", model.config)


def _vocab_size(model: Any) -> int:
    config = _text_config(model)
    return config.vocab_size + getattr(config, "additional_vocab_size", 0)  # IDEFICS decouples its image tokens
