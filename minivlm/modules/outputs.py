"""What a model's forward returns, and the loss that every family shares.

B batch, T tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from minivlm.modules.cache import KVCache


@dataclass
class Output:
    """The fields carry the names of the reference's outputs; None where a call did not ask for one."""

    logits: Tensor
    loss: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of token t + 1 given logits at t, in fp32.

    logits (B, T, V), labels (B, T), −100 = not counted.
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels should be {tuple(logits.shape[:2])} like input_ids, found {tuple(labels.shape)}")
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
