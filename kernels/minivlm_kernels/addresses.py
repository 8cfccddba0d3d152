"""Which tensors code outside torch, a page of C or a Triton kernel, may be given by their addresses."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

EXACT = (Tensor, nn.Parameter)


def addressable(*tensors: Tensor | None) -> bool:
    """Whether the numbers of these tensors lie at their addresses, and torch need not know that they are read.

    Not so: subclasses (DTensor, FakeTensor, torchao's weights), which keep their numbers elsewhere or have none;
    tensors inside a `torch.func` transform or with a forward-mode derivative; lazy negatives; and any call that is
    traced, exported or compiled, or that a dispatch mode watches, such as torch's counter of operations.
    """
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in EXACT or tensor.is_neg()):
            return False
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack()
        or forward_ad._current_level >= 0
    )
