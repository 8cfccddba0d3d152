"""What the three model classes share and a reader of one of them need not see twice: none of it is architecture.

Functions of `self` are written into the classes as they are, as `loading.save_pretrained` is. They ask a class for
`model`, `decoder` and `head`: what is inside, its text decoder, and what makes logits of final hidden states.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minivlm.generation.settings import GenerationConfig
from minivlm.modules.attention import check_implementation
from minivlm.modules.cache import KVCache
from minivlm.modules.outputs import Output, next_token_loss


def prepare(self: Any, config: Any, attn_implementation: str | None) -> None:
    """What a model keeps beside its parts. ValueError for an attention implementation that is not known."""
    self.config = config
    self.attn_implementation = attn_implementation and check_implementation(attn_implementation)
    self.generation_config = GenerationConfig.from_model_config(config)


@property
def device(self: Any) -> torch.device:
    """Where the model lives."""
    return self.decoder.norm.weight.device


@property
def dtype(self: Any) -> torch.dtype:
    """What the model computes in; its quantised layers may store their weights in another."""
    return self.decoder.norm.weight.dtype


def new_cache(self: Any, batch: int, slots: int) -> KVCache:
    """An empty cache for `batch` rows of `slots` tokens, to be passed as `past_key_values`."""
    return self.decoder.new_cache(batch, slots, self.device, self.dtype)


def one_of(**given: Any) -> None:
    """ValueError unless exactly one of two arguments is given."""
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"pass either {' or '.join(given)}, and not both")


def image_slots(
    input_ids: Tensor | None, inputs_embeds: Tensor, embed_tokens: nn.Embedding, image_token: int
) -> Tensor:
    """Which tokens are the places of pictures, (B, T) bool; without ids, those with the image token's embedding."""
    if input_ids is not None:
        return input_ids == image_token
    return (inputs_embeds == embed_tokens.weight[image_token]).all(-1)


def check_places(slots: Tensor, vectors: int, pictures: str) -> None:
    """ValueError unless as many places are marked in slots (B, T) as there are vectors, which `pictures` give."""
    if (found := int(slots.sum())) != vectors:
        raise ValueError(
            f"the prompt has {found} image tokens, but {pictures} give {vectors} vectors; was it made by this "
            "checkpoint's processor, with these pictures, and not cut?"
        )


def merge(slots: Tensor, inputs_embeds: Tensor, vectors: Tensor, pictures: str) -> Tensor:
    """Put vectors (n, C) into the places marked in slots (B, T), in order of appearance → (B, T, C)."""
    check_places(slots, len(vectors), pictures)
    return inputs_embeds.masked_scatter(slots[..., None], vectors.to(inputs_embeds.dtype))


def forward(
    self: Any,
    *args: Any,
    labels: Tensor | None = None,
    logits_to_keep: int = 0,
    output_hidden_states: bool = False,
    **inputs: Any,
) -> Output:
    """One pass over T new tokens: `forward` of the model inside, with its arguments, then the head and the loss.

    labels: (B, T) like input_ids, −100 = not counted; image tokens count unless they are set to −100.
    logits_to_keep: compute logits for the last so many tokens only; 0 = all.

    Raises ValueError where shapes do not fit, and where pictures and the text do not match.
    """
    states = [] if output_hidden_states else None
    wanted = {"hidden_states": states, "last": 0 if output_hidden_states else logits_to_keep}
    x, vectors = self.model(*args, **inputs, attn_implementation=self.attn_implementation, **wanted)
    logits = self.head(x[:, -logits_to_keep:])  # (B, T or logits_to_keep, V)
    return Output(
        logits=logits,
        loss=None if labels is None else next_token_loss(logits, labels),
        past_key_values=inputs.get("past_key_values"),
        hidden_states=None if states is None else tuple(states),
        image_hidden_states=vectors,
    )
