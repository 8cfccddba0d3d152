"""Differences from transformers that are deliberate (docs/differences.md), recognised where they show in the inputs.

A report names them and does not count them. A known difference must explain everything that differs in an input: if
anything is left, that input counts as before.
"""

import itertools
from typing import Any

import torch

from minivlm import auto
from minivlm.parity.sides import Side

BLANKS = "transformers 5 drops or adds a blank after a special token"
END = "in transformers, text after </s> does not attend to its image"


def known_differences(a: str, side: Side, theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, str]:
    """The inputs that differ for a known reason → that reason.

    a: a description of the other side.  side: this side, b.  theirs, ours: the outputs of the processors of a and b,
    one row each.
    """
    codes = {a.split()[0], side.code}
    versions = [words for words in (a, side.version) if words.startswith("transformers ")]
    if codes != {"minivlm", "transformers"} or not versions[0].startswith("transformers 5."):
        return {}
    if len(theirs["input_ids"]) != 1 or len(ours["input_ids"]) != 1:
        return {}
    if side.code == "transformers":
        theirs, ours = ours, theirs
    tokenizer = auto.AutoProcessor.from_pretrained(side.model).tokenizer
    return _reasons(theirs, ours, tokenizer)


def _reasons(theirs: dict[str, Any], ours: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    """As `known_differences`; theirs is from transformers, ours from minivlm."""
    ids = theirs["input_ids"][0].tolist(), ours["input_ids"][0].tolist()
    pairs = _aligned(*ids, tokenizer)
    if pairs is None:
        return {}
    found = {} if ids[0] == ids[1] else {"input_ids": BLANKS}
    rows = torch.tensor(pairs).T  # (2, tokens that both have)
    for name in ("attention_mask", "image_attention_mask"):
        if name not in theirs or name not in ours or theirs[name].shape[2:] != ours[name].shape[2:]:
            continue
        masks = theirs[name][0, rows[0]], ours[name][0, rows[1]]
        if torch.equal(*masks):
            if found:
                found[name] = BLANKS
        elif name == "image_attention_mask" and _only_after_end(*masks, rows[1], ids[1], tokenizer.eos_token_id):
            found[name] = END
    return found


def _aligned(theirs: list[int], ours: list[int], tokenizer: Any) -> list[tuple[int, int]] | None:
    """Positions (theirs, ours) of the common tokens; None if more than blanks after special tokens differs."""
    special = set(tokenizer.backend.get_added_tokens_decoder())
    segments = _segments(theirs, special), _segments(ours, special)
    if len(segments[0]) != len(segments[1]):
        return None
    pairs: list[tuple[int, int]] = []
    for one, other in zip(*segments, strict=True):
        texts = [theirs[position] for position in one], [ours[position] for position in other]
        if texts[0] == texts[1]:
            pairs += zip(one, other, strict=True)
        elif texts[0][0] == texts[1][0] and texts[0][0] in special and _only_blanks(*texts, tokenizer.backend):
            tail = min(len(one), len(other)) - 1
            pairs += [(one[0], other[0]), *zip(one[len(one) - tail :], other[len(other) - tail :], strict=True)]
        else:
            return None
    return pairs


def _segments(ids: list[int], special: set[int]) -> list[range]:
    """The positions from each special token up to the next."""
    bounds = sorted({0, len(ids), *(position for position, id in enumerate(ids) if id in special)})
    return [range(begin, end) for begin, end in itertools.pairwise(bounds)]


def _only_blanks(theirs: list[int], ours: list[int], backend: Any) -> bool:
    """Whether two segments, each as this vocabulary encodes it, are the same text except for one blank at the start."""
    texts = []
    for ids in (theirs[1:], ours[1:]):
        text = _text([backend.id_to_token(id) for id in ids])
        if text is None or [token.id for token in backend.model.tokenize(text)] != ids:
            return False
        texts.append(text)
    return texts[0].lstrip("▁") == texts[1].lstrip("▁") and abs(len(texts[0]) - len(texts[1])) == 1


def _text(tokens: list[str | None]) -> str | None:
    """The text of some vocabulary tokens; None if byte tokens (<0x0A>) form no valid character."""
    data = b""
    for token in tokens:
        is_byte = token is not None and len(token) == 6 and token.startswith("<0x")
        data += bytes([int(token[3:5], 16)]) if is_byte else (token or "").encode()
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _only_after_end(
    theirs: torch.Tensor, ours: torch.Tensor, positions: torch.Tensor, ids: list[int], eos: int | None
) -> bool:
    """Whether the masks (T, N) differ only in tokens after an eos that attend to no image in theirs."""
    rows = (theirs != ours).any(-1).nonzero()[:, 0]
    return all(eos in ids[: int(positions[row])] and not theirs[row].any() for row in rows)
