"""What the backward pass keeps: less where training is lean or checkpointed, for the same gradients; the estimate."""

from pathlib import Path
from typing import Any

import oracle
import oracle_peft as peft_side
import pytest
import torch

from minivlm import BitsAndBytesConfig, Idefics2Config, Idefics2ForConditionalGeneration
from minivlm.quantization import apply as quantise
from minivlm.quantization.linear import QuantizedLinear
from minivlm.training import lean, lora, memory
from minivlm.training.loss import token_loss
from minivlm.training.optimisation import Optimisation, adamw, trained
from minivlm.training.targets import LoraConfig

TEXT = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 640, "sliding_window": None, "model_type": "mistral"}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
PERCEIVER = {"hidden_size": 256, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16}
PERCEIVER |= {"num_key_value_heads": 1, "resampler_n_latents": 4}


def config() -> Idefics2Config:
    parts = {"vision_config": VISION, "perceiver_config": PERCEIVER, "text_config": TEXT}
    return Idefics2Config.from_hub({**parts, "image_token_id": 639})


def inputs() -> dict[str, torch.Tensor]:
    """Two rows of 100 tokens without an image, all learned."""
    ids = torch.randint(3, 600, (2, 100), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total, count = token_loss(model, batch)
    (total / count).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def kept(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that the forward pass keeps for the backward pass, weights and lookup tables left out."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    alive = []  # or another tensor could get the address of one that was dropped on the way

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor.untyped_storage())
        sizes[alive[-1].data_ptr()] = alive[-1].nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = token_loss(model, batch)[0]
    assert total.requires_grad
    return sum(size for place, size in sizes.items() if place not in weights)


@pytest.fixture(autouse=True)
def few_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivlm.training.loss.LOGITS", 1)  # so that next to no logits are kept


@pytest.mark.parametrize("family", peft_side.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_gates_keep_less_for_the_same_gradients(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """The activation and the product are computed twice, so bit for bit; sums of gradients come in another order."""
    reference, batch = peft_side.reference(family), peft_side.inputs(family)
    batch |= {"labels": oracle.labels(batch)}
    model = peft_side.ours(reference, tmp_path, dtype=dtype)
    torch.manual_seed(0)
    lora.apply(model, LoraConfig(r=4, target_modules="text+connector", init_lora_weights=False))
    before, much = gradients(model, dict(batch)), kept(model, dict(batch))
    memory.lean_gates(model)
    after = gradients(model, dict(batch))
    for name, gradient in before.items():
        assert (after[name] - gradient).norm() <= 64 * torch.finfo(dtype).eps * gradient.norm(), name
    assert kept(model, dict(batch)) < 0.92 * much


def test_low_rank_inputs_are_kept_as_they_came() -> None:
    """Over bf16 there is no fp32 copy of an input for each of the layers that share it."""
    model = Idefics2ForConditionalGeneration(config()).to(torch.bfloat16)
    lora.apply(model, LoraConfig(target_modules="text"))
    some = kept(model, inputs())
    layers = [module for module in model.modules() if isinstance(module, lora.LoRALinear)]
    copies = 200 * 4 * sum(layer.in_features for layer in layers)
    memory.lean_gates(model)
    assert kept(model, inputs()) < some < copies + 200 * 2 * 3 * 4 * 896  # and four tensors of an MLP


def test_checkpointing_keeps_less() -> None:
    sizes = []
    for checkpointing in (False, True):
        model = Idefics2ForConditionalGeneration(config())
        lora.apply(model, LoraConfig(target_modules="text"))
        memory.lean_gates(model)
        if checkpointing:
            memory.checkpoint_layers(model)
        sizes.append(kept(model, inputs()))
    assert sizes[1] < 0.2 * sizes[0]


@pytest.mark.parametrize("way", ["lora", "lora, bf16", "nf4", "full", "full, bf16"])
def test_the_estimate_is_what_a_step_takes(way: str) -> None:
    """Gradients and the optimiser to the byte; activations to 12 %, since small tensors of each layer are left out."""
    dtype = torch.bfloat16 if "bf16" in way else torch.float32
    form = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if way == "nf4" else None
    with torch.device("meta"):
        empty = Idefics2ForConditionalGeneration(config())
    model = Idefics2ForConditionalGeneration(config()).to(dtype)
    if form:
        quantise.quantize(model, form)
    for one in (empty, model):
        one.requires_grad_(True) if "full" in way else lora.apply(one, LoraConfig(target_modules="text"))
    memory.lean_gates(model)
    found = memory.estimate(empty, tokens=200, learned=198, dtype=dtype, quantised=form)

    adapter = {name: p for name, p in model.named_parameters() if "lora_" in name}
    stored = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - sum(p.nbytes for p in adapter.values())
    assert found.weights == pytest.approx(stored, rel=0.01)
    optimisation = Optimisation(trained(model), adamw(model, 1e-4))
    copies = [p for name, p in optimisation.stepped.items() if p is not optimisation.parameters[name]]
    assert found.trained == sum(p.nbytes for p in (*copies, *adapter.values()))
    total, count = token_loss(model, inputs())
    total.backward()
    unused = sum(4 * p.numel() for p in optimisation.stepped.values() if p.grad is None)  # there was no image
    assert found.gradients == sum(p.grad.nbytes for p in optimisation.stepped.values() if p.grad is not None) + unused
    optimisation.step(1.0, torch.tensor([total.item(), count], dtype=torch.float64))
    states = [value for one in optimisation.optimisers for state in one.state.values() for value in state.values()]
    assert found.optimiser == sum(value.nbytes for value in states if value.ndim) + 2 * unused
    assert found.activations + found.logits == pytest.approx(kept(model, inputs()), rel=0.12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [None, "nf4", "int8"])
@pytest.mark.parametrize("gated", [False, True])
def test_an_adapted_layer_has_the_gradients_of_autograd(dtype: torch.dtype, form: str | None, gated: bool) -> None:
    torch.manual_seed(0)
    layer = adapted_layer(dtype, form)
    inputs = [torch.randn(100, 64, dtype=dtype, requires_grad=True) for _ in range(1 + gated)]
    act = torch.nn.functional.silu if gated else None
    wanted = [layer.lora_A, layer.lora_B, *inputs]
    direction = torch.randn(100, 48, dtype=dtype)
    fast = lean.adapted(layer, *inputs, act=act)
    plain = lean.plainly(layer, act(inputs[0]) * inputs[1] if gated else inputs[0])
    # Sums of 64 products, rounded once or in pieces
    bound = 8 * torch.finfo(dtype).eps
    assert (fast - plain).norm() <= bound * plain.norm()
    found, expected = (torch.autograd.grad(result, wanted, direction) for result in (fast, plain))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= bound * theirs.norm()


def adapted_layer(dtype: torch.dtype, form: str | None = None) -> lora.LoRALinear:
    base = torch.nn.Linear(64, 48, dtype=dtype).requires_grad_(False)
    if form:
        choice = {"load_in_8bit": True} if form == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": form}
        quantised = QuantizedLinear(64, 48, base.bias, BitsAndBytesConfig(**choice).format)
        quantised.quantize_(base.weight)
        base = quantised
    layer = lora.LoRALinear(base, 4, 8.0, LoraConfig())
    layer.initialize(False)
    return layer


def test_a_second_derivative_is_refused() -> None:
    gate, up = (torch.randn(3, 64, requires_grad=True) for _ in range(2))
    layer = adapted_layer(torch.float32)
    for result in (lean.gated(gate, up, torch.sin), lean.adapted(layer, gate, up, act=torch.sin)):
        (first,) = torch.autograd.grad(result.sum(), gate, create_graph=True)
        with pytest.raises(RuntimeError, match=r"require grad|once_differentiable"):
            first.sum().backward()


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"])
def test_hooks_of_adapted_layers_run(kind: str) -> None:
    layer, calls = adapted_layer(torch.float32), []
    getattr(layer.base_layer, f"register_{kind}")(lambda *_: calls.append(kind))
    layer(torch.randn(3, 64, requires_grad=True)).sum().backward()
    assert calls == [kind]


def test_another_forward_of_an_adapted_layer_is_called() -> None:
    """As tools put it on one module alone."""
    layer = adapted_layer(torch.float32)
    x = torch.randn(3, 64, requires_grad=True)
    usual, plain = layer(x), layer.base_layer.forward
    layer.base_layer.forward = lambda x: 2 * plain(x)
    (layer(x) - usual).sum().backward()
    torch.testing.assert_close(layer(x) - usual, plain(x))


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (2, 3, 5, 64)])
def test_adapted_layers_take_any_shape(shape: tuple[int, ...]) -> None:
    assert adapted_layer(torch.float32)(torch.randn(shape, requires_grad=True)).shape == (*shape[:-1], 48)


def test_a_checkpointed_layer_runs_again_under_the_same_autocast() -> None:
    layers, x = torch.nn.ModuleList([torch.nn.Linear(8, 8)]), torch.randn(3, 8)

    def gradient() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = layers[0](x).square().float().sum()
        return torch.autograd.grad(y, layers[0].weight)[0]

    expected = gradient()
    memory.checkpoint_layers(layers)
    assert torch.equal(gradient(), expected)


def test_an_input_changed_in_place_after_a_checkpointed_layer_is_an_error() -> None:
    """Run again on the changed input, the layer would give another gradient."""
    layers, x = torch.nn.ModuleList([torch.nn.Linear(8, 8)]), torch.randn(3, 8)
    memory.checkpoint_layers(layers)
    y = layers[0](x).square().sum()
    x += 1
    with pytest.raises(RuntimeError, match=r"changed in place .* change a copy"):
        y.backward()
