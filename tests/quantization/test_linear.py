"""`QuantizedLinear` against the product with its dequantised weight in fp64, on odd shapes and in every dtype."""

import copy

import pytest
import torch
from minivlm_kernels import cpu_products
from torch import nn

from minivlm.quantization import cpu
from minivlm.quantization.formats import Affine, Codebook, Format, Int8
from minivlm.quantization.linear import QuantizedLinear

FORMATS = (Codebook("nf4"), Codebook("nf4", nested=True), Codebook("fp4"), Affine(32), Affine(128), Int8())
# outputs, inputs: blocks over row ends; odd; a K tail like Idefics2's 4304; the head's odd number of outputs
SHAPES = ((64, 128), (130, 200), (6, 4304), (5, 37), (33, 64), (70, 384))
# Half a unit in the last place each for the weight, the product, and its sum with the bias; and the product may be
# larger than the sum.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 4 * 2**-9, torch.float16: 4 * 2**-12}


def layer(shape: tuple[int, int], format: Format, dtype: torch.dtype = torch.bfloat16) -> QuantizedLinear:
    torch.manual_seed(0)
    made = QuantizedLinear(shape[1], shape[0], nn.Parameter(torch.randn(shape[0]).to(dtype)), format)
    made.quantize_(torch.randn(shape).to(dtype))
    return made


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_product(format: Format, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(cpu_products, "available", lambda: False)
    for shape in SHAPES:
        made = layer(shape, format).to(dtype)
        weight, bias = made.dequantize(torch.float32).double(), made.bias.double()
        for rows in (1, 3, 130):
            x = torch.randn(2, rows, shape[1]).to(dtype)
            expected = x.double() @ weight.T + bias
            error = (made(x).double() - expected).abs().max() / expected.abs().max()
            assert error <= BOUNDS[dtype], (shape, rows, error)
            assert made(x).dtype == dtype


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gradients_of_input_and_bias(format: Format) -> None:
    made = layer((33, 64), format, torch.float32)
    plain = nn.Linear(64, 33)
    plain.weight, plain.bias = nn.Parameter(made.dequantize()), nn.Parameter(made.bias.detach().clone())
    x = torch.randn(2, 3, 64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    made(ours).square().sum().backward()
    plain(theirs).square().sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-3)
    assert torch.allclose(made.bias.grad, plain.bias.grad, rtol=1e-4, atol=1e-3)
    assert not [name for name, _ in made.named_parameters() if name != "bias"]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_casting_and_copying_keep_codes_and_scales(format: Format) -> None:
    made = layer((33, 64), format)
    before = {name: tensor.clone() for name, tensor in made.tensors.items()}
    for changed in (made.half(), made.float(), made.to(torch.bfloat16), copy.deepcopy(made)):
        assert changed.tensors.keys() == before.keys()
        for name, tensor in changed.tensors.items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name]), name


def test_fp16_inputs_are_multiplied_in_the_compute_dtype() -> None:
    made = layer((33, 64), Codebook("nf4"), torch.float16)
    made.compute_dtype = torch.float32
    x = torch.randn(3, 64).half()
    exact = x.float() @ made.dequantize(torch.float32).T + made.bias.float()
    assert torch.equal(made(x), exact.half())


def test_int4_is_held_in_the_operator_s_order_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no compiler."""
    monkeypatch.setattr(cpu_products, "available", lambda: False)
    if cpu._half_bytes() is None:
        pytest.skip("torch's int4 operator has another layout on this processor")
    for shape in SHAPES:
        made = layer(shape, Affine(32))
        torch.manual_seed(0)
        torch.randn(shape[0])  # as in `layer`
        expected = Affine(32).quantize(torch.randn(shape).bfloat16())
        assert "packed" in made.held
        assert made.tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in made.tensors.items())


def test_memory() -> None:
    """Bytes a weight: what the formats promise, at a width where their tables no longer count."""
    sizes = {repr(format): layer((256, 4096), format).nbytes / 2**20 for format in FORMATS}
    assert sizes["Codebook(kind='nf4', nested=False, block=64)"] == pytest.approx(4.5 / 8, rel=0.001)
    assert sizes["Codebook(kind='nf4', nested=True, block=64)"] == pytest.approx(4.127 / 8, rel=0.005)
    assert sizes["Affine(group_size=128)"] <= 0.56  # both forms of the scales, in the operator's order
    assert sizes["Int8()"] == pytest.approx(1.001, rel=0.001)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_product_on_a_gpu(format: Format, dtype: torch.dtype) -> None:
    """The kernels behind the layer, after a move from the CPU, where int4 has an order of its own; and the way back."""
    for shape in SHAPES:
        made = layer(shape, format)
        weight, before = made.dequantize(torch.float32).double(), made.tensors
        made.to("cuda", dtype)
        for rows in (1, 3, 130):
            x = torch.randn(2, rows, shape[1]).to(dtype)
            expected = x.double() @ weight.T + made.bias.double().cpu()
            error = (made(x.cuda()).double().cpu() - expected).abs().max() / expected.abs().max()
            assert error <= BOUNDS[dtype], (shape, rows, error)
        made.to("cpu", torch.bfloat16)
        assert all(torch.equal(tensor, before[name]) for name, tensor in made.tensors.items())
