"""What all kernels share: they can be imported and their references read where there is no triton."""

import os
import sys

import processes

SCRIPT = """
import sys
sys.modules["triton"] = None  # so that importing it fails
import torch
from minivlm_kernels.decode_attention import decode_attention, decode_attention_reference
from minivlm_kernels.flash_attention import attention_reference, flash_attention
from minivlm_kernels.int4_dequant import int4_dequantize, int4_reference
from minivlm_kernels.int4_matmul import int4_matmul

q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 1, 5, 16)
assert attention_reference(q, k, k)[0].shape == decode_attention_reference(q, k, k).shape == q.shape
scales, zeros = torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.uint8)
weight = {"qweight": torch.ones(2, 16, dtype=torch.uint8), "scales": scales, "zeros": zeros}
weight |= {"group_size": 32, "shape": (2, 32)}
assert int4_reference(**weight).shape == (2, 32)
for call in (
    lambda: flash_attention(q, k, k),
    lambda: decode_attention(q, k, k),
    lambda: int4_dequantize(**weight),
    lambda: int4_matmul(torch.ones(1, 32), **weight),
):
    try:
        call()
    except ValueError as error:
        assert "needs triton, which is not installed" in str(error), error
    else:
        raise AssertionError("no error")
"""


def test_without_triton() -> None:
    child = processes.run(SCRIPT, env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert child.returncode == 0, child.stderr
