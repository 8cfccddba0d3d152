"""Layers exchanged from outside: the same model before and after, whatever is done with it, on any processor."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from minivlm_kernels import cpu_dense, processor
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from wrapped import Wrapped

from minivlm import AutoModelForImageTextToText
from minivlm.devices import fast_cpu
from minivlm.devices.fast_cpu import FastLinear, FastRMSNorm
from minivlm.modules.layers import GatedMLP, RMSNorm

needs_compiler = pytest.mark.skipif(not cpu_dense.available(), reason="no GCC, or no AVX: products stay with torch")


class Small(nn.Module):
    """Layers of every kind that is exchanged, large enough to be worth it in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.head = RMSNorm(96, 1e-6), GatedMLP(96, 256, "silu"), nn.Linear(96, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.mlp(self.norm(x)))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the faster ways were taken."""
    made: list[str] = []
    for owner, name in ((cpu_dense, "dense_rows"), (cpu_dense, "rms_norm"), (fast_cpu, "linear_in_fp32")):
        monkeypatch.setattr(owner, name, _noted(getattr(owner, name), name, made))
    monkeypatch.setattr(fast_cpu, "pays", lambda: True)
    return made


def _noted(function: Callable[..., Tensor], name: str, made: list[str]) -> Callable[..., Tensor]:
    def noting(*args: Any) -> Tensor:
        made.append(name)
        return function(*args)

    return noting


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small().bfloat16().eval()


def test_exchanged_and_back(model: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_cpu, "pays", lambda: True)
    seen = []
    model.head.register_forward_hook(lambda *_: seen.append(1))
    before, weights = dict(model.named_modules()), dict(model.named_parameters())
    classes = {name: type(module) for name, module in before.items()}
    assert fast_cpu.apply(fast_cpu.apply(model)) is model
    assert type(model.head) is FastLinear
    assert type(model.norm) is FastRMSNorm
    assert isinstance(model.mlp.up_proj, nn.Linear)
    assert list(model.state_dict()) == list(weights)
    assert all(module is before[name] for name, module in model.named_modules())
    assert all(parameter is weights[name] for name, parameter in model.named_parameters())
    with torch.no_grad():
        model(torch.randn(1, 96).bfloat16())
    assert seen
    assert fast_cpu.remove(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == classes


def test_nothing_is_exchanged_where_nothing_is_gained(model: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_cpu, "pays", lambda: False)
    assert type(fast_cpu.apply(model).head) is nn.Linear


def test_loading_asks_for_it_and_can_be_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_cpu, "pays", lambda: True)
    load = AutoModelForImageTextToText.from_pretrained
    fast, plain = load("shapes-idefics2"), load("shapes-idefics2", fast_cpu=False)
    assert any(type(module) is FastLinear for module in fast.modules())
    assert fast.attn_implementation == fast.model.attn_implementation == "compiled"
    assert plain.attn_implementation is None
    assert fast_cpu.remove(fast).attn_implementation is None
    chosen = load("shapes-idefics2", attn_implementation="eager")
    assert chosen.attn_implementation == chosen.model.attn_implementation == "eager"
    chosen = load("shapes-idefics2", attn_implementation="compiled")
    assert fast_cpu.remove(chosen).attn_implementation == chosen.model.attn_implementation == "compiled"
    fast_cpu.apply(fast).set_attn_implementation("sdpa")
    assert fast.attn_implementation == fast.model.attn_implementation == "sdpa"
    assert not any(type(module) in (FastLinear, FastRMSNorm) for module in plain.modules())


@needs_compiler
def test_few_rows_take_the_compiled_way(model: Small, calls: list[str]) -> None:
    x = torch.randn(2, 96).bfloat16()
    with torch.no_grad():
        expected = model(x)
        found = fast_cpu.apply(model)(x)
    assert set(calls) == {"dense_rows", "rms_norm"}
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("native", [False, True])
def test_many_rows_of_bf16(bias: bool, native: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without bf16 products: the exact result, rounded once; and gradients where they are wanted."""
    torch.manual_seed(0)
    monkeypatch.setattr(fast_cpu, "CHUNK", 1000)  # several pieces, the last one shorter
    monkeypatch.setattr(processor, "multiplies", lambda dtype: native)
    layer = fast_cpu.apply(nn.Sequential(nn.Linear(96, 77, bias=bias))).bfloat16()[0]
    many = fast_cpu.MANY
    for rows in ((2, many // 2, 96), (many - 1, 96), (many, 96)):
        x = torch.randn(rows).bfloat16()
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        with torch.no_grad():
            found = layer(x)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)
    assert calls == ([] if native else ["linear_in_fp32"] * 2)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert len(calls) == (0 if native else 2)


def wrapped_weights(model: Small) -> None:
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(Wrapped(value.detach()), requires_grad=False))


def wrapped_biases(model: Small) -> None:
    model.head.bias = nn.Parameter(Wrapped(model.head.bias.detach()), requires_grad=False)


def other_bias(model: Small) -> None:
    model.head.bias = nn.Parameter(model.head.bias.detach().float())


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("change", [wrapped_weights, wrapped_biases])
def test_weights_of_another_kind_are_left_to_torch(
    change: Callable[[Small], None], rows: int, native: bool, model: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "multiplies", lambda dtype: native)
    monkeypatch.setattr(fast_cpu, "pays", lambda: True)
    x = torch.randn(rows, 96).bfloat16()
    change(model)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(fast_cpu.apply(model)(x), expected, rtol=2**-6, atol=2**-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize("native", [False, True])
def test_transforms_traces_and_modes_see_every_operation(
    native: bool, model: Small, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "multiplies", lambda dtype: native)
    fast_cpu.apply(model)
    x, many = torch.randn(2, 96).bfloat16(), torch.randn(64, 96).bfloat16()
    with torch.no_grad():
        for rows in (x, many):
            torch.func.vmap(model)(rows)
            _, tangent = torch.func.jvp(model, (rows,), (torch.ones_like(rows),))
            assert tangent.any()
            traced = torch.jit.trace(model, rows, check_trace=False)
            assert not torch.equal(traced(rows), traced(rows + 1))
            exported = torch.export.export(model, (rows,)).module()
            assert not torch.equal(exported(rows), exported(rows + 1))
            with FlopCounterMode(display=False) as counter:
                model(rows)
            assert counter.get_total_flops() == 2 * len(rows) * (3 * 96 * 256 + 96 * 128)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert model.float()(rows.float()).dtype == torch.bfloat16
            model.bfloat16()
    assert not calls


@needs_compiler
def test_shapes_and_dtypes_that_do_not_fit_are_torchs_errors(model: Small, calls: list[str]) -> None:
    fast_cpu.apply(model)
    with torch.no_grad():
        for shape in ((1, 64), (1, 192), ()):
            for layer in (model.head, model.mlp.up_proj):
                with pytest.raises(RuntimeError):
                    layer(torch.randn(shape).bfloat16())
        with pytest.raises(RuntimeError):
            model.head(torch.randn(1, 96))
        other_bias(model)
        with pytest.raises(RuntimeError):
            model.head(torch.randn(1, 96).bfloat16())
    assert "dense_rows" not in calls


def _saved(model: Small) -> Small:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "change",
    [copy.deepcopy, _saved, lambda model: model.half().bfloat16(), lambda model: model.float().to(torch.bfloat16)],
    ids=["deepcopy", "pickle", "half", "to"],
)
def test_what_is_done_with_a_model_afterwards(change: Callable[[Small], Small], model: Small) -> None:
    x = torch.randn(1, 96).bfloat16()
    with torch.no_grad():
        expected = fast_cpu.apply(model)(x)
        again = change(model)
        assert type(again.head) is type(model.head)
        torch.testing.assert_close(again(x), expected, rtol=2**-6, atol=2**-6)
        for dtype in (torch.float32, torch.float16, torch.float64):
            assert again.to(dtype)(x.to(dtype)).isfinite().all()
        assert again.to("meta")(x.to("meta")).is_meta


def test_a_text_part_is_exported() -> None:
    model = AutoModelForImageTextToText.from_pretrained("shapes-idefics2", dtype=torch.bfloat16)
    ids, decoder = torch.arange(5, 17)[None], fast_cpu.apply(model).model.text_model
    with torch.no_grad():
        x = decoder.embed_tokens(ids)
        expected = decoder(x)
        exported = torch.export.export(decoder, (x,)).module()
        torch.testing.assert_close(exported(x), expected, rtol=2**-5, atol=2**-5)
        assert torch.equal(decoder(x), expected)  # nothing made while tracing is kept for ordinary calls
