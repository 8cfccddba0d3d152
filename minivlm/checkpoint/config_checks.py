"""Checks of fields of a whole model's config against each other: ValueError that names them."""

from typing import Any

from minivlm.modules import anyres


def token_in_vocabulary(config: Any, name: str) -> None:
    """The token of this field is in the text model's vocabulary."""
    token, size = getattr(config, name), config.text_config.vocab_size
    if not 0 <= token < size:
        raise ValueError(f"{name} {token} is outside the vocabulary of {size}")


def llava_next(config: Any) -> None:
    """ValueError for settings that no model has."""
    tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
    if tower not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(
            f"vision_config.model_type {tower!r:.80} is not supported; known: clip_vision_model, siglip_vision_model"
        )
    if strategy != ("default" if config.class_token else "full"):
        raise ValueError(
            f"vision_feature_select_strategy {strategy!r} is not supported with this tower: packing needs all patches "
            'and nothing else, so CLIP\'s class token goes ("default") and SigLIP, which has none, keeps all ("full"); '
            "otherwise the features of a tile are not a grid, and the reference fails too"
        )
    token_in_vocabulary(config, "image_token_index")
    anyres.check_pinpoints(config.image_grid_pinpoints, config.vision_config.image_size)
    most, layers = config.vision_config.num_hidden_layers, config.feature_layers
    fits = all(type(layer) is int and -most - 1 <= layer <= most for layer in layers)
    if not 1 <= len(layers) <= most + 1 or not fits:
        raise ValueError(
            f"vision_feature_layer should be one or more of the {most + 1} hidden states of a tower of {most} "
            f"layers, counted from 0 or from -1 down; found {config.vision_feature_layer!r}"
        )
