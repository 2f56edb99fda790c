"""Stacks experts, in place, and takes stacks apart."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from .errors import InputTypeError, StackedError, UnknownLevelError, listed, nearest
from .hierarchy import HierarchicalCELMoE
from .level import Level
from .names import STACKED, NamedModules
from .stacked.assembly import stack_members, unstack_members
from .stacked.fitness import Owners, holding, likeness
from .stacked.stack import stacks_of


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
        StackedError: An optimizer holds the experts' parameters, or the model is spread over ranks.
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
            why = owners.obstacle(expert)
            alike.setdefault((why, type(expert) if why else likeness(expert)), []).append(name)
        for (found, _), experts in alike.items():
            why = found or ("have no others like them" if len(experts) < 2 else None)
            if why:
                kind = type(registry[experts[0]]).__name__
                classes.append(StackedClass(level, kind, tuple(experts), {}, why))
            else:
                # In the order of their rows: see `LevelPlan.present`.
                groups.append((level, sorted(experts)))
    modules = [model.level_modules[level][name] for level, experts in groups for name in experts]  # type: ignore[index]
    require_no_optimizer([parameter for module in modules for parameter in module.parameters()], "stacked")
    for level, experts in groups:
        registry = cast(NamedModules, model.level_modules[level])
        kind = type(registry[experts[0]]).__name__
        stack = stack_members(registry, experts)
        model._stacks.setdefault(level, []).append(stack)
        classes.append(StackedClass(level, kind, tuple(experts), stack.keys))
    order = {level: place for place, level in enumerate(names)}
    return StackReport(tuple(sorted(classes, key=lambda each: order[each.level])))


@torch.inference_mode(False)
def unstack_experts(model: HierarchicalCELMoE, levels: Collection[str] | None = None) -> None:
    """Give all stacked experts parameters of their own again, with the same values and gradients, frozen as before.

    Experts that were absent since gradients were cleared have none.

    Args:
        model: The model.
        levels: The names of the levels; all levels by default.

    Raises:
        InputTypeError: ``model`` is no `HierarchicalCELMoE`.
        UnknownLevelError: The model has no such level.
        StackedError: The model is spread over ranks.
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
        for stack in stacks_of(registry):
            unstack_members(stack)
        for name in [each for each in registry._parameters if each.startswith(STACKED)]:
            del registry._parameters[name]
        model._stacks.pop(level, None)


def _levels(model: HierarchicalCELMoE, levels: Collection[str] | None) -> list[str]:
    if not isinstance(model, HierarchicalCELMoE):
        raise InputTypeError(f"'model' must be a HierarchicalCELMoE (got {type(model).__name__})")
    if any(type(level) is not Level for level in model._levels):
        raise StackedError(
            "'model' must be stacked or unstacked before it is spread over ranks (got one that is; save a checkpoint, "
            "and load it into a new model)"
        )
    known = list(model.level_modules)
    wanted = known if levels is None else [levels] if isinstance(levels, str) else list(levels)
    if unknown := [each for each in wanted if each not in known]:
        raise UnknownLevelError(
            f"'levels' must be levels of the model (got {listed(unknown)}; {nearest(unknown, known)})"
        )
    return list(dict.fromkeys(wanted))


def require_no_optimizer(parameters: Sequence[nn.Parameter], what: str) -> None:
    """Refuse parameters that an optimizer holds: it would go on to step what no expert reads any more.

    Args:
        parameters: The parameters.
        what: What is done to the model.

    Raises:
        StackedError: An optimizer holds some of the parameters.
    """
    if holding(torch.optim.Optimizer, parameters):
        # An optimizer that is gone may wait for the collector.
        gc.collect()
    for each in holding(torch.optim.Optimizer, parameters):
        raise StackedError(
            f"'model' must be {what} before its optimizer is made (got parameters that a {type(each).__name__} holds; "
            f"make it anew from model.parameters() afterwards)"
        )
