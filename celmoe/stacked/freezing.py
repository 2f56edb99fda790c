"""Freezes experts, stacked or not, and lets them be trained again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import nn

from celmoe.names import FROZEN

from .presence import forget, reached
from .stack import Stack, slot_of


def freeze(experts: Collection[nn.Module], everyone: Iterable[nn.Module]) -> None:
    """Freeze experts: their parameters get no gradients, and lose those that they have.

    Args:
        experts: The experts.
        everyone: All experts of the model, which may share parameters.
    """
    held = _held(everyone)
    kept = [
        [path for path, parameter in _own(expert) if parameter.requires_grad or id(parameter) in held]
        for expert in experts
    ]
    for expert, paths in zip(experts, kept, strict=True):
        if paths:
            # Not by `setattr`, which a class may give a meaning of its own.
            expert.__dict__[FROZEN] = tuple(dict.fromkeys((*expert.__dict__.get(FROZEN, ()), *paths)))
        for _, parameter in _own(expert):
            parameter.requires_grad_(False)
            parameter.grad = None
    for stack, members in _members(experts).items():
        stack.freeze(members)
        for path in stack.keys:
            whole = stack.whole(path)
            before = reached(whole)
            if not forget(whole, members) and (before is None or before.any()):
                # Nobody's gradient is none, also for optimizers that see one parameter.
                whole.grad = None


def unfreeze(experts: Collection[nn.Module], everyone: Iterable[nn.Module]) -> None:
    """Let experts be trained as before `freeze`.

    Args:
        experts: The experts.
        everyone: All experts of the model. What others hold frozen, too, stays so.
    """
    ids = set(map(id, experts))
    held = _held(other for other in everyone if id(other) not in ids)
    for expert in experts:
        paths = expert.__dict__.pop(FROZEN, ())
        for path, parameter in _own(expert):
            takes_gradients = parameter.is_floating_point() or parameter.is_complex()
            if path in paths and id(parameter) not in held and takes_gradients:
                parameter.requires_grad_()
    for stack, members in _members(experts).items():
        stack.unfreeze(members)


def is_frozen(expert: nn.Module) -> bool:
    """True for an ordinary expert that is frozen, and of which nobody has let a parameter be trained again."""
    return bool(expert.__dict__.get(FROZEN)) and not any(each.requires_grad for each in expert.parameters())


def trained_paths(expert: nn.Module) -> frozenset[str]:
    """The paths of an ordinary expert's parameters that are trained, or that are once it is not frozen any more."""
    if is_frozen(expert):
        return frozenset(expert.__dict__[FROZEN])
    return frozenset(path for path, parameter in expert.named_parameters() if parameter.requires_grad)


def _own(expert: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are in no stack, by path."""
    for path, module in expert.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name, parameter


def _held(experts: Iterable[nn.Module]) -> set[int]:
    """The ids of the parameters that experts hold frozen."""
    return {
        id(parameter)
        for expert in experts
        if FROZEN in expert.__dict__
        for path, parameter in _own(expert)
        if path in expert.__dict__[FROZEN]
    }


def _members(experts: Iterable[nn.Module]) -> Mapping[Stack, set[int]]:
    found: dict[Stack, set[int]] = {}
    for module in (each for expert in experts for each in expert.modules()):
        if (slot := slot_of(module)) is not None:
            found.setdefault(slot.stack, set()).add(slot.member)
    return found
