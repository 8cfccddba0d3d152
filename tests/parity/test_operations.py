"""Inside the first stage that diverges; and stages that one side has no module for."""

import copy
import json
from typing import Any

import pytest
import tiny_inside
import torch
from torch import Tensor, nn

from minivlm.app import cli
from minivlm.modules import decoder
from minivlm.parity import Side, compare, drawn_image, sides
from minivlm.parity.operations import Operation, blame

NAMES = ["shapes-idefics2", "shapes-llava-next", "shapes-idefics"]


def pair(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """(the reference's model, ours, inputs)"""
    inputs = sides.encode(Side(name), [drawn_image()], "what is this?")
    return sides.load(Side(name, "transformers")), sides.load(Side(name)), inputs


@pytest.mark.parametrize("name", NAMES)
def test_a_projection_with_other_weights_is_found(name: str) -> None:
    """Though what runs after it in the same layer has right results too, and the two codes run other operations."""
    reference, ours, inputs = pair(name)
    torch.manual_seed(0)
    with torch.no_grad():
        ours.decoder.layers[2].self_attn.k_proj.weight.add_(0.01)
    report = compare(reference, ours, inputs, ops=True, tokens=0)
    assert report.first.stage == "decoder layer 2"
    assert report.operations.first.name in ("aten::mm", "aten::addmm", "aten::linear")
    assert "minivlm/modules/decoder.py" in report.operations.first.line
    assert "first unequal one: aten::" in report.verdict()
    assert report.to_json()["operations"][0].startswith("last equal operation: aten::")


def test_a_rotation_the_wrong_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, ours, inputs = pair(NAMES[0])
    original = decoder.rotate
    monkeypatch.setattr(decoder, "rotate", lambda x, cos, sin: original(x, cos, sin) * 1.01)
    report = compare(reference, ours, inputs, ops=True, tokens=0)
    assert report.first.stage == "decoder layer 0"
    assert report.operations.first.name == "aten::mul.Tensor"
    assert "test_operations.py" in report.operations.first.line
    assert report.operations.last is not None


def test_nothing_to_find(capsys: Any) -> None:
    assert cli.main(["parity", NAMES[0], "--ops", "--tokens", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["float32"]
    assert "operations" not in found
    assert found["skipped"] == []


def test_padding_cannot_be_compared() -> None:
    _, ours, inputs = tiny_inside.pair("idefics2")
    with pytest.raises(ValueError, match="without padding"):
        compare(ours, ours, inputs, ops=True)


def test_a_detour_that_leads_back_is_forgiven() -> None:
    def operation(name: str, values: list[float], *sources: int) -> Operation:
        return Operation(name, "", torch.tensor(values), (len(values),), list(sources))

    a = [operation("fused", [1.0, 2.0]), operation("out", [3.0])]
    b = [operation("scores", [7.0, 8.0]), operation("mixed", [1.0, 2.0], 0), operation("wrong", [4.0], 1)]
    assert blame(a, b, 1e-5).first.name == "wrong"
    assert blame(a, b, 1e-5).last.name == "mixed"
    assert blame(a, b[:2], 1e-5) is None


class Pooled(nn.Module):
    """In the place of the perceiver: the mean of all patches, for every vector."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(latents, 64))

    def forward(self, context: Tensor, *_: Any) -> Tensor:
        return context.mean(1, keepdim=True) + self.latents


def test_structural_edits_are_compared_where_they_can_be() -> None:
    _, ours, inputs = tiny_inside.pair("idefics2")
    edited = copy.deepcopy(ours)
    edited.model.connector.perceiver_resampler = Pooled(ours.config.perceiver_config.resampler_n_latents)
    report = compare(ours, edited, inputs, tokens=0)
    skipped = {"resampler layer 0", "resampler layer 1", "resampler norm"}
    assert set(report.skipped) == skipped
    assert report.first.stage == "merged embeddings"
    assert "skipped, since one side has no such module: resampler layer 0" in report.verdict()
    there = compare(edited, ours, inputs, tokens=0)
    assert set(there.skipped) == skipped
    assert there.first.stage == "merged embeddings"
    assert compare(edited, edited, inputs, tokens=2).first is None
