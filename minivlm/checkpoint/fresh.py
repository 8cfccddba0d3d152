"""Random values for some parameters of a model, without memory for the others."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook


def random_values(build: Callable[[], nn.Module], names: Collection[str]) -> dict[str, Tensor]:
    """The named parameters as `build` makes them, fp32.

    `build` runs twice. On the meta device it shows in which order its parameters come; then, for real, every other
    parameter is put on the meta device as soon as it is registered, before anything is drawn for it.
    """
    order: list[nn.Parameter] = []
    hook = register_module_parameter_registration_hook(lambda module, name, parameter: order.append(parameter))
    try:
        with torch.device("meta"):
            named = {id(parameter): name for name, parameter in build().named_parameters()}
    finally:
        hook.remove()
    wanted = iter([named.get(id(parameter)) in names for parameter in order])

    def register(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return parameter if next(wanted) else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(register)
    try:
        with torch.device("cpu"):
            return {name: value.detach() for name, value in build().named_parameters() if name in names}
    finally:
        hook.remove()
