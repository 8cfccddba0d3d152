"""CLIP's vision tower against the reference: every hidden state, both activations, the head width of ViT-H/14."""

from dataclasses import asdict
from typing import Any

import oracle
import pytest
import torch
import transformers

from minivlm.modules.clip import ClipVisionTower
from minivlm.modules.siglip import SiglipVisionConfig
from minivlm.modules.vision import VisionConfig

SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "quick GELU": {**SIZES, "image_size": 12, "patch_size": 4},
    "exact GELU, heads of 80 as in ViT-H/14": {
        **{**SIZES, "hidden_size": 160, "num_attention_heads": 2, "hidden_act": "gelu"},
        **{"image_size": 15, "patch_size": 4, "layer_norm_eps": 1e-3},
    },
}


def pair(case: str) -> tuple[Any, ClipVisionTower]:
    """(reference, ours with the same weights), large enough for errors to show."""
    torch.manual_seed(0)
    reference = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CONFIGS[case])).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter)) if parameter.ndim == 1 else parameter.mul_(4)
    ours = ClipVisionTower(VisionConfig(**CONFIGS[case]))
    ours.load_state_dict(reference.state_dict())
    return reference, ours


@pytest.mark.parametrize("backend", ["eager", "sdpa", None])
@pytest.mark.parametrize("case", CONFIGS)
@torch.no_grad()
def test_hidden_states(case: str, backend: str | None) -> None:
    reference, ours = pair(case)
    side = CONFIGS[case]["image_size"]
    pixels = torch.randn(2, 3, side, side)
    eager, sdpa = oracle.both(reference, lambda model: model(pixels, output_hidden_states=True).hidden_states)
    found = ours(pixels, layers=range(4), attn_implementation=backend)
    for layer, states in enumerate(zip(found, eager, sdpa, strict=True)):
        oracle.assert_close(*states, f"state {layer}")
    assert torch.equal(ours(pixels, attn_implementation=backend)[0], found[-1])
    several = ours(pixels, layers=[-2, 0, -2], attn_implementation=backend)
    assert [torch.equal(state, found[layer]) for state, layer in zip(several, [2, 0, 2], strict=True)] == [True] * 3


@torch.no_grad()
def test_nothing_behind_the_highest_state_runs() -> None:
    """So LLaVA-NeXT pays for 23 of the 24 blocks, and `post_layernorm` changes nothing."""
    _, ours = pair("quick GELU")
    pixels = torch.randn(1, 3, 12, 12)
    before = ours(pixels, layers=[-2])[0]
    for module in (ours.encoder.layers[-1], ours.post_layernorm):
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(ours(pixels, layers=[-2])[0], before)


def test_defaults_are_those_of_the_reference() -> None:
    idefics2 = transformers.Idefics2Config().vision_config
    for theirs, ours in ((transformers.CLIPVisionConfig(), VisionConfig()), (idefics2, SiglipVisionConfig())):
        assert {name: getattr(theirs, name) for name in asdict(ours)} == asdict(ours)


def test_bad_calls() -> None:
    _, ours = pair("quick GELU")
    with pytest.raises(ValueError, match=r"takes images of \(3, 12, 12\), found \(3, 16, 12\)"):
        ours(torch.randn(1, 3, 16, 12))
    with pytest.raises(ValueError, match=r"found \(4, 12, 12\)"):
        ours(torch.randn(1, 4, 12, 12))
    with pytest.raises(IndexError):
        ours(torch.randn(1, 3, 12, 12), layers=[4])
    with pytest.raises(ValueError, match="multiple of"):
        VisionConfig(hidden_size=50)
    with pytest.raises(ValueError, match="must be positive"):
        VisionConfig(patch_size=0)
