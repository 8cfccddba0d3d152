"""One run of the model, over a prompt with its images or over the next tokens of every row.

B rows, T tokens to run, V vocabulary.
"""

from typing import Any

from torch import Tensor

from minivlm.modules.cache import KVCache


def forward(
    model: Any,
    ids: Tensor | None,
    cache: Any = None,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    keep: int = 1,
    **inputs: Any,
) -> Any:
    """The model's output for ids (B, T) after those in `cache`, which it extends; logits for the last `keep` (0: all).

    mask: (B, cached + T), True = real token; None without padding.  positions: (B, T).  inputs: images and the like.
    """
    return model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        logits_to_keep=keep,
        **inputs,
    )


def decode_step(
    model: Any, token: Tensor, cache: KVCache, position: Tensor, mask: Tensor | None = None, **wanted: bool
) -> Any:
    """The model's output for one more token (B,) at `position` (B,)."""
    return forward(model, token[:, None], cache, mask, position[:, None], **wanted)


def positions(mask: Tensor) -> Tensor:
    """Rotary positions (B, S) of a padding mask (B, S): real tokens count from 0, pads before them are 0."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)
