"""`int4_dequant.py`: by the interpreter on a CPU, bit for bit. Real sizes: `test_int4_matmul.py`."""

import bounds
import pytest
import torch
from int4_weights import DEVICE, KINDS, dequantize, reference, weight
from minivlm_kernels import launching

SHAPES = [(3, 65), (33, 127), (3, 130), (1, 1), (33, 64), (5, 304), (17, 480)]  # 304: blocks of 64 straddle rows


@pytest.fixture(autouse=True)
def nan_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN, so that an element that no kernel writes is seen."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(kind: str, shape: tuple[int, int]) -> None:
    """Bit for bit, in every dtype: the reference rounds where the kernel rounds, and once at the end."""
    arguments, exact = weight(kind, *shape)
    expected = reference(arguments)
    # float32 rounds the scale twice (multiply, add) and the product once: 3 · 2⁻²⁴ of the largest scale, here < 1
    torch.testing.assert_close(expected.double(), exact, rtol=0, atol=3 * bounds.FP32)
    assert torch.equal(dequantize(arguments, torch.float32), expected)
    assert torch.equal(dequantize(arguments, torch.float16), expected.half())


def test_an_offset_on_the_device() -> None:
    arguments, _ = weight("nested", 3, 64)
    code, absmax, offset = arguments["nested"]
    expected = dequantize(arguments, torch.float32)
    for tensor in (torch.tensor(offset, device=DEVICE), torch.tensor([offset], device=DEVICE)):
        assert torch.equal(dequantize(arguments | {"nested": (code, absmax, tensor)}, torch.float32), expected)


@pytest.mark.parametrize("block", [2, 16, 256])
def test_other_block_sizes(block: int) -> None:
    arguments, _ = weight("nf4", 5, 48)
    arguments |= {"block_size": block, "absmax": torch.rand(-(-5 * 48 // block), device=DEVICE)}
    assert torch.equal(dequantize(arguments, torch.float32), reference(arguments))


@pytest.mark.parametrize("group", [64, 128])
def test_other_group_sizes(group: int) -> None:
    arguments, _ = weight("int4", 5, 208)
    groups = -(-208 // group)
    arguments |= {"group_size": group, "scales": torch.rand(5, groups, device=DEVICE)}
    arguments["zeros"] = torch.full((5, groups), 8, dtype=torch.uint8, device=DEVICE)
    assert torch.equal(dequantize(arguments, torch.float32), reference(arguments))


NF4, _ = weight("nf4", 4, 130)
NESTED, _ = weight("nested", 4, 130)
INT4, _ = weight("int4", 4, 130)


@pytest.mark.parametrize(
    ("good", "change", "message"),
    [
        (NF4, {"qweight": NF4["qweight"][:-1]}, "qweight should have 260 elements of uint8, found .259,.*complete"),
        (NF4, {"qweight": NF4["qweight"].char()}, "qweight should have 260 elements of uint8, found .* of int8"),
        (NF4, {"qweight": NF4["qweight"].repeat(2)[::2]}, "qweight should be contiguous"),
        (NF4, {"qweight": NF4["qweight"].repeat(2)[3:263]}, "qweight should begin at a multiple of 16 bytes"),
        (NF4, {"absmax": NF4["absmax"][:-1]}, "absmax should have 9 elements"),
        (NF4, {"absmax": NF4["absmax"].half()}, "absmax should have .* of float32, found .* float16"),
        (NF4, {"absmax": NESTED["absmax"]}, "absmax holds uint8 codes: give `nested`"),
        (NF4, {"code": NF4["code"][:8]}, r"code should have shape \(16,\)"),
        (NF4, {"block_size": 48}, "block_size should be a power of two from 2 up, found 48"),
        (NF4, {"shape": (4, 0)}, "shape should be"),
        (NF4, {"shape": (4, 131)}, "qweight should have 262 elements"),
        (NF4, {"code": NF4["code"].to("meta")}, "on one device, found .*, meta"),
        (NESTED, {"nested": (NF4["code"], *NESTED["nested"][1:])}, r"nested code should have shape \(256,\)"),
        (NESTED, {"nested": (NESTED["nested"][0], torch.rand(2), 0.0)}, "nested absmax should have 1 elements"),
        (NESTED, {"nested": (*NESTED["nested"][:2], torch.zeros(2))}, "nested offset should have 1 elements"),
        (NESTED, {"absmax": NF4["absmax"]}, "absmax should have 9 elements of uint8"),
        (INT4, {"qweight": INT4["qweight"][:, :-1].contiguous()}, r"qweight should have shape \(4, 65\)"),
        (INT4, {"scales": INT4["scales"][:, :-1].contiguous()}, r"scales should have shape \(4, 5\)"),
        (INT4, {"scales": INT4["scales"].double()}, "scales .* float16 or bfloat16 or float32, found .* float64"),
        (INT4, {"zeros": INT4["zeros"].short()}, "zeros should have .* uint8, found .* int16"),
        (INT4, {"group_size": 48}, "group_size should be 32, 64 or 128, found 48"),
    ],
)
def test_bad_input(good: dict, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantize(good | change, torch.float32)


def test_other_dtypes() -> None:
    with pytest.raises(ValueError, match=r"to float16, bfloat16 or float32, not to torch\.float64"):
        dequantize(NF4, torch.float64)


def test_needs_a_device_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching.triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="needs a GPU, found tensors on cpu"):
        dequantize(weight("int4", 4, 130, device="cpu")[0], torch.float32)
