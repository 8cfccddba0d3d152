"""Tiny models of the three families on both sides, and PEFT's adapters on the reference's."""

import copy
import warnings
from pathlib import Path
from typing import Any

import oracle
import oracle_idefics
import oracle_llava
import peft
import torch
from torch import Tensor

from minivlm.models.idefics import IdeficsForVisionText2Text
from minivlm.models.idefics2 import Idefics2ForConditionalGeneration
from minivlm.models.llava_next import LlavaNextForConditionalGeneration

FAMILIES = ("idefics2", "llava_next", "idefics")
# The regular expressions of the notebooks that people copy; for IDEFICS one in their manner.
PROJECTIONS = "(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj)"
NOTEBOOK = {
    "idefics2": rf".*(text_model|modality_projection|perceiver_resampler).*{PROJECTIONS}.*$",
    "llava_next": rf".*(language_model).*{PROJECTIONS}.*$",
    "idefics": r".*(gated_cross_attn_layers|perceiver_resampler).*(q_proj|k_proj|v_proj|o_proj|output_proj|fc|c_proj)$",
}


def reference(family: str, seed: int = 0, layers: int = 2) -> Any:
    """A tiny random reference model with so many decoder layers, and two in the tower. IDEFICS without added tokens, of
    which the reference has no loss."""
    config, build = {
        "idefics2": (oracle.idefics2_config(), oracle.random_reference),
        "llava_next": (oracle_llava.llava_config(), oracle_llava.random_llava),
        "idefics": (oracle_idefics.idefics_config(added=0), oracle_idefics.random_reference),
    }[family]
    config.get_text_config().num_hidden_layers = layers
    config.vision_config.num_hidden_layers = 2
    return build(config, seed)


def inputs(family: str) -> dict[str, Tensor]:
    """A left-padded batch of several pictures a row."""
    if family == "idefics2":
        return oracle.random_inputs((2, 0, 1), 4)
    if family == "llava_next":
        return oracle_llava.llava_inputs([[(30, 50)], [], [(12, 12)]], oracle_llava.llava_config())
    return oracle_idefics.random_inputs((2, 0, 1), added=0)


def ours(theirs: Any, folder: Path, **options: Any) -> Any:
    """Our model with the weights of the reference's."""
    classes = {
        "idefics2": Idefics2ForConditionalGeneration,
        "llava_next": LlavaNextForConditionalGeneration,
        "idefics": IdeficsForVisionText2Text,
    }
    model_class = classes[theirs.config.model_type]
    if not (folder / "config.json").exists():
        oracle.save(theirs, folder)
    return model_class.from_pretrained(folder, **options)


def adapted(theirs: Any, seed: int = 0, **options: Any) -> Any:
    """PEFT's model around a copy of a reference, every number of the adapter random (B too, so that it acts)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights of embeddings that it will save too, for one
        model = peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(**options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(0.3 * torch.randn_like(parameter) / max(parameter.shape) ** 0.5)
            elif parameter.requires_grad:  # magnitudes, modules that are trained whole, biases
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    return model.eval()


def saved(model: Any, folder: Path) -> Path:
    """The folder that PEFT writes of an adapted model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder
