"""Reads tokenizer.json and the older small files beside it, and trusts none of them.

`tokenizers` accepts a vocabulary that names an id twice, a normaliser that makes a text a thousand times longer, or a
pattern that causes a Rust panic. This file refuses anything that could exhaust memory or silently change ids.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from minivlm.checkpoint import hub

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
MAX_TOKENIZER = 2**25  # bytes of tokenizer.json; the released checkpoints need up to a third
MAX_ADDED = 2**14  # added tokens; every text is searched for each of them
MAX_GROWTH = 256  # factor by which normalisation may lengthen a text; replacing blanks by "▁" triples it
MAX_ID = 2**24  # `tokenizers` copies a tokenizer by counting all ids up to the largest


def attempt(message: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call `tokenizers`; whatever it raises becomes a ValueError, Rust panics (which are not `Exception`s) included."""
    try:
        return call(*args, **options)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{message}: {error}") from error
        raise


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Read tokenizer.json unchanged; CheckpointError if `tokenizers` cannot read it, or if it is unsafe."""
    if path.stat().st_size > MAX_TOKENIZER:
        raise hub.CheckpointError(f"{path} has {path.stat().st_size:,} bytes, expected at most {MAX_TOKENIZER:,}")
    content = path.read_bytes()
    hub.check_start(path, content)
    with hub.blame(str(path)):
        added = _added_tokens(content)
        known = f"no tokenizer.json that `tokenizers` {tokenizers.__version__} reads"
        backend = attempt(known, tokenizers.Tokenizer.from_buffer, content)
        for token in added:
            found = backend.token_to_id(token["content"])
            if found != token["id"]:
                raise ValueError(f"{token['content']!r:.80} has id {found}, but {token['id']!r:.40} under added_tokens")
        if getattr(backend.model, "dropout", None):
            raise ValueError(f"model.dropout {backend.model.dropout} makes ids random; set it to null")
        token, largest = max(backend.get_vocab().items(), key=lambda item: item[1], default=("", 0))
        if largest > MAX_ID:
            raise ValueError(f"{token!r:.80} has id {largest:,}, expected at most {MAX_ID:,}")
        for name in ("normalizer", "post_processor", "decoder"):
            part = getattr(backend, name)
            if part is not None and (times := _growth(json.loads(part.__getstate__()))) > MAX_GROWTH:
                raise ValueError(f"the {name} can make a text {times:,} times as long, expected at most {MAX_GROWTH}")
    return backend


def _added_tokens(content: bytes) -> list[dict[str, Any]]:
    """The added_tokens of tokenizer.json, found without parsing its vocabulary, which `tokenizers` does."""
    found = re.search(rb'"added_tokens"\s*:\s*(?=\[)', content)
    if found is None:
        return []
    section = content[found.end() : found.end() + 2**8 * MAX_ADDED].decode(errors="replace")
    try:
        tokens, _ = json.JSONDecoder().raw_decode(section)
    except RecursionError as error:
        raise ValueError("added_tokens is nested too deeply") from error
    except json.JSONDecodeError:
        tokens = [None]  # longer than the section, or not JSON
    known = all(isinstance(token, dict) and isinstance(token.get("content"), str) and "id" in token for token in tokens)
    if not known or len(tokens) > MAX_ADDED:
        raise ValueError(f"added_tokens is a list of at most {MAX_ADDED} objects with id and content")
    return [token for token in tokens if token["content"]]


def _growth(spec: dict[str, Any]) -> int:
    """The factor by which a normalizer, post-processor or decoder can lengthen a text: by replacements, in bytes, or by
    a template, which may repeat it."""
    parts = spec.get("normalizers") or spec.get("processors") or spec.get("decoders") or []
    own = 1
    if spec.get("type") == "Replace":
        own = max(1, len(spec.get("content", "").encode()))
    elif spec.get("type") == "TemplateProcessing":
        own = max(1, sum("Sequence" in piece for piece in spec["single"]))
    return own * math.prod(map(_growth, parts))


def listed_tokens(added: dict[str, Any], decoder: Any) -> dict[int, tuple[str, bool]]:
    """Id → (token, special) from added_tokens.json, overridden by tokenizer_config.json's added_tokens_decoder."""
    if not isinstance(decoder, dict):
        raise ValueError(f"added_tokens_decoder is an object of ids and tokens, found {decoder!r:.80}")
    if max(len(added), len(decoder)) > MAX_ADDED:
        raise ValueError(f"the files beside tokenizer.json list more than {MAX_ADDED} added tokens")
    found: dict[int, tuple[str, bool]] = {}
    for token, i in added.items():
        if type(i) is not int or not 0 <= i < 2**32:
            raise ValueError(f"added_tokens.json gives each token its id, found {i!r:.40} for {token!r:.80}")
        found[i] = token, True
    for i, token in decoder.items():
        special = token.get("special", True) if isinstance(token, dict) else None
        if not re.fullmatch(r"[0-9]{1,9}", i) or not isinstance(special, bool) or not token_text(token):
            raise ValueError(f"added_tokens_decoder gives an id its token, found {token!r:.80} for {i!r:.40}")
        found[int(i)] = token_text(token), special
    return found


def token_text(token: Any, name: str = "a token") -> str | None:
    """The string of a token, given in JSON as a string or as {"content": …}."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{name} should be a string, found {token!r:.80}")
    return text
