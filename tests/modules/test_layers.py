"""The linear layer's ways of multiplying on a CPU agree, whatever processor this is."""

import pytest
import torch
import torch.nn.functional as F

from minivlm.modules import layers
from minivlm.modules.layers import MANY, Linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("native", [False, True])
def test_many_rows_of_bf16(bias: bool, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without bf16 products: the exact result, rounded once; and gradients where they are wanted."""
    torch.manual_seed(0)
    monkeypatch.setattr(layers, "PIECE", 1000)  # several pieces, the last one shorter
    monkeypatch.setattr(layers, "multiplies", lambda dtype: native)
    layer = Linear(96, 77, bias=bias).bfloat16()
    called = []
    monkeypatch.setattr(Linear, "_in_fp32", _counted(Linear._in_fp32, called))
    for rows in ((2, MANY // 2, 96), (MANY - 1, 96), (MANY, 96)):
        x = torch.randn(rows).bfloat16()
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        with torch.no_grad():
            found = layer(x)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)
    assert len(called) == (0 if native else 2)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert len(called) == (0 if native else 2)


def _counted(method, calls: list):
    def counting(self, x):
        calls.append(x.shape)
        return method(self, x)

    return counting
