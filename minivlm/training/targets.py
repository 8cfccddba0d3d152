"""What an adapter changes: its configuration in PEFT's words, and PEFT's rules for names of modules.

PEFT matches the module names of `transformers`, so names are compared in that spelling. A family's record lists where
ours differ from those of version 5 and of older ones (`spellings`).
"""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from minivlm.families import family
from minivlm.quantization.linear import QuantizedLinear

PRESETS = {
    "text": ("text",),
    "text+connector": ("text", "connector"),
    "all": ("text", "connector", "vision"),
}
ALL_LINEAR = "all-linear"
LARGEST = 2**31  # of alpha; far beyond, products would be infinite
SECONDS = 10  # for all regular expressions of one adapter; honest ones take milliseconds
BIASES = ("none", "all", "lora_only")
INITS = (True, False, "gaussian")
NAMES = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")


@dataclass(frozen=True)
class LoraConfig:
    """What is trained, in PEFT's words.

    target_modules: a preset ("text", "text+connector", "all"), "all-linear" (every linear layer but the output head), a
    regular expression that matches whole module names, or a list of names or ends of names. Names are those of
    `transformers`, for instance "model.text_model.layers.0.self_attn.q_proj".
    exclude_modules: an expression or a list too, left out. layers_to_transform: for a list of targets, only layers of
    these numbers (after one of the words in layers_pattern, or after any).
    r, lora_alpha: rank, and the scale s = alpha / r (alpha / sqrt(r) with use_rslora); `rank_pattern` and
    `alpha_pattern` map ends of names to other values. lora_dropout: on the input of A, in training.
    modules_to_save: ends of names of modules that are trained whole, such as "lm_head" and "embed_tokens".
    bias: "all" trains every bias of the model, "lora_only" those of targeted layers.
    init_lora_weights: True: A uniform, B zero; "gaussian": A normal, B zero; False: B is normal too.
    use_dora: the length of each row of W is trained apart from its direction.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | tuple[str, ...] = "text+connector"
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_dropout: float = 0.0
    modules_to_save: tuple[str, ...] | None = None
    bias: str = "none"
    init_lora_weights: bool | str = True
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        for name in (*NAMES, "layers_to_transform"):
            self._listed(name, int if name == "layers_to_transform" else str)
        if not self.target_modules:
            raise ValueError("target_modules should be text or a list of names, found nothing")
        if not all(isinstance(pattern, dict) for pattern in (self.rank_pattern, self.alpha_pattern)):
            raise ValueError("rank_pattern and alpha_pattern should map ends of module names to numbers")
        ranks = [self.r, *self.rank_pattern.values()]
        if not all(type(rank) is int and 1 <= rank <= 2**16 for rank in ranks):
            raise ValueError(f"r and the values of rank_pattern are whole numbers from 1, found {ranks!r:.80}")
        alphas = [self.lora_alpha, *self.alpha_pattern.values()]
        if not all(type(alpha) in (int, float) and abs(alpha) <= LARGEST for alpha in alphas):
            raise ValueError(
                f"lora_alpha and the values of alpha_pattern are numbers to {LARGEST}, found {alphas!r:.80}"
            )
        if type(self.lora_dropout) not in (int, float) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is from 0 to below 1, found {self.lora_dropout!r:.80}")
        for name, known in {"bias": BIASES, "init_lora_weights": INITS}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(map(str, known))}; found {getattr(self, name)!r:.80}")
        for name in ("use_rslora", "use_dora"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is true or false, found {getattr(self, name)!r:.80}")

    def _listed(self, name: str, kind: type) -> None:
        """Make a tuple of a list of names or numbers; only the first two of `NAMES` may be text. Else ValueError."""
        value = getattr(self, name)
        if type(value) is kind and name not in NAMES[:2]:
            value = (value,)
        if isinstance(value, list | set | tuple):
            value = tuple(value)
            if not all(type(entry) is kind for entry in value):
                raise ValueError(f"{name} should be a list of {kind.__name__}, found {value!r:.80}")
        elif value is not None and type(value) is not kind:
            raise ValueError(f"{name} should be a list of {kind.__name__}, found {value!r:.80}")
        object.__setattr__(self, name, value)


def part_of(model_type: str, name: str) -> str:
    """The part that a module or parameter of this name belongs to: "text", "connector", "vision" or "head"."""
    parts = family(model_type).parts.items()
    return next((part for part, prefixes in parts if name.startswith(prefixes)), "head")


def spelled(name: str, generation: dict[str, str]) -> str:
    """One of our names as a version of transformers spells it."""
    for ours, theirs in generation.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def generations(model: nn.Module) -> tuple[dict[str, str], ...]:
    """The spellings of a model's family, newest first."""
    return family(model.config.model_type).spellings


def preset_pattern(model: nn.Module, preset: str) -> str:
    """A preset as a regular expression over module names, which is what PEFT reads from a saved adapter.

    It matches the linear layers of the preset's parts and nothing else.
    """
    kind, spelling = model.config.model_type, generations(model)[0]
    prefixes, leaves = set(), set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | QuantizedLinear) and part_of(kind, name) in PRESETS[preset]:
            # The first word after "model."
            prefixes.add(spelled(name, spelling).split(".")[1])
            leaves.add(name.rpartition(".")[2])
    return rf"model\.({'|'.join(sorted(prefixes))})\.(.*\.)?({'|'.join(sorted(leaves))})"


def targeted(config: LoraConfig, names: Iterable[str], linears: Iterable[str]) -> list[str]:
    """Those of `names` (as transformers spells them) that get low-rank matrices; PEFT's rules, see `LoraConfig`.

    linears: the names among them that "all-linear" means.
    """
    names = list(names)
    wanted, left_out = config.target_modules, config.exclude_modules or ()
    found = matches([p for p in (wanted, left_out) if isinstance(p, str) and p != ALL_LINEAR], names)
    found[ALL_LINEAR] = set(linears)
    chosen = _picked(wanted, names, found)
    if not isinstance(wanted, str):  # as in PEFT, layers are counted for lists alone
        chosen = {name for name in chosen if _in_layers(name, config)}
    chosen -= _picked(left_out, names, found)
    whole = [re.compile(rf"(^|.*\.){re.escape(module)}($|\.)") for module in config.modules_to_save or ()]
    return [name for name in names if name in chosen and not any(pattern.match(name) for pattern in whole)]


def _picked(wanted: str | tuple[str, ...], names: list[str], found: dict[str, set[str]]) -> set[str]:
    """The names that a regular expression matches, or that end in one of several entries."""
    if isinstance(wanted, str):
        return found[wanted]
    return {name for name in names if any(name == entry or name.endswith(f".{entry}") for entry in wanted)}


def _in_layers(name: str, config: LoraConfig) -> bool:
    """Whether the first number in a name is one of `layers_to_transform`, where that is given."""
    layers = config.layers_to_transform
    if layers in (None, ()):
        return True
    words = [re.escape(pattern) for pattern in config.layers_pattern or ()] or ["[^.]+"]
    numbers = (re.match(rf"(?:.*?\.)?{word}\.(\d+)\.", name) for word in words)
    return next((int(number[1]) in layers for number in numbers if number), False)


def saved_whole(config: LoraConfig, modules: Iterable[str], parameters: Iterable[str]) -> list[str]:
    """Those of `parameters` that lie in a module of `modules_to_save`; all names as transformers spells them.

    PEFT compares ends of names, not words: "norm" also means a module called "layer_norm".
    """
    entries = tuple(config.modules_to_save or ())
    whole = [f"{module}." for module in modules if module.endswith(entries)] if entries else []
    return [name for name in parameters if name.startswith(tuple(whole))]


def valued(patterns: dict[str, Any], default: Any, names: list[str]) -> dict[str, Any]:
    """`rank_pattern` or `alpha_pattern` for each name: the value of the first key that matches its end."""
    found = matches([_at_end(key) for key in patterns], names)
    values = {}
    for name in names:
        keys = (key for key in patterns if name in found[_at_end(key)])
        values[name] = patterns.get(next(keys, None), default)
    return values


def _at_end(key: str) -> str:
    return rf"(?:.*\.)?(?:{key})"


_CHILD = """
import json, re, sys
patterns, names = json.load(sys.stdin)
try:
    json.dump([[name for name in names if re.fullmatch(pattern, name)] for pattern in patterns], sys.stdout)
except (re.error, RecursionError, OverflowError) as error:
    json.dump(str(error), sys.stdout)
"""


def matches(patterns: list[str], names: list[str]) -> dict[str, set[str]]:
    """For each regular expression the names that it matches as a whole.

    A child process does it within `SECONDS`: adapters are other people's files, and an expression can backtrack for
    ever. ValueError for one that does, or that is not valid.
    """
    if not patterns:
        return {}
    shown = ", ".join(f"{pattern!r:.80}" for pattern in patterns)
    command, question = [sys.executable, "-I", "-c", _CHILD], json.dumps([patterns, names])
    try:
        child = subprocess.run(command, input=question, capture_output=True, text=True, timeout=SECONDS, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"{shown} took more than {SECONDS} s to match the module names; list the modules instead"
        ) from error
    found = json.loads(child.stdout)
    if isinstance(found, str):
        raise ValueError(f"{shown}: not a regular expression ({found})")
    return {pattern: set(some) for pattern, some in zip(patterns, found, strict=True)}


def trained(model: nn.Module) -> dict[str, int]:
    """How many numbers of each part ("text", "connector", "vision", "head") are trained."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[part_of(model.config.model_type, name)] += parameter.numel()
    return dict(counts)
