"""What `generate` can be told: the settings, their defaults, what is refused, and whose word counts.

The call's keywords win over its `generation_config`, that over the checkpoint's `generation_config.json`, and that over
`DEFAULTS`, which are the reference's.
"""

import difflib
import inspect
import warnings
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from minivlm.modules import config as hub_config

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


def settings_of(model: Any, config: GenerationConfig | None, kwargs: dict) -> tuple[GenerationConfig, dict[str, Any]]:
    """Split `kwargs` into settings (laid over the call's config, the checkpoint's and `DEFAULTS`) and model inputs."""
    settings = model.generation_config.over(GenerationConfig(**DEFAULTS))
    settings.use_cache = True  # LLaVA 34B ships False, which gives the same ids and encodes the pictures at every token
    settings = settings if config is None else config.over(settings)
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
