"""Tiny random Idefics2 models, batches of all kinds, and calls of both sides, for the tests of generation."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from oracle import save
from torch import Tensor

from minivlm.models.idefics2 import Idefics2ForConditionalGeneration

V, IMAGE, PAD, LATENTS, SIDE = 99, 98, 0, 2, 12
EOS = [5, 7]


def oracle(sliding_window: int | None) -> transformers.Idefics2ForConditionalGeneration:
    """A reference model whose logits lie far enough apart that rounding cannot change a token."""
    torch.manual_seed(0)
    vision = {"image_size": SIDE, "patch_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2}
    perceiver = {"resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16, "num_key_value_heads": 1}
    text = {"model_type": "mistral", "vocab_size": V, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "sliding_window": sliding_window, "max_position_embeddings": 64}
    text |= {"eos_token_id": EOS, "bos_token_id": 1, "pad_token_id": PAD}
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    config = transformers.Idefics2Config(
        vision_config=vision | sizes,
        perceiver_config=perceiver | {"resampler_n_latents": LATENTS, "hidden_size": 32},
        text_config=text | sizes,
        image_token_id=IMAGE,
    )
    model = transformers.Idefics2ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def twins(reference: Any, folder: Path, ours: Any = Idefics2ForConditionalGeneration) -> tuple[Any, Any]:
    """(reference, ours) with the same weights."""
    return reference, ours.from_pretrained(save(reference, folder))


def batch(
    counts: tuple[int, ...] = (0, 1, 2, 3), lengths: tuple[int, ...] = (5, 3, 9, 4), seed: int = 0
) -> dict[str, Tensor]:
    """Left-padded rows of `lengths` text tokens and `counts` images each, the rows' images padded as processors do."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for count, length in zip(counts, lengths, strict=True):
        text = torch.randint(8, 90, (length,), generator=random).tolist()
        rows.append([text[0], *([IMAGE] * LATENTS + [9]) * count, *text[1:]])
    longest = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }
    if max(counts):
        pixels = torch.randn(len(counts), max(counts), 3, SIDE, SIDE, generator=random)
        real = torch.arange(max(counts)) < torch.tensor(counts)[:, None]  # (B, N)
        inputs["pixel_values"] = pixels * real[:, :, None, None, None]
        inputs["pixel_attention_mask"] = real[:, :, None, None].expand(-1, -1, SIDE, SIDE).long()
    return inputs


def alone(inputs: dict[str, Tensor], row: int, counts: tuple[int, ...] = (0, 1, 2, 3)) -> dict[str, Tensor]:
    """One row of a batch without its padding tokens and padding images."""
    real = inputs["attention_mask"][row].bool()
    single = {"input_ids": inputs["input_ids"][row][real][None], "attention_mask": real[real].long()[None]}
    if counts[row]:
        single |= {
            name: inputs[name][row : row + 1, : counts[row]] for name in ("pixel_values", "pixel_attention_mask")
        }
    return single


def both(pair: tuple[Any, Any], inputs: dict[str, Any], **kwargs: Any) -> list[Any]:
    """What the reference and ours return, sampling from torch's own generator under the same seed."""
    outputs = []
    for model in pair:
        torch.manual_seed(1234)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs.append(model.generate(**inputs, **kwargs))
    return outputs
