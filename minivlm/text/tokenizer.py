"""Text to ids and back, with the `tokenizers` library and the checkpoint's own `tokenizer.json`, unchanged.

`transformers` 5 rebuilds Llama-type tokenizers and so loses the "▁" (28705 in Mistral's vocabulary) that the file puts
before text after a special token; the models were trained with it. The other JSON files only assign roles (bos, eos,
pad, unk) and the padding side.
"""

import copy
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from minivlm.checkpoint import hub
from minivlm.checkpoint.files import saving
from minivlm.modules.inputs import Inputs
from minivlm.text.shown import short
from minivlm.text.tokenizer_file import ROLES, attempt, listed_tokens, read_backend, token_text
from minivlm.text.tokenizer_tools import TokenizerTools, to_lists

UNLIMITED = 2**24  # tokens; files write 1e30 for "no limit"
MAX_MISSING = 2**10  # tokens that are missing from tokenizer.json but in the files beside it
MAX_AROUND = 16  # special tokens that tokenizer.json puts around a text
MAX_TEXT = 2**22  # characters; a hundred times the longest context of the models here
# options of `Tokenizer.assemble` that calls of tokenizers and processors accept
TEXT_OPTIONS = ("padding", "truncation", "max_length", "add_special_tokens", "padding_side", "pad_to_multiple_of")
BROKEN = "this tokenizer.json cannot be followed"
Span = tuple[int, int]  # (begin, end) of characters in a text


def as_texts(text: Any) -> list[str]:
    """One text or several as a list. ValueError for anything else."""
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"text is a string or a list of strings, found {short(text)}")
    return list(texts)


def _id_of(role: str) -> property:
    """The id of a role's token, None without one. ValueError if it is not in the vocabulary."""

    def find(tokenizer: "Tokenizer") -> int | None:
        token = getattr(tokenizer, role)
        found = None if token is None else tokenizer.backend.token_to_id(token)
        if token is not None and found is None:
            raise ValueError(
                f"{token!r:.80} is not in the vocabulary; add it with tokenizer.add_tokens([{token!r:.80}])"
            )
        return found

    return property(find)


@dataclass(frozen=True)
class Prompt:
    """A text to be encoded: plain, or from a chat template, with guards in typed text (see `rendering`)."""

    text: str
    guard: str | None = None
    learned: list[Span] | None = None  # in characters of `text`, guards included

    def encode(self, tokenizer: "Tokenizer") -> tuple[list[int], list[int]]:
        """Ids without bos and eos, and 1 for those of `learned` tokens."""
        if self.guard is None:
            ids = tokenizer.encode(self.text, add_special_tokens=False)
        elif self.learned is not None:
            return tokenizer.encode_learned(self.text, self.guard, self.learned)
        else:
            ids = tokenizer.encode_guarded(self.text, self.guard)
        return ids, [0] * len(ids)


class Tokenizer(TokenizerTools):
    """Callable like transformers' tokenizers: `tokenizer(texts, padding=True, return_tensors="pt")`.

    bos_token, eos_token, unk_token and pad_token are strings or None and may be set; `…_token_id` follows.
    """

    bos_token_id, eos_token_id, unk_token_id, pad_token_id = map(_id_of, ROLES)

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> None:
        self.backend = backend
        self.config = dict(config or {})
        for role in ROLES:
            setattr(self, role, token_text(self.config.get(role), role))
        self.padding_side = self.config.get("padding_side", "left")  # decoders continue the last token
        self.truncation_side = self.config.get("truncation_side", "right")
        for name in ("padding_side", "truncation_side"):
            if getattr(self, name) not in ("left", "right"):
                raise ValueError(f'{name} is "left" or "right", found {getattr(self, name)!r:.80}')
        self.model_max_length = self.config.get("model_max_length") or UNLIMITED
        if type(self.model_max_length) not in (int, float) or not self.model_max_length >= 1:
            raise ValueError(f"model_max_length is a number of tokens, found {self.model_max_length!r:.80}")
        self.chat_template: str | None = None
        backend.no_padding()
        backend.no_truncation()

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, **where: Any) -> "Tokenizer":
        """From a folder or Hub id; `where` is what `hub.source` takes (revision, cache_dir, token, …)."""
        return cls.from_source(hub.source(name_or_folder, **where))

    @classmethod
    def from_source(cls, source: hub.Source) -> "Tokenizer":
        """Read tokenizer.json and the older small files beside it.

        Raises CheckpointError for damaged or contradictory files, and for one with which a text could exhaust memory.
        """
        backend = read_backend(source.file("tokenizer.json"))
        config = source.json("tokenizer_config.json", required=False) or {}
        roles = source.json("special_tokens_map.json", required=False) or {}
        added = source.json("added_tokens.json", required=False) or {}
        with hub.blame(f"{source.name}: the tokenizer's files"):
            tokenizer = cls(backend, config | {role: roles[role] for role in ROLES if role in roles})
            tokenizer._add_listed(listed_tokens(added, config.get("added_tokens_decoder") or {}))
            _ = tokenizer._around  # encode a first text now, so that errors appear here
        return tokenizer

    def _add_listed(self, listed: dict[int, tuple[str, bool]]) -> None:
        """Add the tokens of `listed`, id → (token, special), that tokenizer.json lacks. ValueError if an id differs."""
        missing = {i: token for i, token in sorted(listed.items()) if self.backend.token_to_id(token[0]) is None}
        if len(missing) > MAX_MISSING:
            raise ValueError(f"tokenizer.json lacks {len(missing):,} tokens that the files beside it have")
        for special, tokens in itertools.groupby(missing.values(), key=lambda token: token[1]):
            self.add_tokens([token for token, _ in tokens], special=special)
        for expected, (token, _) in listed.items():
            found = self.backend.token_to_id(token)
            if found != expected:
                raise ValueError(
                    f"{token!r:.80} has id {found} by tokenizer.json but {expected} by the files beside it; "
                    "these files are not from one checkpoint"
                )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, as transformers reads them."""
        folder = Path(folder)
        roles, others = self.special_tokens_map, self.additional_special_tokens
        flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        decoder = {
            str(i): {flag: getattr(token, flag) for flag in flags}
            for i, token in self.backend.get_added_tokens_decoder().items()
        }
        config = self.config | roles | {"padding_side": self.padding_side, "added_tokens_decoder": decoder}
        config |= {"additional_special_tokens": others, "model_max_length": self.model_max_length}
        with saving() as save:
            save.text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
            save.json(folder / "tokenizer_config.json", config)
            save.json(folder / "special_tokens_map.json", roles | {"additional_special_tokens": others})

    # ---- text → ids

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        return_tensors: str | None = None,
        return_offsets_mapping: bool = False,
        **options: Any,
    ) -> Inputs:
        """`input_ids` and `attention_mask` (1 = token, 0 = padding): flat lists for one string, else one per text.

        `options` are TEXT_OPTIONS, see `assemble`. `return_offsets_mapping` adds the (begin, end) of every token in its
        text; (0, 0) for special tokens around it.
        """
        single = isinstance(text, str)
        encoded = [_encode(self.backend, each, False) for each in as_texts(text)]
        beside = {"offset_mapping": ([each.offsets for each in encoded], (0, 0))} if return_offsets_mapping else {}
        inputs = self.assemble([each.ids for each in encoded], beside=beside, **options)
        if single and return_tensors is None:
            return Inputs({name: rows[0] for name, rows in inputs.items()})
        return inputs.convert(return_tensors)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of one string. Special tokens written out in it become their ids."""
        return _encode(self.backend, text, add_special_tokens).ids

    def encode_guarded(self, text: str, guard: str) -> list[int]:
        """Ids of a prompt in which special tokens count only if they do not contain `guard`.

        `guard` is a character that marks typed text (see `rendering`). The prompt is first split at its own special
        tokens; then guards are removed, and the text in between is encoded without special tokens. Between the same
        special tokens, the ids are those of `encode` on the text without guards.
        """
        return [i for _, _, encoding in self._encode_pieces(text, guard) for i in encoding.ids]

    def encode_learned(self, text: str, guard: str, learned: Sequence[Span]) -> tuple[list[int], list[int]]:
        """`encode_guarded`, and for each id 1 if a character of its token lies in one of the spans of `text`, else 0.

        A blank outside all of the tokenizer's offsets belongs to the token after it.
        """
        inside = bytearray(len(text))  # 1 for characters in a span
        for begin, end in learned:
            inside[begin:end] = b"\1" * len(inside[begin:end])
        ids: list[int] = []
        marks: list[int] = []
        for begin, end, encoding in self._encode_pieces(text, guard):
            own = bytes(m for m, c in zip(inside[begin:end], text[begin:end], strict=True) if c != guard)
            position = 0
            for first, last in encoding.offsets:
                marks.append(int(1 in own[min(first, position) : last]))
                position = max(position, last)
            ids += encoding.ids
        return ids, marks

    def _encode_pieces(self, text: str, guard: str) -> Iterator[tuple[int, int, tokenizers.Encoding]]:
        """Runs of special tokens and the text between them, each with its (begin, end) in `text`."""
        position = 0
        runs = self._special_runs.finditer(text) if self._special_runs else ()
        for match in [*runs, None]:
            end = match.start() if match else len(text)
            plain = text[position:end].replace(guard, "")
            if plain:
                yield position, end, _encode(self._plain[0 if position == 0 else 1], plain, False)
            if match:
                yield *match.span(), _encode(self.backend, match.group(), False)
                position = match.end()

    def guard(self, text: str, guard: str) -> str:
        """Put `guard` after every character that could begin a special token."""
        for first in self._first_characters:
            text = text.replace(first, first + guard)
        return text

    def assemble(
        self,
        bodies: list[list[int]],
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        keep: int | None = None,
        beside: dict[str, tuple[list[list[Any]], Any]] | None = None,
    ) -> Inputs:
        """Ids of texts → rows: truncate the text, add bos and eos as in tokenizer.json, pad.

        The options are those of transformers, where `max_length` alone also truncates. `beside` maps a name to further
        values for each id, and a filler for added tokens. ValueError if truncation would remove an id `keep`: an
        image's tokens cannot be cut.
        """
        before, after = self._around if add_special_tokens else ([], [])
        limit = self._limit(padding, truncation, max_length)
        rows = []
        more: dict[str, list[list[Any]]] = {name: [] for name in beside or {}}
        for number, body in enumerate(bodies):
            room = len(body) if limit is None else max(0, limit - len(before) - len(after))
            kept = slice(max(0, len(body) - room), None) if self.truncation_side == "left" else slice(room)
            if keep is not None and body[kept].count(keep) < body.count(keep):
                raise ValueError(
                    f"prompt {number} has {len(before) + len(body) + len(after)} tokens with its images, and "
                    f"max_length={limit} would cut into an image; raise it, shorten the text or use fewer images"
                )
            rows.append([*before, *body[kept], *after])
            for name, (values, other) in (beside or {}).items():
                more[name].append([*[other] * len(before), *values[number][kept], *[other] * len(after)])
        masks = [[1] * len(row) for row in rows]
        length = self._padded_length(rows, padding, max_length, pad_to_multiple_of)
        if length is not None:
            side = padding_side or self.padding_side
            rows = [_padded(row, self._pad_id(), length, side) for row in rows]
            masks = [_padded(mask, 0, length, side) for mask in masks]
            for name, (_, other) in (beside or {}).items():
                more[name] = [_padded(values, other, length, side) for values in more[name]]
        return Inputs(input_ids=rows, attention_mask=masks, **more)

    def _pad_id(self) -> int:
        if self.pad_token is None:
            raise ValueError("this tokenizer has no pad token; set tokenizer.pad_token = tokenizer.eos_token, for one")
        return self.pad_token_id

    def _limit(self, padding: bool | str, truncation: bool | str | None, max_length: int | None) -> int | None:
        """The most tokens a row may have, None without a limit; checks the options."""
        if padding not in (True, False, "longest", "max_length", "do_not_pad"):
            raise ValueError(f'padding is True, False, "longest" or "max_length", found {padding!r}')
        if truncation not in (True, False, None, "longest_first", "only_first", "do_not_truncate"):
            raise ValueError(f'truncation is True, False or "longest_first", found {truncation!r}')
        if max_length is not None and (type(max_length) is not int or not 1 <= max_length < UNLIMITED):
            raise ValueError(f"max_length is a whole number from 1 to {UNLIMITED - 1:,}, found {max_length!r}")
        if truncation is None:
            truncation = max_length is not None and padding is False
        limit = self.model_max_length if max_length is None else max_length
        return None if truncation in (False, "do_not_truncate") or limit >= UNLIMITED else int(limit)

    def _padded_length(
        self, rows: list[list[int]], padding: bool | str, max_length: int | None, multiple: int | None
    ) -> int | None:
        """The length to pad rows to; None for no padding."""
        if multiple is not None and (type(multiple) is not int or not 1 <= multiple < UNLIMITED):
            raise ValueError(f"pad_to_multiple_of is a whole number from 1, found {multiple!r}")
        limit = max_length or self.model_max_length
        if padding in (False, "do_not_pad") or (padding == "max_length" and limit >= UNLIMITED):
            return None
        length = max([len(row) for row in rows] + ([int(limit)] if padding == "max_length" else []))
        return -(-length // (multiple or 1)) * (multiple or 1)

    # ---- ids → text

    def decode(
        self, ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str | list[str]:
        """Text of one sequence of ids (list, array, tensor or one int); of a batch of sequences, a list of texts.

        `clean_up_tokenization_spaces` is accepted and does nothing, as in transformers 5 for this kind of tokenizer.
        """
        ids = to_lists(ids)
        ids = [ids] if isinstance(ids, int) else ids
        if isinstance(ids, list) and any(isinstance(row, list) for row in ids):
            return [self.decode(row, skip_special_tokens) for row in ids]
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise TypeError(f"ids are whole numbers in a list, array or tensor, found {short(ids)}")
        if ids and not 0 <= min(ids) <= max(ids) < 2**32:
            raise ValueError(
                f"ids lie in 0..{len(self) - 1}, found {min(ids)} to {max(ids)}; replace label fillers (-100)"
            )
        return attempt(BROKEN, self.backend.decode, ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """One text per sequence; a flat list of ids counts as one sequence, as in transformers."""
        sequences = to_lists(sequences)
        texts = self.decode(sequences, skip_special_tokens) if sequences != [] else []
        return [texts] if isinstance(texts, str) else texts

    def check_vocabulary(self, size: int) -> None:
        """ValueError unless every token has its own id, below the `size` of the model's embedding table.

        Special tokens may exceed it (idefics2-8b-base has one that its model never learnt): no text encodes to them.
        """
        tokens: dict[int, str] = {}
        special = set(self.all_special_tokens)
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i >= size and token not in special:
                raise ValueError(f"{token!r:.80} has id {i}, but the model has {size} tokens")
            if tokens.setdefault(i, token) != token:
                raise ValueError(f"{token!r:.80} and {tokens[i]!r:.80} have the same id, {i}")

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Id of a token or ids of tokens; the unk id (or None) for tokens that are not in the vocabulary."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self.backend.token_to_id(tokens)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """Token of an id or tokens of ids; None outside the vocabulary."""
        if isinstance(ids, int):
            return self.backend.id_to_token(ids)
        return [self.backend.id_to_token(int(i)) for i in ids]

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    # ---- special tokens

    def add_tokens(self, tokens: Sequence[str], special: bool = False) -> int:
        """Append the tokens that are new and return their number. The model needs an embedding row for each."""
        new = [t for t in dict.fromkeys(tokens) if self.backend.token_to_id(t) is None]
        if special and (plain := set(tokens) - set(new) - set(self.all_special_tokens)):
            raise ValueError(f"tokenizer.json has {min(plain)} as ordinary text, not as the special token it should be")
        make = [tokenizers.AddedToken(t, normalized=False, special=special) for t in new]
        count = attempt(BROKEN, self.backend.add_special_tokens if special else self.backend.add_tokens, make)
        self._forget()
        return count

    def _forget(self) -> None:
        """Drop cached values after the vocabulary or the roles have changed."""
        for name in ("_first_characters", "_special_runs", "_plain", "_around"):
            self.__dict__.pop(name, None)

    def __setattr__(self, name: str, value: Any) -> None:
        changed = name in ROLES and value != getattr(self, name, None)
        super().__setattr__(name, value)
        if changed:
            self._forget()

    @property
    def all_special_tokens(self) -> list[str]:
        """Every token that `tokenizer.json` marks as special, in id order."""
        return [t.content for _, t in sorted(self.backend.get_added_tokens_decoder().items()) if t.special]

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The roles that are set: {"bos_token": "<s>", …}; chat templates get these variables."""
        return {role: getattr(self, role) for role in ROLES if getattr(self, role) is not None}

    @property
    def additional_special_tokens(self) -> list[str]:
        """Special tokens that are neither bos, eos, unk nor pad."""
        return [t for t in self.all_special_tokens if t not in self.special_tokens_map.values()]

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.additional_special_tokens)

    @property
    def control_tokens(self) -> list[tokenizers.AddedToken]:
        """Tokens that typed text must not produce: special ones, and those with a role."""
        roles = self.special_tokens_map.values()
        return [t for t in self.backend.get_added_tokens_decoder().values() if t.special or t.content in roles]

    @cached_property
    def _first_characters(self) -> set[str]:
        return {token.content[0] for token in self.control_tokens}

    @cached_property
    def _special_runs(self) -> re.Pattern[str] | None:
        """Matches a run of special tokens, with the blanks that lstrip and rstrip tokens swallow."""
        special = sorted(self.control_tokens, key=lambda t: -len(t.content))
        before = r"(?:(?<!\s)\s*+)?"  # only from the first blank on, otherwise a run of n blanks costs n² steps
        each = [before * t.lstrip + re.escape(t.content) + r"\s*+" * t.rstrip for t in special]
        return re.compile(f"(?:{'|'.join(each)})+") if each else None

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The ids added before and after a text, found by encoding one."""
        encoded = attempt(BROKEN, self.backend.encode, "a")
        inside = [i for i, special in enumerate(encoded.special_tokens_mask) if not special]
        if not inside:
            raise ValueError("this tokenizer.json has no token for the letter a, so it is not a language model's")
        around = encoded.ids[: inside[0]], encoded.ids[inside[-1] + 1 :]
        both = [*around[0], *around[1]]
        if len(both) > MAX_AROUND or None in self.convert_ids_to_tokens(both):
            raise ValueError(f"tokenizer.json may add up to {MAX_AROUND} tokens around a text, found {both!r:.80}")
        return around

    @cached_property
    def _plain(self) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
        """Two copies without special tokens: for text at the start of a prompt, and for text after a token.

        They differ only if Metaspace adds its "▁" to the first piece of a prompt alone (LLaVA's vicuna).
        """
        start = copy.deepcopy(self.backend)
        start.add_special_tokens([t.content for t in self.control_tokens if not t.special])
        start.encode_special_tokens = True
        text = start.to_str()
        if not re.search(r'"prepend_scheme":\s*"first"', text):  # parsing megabytes takes longer than looking
            return start, start
        spec = json.loads(text)
        if '"prepend_scheme": "first"' not in json.dumps([spec["pre_tokenizer"], spec["normalizer"]]):
            return start, start
        parts = json.dumps(spec["pre_tokenizer"]).replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        later = tokenizers.Tokenizer.from_str(json.dumps(spec | {"pre_tokenizer": json.loads(parts)}))
        later.encode_special_tokens = True
        return start, later


def _encode(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
    if not isinstance(text, str):
        raise TypeError(f"text is a string, found {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise ValueError(f"the text has {len(text):,} characters, far beyond any model's positions; shorten it")
    wrong = f"the text {text[:40]!r} cannot be encoded (a lone surrogate, for one, is not text)"
    return attempt(wrong, backend.encode, text, add_special_tokens=add_special_tokens)


def _padded(row: list[Any], value: Any, length: int, side: str) -> list[Any]:
    if side not in ("left", "right"):
        raise ValueError(f'padding_side is "left" or "right", found {side!r}')
    filler = [value] * (length - len(row))
    return filler + row if side == "left" else row + filler
