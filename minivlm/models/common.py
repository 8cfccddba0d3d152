"""What the three model classes share and a reader of one of them need not see twice: none of it is architecture.

`device`, `dtype` and `new_cache` are written into the classes as they are, as `loading.save_pretrained` is.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minivlm.generation_config import GenerationConfig
from minivlm.modules.attention import check_implementation
from minivlm.modules.cache import KVCache
from minivlm.modules.outputs import Output, next_token_loss


def prepare(model: nn.Module, config: Any, attn_implementation: str | None) -> None:
    """What a model keeps beside its parts. ValueError for an attention implementation that is not known."""
    model.config = config
    model.attn_implementation = attn_implementation and check_implementation(attn_implementation)
    model.generation_config = GenerationConfig.from_model_config(config)


@property
def device(model: Any) -> torch.device:
    """Where the model lives."""
    return model.decoder.norm.weight.device


@property
def dtype(model: Any) -> torch.dtype:
    """What the model computes in; its quantised layers may store their weights in another."""
    return model.decoder.norm.weight.dtype


def new_cache(model: Any, batch: int, slots: int) -> KVCache:
    """An empty cache for `batch` rows of `slots` tokens, to be passed as `past_key_values`."""
    return model.decoder.new_cache(batch, slots, model.device, model.dtype)


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


def output(
    logits: Tensor,
    labels: Tensor | None,
    past_key_values: KVCache | None,
    hidden_states: list[Tensor] | None,
    image_hidden_states: Tensor | None,
) -> Output:
    """What a forward pass returns, the loss with it where there are labels."""
    return Output(
        logits=logits,
        loss=None if labels is None else next_token_loss(logits, labels),
        past_key_values=past_key_values,
        hidden_states=None if hidden_states is None else tuple(hidden_states),
        image_hidden_states=image_hidden_states,
    )
