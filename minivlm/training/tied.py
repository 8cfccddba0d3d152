"""Heads that share the embedding table (tie_word_embeddings): an adapter may change one of the two and not the other.

As in PEFT, a table or a head that is trained whole, or changed by low-rank matrices and merged, is one of its own.
"""

from collections.abc import Iterable
from dataclasses import replace

from torch import nn


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """Give heads a weight of their own if `names`, of parameters, has the head or its table."""
    names = set(names)
    for head, table in pairs(model):
        weight = model.get_parameter(head)
        if names & {head, table} and weight is model.get_parameter(table):
            owner, _, leaf = head.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(weight.detach().clone(), weight.requires_grad))
    settle(model)


def settle(model: nn.Module) -> None:
    """Let the configuration say whether heads are still their tables, so that saving writes both if they are not."""
    if any(model.get_parameter(head) is not model.get_parameter(table) for head, table in pairs(model)):
        model.config = model.model.config = replace(model.config, tie_word_embeddings=False)


def pairs(model: nn.Module) -> list[tuple[str, str]]:
    """(head, table) by their names, as long as none has low-rank matrices around it."""
    tied = model.tied_weights if model.config.tie_word_embeddings else {}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [(head, table) for head, table in tied.items() if {head, table} <= names]
