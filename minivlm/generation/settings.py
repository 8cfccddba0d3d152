"""The settings of `generate`: names, defaults, allowed values, and the order of their sources.

A keyword of the call overrides its `generation_config`, which overrides the checkpoint's `generation_config.json`,
which overrides `DEFAULTS`, those of the reference.
"""

import difflib
import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minivlm.checkpoint import config_file, hub
from minivlm.checkpoint.files import write_json
from minivlm.modules.config import check_token_ids

FILE = "generation_config.json"
MAX_COPIES = 256  # of a prompt, if a file requests them: each needs a cache
DEFAULTS = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "temperature": 1.0,
    "top_k": 50,  # active in all sampling; 0 or None disables it
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "num_assistant_tokens": 20,
    "assistant_confidence_threshold": 0.4,
    "use_cache": True,
}

# Settings of transformers that are missing here → the value without effect; any other value is an error.
UNSUPPORTED: dict[str, Any] = {
    name: neutral
    for neutral, names in [
        (1, "guidance_scale encoder_repetition_penalty num_beam_groups"),
        (0, "encoder_no_repeat_ngram_size diversity_penalty"),
        (False, "renormalize_logits token_healing is_assistant use_mtp"),
        (None, "top_h sequence_bias suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id"),
        (None, "exponential_decay_length_penalty watermarking_config constraints custom_generate penalty_alpha"),
        (None, "negative_prompt_ids negative_prompt_attention_mask assistant_early_exit speculation_type dola_layers"),
        (None, "force_words_ids"),
    ]
    for name in names.split()
}
# Settings of transformers that never change the ids of supported calls.
HARMLESS = frozenset(
    """transformers_version _from_model_config _commit_hash decoder_start_token_id synced_gpus labels
    cache_implementation cache_config max_cache_len low_memory compile_config prefill_chunk_size
    num_assistant_tokens_schedule assistant_lookbehind target_lookbehind assistant_ensemble_weight
    continuous_batching_config""".split()  # noqa: SIM905
)


@dataclass(slots=True, init=False)
class GenerationConfig:
    """How to generate, with the Hub's names. None means not set: the checkpoint's value, else that of `DEFAULTS`."""

    max_new_tokens: int | None  # overrides max_length
    max_length: int | None  # prompt and new tokens together
    min_new_tokens: int | None  # overrides min_length
    min_length: int | None  # prompt and new tokens together
    stop_strings: str | list[str] | None  # a row ends with the token that completes one; needs `tokenizer`
    max_time: float | None  # seconds after which no further token is started
    do_sample: bool | None
    num_beams: int | None
    num_return_sequences: int | None  # samples, or best beams, for each prompt
    length_penalty: float | None  # the score of a beam is its log-probability / its length ** length_penalty
    early_stopping: bool | str | None  # True: stop at num_beams ended beams; "never": when none can improve; else guess
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    bad_words_ids: list[list[int]] | None
    remove_invalid_values: bool | None  # generate despite NaN or infinite logits, which become 0 or the largest number
    prompt_lookup_num_tokens: int | None  # guess so many tokens ahead from the text so far; same answer
    max_matching_ngram_size: int | None  # look up so many of the newest ids, or fewer; 2 if not set
    num_assistant_tokens: int | None  # guess so many tokens ahead by `assistant_model`
    assistant_confidence_threshold: float | None  # stop guessing below this probability
    eos_token_id: int | list[int] | None
    pad_token_id: int | None  # fills rows that have ended; the first eos id if not set
    bos_token_id: int | None
    use_cache: bool | None
    disable_compile: bool | None  # on CUDA, launch each step from Python instead of a captured graph
    return_dict_in_generate: bool | None  # return a `GenerateOutput`
    output_scores: bool | None  # with the scores of each step in it
    output_logits: bool | None  # with the logits of each step in it
    output_attentions: bool | None  # with the attention weights of each step and decoder block in it
    output_hidden_states: bool | None  # with those of each step in it, the embeddings and each block's output
    other: dict[str, Any]  # settings kept for the file; `generate` refuses those it does not support

    def __init__(self, *, other: dict[str, Any] | None = None, **settings: Any) -> None:
        """Keywords are the fields above and others of the reference's settings. ValueError for other names."""
        for name in SETTINGS:
            setattr(self, name, plain(settings.pop(name, None)))
        for name in settings:
            check_known(name)
        self.other = {**(other or {}), **settings}

    @classmethod
    def from_hub(cls, values: dict[str, Any]) -> "GenerationConfig":
        """From generation_config.json; unknown entries are kept in `other`, and `generate` refuses them.

        Raises ValueError for a setting of the wrong type, and for more copies of a prompt than any checkpoint needs.
        """
        known = {name: value for name, value in values.items() if name in SETTINGS}
        other = {name: value for name, value in values.items() if name not in SETTINGS}
        config = config_file.from_hub(cls, known, other=other)
        for name in SPECIAL_IDS:
            check_token_ids(f"GenerationConfig.{name}", getattr(config, name))
        for name in ("num_beams", "num_return_sequences"):
            copies = getattr(config, name)
            check(name, copies, copies is None or 1 <= copies <= MAX_COPIES, f"an integer from 1 to {MAX_COPIES}")
        return config

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, config_file_name: str = FILE, **where: Any
    ) -> "GenerationConfig":
        """From a folder or Hub id; `where` is what `hub.source` takes (revision, cache_dir, token, …)."""
        return cls.from_hub(hub.source(name_or_folder, **where).json(config_file_name))

    @classmethod
    def from_model_config(cls, config: Any) -> "GenerationConfig":
        """For a model without generation_config.json: the special ids of its config, or else of its text config."""
        text = getattr(config, "text_config", None)
        ids = {name: getattr(config, name, None) for name in SPECIAL_IDS}
        return cls(**{name: getattr(text, name, None) if id is None else id for name, id in ids.items()})

    def to_hub(self) -> dict[str, Any]:
        """The contents of generation_config.json: all settings that are set."""
        return {name: plain(getattr(self, name)) for name in SETTINGS if getattr(self, name) is not None} | self.other

    def save_pretrained(self, folder: str | Path, config_file_name: str = FILE) -> None:
        """Write `to_hub()` into `folder`, which is created if missing."""
        write_json(Path(folder) / config_file_name, self.to_hub(), sort_keys=True)

    def over(self, base: "GenerationConfig") -> "GenerationConfig":
        """This config where it is set, `base` elsewhere."""
        given = {name: getattr(self, name) for name in SETTINGS if getattr(self, name) is not None}
        return replace(base, **given, other=base.other | self.other)

    def active(self, name: str) -> Any:
        """The value of a setting; None also if its value disables its rule."""
        value = getattr(self, name)
        return None if name in OFF and value == OFF[name] else value

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end a row, as a list."""
        return [] if self.eos_token_id is None else torch.as_tensor(self.eos_token_id).flatten().tolist()

    @property
    def copies(self) -> int:
        """The number of sequences that continue each prompt: its beams or samples."""
        return max(self.num_beams, self.num_return_sequences)


SETTINGS = tuple(item.name for item in fields(GenerationConfig) if item.name != "other")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# ---- Allowed values ----


def is_whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and least <= value <= most


def _is_float(value: Any) -> bool:
    return isinstance(value, float) and 1e-6 <= value <= 1e6


def plain(value: Any) -> Any:
    """Convert numpy's numbers and arrays to Python's, inside lists and tuples too."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def check(name: str, value: Any, fits: bool, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name} should be {expected}, found {value!r:.80}")


def _are_strings(value: Any) -> bool:
    strings = [value] if isinstance(value, str) else value
    return isinstance(strings, list | tuple) and all(isinstance(each, str) and each for each in strings)


def are_words(value: Any) -> bool:
    lists = isinstance(value, list | tuple) and all(isinstance(word, list | tuple) and word for word in value)
    return lists and len(value) > 0 and all(is_whole(id) for word in value for id in word)


# A description of allowed values, the test, and the settings. The bounds of floats keep scores from overflowing.
COUNTS = "max_new_tokens num_beams num_return_sequences top_k no_repeat_ngram_size max_matching_ngram_size"
FRACTIONS = "top_p min_p typical_p epsilon_cutoff eta_cutoff assistant_confidence_threshold"
ALLOWED = [
    ("an integer > 0", lambda value: is_whole(value, 1), f"{COUNTS} prompt_lookup_num_tokens num_assistant_tokens"),
    ("an integer ≥ 0", is_whole, "min_new_tokens min_length"),
    ("between 0 and 1", lambda value: is_number(value, 0, 1), FRACTIONS),
    ("a number of seconds", lambda value: is_number(value, 0), "max_time"),
    ("a number from -10 to 10", lambda value: is_number(value, -10, 10), "length_penalty"),
    ("True, False or 'never'", lambda value: isinstance(value, bool) or value == "never", "early_stopping"),
    ("a float > 0, such as 1.2", _is_float, "repetition_penalty"),
    ("a float > 0 (for greedy search, pass do_sample=False)", _is_float, "temperature"),
    ("a string or a list of strings, none of them empty", _are_strings, "stop_strings"),
    ("a list of words, each a list of token ids, such as [[5], [2, 7]]", are_words, "bad_words_ids"),
]
# Values besides None that disable a rule.
OFF = {"repetition_penalty": 1, "no_repeat_ngram_size": 0, "stop_strings": [], "temperature": 1, "top_k": 0}
OFF |= {"top_p": 1, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
# Settings that have no effect without do_sample, more than one beam, or return_dict_in_generate.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")

# ---- The settings of one call ----


def resolve(
    stored: GenerationConfig, config: GenerationConfig | None, given: dict[str, Any], also: Collection[str] = ()
) -> GenerationConfig:
    """The settings of one call: keywords `given`, over its `config`, over the checkpoint's `stored`, over `DEFAULTS`.

    Raises ValueError for unknown, unsupported and impossible settings. `also`: names to suggest for a misspelt one.
    """
    settings = stored.over(GenerationConfig(**DEFAULTS))
    settings.use_cache = True  # LLaVA 34B ships False, which gives the same ids but encodes the images at every token
    if config is not None:
        check("generation_config", config, isinstance(config, GenerationConfig), "a minivlm.GenerationConfig")
        settings = config.over(settings)
    other = settings.other | {name: value for name, value in given.items() if name not in SETTINGS}
    settings = replace(settings, **{name: value for name, value in given.items() if name in SETTINGS})
    for name, value in other.items():
        _refuse(name, value, also)
    for name in {*DEFAULTS} - {*OFF}:  # None disables the others
        if getattr(settings, name) is None:
            setattr(settings, name, DEFAULTS[name])
    _check_values(settings)
    _warn_unused(settings, given)
    return settings


def _check_values(settings: GenerationConfig) -> None:
    """ValueError for a value that is not allowed, alone or beside others. Without sampling, its settings go unread."""
    for expected, fits, names in ALLOWED:
        for name in names.split():
            if (value := settings.active(name)) is not None and (settings.do_sample or name not in SAMPLING):
                check(name, value, fits(value), expected)
    beams, copies = settings.num_beams, settings.num_return_sequences
    if beams == 1 < copies and not settings.do_sample:
        raise ValueError(f"num_return_sequences={copies}: greedy search has one answer; pass num_beams or do_sample")
    if 1 < beams < copies:
        raise ValueError(f"num_return_sequences={copies} is more than there are beams: num_beams={beams}")


def check_known(name: str, also: Collection[str] = ()) -> None:
    """Raise ValueError for a name that is neither a setting of the reference nor in `also`."""
    known = {*SETTINGS, *UNSUPPORTED, *HARMLESS, *also}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"unknown setting {name!r:.80}" + (f"; did you mean {close[0]!r}?" if close else ""))


def _refuse(name: str, value: Any, also: Collection[str]) -> None:
    """Raise ValueError unless the setting has no effect."""
    if value is None or name in HARMLESS:
        return
    check_known(name, also)
    if value != (neutral := UNSUPPORTED[name]) and value != []:
        raise ValueError(
            f"{name}={value!r:.80} is not supported, leave it at {neutral!r}; GenerationConfig lists the supported ones"
        )


def _warn_unused(settings: GenerationConfig, given: dict[str, Any]) -> None:
    """Warn of settings that have no effect without another one, which the caller probably forgot."""
    for names, present, need in [
        (SAMPLING, settings.do_sample, "do_sample=True"),
        (BEAMS, settings.num_beams > 1, "num_beams above 1"),
        (OUTPUTS, settings.return_dict_in_generate, "return_dict_in_generate=True"),
    ]:
        unused = [name for name in names if given.get(name) not in (None, 0, DEFAULTS.get(name))]
        if unused and not present:
            warnings.warn(f"{', '.join(unused)} has no effect without {need}", stacklevel=6)
