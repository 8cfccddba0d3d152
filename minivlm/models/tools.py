"""What other libraries' training and evaluation code calls on a model: transformers' Trainer, PEFT, accelerate, TRL and
evaluation harnesses know these names. Each is a line or two over what exists; nothing in minivlm needs one.

    activation checkpointing    wraps the layers of a finished model from outside
    embeddings                  get, set, resize
    names of tensors            those of files where those of the model are expected
    adapters                    save
    other names                 of what is elsewhere
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from minivlm.checkpoint import saving
from minivlm.checkpoint.names import local_name, tied
from minivlm.generation import output
from minivlm.models.base import Output, next_token_loss
from minivlm.modules.attention import Mask, attention_taps, check_implementation
from minivlm.modules.cache import KVCache
from minivlm.modules.config import Config, vocabulary
from minivlm.modules.inputs import Inputs
from minivlm.modules.stacks import stacked_layers
from minivlm.training import adapters


def equip(model_class: type[nn.Module]) -> None:
    """Add all of `Tools` to a class."""
    for name, value in vars(Tools).items():
        if not name.startswith("__"):
            setattr(model_class, name, value)


class Tools:
    """Methods of every model, with and without a head."""

    main_input_name: ClassVar[str] = "input_ids"
    base_model_prefix: ClassVar[str] = "model"
    supports_gradient_checkpointing: ClassVar[bool] = True
    accepts_loss_kwargs: ClassVar[bool] = True  # `num_items_in_batch`
    loss_type: ClassVar[str] = "ForCausalLM"  # labels are shifted here: a row's first one never counts
    _no_split_modules: ClassVar[list[str]] = ["DecoderBlock", "VisionBlock", "PerceiverLayer", "GatedBlock"]

    # ---- Activation checkpointing ----

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep only the input of every (n-th) layer for the backward pass, which runs the layer again: less memory, the
        same gradients. Layers are those of decoder, towers and resamplers; options are those of torch's `checkpoint`.

        ValueError for use_reentrant=True and for offload=True, which are not supported.
        """
        options = dict(activation_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            raise ValueError("checkpointing here is non-reentrant; leave use_reentrant out, or at False")
        if offload:
            raise ValueError("offload=True is not supported: what checkpointing keeps stays on the model's device")
        self.activation_checkpointing_disable()
        for index, layer in enumerate(stacked_layers(self)):
            if index % every_n_layers == 0:
                layer.forward = partial(_checkpointed, layer, options)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """`activation_checkpointing_enable`, by its name before transformers 5."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        for layer in stacked_layers(self):
            vars(layer).pop("forward", None)

    @property
    def is_activation_checkpointing(self) -> bool:
        return any("forward" in vars(layer) for layer in stacked_layers(self))

    gradient_checkpointing_disable = activation_checkpointing_disable
    is_gradient_checkpointing = is_activation_checkpointing

    def enable_input_require_grads(self) -> None:
        """Gradients flow to the embeddings' output though their table is frozen."""
        self._input_hook = self.get_input_embeddings().register_forward_hook(lambda _m, _i, x: x.requires_grad_(True))

    def disable_input_require_grads(self) -> None:
        self._input_hook.remove()

    # ---- Embeddings ----

    def get_input_embeddings(self) -> nn.Embedding:
        return self.decoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.decoder.embed_tokens = value
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Room for `new_num_tokens` in the embedding table, the head and the config; the table itself is returned.

        New rows are the mean of the old ones, or with mean_resizing=False random. IDEFICS keeps its vocabulary of V and
        counts V + A: the rows from V on are those of its additional tables. Raises ValueError for fewer than V there.
        """
        flat = hasattr(self.config, "additional_vocab_size")  # IDEFICS
        base = self.config.vocab_size if flat else 0
        found = vocabulary(self.config)
        wanted = found if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted == found:
            return self.get_input_embeddings()
        if wanted < base:
            raise ValueError(f"IDEFICS keeps its vocabulary of {base} tokens and adds to it; found {wanted}")
        if flat:
            config = changed(self.config, additional_vocab_size=wanted - base)
        else:
            config = changed(self.config, text_config=changed(self.config.text_config, vocab_size=wanted))
        inner = getattr(self, "model", self)
        std = self.config.initializer_range if flat else self.config.text_config.initializer_range
        grow = partial(_resized, rows=wanted - base, std=0.0 if mean_resizing else std)
        table = self.decoder.embed_tokens
        if flat:
            inner.additional_embedding = grow(inner.additional_embedding, like=table)
            if hasattr(self, "lm_head"):
                self.additional_fc = grow(self.additional_fc, like=self.lm_head)
        else:
            self.decoder.embed_tokens = grow(table, like=table)
            if hasattr(self, "lm_head"):
                self.lm_head = grow(self.lm_head, like=self.lm_head)
        for model in {self, inner}:
            model.config = config
        self.decoder.config = config.decoder if flat else config.text_config
        self.tie_weights()
        return self.get_input_embeddings()

    # ---- Names of tensors ----

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module's; the names may also be those of files, which `save_pretrained` writes and a trainer reads."""
        known = self.state_dict().keys()
        names = {name: name if name in known else self._local_name(name) for name in state_dict}
        renamed = {names[name]: value for name, value in state_dict.items()}
        return nn.Module.load_state_dict(self, renamed, strict=strict, assign=assign)

    def _local_name(self, name: str) -> str:
        return local_name(name, self.hub_prefixes).removeprefix(self.hub_root)

    @property
    def _keys_to_ignore_on_save(self) -> list[str] | None:
        """What files lack without being damaged: a tied head."""
        return list(tied(self)) or None

    @property
    def _checkpoint_conversion_mapping(self) -> dict[str, str]:
        """For PEFT, so that it reads an adapter trained on transformers' model: patterns of names there → here."""
        return {f"^{re.escape(theirs)}": ours for theirs, ours in self.hub_prefixes.items()}

    # ---- Adapters ----

    def load_adapter(self, name_or_folder: str | Path, **options: Any) -> None:
        """Put a LoRA adapter of PEFT's folder on the model; options: see `adapters.load`."""
        adapters.load(self, name_or_folder, **options)

    def save_adapter(self, folder: str | Path) -> None:
        """Write the LoRA adapter that is on the model, as PEFT reads it. ValueError if there is none."""
        adapters.save(self, folder)

    # ---- Other names ----

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Of the whole model. ValueError for a name that is not known."""
        for model in {self, self.base_model}:
            model.attn_implementation = check_implementation(attn_implementation)
        self.config._attn_implementation = attn_implementation

    def get_image_features(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, **inputs: Any
    ) -> Inputs:
        """`pooler_output`: a list of (vectors, C), for each row of Idefics2 and for each image of LLaVA-NeXT.

        Arguments as of `encode_images` of the model without a head; IDEFICS has none, as in the reference.
        """
        model = self.base_model
        inputs.setdefault("attn_implementation", self.attn_implementation)
        if not isinstance(getattr(model, "connector", None), nn.Module):
            return Inputs(pooler_output=model.encode_images(pixel_values, **inputs))
        vectors = model.encode_images(pixel_values, pixel_attention_mask, **inputs)  # (images, Q, C)
        patch = self.config.vision_config.patch_size
        real = model._patch_masks(pixel_values.flatten(0, 1), pixel_attention_mask, patch).flatten(1).any(1)  # (B·N)
        counts = real.unflatten(0, pixel_values.shape[:2]).sum(1).tolist()
        return Inputs(pooler_output=[row.flatten(0, 1) for row in vectors.split(counts)])

    def prepare_inputs_for_generation(self, input_ids: Tensor, **inputs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, **inputs}

    compute_transition_scores = output.compute_transition_scores
    push_to_hub = saving.push_to_hub

    @staticmethod
    def loss_function(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> Tensor:
        """`next_token_loss`; vocab_size is the logits' last size."""
        return next_token_loss(logits, labels, num_items_in_batch)

    def can_generate(self) -> bool:
        return hasattr(self, "lm_head")

    def get_decoder(self) -> nn.Module:
        return self.decoder

    @property
    def base_model(self) -> nn.Module:
        return getattr(self, "model", self)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        tables = {id(part.weight) for part in self.modules() if isinstance(part, nn.Embedding)}
        return sum(
            each.numel()
            for each in self.parameters()
            if (each.requires_grad or not only_trainable) and not (exclude_embeddings and id(each) in tables)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of all weights."""
        return sum(each.nbytes for each in (*self.parameters(), *(self.buffers() if return_buffers else ())))

    @property
    def is_loaded_in_8bit(self) -> bool:
        return getattr(getattr(self, "quantization_config", None), "load_in_8bit", False)

    @property
    def is_loaded_in_4bit(self) -> bool:
        return getattr(self, "quantization_config", None) is not None and not self.is_loaded_in_8bit

    @property
    def warnings_issued(self) -> dict[str, bool]:
        return vars(self).setdefault("_warnings_issued", {})

    def add_model_tags(self, tags: str | list[str]) -> None:
        """Kept in `model_tags`, for model cards."""
        self.model_tags = [*getattr(self, "model_tags", []), *([tags] if isinstance(tags, str) else tags)]


def _checkpointed(layer: nn.Module, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """A layer's forward pass. Plain where nothing is to be kept, and where running it twice would not be the same: with
    a cache, which it fills, and while attention weights are collected."""
    plain = type(layer).forward
    if not torch.is_grad_enabled() or attention_taps or any(isinstance(each, KVCache) for each in args):
        return plain(layer, *args, **kwargs)
    return checkpoint(plain, layer, *args, use_reentrant=False, **options, **kwargs)


def changed(config: Config, **fields_: Any) -> Config:
    """The config with other fields, and what else had been set on it."""
    new = replace(config, **fields_)
    known = {item.name for item in fields(config)}
    for name, value in vars(config).items():
        if name not in known and name != "_made":
            setattr(new, name, value)
    return new


@torch.no_grad()
def _resized(layer: Any, like: Any, rows: int, std: float) -> Any:
    """An embedding or linear layer with so many rows, those of `layer` (if any) first. `like` has the width."""
    if not rows:
        return None
    old = like.weight if layer is None else layer.weight
    kept = old[:0] if layer is None else old[:rows]
    new = old.mean(0, keepdim=True).expand(rows - len(kept), -1)
    if std:
        new = torch.randn_like(new) * std
    made = copy.copy(like if layer is None else layer)
    made._parameters = dict(made._parameters)
    made.weight = nn.Parameter(torch.cat([kept, new]), requires_grad=old.requires_grad)
    for name in ("num_embeddings", "out_features"):
        if hasattr(made, name):
            setattr(made, name, rows)
    return made


# Sharded training looks for tensors inside of what a model returns.
pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: Output(dict(zip(names, values, strict=True))),
)


class _Compilable:
    """Instead of a `cached_property`, which takes a lock in Python 3.11, where torch.compile would have to stop; the
    compiler sees by itself that it computes the same thing for every layer."""

    def __init__(self, cached: cached_property) -> None:
        self.cached = cached

    def __get__(self, mask: Any, owner: Any = None) -> Any:
        return self.cached.func(mask) if torch.compiler.is_compiling() else self.cached.__get__(mask, owner)


for _name in ("allowed", "dense"):
    setattr(Mask, _name, _Compilable(vars(Mask)[_name]))
