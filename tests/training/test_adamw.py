"""Our AdamW and our checkpointing are torch's bit for bit, without torch's compiler."""

from typing import Any

import processes
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minivlm.training import memory
from minivlm.training.adamw import AdamW

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}


def groups() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    sizes = [[(7, 5), (3,)], [(4, 4)]]
    parameters = [[nn.Parameter(torch.randn(size)) for size in some] for some in sizes]
    return [{"params": some, "weight_decay": decay} for some, decay in zip(parameters, (0.1, 0.0), strict=True)]


def run(optimiser: Any, first: int, last: int) -> list[torch.Tensor]:
    """Steps with falling learning rates; one parameter has no gradient in the first."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for index, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None if number == 0 and index == 1 else gradient
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 / (number + 1)
        optimiser.step()
    return [parameter.detach().clone() for parameter in parameters]


def test_its_steps_are_torchs_bit_for_bit() -> None:
    ours, theirs = AdamW(groups(), **OPTIONS), torch.optim.AdamW(groups(), **OPTIONS, fused=True)
    for found, wanted in zip(run(ours, 0, 5), run(theirs, 0, 5), strict=True):
        assert torch.equal(found, wanted)


def test_states_go_both_ways() -> None:
    theirs = torch.optim.AdamW(groups(), **OPTIONS, fused=True)
    middle = run(theirs, 0, 2)
    ours = AdamW(groups(), **OPTIONS)
    with torch.no_grad():
        for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
            for parameter, value in zip(group["params"], other["params"], strict=True):
                parameter.copy_(value)
    ours.load_state_dict(theirs.state_dict())
    assert len(middle) == 3
    theirs.load_state_dict(as_torch(ours))
    for found, wanted in zip(run(ours, 2, 4), run(theirs, 2, 4), strict=True):
        assert torch.equal(found, wanted)


def as_torch(optimiser: AdamW) -> dict[str, Any]:
    """A copy, as it comes back from a file, with the options that torch's class expects besides."""
    state = optimiser.state_dict()
    more = {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False}
    state["param_groups"] = [{**more, "fused": True, **group} for group in state["param_groups"]]
    state["state"] = {n: {name: t.clone() for name, t in each.items()} for n, each in state["state"].items()}
    return state


def test_checkpointing_is_torchs() -> None:
    """Same gradients, and each layer runs twice, for a backward pass and for a second one."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)) for _ in range(3))
    plain = [layer.forward for layer in layers]
    runs = []
    for layer in layers:
        layer[1].register_forward_hook(lambda *_: runs.append(1))
    x = torch.randn(5, 8, requires_grad=True)

    def gradients(forwards: list[Any]) -> list[torch.Tensor]:
        y = x
        for forward in forwards:
            y = y + forward(y)
        first = torch.autograd.grad(y.square().sum(), [x, *layers.parameters()], retain_graph=True)
        again = torch.autograd.grad(y.square().sum(), [x, *layers.parameters()])
        assert all(map(torch.equal, first, again))
        return list(first)

    wanted = gradients([lambda y, f=f: checkpoint(f, y, use_reentrant=False) for f in plain])
    runs.clear()
    memory.checkpoint_layers(layers)
    found = gradients([layer.forward for layer in layers])
    assert all(map(torch.equal, found, wanted))
    assert len(runs) == 3 * 3
    with torch.no_grad():
        layers[0](x)
    assert len(runs) == 3 * 3 + 1


def test_a_step_imports_no_compiler() -> None:
    program = """
import sys, torch
from minivlm.training import memory
from minivlm.training.optimisation import Optimisation, adamw, trained
model = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
memory.checkpoint_layers(model)
optimisation = Optimisation(trained(model), adamw(model, 1e-3))
model[0](torch.ones(2, 4)).sum().backward()
optimisation.step(1.0, torch.tensor([1.0, 2.0]))
print(sorted(name for name in ("torch._dynamo", "torch._inductor", "sympy", "triton") if name in sys.modules))
"""
    found = processes.run(program, check=True)
    assert found.stdout.strip() == "[]"
