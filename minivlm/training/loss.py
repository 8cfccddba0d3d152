"""The loss of a step: −log p of every learned token, summed, over the number of them in the whole step.

A mean over each batch, averaged over batches, would weigh a token by the company it keeps: a short answer's more than a
long one's. So batches give sums and counts, and whoever puts a step together divides once.

B batch, T tokens, n learned tokens, C hidden width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a token that is not learned
LOGITS = 2**21  # logits that exist at once: 8 MB in fp32, and as much for their gradients


def token_loss(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Minus the summed log-probability of the learned tokens in a batch, in fp32, and how many there are.

    inputs: what `model` takes, and labels (B, T), `IGNORED` for tokens that are not learned; the first token of a row
    never is, because nothing predicts it. The output head runs only at the n tokens that predict learned ones.
    """
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    states = model.model(**inputs, attn_implementation=model.attn_implementation).last_hidden_state  # (B, T, C)
    learned = labels[:, 1:] != IGNORED
    states, wanted = states[:, :-1][learned], labels[:, 1:][learned]  # (n, C), (n,)
    if torch.is_grad_enabled() and len(wanted):
        named = model.named_parameters(remove_duplicate=False)  # a head can be tied to the embeddings
        head = [parameter for name, parameter in named if not name.startswith("model.") and parameter.requires_grad]
        return _Pieces.apply(model, states, wanted, *head), len(wanted)
    return sum((_summed(model, *piece) for piece in _pieces(model, states, wanted)), states.new_zeros(())), len(wanted)


class _Pieces(torch.autograd.Function):
    """The summed loss of states (n, C), and its gradients at once, a piece of the n tokens at a time.

    So the logits of one piece exist and no others, and nothing is computed twice. head: what is trained in the head.
    """

    @staticmethod
    def forward(ctx: Any, model: Any, states: Tensor, wanted: Tensor, *head: Tensor) -> Tensor:
        total, gradients = 0.0, [torch.zeros_like(tensor) for tensor in (states, *head)]
        for piece, labels, where in _pieces(model, states, wanted, gradients[0]):
            piece = piece.detach().requires_grad_()
            with torch.enable_grad():
                loss = _summed(model, piece, labels)
                found = torch.autograd.grad(loss, (piece, *head))
            total = total + loss.detach()
            where.copy_(found[0])
            for gradient, more in zip(gradients[1:], found[1:], strict=True):
                gradient += more
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, *head = (tensor * gradient for tensor in ctx.saved_tensors)
        return None, states, None, *head


def _pieces(model: Any, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors (n, …) cut along n, so that a piece has no more than `LOGITS` logits."""
    rows = max(1, LOGITS // len(model.lm_head.weight))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _summed(model: Any, states: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(model.head(states).float(), wanted, reduction="sum")


def count(labels: Tensor) -> int:
    """How many tokens are learned of labels (B, T)."""
    return int((labels[:, 1:] != IGNORED).sum())
