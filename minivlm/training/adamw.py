"""AdamW (Loshchilov & Hutter 2019): the numbers of `torch.optim.AdamW(fused=True)` bit for bit, by the same operator.

torch's class imports torch's compiler as soon as one is made, which takes seconds and 150 MB of every training process.
"""

from typing import Any

import torch
from torch import Tensor, nn


class AdamW:
    """m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  w ← w − lr·λ·w − lr · m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε).

    groups: {"params": […], "weight_decay": λ} each. What a state holds, and its names, are those of torch's class.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        self.param_groups = [{"lr": lr, "betas": betas, "eps": eps, **group} for group in groups]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters that have a gradient."""
        for group in self.param_groups:
            present = [parameter for parameter in group["params"] if parameter.grad is not None]
            for device in {parameter.device for parameter in present}:
                self._step(group, [parameter for parameter in present if parameter.device == device])

    def _step(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter not in self.state:
                self.state[parameter] = _begun(parameter)
        states = [self.state[parameter] for parameter in parameters]
        steps, means, squares = ([state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            parameters,
            [parameter.grad for parameter in parameters],
            means,
            squares,
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """Parameters are numbers there, in the order of the groups."""
        numbers = {parameter: number for number, parameter in enumerate(self._parameters())}
        groups = [{**group, "params": [numbers[p] for p in group["params"]]} for group in self.param_groups]
        return {"state": {numbers[p]: dict(state) for p, state in self.state.items()}, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a state, this class's or torch's, of the same parameters in the same groups."""
        parameters = self._parameters()
        self.state = {
            parameters[number]: {name: value.to(parameters[number].device) for name, value in state.items()}
            for number, state in saved["state"].items()
        }
        for group, other in zip(self.param_groups, saved["param_groups"], strict=True):
            group.update({name: other[name] for name in group if name != "params"})

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


def _begun(parameter: nn.Parameter) -> dict[str, Tensor]:
    means = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **means}
