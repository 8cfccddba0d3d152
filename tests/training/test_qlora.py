"""Adapters over four-bit weights against bitsandbytes and PEFT: loss, gradients, a few steps, merging."""

from pathlib import Path
from typing import Any

import oracle
import oracle_peft as peft_side
import peft
import pytest
import torch
import transformers

from minivlm import BitsAndBytesConfig
from minivlm.training import adapters, lora
from minivlm.training.loss import token_loss

bitsandbytes = pytest.importorskip("bitsandbytes")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


def decoded(model: Any) -> Any:
    """The reference with its four-bit layers as plain ones, in place: each block of 64 codes times its scale.

    bitsandbytes 0.50.2 itself decodes wrongly on processors with AVX-512 where a width is no multiple of 64.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            state, packed = layer.weight.quant_state, layer.weight.data.flatten()
            codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()
            scales = state.absmax.repeat_interleave(state.blocksize)[: len(codes)]
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight.data = (state.code[codes] * scales)[: state.shape.numel()].view(state.shape)
            plain.bias = layer.bias
            model.set_submodule(name, plain)
    return model


@pytest.mark.parametrize("family", peft_side.FAMILIES)
def test_qlora_is_that_of_bitsandbytes_and_peft(tmp_path: Path, family: str) -> None:
    reference = peft_side.reference(family)
    folder = tmp_path / "base"
    adapter = peft_side.saved(peft_side.adapted(reference, r=4, target_modules="all-linear"), tmp_path / "adapter")
    ours = peft_side.ours(reference, folder, quantization_config=BitsAndBytesConfig(**NF4))
    adapters.load(ours, adapter, trainable=True)
    four_bits = transformers.BitsAndBytesConfig(**NF4)
    theirs = type(reference).from_pretrained(folder, quantization_config=four_bits, dtype=torch.float32)
    layers = sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in theirs.modules())
    assert layers == sum(isinstance(m, lora.LoRALinear) and m.quantised for m in ours.modules()) > 10
    theirs = peft.PeftModel.from_pretrained(decoded(theirs), adapter, is_trainable=True).eval()
    inputs = peft_side.inputs(family)
    inputs |= {"labels": oracle.labels(inputs)}

    wanted = {name.split(".default")[0]: p for name, p in theirs.named_parameters() if p.requires_grad}
    table = lora.targets.generations(ours)[0]
    found = {
        f"base_model.model.{lora.targets.spelled(name, table)}": parameter
        for name, parameter in ours.named_parameters()
        if parameter.requires_grad
    }
    assert found.keys() == wanted.keys()
    optimisers = [torch.optim.AdamW(side.values(), lr=2e-3, weight_decay=0.0) for side in (found, wanted)]
    for step in range(3):
        total, count = token_loss(ours, inputs)
        losses = total / count, theirs(**inputs).loss
        torch.testing.assert_close(*losses, rtol=1e-4 if step == 0 else 2e-3, atol=0)
        for loss in losses:
            loss.backward()
        rounding = 1e-6 * max(p.grad.norm() for p in wanted.values() if p.grad is not None)
        for name, parameter in found.items() if step == 0 else ():
            if wanted[name].grad is not None:  # LLaVA-NeXT does not use its tower's last layer
                assert (parameter.grad - wanted[name].grad).norm() <= 1e-3 * wanted[name].grad.norm() + rounding, name
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    total, count = token_loss(lora.merge(ours), inputs)
    torch.testing.assert_close(total / count, theirs.merge_and_unload()(**inputs).loss, rtol=2e-3, atol=0)
