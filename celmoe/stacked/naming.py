"""The parameters of a model by the experts' own names, whether the experts are stacked or not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from celmoe.names import STACKED, NamedModules

from .stack import slot_of


class Named(NamedTuple):
    """The parameter that has a name.

    Attributes:
        parameter: The parameter; for a stacked expert, the stack's ``[M, ...]``.
        member: The expert's place in the stack; ``None`` for an ordinary parameter.
    """

    parameter: torch.Tensor
    member: int | None


def named_tensors(model: nn.Module) -> dict[str, Named]:
    """The parameters by the names, and in the order, that ``named_parameters`` gives if no expert is stacked.

    A parameter that has several names stands under its first.

    Args:
        model: Any module.
    """
    found: dict[str, Named] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        dotted = f"{prefix}." if prefix else ""
        slot = slot_of(module)
        paths = {} if slot is None else slot.paths
        if slot is not None:
            for name, path in paths.items():
                if path is not None:
                    found[f"{dotted}{name}"] = Named(slot.stack.whole(path), slot.member)
        holds_stacks = isinstance(module, NamedModules)
        for name, parameter in module._parameters.items():
            is_stack = holds_stacks and name.startswith(STACKED)
            if parameter is None or is_stack or name in paths or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            found[f"{dotted}{name}"] = Named(parameter, None)
    return found


def stacked_ids(model: nn.Module) -> set[int]:
    """The ids of all stacked parameters. One has no name if all of its members were replaced by other modules.

    Args:
        model: Any module.
    """
    return {
        id(parameter)
        for module in model.modules()
        if isinstance(module, NamedModules)
        for name, parameter in module._parameters.items()
        if name.startswith(STACKED)
    }
