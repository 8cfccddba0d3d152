"""What `generate` can be told: the settings, their defaults, what is refused, and whose word counts.

The call's keywords win over its `generation_config`, that over the checkpoint's `generation_config.json`, and that over
`DEFAULTS`, which are the reference's.
"""

import difflib
import inspect
import json
import warnings
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minivlm.checkpoint import hub
from minivlm.modules import config as hub_config

FILE = "generation_config.json"
MAX_COPIES = 256  # of a prompt, when a file asks for them: each takes a cache
DEFAULTS = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "temperature": 1.0,
    "top_k": 50,  # on whenever sampling: 0 or None switches it off
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "use_cache": True,
}

# What else transformers can be told. None and the value given here change nothing; any other value is an error.
UNSUPPORTED: dict[str, Any] = {
    **dict.fromkeys(("guidance_scale", "encoder_repetition_penalty", "num_beam_groups"), 1),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "diversity_penalty"), 0),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "remove_invalid_values"), False),
    **dict.fromkeys(("renormalize_logits", "token_healing", "is_assistant", "use_mtp"), False),
    **dict.fromkeys(("top_h", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id")),
    **dict.fromkeys(("forced_eos_token_id", "exponential_decay_length_penalty", "watermarking_config", "constraints")),
    **dict.fromkeys(("prefix_allowed_tokens_fn", "negative_prompt_ids", "negative_prompt_attention_mask")),
    **dict.fromkeys(("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "speculation_type")),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "force_words_ids", "custom_generate")),
}
# These never change the ids of what is supported.
HARMLESS = {
    *("transformers_version", "_from_model_config", "_commit_hash", "decoder_start_token_id", "synced_gpus", "labels"),
    *("cache_implementation", "cache_config", "max_cache_len", "low_memory", "compile_config"),
    *("prefill_chunk_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size"),
    *("continuous_batching_config",),
}


@dataclass(slots=True, init=False)
class GenerationConfig:
    """How to generate, in the Hub's words. None is not set: the checkpoint's value, else that of `DEFAULTS`."""

    max_new_tokens: int | None  # wins over max_length
    max_length: int | None  # prompt and new tokens together
    min_new_tokens: int | None  # wins over min_length; no row ends before
    min_length: int | None  # prompt and new tokens together
    stop_strings: str | list[str] | None  # a row ends with the token that completes one; needs `tokenizer`
    max_time: float | None  # seconds after which no further token is begun
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
    eos_token_id: int | list[int] | None
    pad_token_id: int | None  # fills rows that have ended; the first eos id if not set
    bos_token_id: int | None
    use_cache: bool | None
    disable_compile: bool | None  # on CUDA, launch each step from Python instead of capturing one in a graph
    return_dict_in_generate: bool | None  # return a `GenerateOutput`
    output_scores: bool | None  # with the scores of each step in it
    output_logits: bool | None  # with the logits of each step in it
    other: dict[str, Any]  # settings that we keep but do not know how to obey: `generate` refuses them

    def __init__(self, *, other: dict[str, Any] | None = None, **settings: Any) -> None:
        """Keywords are the fields above, or what else the reference takes. ValueError for a name unknown to both."""
        for name in SETTINGS:
            setattr(self, name, plain(settings.pop(name, None)))
        for name in settings:
            check_known(name)
        self.other = {**(other or {}), **settings}

    @classmethod
    def from_hub(cls, values: dict[str, Any]) -> "GenerationConfig":
        """From generation_config.json; what we do not know is kept in `other`, where `generate` refuses it.

        Raises ValueError for a setting of a wrong type, and for copies of a prompt that no checkpoint needs.
        """
        known = {name: value for name, value in values.items() if name in SETTINGS}
        other = {name: value for name, value in values.items() if name not in SETTINGS}
        config = hub_config.from_hub(cls, known, other=other)
        hub_config.token_ids(config, "bos_token_id", "eos_token_id", "pad_token_id")
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
        sources = (config, getattr(config, "text_config", None))
        ids = {}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            found = (getattr(source, name, None) for source in sources)
            ids[name] = next((value for value in found if value is not None), None)
        return cls(**ids)

    def to_hub(self) -> dict[str, Any]:
        """What generation_config.json would hold: everything that is set."""
        return {name: plain(getattr(self, name)) for name in SETTINGS if getattr(self, name) is not None} | self.other

    def save_pretrained(self, folder: str | Path, config_file_name: str = FILE) -> None:
        """Write `to_hub()` into `folder`, which is made if need be."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_hub(), indent=2, sort_keys=True) + "\n"
        (Path(folder) / config_file_name).write_text(text, encoding="utf-8")

    def over(self, base: "GenerationConfig") -> "GenerationConfig":
        """This config where it is set, `base` elsewhere."""
        given = {name: getattr(self, name) for name in SETTINGS if getattr(self, name) is not None}
        return replace(base, **given, other=base.other | self.other)

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end a row, as a list."""
        return [] if self.eos_token_id is None else torch.as_tensor(self.eos_token_id).flatten().tolist()

    @property
    def copies(self) -> int:
        """How many sequences are continued for each prompt: its beams, or its samples."""
        return max(self.num_beams, self.num_return_sequences)


SETTINGS = tuple(item.name for item in fields(GenerationConfig) if item.name != "other")


def settings_of(model: Any, config: GenerationConfig | None, kwargs: dict) -> tuple[GenerationConfig, dict[str, Any]]:
    """Split `kwargs` into settings (laid over the call's config, the checkpoint's and `DEFAULTS`) and model inputs."""
    settings = model.generation_config.over(GenerationConfig(**DEFAULTS))
    settings.use_cache = True  # LLaVA 34B ships False, which gives the same ids and encodes the pictures at every token
    if config is not None:
        check("generation_config", config, isinstance(config, GenerationConfig), "a minivlm.GenerationConfig")
        settings = config.over(settings)
    takes = set(inspect.signature(type(model.model).forward).parameters) - {"self", "backend", "hidden_states", "last"}
    inputs = {name: value for name, value in kwargs.items() if name in takes and value is not None}
    settings = replace(settings, **{name: value for name, value in kwargs.items() if name in SETTINGS})
    other = settings.other | {name: value for name, value in kwargs.items() if name not in {*SETTINGS, *takes}}
    for name, value in other.items():
        _refuse(name, value, takes)
    settings.eos_token_id = [id for id in settings.eos_ids if 0 <= id < vocab_size(model)]  # others are never chosen
    if settings.pad_token_id == -1:  # in some files, this is how to say none
        settings.pad_token_id = None
    if settings.pad_token_id is None and settings.eos_ids:
        settings.pad_token_id = settings.eos_ids[0]
    for name in ("num_beams", "num_return_sequences", "length_penalty", "early_stopping"):
        if getattr(settings, name) is None:
            setattr(settings, name, DEFAULTS[name])
    _check_search(settings)
    _warn_unused(settings, kwargs)
    return settings, inputs


def check(name: str, value: Any, fits: bool, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name} should be {expected}, found {value!r:.80}")


def is_whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def vocab_size(model: Any) -> int:
    """How many tokens have a logit: IDEFICS keeps its image tokens apart from the others."""
    return hub_config.text_config(model.config).vocab_size + getattr(model.config, "additional_vocab_size", 0)


def plain(value: Any) -> Any:
    """numpy's numbers and arrays as Python's own, inside lists and tuples too."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def check_known(name: str, also: set[str] = frozenset()) -> None:
    """Raise ValueError for a name that is neither a setting of the reference nor in `also`."""
    known = {*SETTINGS, *UNSUPPORTED, *HARMLESS, *also}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"unknown setting {name!r:.80}" + (f"; did you mean {close[0]!r}?" if close else ""))


def _refuse(name: str, value: Any, takes: set[str]) -> None:
    """Raise unless leaving `name` out changes nothing."""
    if value is None or name in HARMLESS:
        return
    check_known(name, takes)
    if value != (neutral := UNSUPPORTED[name]) and value != []:
        raise ValueError(
            f"{name}={value!r:.80} is not supported, leave it at {neutral!r}; GenerationConfig has what is"
        )


def _check_search(settings: GenerationConfig) -> None:
    beams, copies, early = settings.num_beams, settings.num_return_sequences, settings.early_stopping
    check("num_beams", beams, is_whole(beams, 1), "an integer > 0")
    check("num_return_sequences", copies, is_whole(copies, 1), "an integer > 0")
    check("early_stopping", early, isinstance(early, bool) or early == "never", "True, False or 'never'")
    penalty = settings.length_penalty
    check("length_penalty", penalty, is_number(penalty) and abs(penalty) <= 10, "a number from -10 to 10")
    if beams == 1 < copies and not settings.do_sample:
        raise ValueError(f"num_return_sequences={copies}: greedy search has one answer; pass num_beams or do_sample")
    if 1 < beams < copies:
        raise ValueError(f"num_return_sequences={copies} is more than there are beams: num_beams={beams}")


def _warn_unused(settings: GenerationConfig, kwargs: dict) -> None:
    """Some settings do nothing without another one, which the caller probably forgot."""
    sampling = {"temperature": (1, 0), "top_k": (50, 0), "top_p": (1,), "min_p": (0,), "typical_p": (1,)}
    sampling |= {"epsilon_cutoff": (0,), "eta_cutoff": (0,)}
    beams = {"early_stopping": (False,), "length_penalty": (1,)}
    outputs = {"output_scores": (False,), "output_logits": (False,)}
    needs = [
        (sampling, settings.do_sample, "do_sample=True"),
        (beams, settings.num_beams > 1, "num_beams above 1"),
        (outputs, settings.return_dict_in_generate, "return_dict_in_generate=True"),
    ]
    for group, given, need in needs:
        unused = [name for name, neutral in group.items() if kwargs.get(name) not in (None, *neutral)]
        if unused and not given:
            warnings.warn(f"{', '.join(unused)} has no effect without {need}", stacklevel=5)
