"""Tiny random IDEFICS models of the reference, and batches in which tokens see different images, or none."""

import gzip
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

SIZE, PATCH = 12, 4  # of a image and of its patches, in pixels
VOCABULARY = 100


def idefics_config(
    *,
    added: int = 2,
    interval: int = 1,
    layers: int = 4,
    resampler: bool = True,
    qk_norms: bool = True,
    perceiver_norms: bool = True,
    **changes: Any,
) -> Any:
    """A reference configuration, small in every dimension; the resampler's inner width differs from its outer one."""
    values = {
        "vocab_size": VOCABULARY,
        "additional_vocab_size": added,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "cross_layer_interval": interval,
        "qk_layer_norms": qk_norms,
        "use_resampler": resampler,
        "freeze_text_layers": False,
        "freeze_vision_layers": False,
        "vision_config": {
            "embed_dim": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
        },
        "perceiver_config": {
            "resampler_n_latents": 5,
            "resampler_depth": 2,
            "resampler_n_heads": 3,
            "resampler_head_dim": 12,
            "qk_layer_norms_perceiver": perceiver_norms,
        },
    }
    return transformers.IdeficsConfig(**(values | changes))


@torch.no_grad()
def random_reference(config: Any, seed: int = 0) -> Any:
    """A reference IDEFICS with weights large enough for errors to show, and open gates: α = 0 proves nothing."""
    torch.manual_seed(seed)
    model = transformers.IdeficsForVisionText2Text(config).eval()
    for name, parameter in model.named_parameters():
        if "alpha" in name:
            parameter.uniform_(0.3, 0.9).mul_(1 - 2 * torch.randint(2, parameter.shape))
        elif parameter.ndim == 1 or name.endswith("latents"):
            parameter += 0.2 * torch.randn_like(parameter)
        else:
            parameter *= 4
    return model


def random_inputs(images: tuple[int, ...], added: int = 2, seed: int = 1, text: int = 6) -> dict[str, Tensor]:
    """A left-padded batch: row r holds images[r] images, each token sees the last one before it, the first ones none.

    Rows with fewer images are filled up with noise that no token sees. Ids of the added tokens occur in the text.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, most = len(images), max(1, *images) if len(images) > 1 else max(1, images[0])
    longest = 3 * max(images) + text + rows
    ids, mask = torch.zeros(2, rows, longest, dtype=torch.long)
    seen = torch.zeros(rows, longest, most, dtype=torch.long)
    for row, count in enumerate(images):
        length = 2 + 3 * count + text + row - 1
        start = longest - length
        ids[row, start:] = torch.randint(4, VOCABULARY + added, (length,), generator=generator)
        ids[row, start] = 1
        mask[row, start:] = 1
        for index in range(count):
            seen[row, start + 2 + 3 * index :] = 0
            seen[row, start + 2 + 3 * index :, index] = 1
    pixels = torch.randn(rows, most, 3, SIZE, SIZE, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_attention_mask": seen}


def released_tensors(name: str, data: Path) -> dict[str, list[int]]:
    """Name → shape of all tensors in the files of a released checkpoint, old buffers among them.

    The lists of an instruct checkpoint and its base differ only in how many tokens were added: 3 and 2.
    """
    path = data / "hub" / name.removesuffix("-instruct") / "keys.json.gz"
    shapes = {key: shape for key, (_, shape) in json.loads(gzip.decompress(path.read_bytes())).items()}
    if name.endswith("-instruct"):
        for key in ("lm_head.additional_fc.weight", "model.embed_tokens.additional_embedding.weight"):
            shapes[key] = [3, shapes[key][1]]
    return shapes
