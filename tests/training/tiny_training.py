"""Tiny models and rows for training, and the same three steps for one process and for many."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minivlm.training import fsdp


def three_steps(model: nn.Module, loss: Any, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Losses, the first gradients, the weights after three steps of clipped AdamW; each process has its batches."""
    # A large eps: where a gradient is nothing but rounding (biases of keys), steps should not be made of that.
    # No decay: fully_shard gives parameters that nothing uses a gradient of zeros, and so they would decay.
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    losses, gradients = [], {}
    for _ in range(3):
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            total, learned = loss(model, batch)
            total.backward()
            sums += torch.tensor([total.item(), learned], dtype=torch.float64)
        scale = 1.0
        if loss is fsdp.loss:
            dist.all_reduce(sums)
            scale = dist.get_world_size()  # fully_shard takes means over processes
        present = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        for gradient in present:
            gradient.mul_(scale / sums[1].item())
        gradients = gradients or {
            name: fsdp.whole(parameter.grad).clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        fsdp.clip(present, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append((sums[0] / sums[1]).item())
    weights = {name: fsdp.whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}
    return {"losses": losses, "gradients": gradients, "weights": weights}
