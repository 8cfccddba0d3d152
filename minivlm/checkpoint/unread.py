"""Entries of a `config.json` that no config reads: harmless ones pass, those that would change the network are refused.

No list of entries can be complete. One that is on none of the lists below causes a warning and is kept, so that
`save_pretrained` writes it again.
"""

import dataclasses
import difflib
import re
import warnings
from typing import Any

from minivlm.generation import settings

# Read, though no field of a config has the name.
READ = """
rope_parameters partial_rotary_factor original_max_position_embeddings quantization_config embed_dim image_token_id
image_token_index dtype torch_dtype model_type
"""
# What `transformers` writes into any config, now or in version 4, and what tools write beside it.
ABOUT = """
architectures transformers_version _name_or_path name_or_path _commit_hash auto_map _attn_implementation
attn_implementation _attn_implementation_autoset _experts_implementation is_encoder_decoder is_decoder
add_cross_attention cross_attention_hidden_size use_cache return_dict output_attentions output_hidden_states
output_router_logits torchscript use_bfloat16 tf_legacy_loss pruned_heads chunk_size_feed_forward tie_encoder_decoder
tie_word_embeddings finetuning_task problem_type id2label label2id num_labels task_specific_params tokenizer_class
processor_class prefix bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
gradient_checkpointing pretraining_tp initializer_range initializer_factor unsloth_version unsloth_fixed license
language tags base_model
"""
# What the reference, too, leaves unread in these models, or reads in training alone.
UNUSED = """
ignore_index image_seq_length use_image_newline_parameter projection_dim vision_use_head dropout attention_dropout
hidden_dropout attention_probs_dropout_prob embd_pdrop resid_pdrop max_sequence_length cross_layer_activation_function
use_resampler freeze_lm_head vocab_size logit_scale_init_value mm_vision_tower mm_projector_type
"""
# All entries that `rope_scaling` and `rope_parameters` can have.
ROPE = """
type rope_type rope_theta factor original_max_position_embeddings max_position_embeddings low_freq_factor
high_freq_factor beta_fast beta_slow truncate attention_factor mscale mscale_all_dim short_factor long_factor
partial_rotary_factor
"""
HARMLESS = {*ABOUT.split(), *UNUSED.split(), *settings.SETTINGS, *settings.UNSUPPORTED, *settings.HARMLESS}
# Parts of the names of entries that change a network: soft caps, other scales of queries, windows, experts, …
CHANGES = re.compile(
    r"softcap|pre_attn_scalar|_multiplier$|logits?_scal|sliding|window|chunk_size|sink|rope|rotary|alibi|position_embed"
    r"|_norm(s|_\w+)?$|expert|moe|(head|layer)_types?$|parallel_(attn|residual)|clip_qkv|_bias$|interpolat"
)


def unread(values: dict[str, Any], config: Any) -> dict[str, Any]:
    """The entries of a config.json that are not read and are to be kept, with those of its parts inside.

    config: what was read of it. Raises ValueError for an entry that would change the network; warns about the others.
    """
    parts = {name: getattr(config, name) for name in fields_of(config) if name.endswith("_config")}
    decoder = getattr(config, "decoder", None) or getattr(config, "text_config", None)
    found = _of_part("", values, config, [decoder, *parts.values()])
    for name, part in parts.items():
        if isinstance(values.get(name), dict) and (inside := _of_part(f"{name}.", values[name], part, [])):
            found[name] = inside
    told = [f"{name}={value!r:.40}" for name, value in flat(found)]
    if told:
        warnings.warn(
            f"config.json has entries that minivlm does not read: {', '.join(told[:8])}{' …' if told[8:] else ''}; if "
            "one of them changes the network, answers are wrong",
            stacklevel=4,
        )
    return found


def over(values: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """`values` of a config.json to be written, with the entries that `unread` has kept."""
    inside = {name: over(values[name], part) for name, part in kept.items() if isinstance(values.get(name), dict)}
    return {**kept, **values, **inside}


def fields_of(config: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []


def _of_part(where: str, values: dict[str, Any], config: Any, others: list[Any]) -> dict[str, Any]:
    """The unknown entries of one part. others: parts whose entries may be repeated here with the same value."""
    known = fields_of(config)
    everything = {*known, *(name for part in others for name in fields_of(part))}
    _check_rope(where, values)
    kept = {}
    for name, value in values.items():
        if name in known or name in READ.split() or name in HARMLESS or value in (None, False, [], {}):
            continue
        if name == "layer_types" and hasattr(config, "windows"):
            continue  # checked by `config_file.read_decoder`
        if same := [part for part in others if name in fields_of(part)]:
            _check_same(where + name, value, [getattr(part, name) for part in same])
        elif close := difflib.get_close_matches(name, everything, n=1, cutoff=0.85):
            raise ValueError(f"{where}{name} is not a known entry; did you mean {close[0]}? Rename or remove it")
        elif CHANGES.search(name):
            raise ValueError(
                f"{where}{name} is {value!r:.80}: minivlm does not implement it, and it would change the network; "
                "remove the entry only if the weights do not need it"
            )
        else:
            kept[name] = value
    return kept


def _check_same(where: str, value: Any, used: list[Any]) -> None:
    """ValueError for an entry outside its part, where it is not read, that differs from the values that are used."""
    if value not in used:
        raise ValueError(
            f"{where} is {value!r:.80}, but it is not read there, and the model uses {used[0]!r:.80}; move it to its "
            "part of config.json, or remove it"
        )


def _check_rope(where: str, values: dict[str, Any]) -> None:
    """Every entry about rotary positions is either followed or refused."""
    for section in ("rope_scaling", "rope_parameters"):
        rope = values.get(section)
        for name in sorted(rope.keys() - set(ROPE.split())) if isinstance(rope, dict) else ():
            if rope[name] not in (None, False):
                raise ValueError(f"{where}{section}.{name} is {rope[name]!r:.80}, which is not supported here")


def flat(values: dict[str, Any], where: str = "") -> list[tuple[str, Any]]:
    """All entries, with those of parts under dotted names."""
    found = []
    for name, value in values.items():
        found += flat(value, f"{where}{name}.") if isinstance(value, dict) else [(where + name, value)]
    return found
