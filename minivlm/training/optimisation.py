"""One optimiser step: gradients summed over batches and processes, divided by the tokens they are of, clipped, applied.

The numbers are those of transformers' `Trainer`: AdamW, no decay of norms and biases, clipping of the whole norm, and a
schedule whose first warm-up step has a learning rate of 0.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minivlm.modules.layers import RMSNorm
from minivlm.training.adamw import AdamW

SCHEDULES = ("linear", "cosine", "constant")
OPTIMISERS = ("adamw", "adamw8bit", "paged_adamw8bit")

Make = Callable[[dict[str, nn.Parameter]], list[torch.optim.Optimizer | AdamW]]


def scheduled(schedule: str, step: int, steps: int, warmup: int) -> float:
    """The learning rate's factor in step 0, 1, …: it rises from 0 for `warmup` steps, then falls to 0 at `steps`."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "constant":
        return 1.0
    return max(0.0, 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name. ValueError if there is none."""
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise ValueError("no parameter of this model is trained; apply an adapter (minivlm.training.lora.apply) first")
    return found


def adamw(model: nn.Module, lr: float, decay: float = 0.0, kind: str = "adamw") -> Make:
    """Makes AdamW for the parameters of a model, of which norms and biases do not decay.

    kind: torch's, or one of bitsandbytes whose two means take 8 bits; ValueError if that is not installed.
    """
    if kind not in OPTIMISERS:
        raise ValueError(f"the optimiser is one of {', '.join(OPTIMISERS)}, found {kind!r:.80}")
    norms = tuple(f"{n}." for n, module in model.named_modules() if isinstance(module, nn.LayerNorm | RMSNorm))

    def make(parameters: dict[str, nn.Parameter]) -> list[torch.optim.Optimizer | AdamW]:
        plain = [p for name, p in parameters.items() if name.startswith(norms) or name.rpartition(".")[2] == "bias"]
        fixed = {id(parameter) for parameter in plain}
        decayed = [parameter for parameter in parameters.values() if id(parameter) not in fixed]
        groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        options = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8}
        if kind == "adamw" and any(is_cut(parameter) for parameter in model.parameters()):
            return [torch.optim.AdamW(groups, **options, fused=True)]  # its state is saved by torch, as of its classes
        if kind == "adamw":
            return [AdamW(groups, **options)]
        try:
            from bitsandbytes import optim
        except ImportError as error:
            raise ValueError(f"{kind} is an optimiser of bitsandbytes; `pip install bitsandbytes`") from error
        return [(optim.AdamW8bit if kind == "adamw8bit" else optim.PagedAdamW8bit)(groups, **options)]

    return make


class Optimisation:
    """Optimisers of some parameters, and their steps.

    16-bit parameters are stepped as fp32 copies and rounded afterwards: in 16 bits alone, an update below 1/256 of a
    weight (bf16) would be lost. Their gradients are added up in fp32 too.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        make: Make,
        clip: float | None = 1.0,
    ) -> None:
        """make: the optimisers of parameters by name: `parameters`, or the copies that are stepped in their place."""
        self.parameters, self.clip = parameters, clip
        self.stepped = {name: _copy(parameter) for name, parameter in parameters.items()}
        self.optimisers = make(self.stepped)
        self.peaks = [group["lr"] for group in self.groups]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Of all optimisers; loading a state makes new ones."""
        return [group for optimiser in self.optimisers for group in optimiser.param_groups]

    def step(self, factor: float, sums: Tensor) -> tuple[float, Tensor]:
        """Divide the gradients, clip, step at `factor` times the learning rates; → the norm before clipping, and sums.

        sums: (loss, tokens, …), added up over all processes; gradients are divided by sums[1].
        """
        gradients = {name: p.grad for name, p in self.stepped.items()}
        if dist.is_initialized() and dist.get_world_size() > 1:
            gradients, sums = _summed(self.stepped, gradients, sums)
        present = [gradient for gradient in gradients.values() if gradient is not None]
        for name, parameter in self.stepped.items():
            parameter.grad = gradients[name]
        norm = self._divide_and_clip(present, max(1.0, float(sums[1])))
        for group, peak in zip(self.groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        if math.isfinite(norm):
            for optimiser in self.optimisers:
                optimiser.step()
        for name, parameter in self.parameters.items():
            self.stepped[name].grad = None
            if self.stepped[name] is not parameter:
                parameter.data.copy_(self.stepped[name].detach())
        return norm, sums

    def _divide_and_clip(self, gradients: list[Tensor], by: float) -> float:
        """The norm before clipping."""
        limit = math.inf if self.clip is None else self.clip
        if any(is_cut(gradient) for gradient in gradients):
            from minivlm.training import fsdp

            for gradient in gradients:
                gradient.div_(by)
            return fsdp.clip(gradients, limit)
        if gradients:
            torch._foreach_div_(gradients, by)
        return nn.utils.clip_grad_norm_(self.stepped.values(), limit).item()

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, for torch.save."""
        values = {name: parameter.detach() for name, parameter in self.stepped.items()}
        return {"parameters": values, "optimisers": [optimiser.state_dict() for optimiser in self.optimisers]}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`. ValueError if it belongs to other parameters."""
        values = state["parameters"]
        other = values.keys() ^ self.stepped.keys()
        other |= {name for name in values.keys() - other if values[name].shape != self.stepped[name].shape}
        if other:
            raise ValueError(
                f"the saved state trains other parameters: {sorted(other)[:3]}; go on as it was begun, or name another "
                "folder"
            )
        for name, value in values.items():
            self.stepped[name].copy_(value)
            self.parameters[name].copy_(value)
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter, or for 16 bits an fp32 copy that gathers its gradients."""
    if parameter.dtype == torch.float32:
        return parameter
    copy = nn.Parameter(parameter.detach().float())

    def gather(of: Tensor) -> None:
        copy.grad = of.grad.float() if copy.grad is None else copy.grad.add_(of.grad)
        of.grad = None

    parameter.register_post_accumulate_grad_hook(gather)
    return copy


def _summed(
    stepped: dict[str, nn.Parameter], gradients: dict[str, Tensor | None], sums: Tensor
) -> tuple[dict[str, Tensor | None], Tensor]:
    """Gradients and sums added up over all processes, by one call; None stays None where every process has none.

    Those of a model that `fsdp` has cut are means over the processes already.
    """
    cut = {name: gradient for name, gradient in gradients.items() if is_cut(stepped[name])}
    for gradient in cut.values():
        if gradient is not None:
            gradient.mul_(dist.get_world_size())
    gradients = {name: gradient for name, gradient in gradients.items() if name not in cut}
    device = next(iter(stepped.values())).device
    there = torch.tensor([float(gradient is not None) for gradient in gradients.values()])
    parts = [
        (torch.zeros_like(stepped[name]) if gradient is None else gradient).flatten().float()
        for name, gradient in gradients.items()
    ]
    flat = torch.cat([*parts, there.to(device), sums.to(device, torch.float32)])
    dist.all_reduce(flat)
    *parts, there, sums = flat.split([*(part.numel() for part in parts), len(there), len(sums)])
    kept = zip(gradients, parts, there.tolist(), strict=True)
    summed = {name: part.view_as(stepped[name]) if any_ else None for name, part, any_ in kept}
    return {name: cut.get(name, summed.get(name)) for name in stepped}, sums.cpu()


def is_cut(tensor: Tensor) -> bool:
    """Whether each process holds a part of it (`fsdp`)."""
    return hasattr(tensor, "full_tensor")
