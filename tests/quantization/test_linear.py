"""`QuantizedLinear` against the product with its dequantised weight in fp64, on odd shapes and in every dtype."""

import copy

import bounds
import processes
import pytest
import torch
from minivlm_kernels import cpu_dense, cpu_int4
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from wrapped import Wrapped

from minivlm.quantization import products
from minivlm.quantization.affine import Affine
from minivlm.quantization.codebook import Codebook
from minivlm.quantization.formats import Format
from minivlm.quantization.int8 import Int8
from minivlm.quantization.linear import QuantizedLinear

FORMATS = (Codebook("nf4"), Codebook("nf4", nested=True), Codebook("fp4"), Affine(32), Affine(128), Int8())
# outputs, inputs: blocks over row ends; odd; a K tail like Idefics2's 4304; the head's odd number of outputs
SHAPES = ((64, 128), (130, 200), (6, 4304), (5, 37), (33, 64), (70, 384))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer(shape: tuple[int, int], format: Format, dtype: torch.dtype = torch.bfloat16) -> QuantizedLinear:
    torch.manual_seed(0)
    made = QuantizedLinear(shape[1], shape[0], nn.Parameter(torch.randn(shape[0]).to(dtype)), format)
    made.quantize_(torch.randn(shape).to(dtype))
    return made


def check(made: QuantizedLinear, weight: Tensor, x: Tensor) -> None:
    """A product in whatever way it is computed, beside that with `weight`, the dequantised one in fp64."""
    found, terms = made(x), None
    assert found.dtype == x.dtype
    if isinstance(made.format, Affine):  # code − 8 and zero − 8, at most 8 steps each, may be multiplied apart
        terms = 8 * made.tensors["scales"].cpu().repeat_interleave(made.format.group_size, 1)[:, : weight.shape[1]]
    sides = (x.flatten(0, 1).cpu(), weight, made.bias.detach().cpu())
    exact, bound = bounds.linear(*sides, dtype=x.dtype, weight_dtype=x.dtype, terms=terms, roundings=2)
    bounds.assert_within(found.detach().flatten(0, 1).cpu(), exact, bound, (weight.shape, x.shape))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_product(format: Format, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(cpu_int4, "available", lambda: False)
        monkeypatch.setattr(cpu_dense, "available", lambda: False)
    for shape in SHAPES:
        made = layer(shape, format).to(dtype)
        weight = made.dequantize(torch.float32).double()
        for rows in ((1, 1), (2, 1), (2, 3), (2, 130)):
            check(made, weight, torch.randn(*rows, shape[1]).to(dtype))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gradients_of_input_and_bias(format: Format) -> None:
    made = layer((33, 64), format, torch.float32)
    plain = nn.Linear(64, 33)
    plain.weight, plain.bias = nn.Parameter(made.dequantize()), nn.Parameter(made.bias.detach().clone())
    x = torch.randn(2, 3, 64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    made(ours).square().sum().backward()
    plain(theirs).square().sum().backward()
    # y is a sum of 64 products; its gradient, 2 y, is multiplied by a weight and summed over 33 outputs, or 6 rows.
    output = plain(theirs).detach()
    each = bounds.random(64, 2 * output.abs().max() * 64**0.5)
    for found, expected, outputs in ((ours.grad, theirs.grad, 33), (made.bias.grad, plain.bias.grad, 1)):
        size = 2 * plain.weight.abs().max().clamp(min=1)
        bounds.assert_within(found, expected.double(), size * (6 * outputs) ** 0.5 * each)
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


@pytest.mark.skipif(not cpu_int4.available(), reason="no GCC, or no AVX")
@pytest.mark.parametrize("format", FORMATS[:-1], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_repacked_tensors_come_back_and_stand_for_the_same_numbers(format: Format, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        torch.manual_seed(0)
        weight = torch.randn(shape).to(dtype)
        made = QuantizedLinear(shape[1], shape[0], None, format)
        made.quantize_(weight)
        expected = format.quantize(weight)
        assert ("stream" in made.held) == (isinstance(format, Affine) or shape[1] % 64 == 0)
        assert made.tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in made.tensors.items())
        if "stream" not in made.held:
            continue
        pieces = [piece for _, piece in products._pieces(made.held, format, shape, torch.float32)]
        assert torch.equal(torch.cat(pieces, 1).T, format.dequantize(expected, shape, torch.float32))


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_what_has_no_address_takes_torchs_operators(format: Format, rows: int) -> None:
    """Subclasses, transforms, exported programs and modes that watch: the product of the definitions."""
    made, x = layer((33, 64), format), torch.randn(rows, 64).bfloat16()
    with torch.no_grad():
        expected = nn.functional.linear(x, made.dequantize(torch.bfloat16), made.bias)
        assert torch.equal(made(Wrapped(x)), expected)
        torch.testing.assert_close(torch.func.vmap(made)(x), expected, rtol=2**-7, atol=2**-7)
        assert torch.equal(torch.export.export(nn.Sequential(made), (x,)).module()(x), expected)
        with FlopCounterMode(display=False) as counter:
            made(x)
    assert counter.get_total_flops() == 2 * rows * 33 * 64


UNUSUAL = """
import copy, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from minivlm.devices import fast_cpu
from minivlm.modules.layers import RMSNorm
from minivlm.quantization import codebook
from minivlm.quantization.affine import Affine
from minivlm.quantization.codebook import Codebook
from minivlm.quantization.int8 import Int8
from minivlm.quantization.linear import QuantizedLinear

torch.set_grad_enabled(False)
weight, x = torch.randn(128, 64).bfloat16(), torch.randn(3, 64).bfloat16()
plain = torch.nn.Linear(64, 128, bias=False).bfloat16()

def results():
    found = []
    for format in (Codebook("nf4"), Codebook("nf4", nested=True), Codebook("fp4"), Affine(32), Int8()):
        layer = QuantizedLinear(64, 128, None, format)
        layer.quantize_(weight)
        found += [layer(x), layer(x.repeat(40, 1)), layer.dequantize()]
        found += [layer.tensors[name] for name in sorted(layer.tensors)]
    return [*found, fast_cpu.apply(copy.deepcopy(plain))(x)]

with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
    for kind in ("nf4", "fp4"):
        codebook.codebook(kind), codebook._cells(kind)
    codebook.dynamic_map(), codebook._dynamic_codes(), fast_cpu.pays()
torch.set_default_dtype(torch.float64)
with torch.device("meta"):
    unusual = results()
torch.set_default_dtype(torch.float32)
for one, other in zip(unusual, results(), strict=True):
    assert type(one) is torch.Tensor and one.device == other.device and one.dtype == other.dtype
    assert torch.equal(one, other)
"""


def test_default_devices_dtypes_and_fake_tensors_change_nothing() -> None:
    """Also in what is worked out once and kept: a process that begins with them."""
    child = processes.run(UNUSUAL)
    assert child.returncode == 0, child.stderr


def test_memory() -> None:
    """Bytes a weight: what the formats promise, at a width where their tables no longer count."""
    sizes = {repr(format): layer((256, 4096), format).nbytes / 2**20 for format in FORMATS}
    assert sizes["Codebook(kind='nf4', nested=False)"] == pytest.approx(4.5 / 8, rel=0.001)
    assert sizes["Codebook(kind='nf4', nested=True)"] == pytest.approx(4.127 / 8, rel=0.005)
    assert sizes["Affine(group_size=128)"] == pytest.approx(4.1875 / 8, rel=0.001)
    assert sizes["Int8()"] == pytest.approx(1.001, rel=0.001)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_product_on_a_gpu(format: Format, dtype: torch.dtype) -> None:
    """The kernels behind the layer, after a move from the CPU, where the order is another; and the way back."""
    for shape in SHAPES:
        made = layer(shape, format)
        weight, before = made.dequantize(torch.float32).double(), made.tensors
        made.to("cuda", dtype)
        for rows in (1, 3, 130):
            check(made, weight, torch.randn(2, rows, shape[1]).to("cuda", dtype))
        made.to("cpu", torch.bfloat16)
        assert all(torch.equal(tensor, before[name]) for name, tensor in made.tensors.items())
