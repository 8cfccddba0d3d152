"""Code the three models share that is not architecture: outputs, the loss, and the base class with loading, saving and
generation. `tools.py` adds to the base class what other libraries' training and evaluation code calls.

B batch, T tokens, C text width, V vocabulary.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.checkpoint import loading
from minivlm.generation import loop
from minivlm.generation.settings import GenerationConfig
from minivlm.modules.attention import check_implementation
from minivlm.modules.cache import KVCache


class Output(dict):
    """The outputs of a forward pass, with the reference's names and order; None for those not requested.

    Read by attribute, by key, or by position among the outputs that are present: `output.loss`, `output["loss"]`,
    `output[0]`.
    """

    loss: Tensor | None
    logits: Tensor | None  # (B, T or logits_to_keep, V)
    last_hidden_state: Tensor | None  # (B, T, C), of a model without a head
    past_key_values: KVCache | None
    hidden_states: tuple[Tensor, ...] | None  # of the decoder: embeddings and each block, (B, T, C) each
    attentions: tuple[Tensor, ...] | None  # of each decoder block: (B, H, T, S)
    image_hidden_states: Tensor | None  # the images' vectors, as given to the decoder

    def __init__(self, values: dict[str, Any] | None = None, **more: Any) -> None:
        for name, value in {**(values or {}), **more}.items():
            more[name] = tuple(value) if isinstance(value, list) else value
        super().__init__((name, more[name]) for name in Output.__annotations__ if more.get(name) is not None)

    def __getattr__(self, name: str) -> Any:
        if name in Output.__annotations__:
            return self.get(name)
        raise AttributeError(f"an output has no {name!r}; it has {', '.join(Output.__annotations__)}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """All outputs that are not None, in order."""
        return tuple(self.values())


def next_token_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross entropy of token t + 1 given logits at t, in fp32: the mean over all labels that count.

    logits (B, T, V), labels (B, T), −100 = not counted. num_items_in_batch: divide the sum by this instead, for batches
    whose gradients are accumulated.
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels should be {tuple(logits.shape[:2])} like input_ids, found {tuple(labels.shape)}")
    predicted, target = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    if num_items_in_batch is None:
        return F.cross_entropy(predicted, target, ignore_index=-100)
    return F.cross_entropy(predicted, target, ignore_index=-100, reduction="sum") / num_items_in_batch


def tokens_to_keep(logits_to_keep: int | Tensor) -> tuple[int, slice | Tensor]:
    """How many of the last tokens the decoder has to compute, 0 = all, and which of these the head gets."""
    row = isinstance(logits_to_keep, Tensor)
    if isinstance(logits_to_keep, slice) or (logits_to_keep.ndim != 1 if row else logits_to_keep < 0):
        raise ValueError(f"logits_to_keep should be a number from 0 or a row of indices, found {logits_to_keep!r:.80}")
    return (0, logits_to_keep) if row else (logits_to_keep, slice(-logits_to_keep, None))  # −0 keeps all


class VisionLanguageModel(nn.Module):
    """Base of all models: those with a head contain a `model`, those without contain a `decoder`."""

    config_class: ClassVar[Any]
    hub_prefixes: ClassVar[dict[str, str]] = {}  # prefixes of names in files → here
    hub_ignored: ClassVar[dict[str, str]] = {}  # patterns of unneeded names in files → why
    prompt_inputs: ClassVar[tuple[str, ...]] = ()  # arguments of `forward` that only the prompt has
    hub_root: ClassVar[str] = ""  # prefix of a headless model's names in the files of a whole model
    tied_weights: ClassVar[dict[str, str]] = {}  # a head's parameter → the table it shares with tie_word_embeddings

    from_pretrained = classmethod(loading.from_pretrained)
    save_pretrained = loading.save_pretrained
    generate = loop.generate
    if TYPE_CHECKING:
        __call__: Callable[..., Output]

    def __init__(self, config: Any, attn_implementation: str | None = None) -> None:
        """ValueError for an attention implementation that is not known."""
        super().__init__()
        self.config = config
        self.attn_implementation = check_implementation(attn_implementation)
        self.generation_config = GenerationConfig.from_model_config(config)

    @property
    def decoder(self) -> nn.Module:
        """The text decoder."""
        return self.model.decoder

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.decoder.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the model computes in; quantised layers may store their weights in another."""
        return self.decoder.norm.weight.dtype

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache for `batch` rows of `slots` tokens, to be passed as `past_key_values`."""
        return self.decoder.new_cache(batch, slots, self.device, self.dtype)

    def growing_cache(self, inputs_embeds: Tensor, use_cache: bool | None) -> KVCache | None:
        """With use_cache=True, a growing cache for these (B, T, C) and later tokens."""
        if not use_cache:
            return None
        cache = self.new_cache(*inputs_embeds.shape[:2])
        cache.grows = True
        return cache

    def tie_weights(self) -> None:
        """Share the embedding table with the head if the config requests it; no released checkpoint does."""
        for name, table in self.tied_weights.items() if self.config.tie_word_embeddings else ():
            head, _, leaf = name.rpartition(".")
            if (layer := getattr(self, head)) is not None:
                setattr(layer, leaf, self.get_parameter(table))


# ---- Images among the tokens (Idefics2, LLaVA-NeXT) ------------------------------------------------------------------


def image_positions(
    input_ids: Tensor | None, inputs_embeds: Tensor, embed_tokens: nn.Embedding, image_token: int
) -> Tensor:
    """Which tokens are image tokens, (B, T) bool; without ids, those with the image token's embedding."""
    if input_ids is not None:
        return input_ids == image_token
    return (inputs_embeds == embed_tokens.weight[image_token]).all(-1)


def merge(positions: Tensor, inputs_embeds: Tensor, vectors: Tensor, images: str) -> Tensor:
    """Put vectors (n, C) at the image token positions (B, T), in order of appearance → (B, T, C).

    Raises ValueError unless there are as many positions as vectors, which `images` gave.
    """
    check_positions(positions, len(vectors), images)
    return inputs_embeds.masked_scatter(positions[..., None], vectors.to(inputs_embeds.dtype))


def check_positions(positions: Tensor, vectors: int, images: str) -> None:
    """ValueError unless as many positions are marked in (B, T) as there are vectors."""
    if (found := int(positions.sum())) != vectors:
        raise ValueError(
            f"the prompt has {found} image tokens, but {images} give {vectors} vectors; was it made by this "
            "checkpoint's processor, with these images, and not cut?"
        )


def check_one_of(*, optional: bool = False, **given: Any) -> None:
    """ValueError unless exactly one of two arguments is given, or with `optional` at most one."""
    count = sum(value is not None for value in given.values())
    if count > 1 or (count == 0 and not optional):
        raise ValueError(f"pass either {' or '.join(given)}, and not both")
