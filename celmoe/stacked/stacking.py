"""Stacks experts, in place, and takes stacks apart."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from celmoe.errors import InputTypeError, StackedError, UnknownLevelError, listed, nearest
from celmoe.hierarchy import HierarchicalCELMoE
from celmoe.names import FROZEN, STACKED, NamedModules

from .fitness import Owners, holding, likeness
from .freezing import is_frozen, trained_paths
from .member import close, reopen
from .stack import Slot, Stack, slot_of


@dataclass(frozen=True)
class StackedClass:
    """Alike experts of one level, stacked or not.

    Attributes:
        level: The level's name.
        architecture: The experts' class.
        experts: Their names.
        parameters: The names of the stacked parameters, by the tensors' paths in an expert; empty if not stacked.
        reason: The reason that the experts are not stacked; empty if they are.
    """

    level: str
    architecture: str
    experts: tuple[str, ...]
    parameters: dict[str, str]
    reason: str = ""

    def __str__(self) -> str:
        what = f"{self.level}: {len(self.experts)} {self.architecture}"
        if self.reason:
            return f"{what} not stacked, for its experts {self.reason} ({listed(self.experts)})"
        tensors = len(self.parameters)
        return f"{what} stacked, {tensors} parameters in place of {tensors * len(self.experts)}"


@dataclass(frozen=True)
class StackReport:
    """What was stacked, and what not and why; ``str()`` has a line for each class.

    Attributes:
        classes: The experts by level and class.
    """

    classes: tuple[StackedClass, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.classes))


@torch.inference_mode(False)
def stack_experts(model: HierarchicalCELMoE, levels: Collection[str] | None = None) -> StackReport:
    """Stack the tensors of alike experts, in place: one parameter ``[M, ...]`` for each tensor of M experts.

    A training step then handles few parameters, however many experts there are. The model's checkpoints keep their keys
    and order. The experts stay where they are, and their tensors are views of the stacks. Make optimizers afterwards.

    Experts are alike if their modules have the same classes, and their parameters the same names, shapes, dtypes,
    devices and ``requires_grad``; frozen experts are like those that are not. Buffers stay as they are.

    Args:
        model: The model.
        levels: The names of the levels whose experts are stacked; all levels by default.

    Returns:
        What was stacked, and what not and why.

    Raises:
        InputTypeError: ``model`` is no `HierarchicalCELMoE`.
        UnknownLevelError: The model has no such level.
        StackedError: An optimizer holds the experts' parameters.
    """
    names = _levels(model, levels)
    registries = [cast(nn.ModuleDict, model.level_modules[level]) for level in names]
    owners = Owners(model, [expert for registry in registries for expert in registry.values()])
    classes: list[StackedClass] = []
    groups: list[tuple[str, list[str]]] = []
    for level, registry in zip(names, registries, strict=True):
        alike: dict[tuple[str | None, Any], list[str]] = {}
        for name, expert in registry.items():
            # By class and reason, for the report.
            is_own = type(registry) is NamedModules or slot_of(registry) is not None
            why = owners.obstacle(expert) if is_own else "are held by other ranks, too"
            alike.setdefault((why, type(expert) if why else likeness(expert)), []).append(name)
        for (found, _), experts in alike.items():
            why = found or ("have no others like them" if len(experts) < 2 else None)
            if why:
                kind = type(registry[experts[0]]).__name__
                classes.append(StackedClass(level, kind, tuple(experts), {}, why))
            else:
                groups.append((level, experts))
    modules = [model.level_modules[level][name] for level, experts in groups for name in experts]  # type: ignore[index]
    _require_no_optimizer([parameter for module in modules for parameter in module.parameters()])
    for level, experts in groups:
        registry = cast(NamedModules, model.level_modules[level])
        kind = type(registry[experts[0]]).__name__
        classes.append(StackedClass(level, kind, tuple(experts), _stack(registry, experts).keys))
    order = {level: place for place, level in enumerate(names)}
    return StackReport(tuple(sorted(classes, key=lambda each: order[each.level])))


@torch.inference_mode(False)
def unstack_experts(model: HierarchicalCELMoE, levels: Collection[str] | None = None) -> None:
    """Give all stacked experts parameters of their own again, with the same values and gradients, frozen as before.

    Args:
        model: The model.
        levels: The names of the levels; all levels by default.

    Raises:
        InputTypeError: ``model`` is no `HierarchicalCELMoE`.
        UnknownLevelError: The model has no such level.
    """
    names = _levels(model, levels)
    wholes = [
        parameter
        for level in names
        for name, parameter in model.level_modules[level]._parameters.items()
        if name.startswith(STACKED) and parameter is not None
    ]
    if holding(torch.optim.Optimizer, wholes):
        warnings.warn(
            "an optimizer holds the stacked parameters, which are no part of the model any more: make it anew from "
            "model.parameters()",
            stacklevel=2,
        )
    for level in names:
        registry = cast(nn.ModuleDict, model.level_modules[level])
        for expert in registry.values():
            slot = slot_of(expert)
            if slot is not None and slot.member in slot.stack.frozen:
                expert.__dict__[FROZEN] = (*expert.__dict__.get(FROZEN, ()), *slot.stack.trained_paths)
        stacks = {slot.stack for module in registry.modules() if (slot := slot_of(module)) is not None}
        for module in {*registry.modules(), *(each for stack in stacks for each in stack.modules)}:
            if slot_of(module) is not None:
                reopen(module)
        for name in [each for each in registry._parameters if each.startswith(STACKED)]:
            del registry._parameters[name]


def _levels(model: HierarchicalCELMoE, levels: Collection[str] | None) -> list[str]:
    if not isinstance(model, HierarchicalCELMoE):
        raise InputTypeError(f"'model' must be a HierarchicalCELMoE (got {type(model).__name__})")
    known = list(model.level_modules)
    wanted = known if levels is None else [levels] if isinstance(levels, str) else list(levels)
    if unknown := [each for each in wanted if each not in known]:
        raise UnknownLevelError(
            f"'levels' must be levels of the model (got {listed(unknown)}; {nearest(unknown, known)})"
        )
    return list(dict.fromkeys(wanted))


def _require_no_optimizer(parameters: Sequence[nn.Parameter]) -> None:
    """Refuse parameters that an optimizer holds: it would go on to step what no expert reads any more.

    Raises:
        StackedError: An optimizer holds some of the parameters.
    """
    for each in holding(torch.optim.Optimizer, parameters):
        raise StackedError(
            f"'model' must be stacked before its optimizer is made (got parameters that a {type(each).__name__} holds; "
            f"make it anew from model.parameters() afterwards)"
        )


def _stack(registry: NamedModules, names: Sequence[str]) -> Stack:
    experts = [registry[name] for name in names]
    paths = [path for path, _ in experts[0].named_parameters()]
    number = next(
        number
        for number in range(len(registry) + 1)
        if not any(_key(number, path) in registry._parameters for path in paths)
    )
    stack = Stack(registry, names, {path: _key(number, path) for path in paths})
    trained = trained_paths(experts[0])
    frozen = [index for index, expert in enumerate(experts) if is_frozen(expert)]
    for path in paths:
        tensors = [expert.get_parameter(path) for expert in experts]
        registry._parameters[stack.keys[path]] = _stacked(tensors, is_trained=path in trained)
    for index, expert in enumerate(experts):
        expert.__dict__.pop(FROZEN, None)
        for prefix, module in list(expert.named_modules()):
            dotted = f"{prefix}." if prefix else ""
            paths_of = {name: None if each is None else f"{dotted}{name}" for name, each in module._parameters.items()}
            close(module, Slot(stack, index, paths_of))
    stack.freeze(frozen)
    return stack


def _key(number: int, path: str) -> str:
    # Neither a name of an expert, nor with a dot, which would part it for whoever looks parameters up by name.
    return f"{STACKED}{number}:{path.replace('.', '/')}"


def _stacked(tensors: Sequence[nn.Parameter], *, is_trained: bool) -> nn.Parameter:
    whole = nn.Parameter(torch.stack([each.detach() for each in tensors]), requires_grad=is_trained)
    if any(each.grad is not None for each in tensors):
        grads = [torch.zeros_like(each) if each.grad is None else each.grad.to_dense() for each in tensors]
        whole.grad = torch.stack(grads)
    return whole
