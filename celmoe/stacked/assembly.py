"""Makes one stack of alike experts' tensors, and takes one apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from celmoe.names import FROZEN, STACKED, NamedModules

from .freezing import is_frozen, trained_paths
from .member import close, reopen
from .presence import reached, set_reached
from .stack import Slot, Stack, slot_of


def stack_members(registry: NamedModules, names: Sequence[str], number: int | None = None) -> Stack:
    """Stack the tensors of alike experts of a level.

    Args:
        registry: The level's experts.
        names: The names of those to stack.
        number: The stack's number among the level's; by default the first that is free.
    """
    experts = [registry[name] for name in names]
    paths = [path for path, _ in experts[0].named_parameters()]
    if number is None:
        number = next(
            number
            for number in range(len(registry) + 1)
            if not any(key_of(number, path) in registry._parameters for path in paths)
        )
    stack = Stack(registry, names, {path: key_of(number, path) for path in paths})
    trained = trained_paths(experts[0])
    frozen = [index for index, expert in enumerate(experts) if is_frozen(expert)]
    for path in paths:
        tensors = [expert.get_parameter(path) for expert in experts]
        registry._parameters[stack.keys[path]] = whole = _stacked(tensors, is_trained=path in trained)
        if whole.grad is not None:
            set_reached(whole, np.array([each.grad is not None for each in tensors]))
    for index, expert in enumerate(experts):
        expert.__dict__.pop(FROZEN, None)
        for prefix, module in list(expert.named_modules()):
            dotted = f"{prefix}." if prefix else ""
            paths_of = {name: None if each is None else f"{dotted}{name}" for name, each in module._parameters.items()}
            close(module, Slot(stack, index, paths_of))
    stack.freeze(frozen)
    return stack


def unstack_members(stack: Stack) -> None:
    """Give a stack's members parameters of their own, with the same values and gradients, frozen as before.

    Members that the stack's gradient is not of have none. The stacked parameters stay in the registry.
    """
    absent = {
        path: {name for name, is_reached in zip(stack.names, members, strict=True) if not is_reached}
        for path in stack.keys
        if (members := reached(stack.whole(path))) is not None
    }
    for expert in stack.registry.values():
        slot = slot_of(expert)
        if slot is not None and slot.stack is stack and slot.member in stack.frozen:
            expert.__dict__[FROZEN] = (*expert.__dict__.get(FROZEN, ()), *stack.trained_paths)
    for module in {*stack.registry.modules(), *stack.modules}:
        slot = slot_of(module)
        if slot is not None and slot.stack is stack:
            reopen(module)
            for name, path in slot.paths.items():
                if path is not None and stack.names[slot.member] in absent.get(path, ()):
                    module._parameters[name].grad = None  # type: ignore[union-attr]  # the stack has a tensor for it


def key_of(number: int, path: str) -> str:
    """The name in the registry of a stacked parameter: the stack's number, and the tensor's path in an expert."""
    # Neither a name of an expert, nor with a dot, which would part it for whoever looks parameters up by name.
    return f"{STACKED}{number}:{path.replace('.', '/')}"


def number_of(stack: Stack) -> int:
    """The number of a stack among its level's."""
    return int(next(iter(stack.keys.values())).removeprefix(STACKED).partition(":")[0])


def _stacked(tensors: Sequence[nn.Parameter], *, is_trained: bool) -> nn.Parameter:
    whole = nn.Parameter(torch.stack([each.detach() for each in tensors]), requires_grad=is_trained)
    if any(each.grad is not None for each in tensors):
        grads = [torch.zeros_like(each) if each.grad is None else each.grad.to_dense() for each in tensors]
        whole.grad = torch.stack(grads)
    return whole
