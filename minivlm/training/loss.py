"""The loss of a step: −log p of every learned token, summed, over the number of them in the whole step.

A mean over each batch, averaged over batches, would weigh a token by the company it keeps: a short answer's more than a
long one's. So batches give sums and counts, and whoever puts a step together divides once.

B batch, T tokens, n learned tokens, C hidden width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # the label of a token that is not learned
LOGITS = 2**23  # logits that exist at once: 32 MB in fp32, and as much for their gradients


def token_loss(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Minus the summed log-probability of the learned tokens in a batch, in fp32, and how many there are.

    inputs: what `model` takes, and labels (B, T), `IGNORED` for tokens that are not learned; the first token of a row
    never is, because nothing predicts it. The output head runs only at the n tokens that predict learned ones, a piece
    at a time; the backward pass computes a piece's logits again instead of keeping them.
    """
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    states, _ = model.model(**inputs, attn_implementation=model.attn_implementation)  # (B, T, C)
    learned = labels[:, 1:] != IGNORED
    states, wanted = states[:, :-1][learned], labels[:, 1:][learned]  # (n, C), (n,)
    rows = max(1, LOGITS // len(model.lm_head.weight))
    pieces = list(zip(states.split(rows), wanted.split(rows), strict=True))
    total = states.new_zeros((), dtype=torch.float32)
    for piece in pieces:
        if len(pieces) > 1 and torch.is_grad_enabled():
            total = total + checkpoint(_summed, model, *piece, use_reentrant=False)
        else:
            total = total + _summed(model, *piece)
    return total, len(wanted)


def _summed(model: Any, states: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(model.head(states).float(), wanted, reduction="sum")


def count(labels: Tensor) -> int:
    """How many tokens are learned of labels (B, T)."""
    return int((labels[:, 1:] != IGNORED).sum())
