"""Checks which tensors may be passed by address to code outside torch: compiled C or Triton kernels."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn, overrides
from torch.autograd import forward_ad
from torch.utils import _python_dispatch
from torch.utils._device import DeviceContext

P, T = ParamSpec("P"), TypeVar("T")
EXACT = (Tensor, nn.Parameter)


def addressable(*tensors: Tensor | None) -> bool:
    """Whether the data of these tensors lies at their addresses and may be read without torch's knowledge.

    False for subclasses (DTensor, FakeTensor, torchao's weights), which keep their data elsewhere or have none; for
    tensors inside a `torch.func` transform or with a forward-mode derivative; for lazy negatives; and while a call is
    traced, exported or compiled, or watched by a mode such as torch's operation counter. (A default device is also a
    mode, but harmless.)
    """
    if torch.compiler.is_compiling():  # which cannot look into what follows
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in EXACT or tensor.is_neg()):
            return False
    if torch._C._len_torch_function_stack():
        for mode in overrides._get_current_function_mode_stack():
            if not isinstance(mode, DeviceContext):
                return False
    return not (
        torch._C._is_tracing()  # what torch.jit.is_tracing() calls, in less time
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack()
        or forward_ad._current_level >= 0
    )


def outside_modes(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function outside all tracing and modes, with the CPU as default device: for tensors that later calls reuse
    or that are read by address. The function must name its dtypes."""

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        with _python_dispatch._disable_current_modes(), torch._C._DisableFuncTorch(), torch.device("cpu"):
            return function(*args, **kwargs)

    return outside
