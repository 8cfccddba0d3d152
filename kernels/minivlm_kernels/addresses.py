"""Which tensors code outside torch, a page of C or a Triton kernel, may be given by their addresses."""

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
    """Whether the numbers of these tensors lie at their addresses, and torch need not know that they are read.

    Not so: subclasses (DTensor, FakeTensor, torchao's weights), which keep their numbers elsewhere or have none;
    tensors inside a `torch.func` transform or with a forward-mode derivative; lazy negatives; and any call that is
    traced, exported or compiled, or that a mode watches, such as torch's counter of operations. (A default device is a
    mode, too: it does no harm.)
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
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack()
        or forward_ad._current_level >= 0
    )


def outside_modes(function: Callable[P, T]) -> Callable[P, T]:
    """A function that runs as if nothing traced or watched, and makes its tensors on the CPU: for what is kept and
    handed to later calls, or read by its address. Dtypes it has to name itself."""

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        with _python_dispatch._disable_current_modes(), torch._C._DisableFuncTorch(), torch.device("cpu"):
            return function(*args, **kwargs)

    return outside
