"""Training a model that no single device holds: parameters, gradients and the optimiser's means cut among processes.

    model on the meta device ─ shard ─► every tensor a DTensor, cut by rows ─ load ─► each process reads its rows alone
    a step: a block's whole weights are gathered before it runs and dropped after it, its gradients summed and cut

It is torch's `fully_shard` (FSDP2; Zhao et al. 2023). One unit is a decoder block; the vision tower, the connector, the
embeddings and the head together are another, the root: processes call a tower different numbers of times, with images
of different sizes or none, and as units of their own these would wait for each other's gathers in different orders.
"""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from minivlm.checkpoint import hub, loading, tensors, weights
from minivlm.devices.parallel import Share
from minivlm.training.loss import token_loss

# From torch 2.13 on, a process whose rows have no images can take part in the sums of gradients that it does not have.
# Before, every parameter needs one on every process, or the sums pair up wrongly.
UNUSED = hasattr(FSDPModule, "set_reduce_scatter_unused_params")


def from_pretrained(
    cls: Any,
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = torch.bfloat16,
    attn_implementation: str | None = None,
    prepare: Callable[[nn.Module], Any] | None = None,
    **where: Any,
) -> nn.Module:
    """A model of class `cls` cut among the processes that torchrun started; no process ever holds all of it.

    dtype: what the optimiser steps. compute_dtype: what blocks compute in, and what the result is saved in (None: the
    same); gradients are summed in fp32. prepare: called with the meta-device model before it is cut, to freeze parts
    of it, say. where: revision, cache_dir, token, local_files_only.

    Raises as `from_pretrained` does for files that do not fit, on all processes before any data is read.
    """
    files = hub.source(name_or_folder, **where)
    config = loading.read_config(files, cls.config_class)
    with loading.shapes_only():
        model = cls(config, attn_implementation=attn_implementation).to(dtype)
    if prepare is not None:
        prepare(model)
    shard(model, compute_dtype)
    load(model, files)
    model.generation_config = loading.read_generation_config(files) or model.generation_config
    model.name_or_path = files.name
    return model.train()


def shard(model: nn.Module, compute_dtype: torch.dtype | None = None) -> None:
    """Cut a model among all processes, in place; what is put on it later, an adapter, is whole in each.

    `summed_loss` becomes a method of the model: the loss of a batch, as `loss.token_loss`.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for unit in [*units(model), model]:
        fully_shard(unit, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule) and UNUSED:
            module.set_reduce_scatter_unused_params(True)
    model.result_dtype = compute_dtype or model.dtype
    model.summed_loss = types.MethodType(_loss, model)
    register_fsdp_forward_method(model, "summed_loss")


def units(model: nn.Module) -> list[nn.Module]:
    """What is gathered and dropped by itself: decoder blocks, and the MLPs of IDEFICS' gated blocks.

    (Keys and values of those are computed beside their forward pass, so their cross-attention stays in the root.)
    """
    gated = getattr(model.model, "gated_cross_attn_layers", ())
    return [*model.decoder.layers, *(block.mlp for block in gated)]


def _loss(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    total, learned = token_loss(model, inputs)
    if not UNUSED:
        unused = (parameter.sum() * 0 for name, parameter in model.named_parameters() if parameter.requires_grad)
        total = total + sum(unused)
    return total, learned


def loss(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """`loss.token_loss` of a model that is cut: the root's parameters are gathered around it."""
    return model.summed_loss(inputs)


# ---- Weights in and out ----------------------------------------------------------------------------------------------


@torch.no_grad()
def load(model: nn.Module, files: hub.Source) -> None:
    """Fill a cut meta-device model from a checkpoint's files. Each process reads its rows of every tensor.

    Names, shapes and dtypes are checked first, as ever. ValueError for a checkpoint that is quantised.
    """
    if files.json(hub.CONFIG).get("quantization_config") is not None:
        raise ValueError(f"{files.name} is quantised; its weights cannot be cut by rows: train adapters without fsdp")
    shards = weights.weight_files(files)
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    readers = [weights.open_weights(path) for path in shards]
    found, _, _ = tensors.match(model, readers, shards)
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            parameter.copy_(found[name].read())
            continue
        share = _rows(parameter)
        if share.stop > share.start:
            parameter.to_local().copy_(found[name].read(share))
    model.tie_weights()


def _rows(parameter: DTensor) -> Share:
    """The rows of this process: torch cuts dimension 0 into pieces of equal size, the last ones smaller or empty."""
    size, rank = parameter.device_mesh.size(), parameter.device_mesh.get_local_rank()
    rows = parameter.shape[0]
    each = -(-rows // size)
    return Share(0, min(rank * each, rows), min((rank + 1) * each, rows), tuple(parameter.shape))


def full_state_dict(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors whole, on the CPU of the first process; empty on the others. dtype: what they become."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        name: tensor.to(dtype or tensor.dtype) for name, tensor in get_model_state_dict(model, options=options).items()
    }


def save_pretrained(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None, **options: Any) -> None:
    """An ordinary checkpoint of a model that is cut, written by the first process. All processes call this.

    dtype: of the stored weights, None: of the parameters; options: see `save_pretrained` of a model.
    """
    state = full_state_dict(model, dtype)
    first = dist.get_rank() == 0
    model.save_pretrained(folder, state_dict=state, is_main_process=first, **options)
    dist.barrier()


def whole(value: Tensor) -> Tensor:
    """A DTensor put together (all processes call this); any other tensor as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


# ---- Steps and states ------------------------------------------------------------------------------------------------


def clip(gradients: list[Tensor], most: float) -> float:
    """Scale gradients, cut ones and whole ones, so that their norm is at most `most`; → the norm before."""
    norms = [whole(torch.linalg.vector_norm(gradient)) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack([each.float() for each in norms])).item()
    factor = min(1.0, most / (norm + 1e-6))
    for gradient in gradients if factor < 1 else ():
        gradient.mul_(factor)
    return norm


def save_state(model: nn.Module, optimisers: list[torch.optim.Optimizer], folder: Path) -> None:
    """What is trained and the optimisers' means, each process its part, by torch.distributed.checkpoint."""
    dcp.save(_state(model, optimisers), checkpoint_id=folder)


def load_state(model: nn.Module, optimisers: list[torch.optim.Optimizer], folder: Path) -> None:
    """Go on from a state that any number of processes has saved."""
    state = _state(model, optimisers)
    dcp.load(state, checkpoint_id=folder)
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    set_state_dict(
        model, optimisers, model_state_dict=state["model"], optim_state_dict=state["optimisers"], options=options
    )


def save_parts(
    model: nn.Module, optimisers: list[torch.optim.Optimizer], out: Path, step: int
) -> tuple[dict[str, Tensor] | None, str]:
    """Save the state of a step beside earlier ones; → the whole weights (None where an adapter is trained), in the
    dtype that the model computed in, and the name of the state's folder in `out`. All processes call this."""
    name = f"state-{step:06d}"
    save_state(model, optimisers, out / name)
    if getattr(model, "adapter_config", None) is not None:
        return None, name
    return full_state_dict(model, model.result_dtype), name


def _state(model: nn.Module, optimisers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    values, means = get_state_dict(model, optimisers, options=StateDictOptions(ignore_frozen_params=True))
    return {"model": values, "optimisers": means}
