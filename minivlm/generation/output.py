"""What `generate` returns if more than ids is requested, and the scores of the chosen tokens from it.

B prompts, n copies of each (beams or samples), R sequences returned for each, P prompt ids, M new tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minivlm.modules.cache import KVCache


@dataclass
class GenerateOutput:
    """The result with `return_dict_in_generate`, named as in the reference; None for fields that were not requested.

    T is the number of uncached prompt tokens in the first step, then 1; without a cache, all tokens so far.
    """

    sequences: Tensor  # (B·R, P + M)
    scores: tuple[Tensor, ...] | None = None  # for each step (B·n, V): the scores the tokens were chosen by
    logits: tuple[Tensor, ...] | None = None  # for each step (B·n, V)
    attentions: tuple[tuple[Tensor, ...], ...] | None = None  # for each step and block (B·n, H, T, keys)
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None  # for each step: embeddings, each block: (B·n, T, C)
    sequences_scores: Tensor | None = None  # (B·R,), of beams
    beam_indices: Tensor | None = None  # (B·R, M): the row of `scores` in which each token was found, −1 after the end
    past_key_values: KVCache | None = None
    finish_reasons: list[str] | None = None  # (B·R): "stop" by a rule (eos, string, criterion); cut: "length" or "time"

    def __getitem__(self, key: str | int) -> Any:
        """`output["sequences"]`, and `output[0]`, as in a tuple of the requested fields."""
        return getattr(self, key) if isinstance(key, str) else [v for v in vars(self).values() if v is not None][key]


def compute_transition_scores(
    model: Any,
    sequences: Tensor,
    scores: Sequence[Tensor],
    beam_indices: Tensor | None = None,
    normalize_logits: bool = False,
) -> Tensor:
    """The score of each chosen token, (B·R, M), from the output of `generate`; 0 after the end of a beam.

    sequences: (B·R, P + M). scores: M of (B·n, V). normalize_logits: make log-probabilities of the scores first.
    """
    stacked = torch.stack(list(scores))  # (M, B·n, V)
    if normalize_logits:
        stacked = stacked.log_softmax(-1)
    if beam_indices is None:  # each row continues itself
        beam_indices = torch.arange(len(sequences), device=sequences.device)[:, None].expand(-1, len(stacked))
    M = int((beam_indices >= 0).sum(1).max())
    rows, tokens = beam_indices[:, :M].long(), sequences[:, sequences.shape[1] - M :]
    found = stacked[torch.arange(M, device=rows.device), rows.clamp(min=0), tokens]
    return found.masked_fill(rows < 0, 0)
