"""Text from logits, one token at a time: `prefill` the prompt, then `decode_step` after `decode_step`.

    ids (B, P) ──prefill──► logits (B, V) ──rules──► scores ──argmax or sample──► token (B,) ──decode_step──► logits …
                    └──────────── KVCache, P + N slots, allocated once ────────────┘

Everything here is a plain function over a model; it knows token ids, not text or images: whatever else the model takes
(`pixel_values`, …) goes to the prefill as it is, and never to a decode step, so that an image placeholder which the
model writes itself is just a token. `generate` collects what `stream` yields.

B rows, P prompt ids, K prompt keys (P, or the length of `inputs_embeds`), N new tokens, S ids so far, V vocabulary.
The rules act on float32 scores in the order of `logits_rules`; they follow transformers 5.23, including its oddities.
"""

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from minivlm.modules import config as hub_config
from minivlm.modules.cache import KVCache

Rule = Callable[[Tensor, Tensor], Tensor]  # (scores (B, V), ids (B, S)) -> scores (B, V)

NEW_TOKENS = 20  # when neither max_new_tokens nor max_length is set anywhere
DEFAULTS = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,  # on whenever sampling: 0 or None switches it off
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "use_cache": True,
}

# What else transformers can be told. None and the value given here change nothing; any other value is an error.
UNSUPPORTED: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_return_sequences", "typical_p", "guidance_scale"), 1),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff"), 0),
    **dict.fromkeys(("remove_invalid_values", "renormalize_logits", "return_dict_in_generate", "output_scores"), False),
    **dict.fromkeys(("output_logits", "output_attentions", "output_hidden_states"), False),
    **dict.fromkeys(("top_h", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id")),
    **dict.fromkeys(("forced_eos_token_id", "exponential_decay_length_penalty", "stop_strings", "max_time")),
    **dict.fromkeys(("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "watermarking_config")),
    **dict.fromkeys(("assistant_model", "prompt_lookup_num_tokens", "negative_prompt_ids")),
}
# These never change the ids of greedy search or sampling.
HARMLESS = {
    *("transformers_version", "_from_model_config", "_commit_hash", "decoder_start_token_id", "synced_gpus", "labels"),
    *("early_stopping", "length_penalty", "cache_implementation", "low_memory", "disable_compile", "tokenizer"),
}


@dataclass(slots=True)
class GenerationConfig:
    """How to generate, in the Hub's words. None is not set: the checkpoint's value, else that of `DEFAULTS`."""

    max_new_tokens: int | None = None  # wins over max_length
    max_length: int | None = None  # prompt and new tokens together
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    bad_words_ids: list[list[int]] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None  # fills rows that have ended; the first eos id if not set
    bos_token_id: int | None = None
    use_cache: bool | None = None
    other: dict[str, Any] = field(default_factory=dict)  # settings of the file that we keep but do not know how to obey

    @classmethod
    def from_hub(cls, json: dict[str, Any]) -> "GenerationConfig":
        """From generation_config.json; what we do not know is kept in `other`, where `generate` refuses it."""
        known = {name: value for name, value in json.items() if name in SETTINGS}
        config = hub_config.from_hub(cls, known)
        config.other = {name: value for name, value in json.items() if name not in SETTINGS}
        return config

    @classmethod
    def from_model_config(cls, config: Any) -> "GenerationConfig":
        """For a model without generation_config.json: the special ids of its config, or else of its text config."""
        sources = (config, getattr(config, "text_config", None))
        ids = {}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            found = (getattr(source, name, None) for source in sources)
            ids[name] = next((value for value in found if value is not None), None)
        return cls(**ids)

    def to_hub(self) -> dict[str, Any]:
        """What generation_config.json would hold: everything that is set."""
        return {name: getattr(self, name) for name in SETTINGS if getattr(self, name) is not None} | self.other

    def over(self, base: "GenerationConfig") -> "GenerationConfig":
        """This config where it is set, `base` elsewhere."""
        given = {name: getattr(self, name) for name in SETTINGS if getattr(self, name) is not None}
        return replace(base, **given, other=base.other | self.other)

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end a row, as a list."""
        return [] if self.eos_token_id is None else torch.as_tensor(self.eos_token_id).flatten().tolist()


SETTINGS = tuple(item.name for item in fields(GenerationConfig) if item.name != "other")


# ---- The rules: scores (B, V) float32 in, scores out; a token that may not come gets -inf ----


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
        _check("repetition_penalty", penalty, isinstance(penalty, float) and penalty > 0, "a float > 0, such as 1.2")
        rules.append(lambda scores, ids: repetition_penalty(scores, ids, penalty, padding))
    if settings.bad_words_ids is not None:
        words = [torch.tensor(word, device=device) for word in _bad_words(settings, vocab_size)]
        rules.append(lambda scores, ids: ban_words(scores, ids, words))
    if not settings.do_sample:
        return rules
    if (temperature := settings.temperature) not in (None, 1):
        fits = isinstance(temperature, float) and temperature > 0
        _check("temperature", temperature, fits, "a float > 0 (for greedy search, pass do_sample=False)")
        rules.append(lambda scores, ids: scores / temperature)
    if (k := settings.top_k) not in (None, 0):
        _check("top_k", k, isinstance(k, int) and k > 0, "an integer > 0, or 0 to switch it off")
        rules.append(lambda scores, ids: top_k(scores, k))
    if (p := settings.top_p) is not None and p != 1:
        _check("top_p", p, 0 <= p < 1, "between 0 and 1")
        rules.append(lambda scores, ids: top_p(scores, p))
    if (floor := settings.min_p) is not None:
        _check("min_p", floor, 0 <= floor <= 1, "between 0 and 1")
        rules.append(lambda scores, ids: min_p(scores, floor))
    return rules


def _check(name: str, value: Any, fits: bool, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name} should be {expected}, found {value!r}")


def _bad_words(settings: GenerationConfig, vocab_size: int) -> list[list[int]]:
    """The checked words, without those that are just an eos id (which would never let a row end)."""
    words = settings.bad_words_ids
    lists = isinstance(words, list | tuple) and len(words) > 0 and all(isinstance(word, list | tuple) for word in words)
    ids = [id for word in words for id in word] if lists else []
    fits = lists and all(words) and all(isinstance(id, int) and id >= 0 for id in ids)
    _check("bad_words_ids", words, fits, "a list of words, each a list of token ids, such as [[32000], [5, 7]]")
    if max(ids) >= vocab_size:
        raise ValueError(f"bad_words_ids has the id {max(ids)}, but the vocabulary has {vocab_size} tokens")
    return [list(word) for word in words if not (len(word) == 1 and word[0] in settings.eos_ids)]


def sample(scores: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One id (B,) for each row of scores (B, V), with the probabilities softmax(scores)."""
    return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)


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
    settings, inputs = _settings(model, config, kwargs)
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


def _settings(model: Any, config: GenerationConfig | None, kwargs: dict) -> tuple[GenerationConfig, dict[str, Any]]:
    """Split `kwargs` into settings (laid over the call's config, the checkpoint's and `DEFAULTS`) and model inputs."""
    settings = GenerationConfig(**DEFAULTS)
    for layer in (getattr(model, "generation_config", None), config):
        settings = settings if layer is None else layer.over(settings)
    takes = set(inspect.signature(model.forward).parameters) - {*UNSUPPORTED, *HARMLESS, "logits_to_keep"}
    inputs = {name: value for name, value in kwargs.items() if name in takes and value is not None}
    settings = replace(settings, **{name: value for name, value in kwargs.items() if name in SETTINGS})
    other = settings.other | {name: value for name, value in kwargs.items() if name not in {*SETTINGS, *takes}}
    for name, value in other.items():
        _refuse(name, value, takes)
    if settings.pad_token_id is None and settings.eos_ids:
        settings = replace(settings, pad_token_id=settings.eos_ids[0])
    _warn_unused(settings, kwargs)
    return settings, inputs


def _refuse(name: str, value: Any, takes: set[str]) -> None:
    """Raise unless leaving `name` out changes nothing."""
    if value is None or name in HARMLESS:
        return
    if name not in UNSUPPORTED:
        close = difflib.get_close_matches(name, {*SETTINGS, *UNSUPPORTED, *takes}, n=1)
        raise ValueError(f"unknown setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    if value != (neutral := UNSUPPORTED[name]) and value != []:
        raise ValueError(f"{name}={value!r} is not supported, leave it at {neutral!r}; greedy search and sampling are")


def _warn_unused(settings: GenerationConfig, kwargs: dict) -> None:
    """Sampling settings in a greedy call do nothing; the caller probably forgot do_sample=True."""
    neutral = {"temperature": (1, 0), "top_k": (50, 0), "top_p": (1,), "min_p": (0,)}
    unused = [name for name, values in neutral.items() if kwargs.get(name) not in (None, *values)]
    if unused and not settings.do_sample:
        warnings.warn(f"{', '.join(unused)} has no effect without do_sample=True", stacklevel=5)


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
        _check("max_new_tokens", N, isinstance(N, int) and N > 0, "an integer > 0")
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
