"""The experts of all hierarchies in a model, together: a host has a hierarchy at each place."""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from celmoe.errors import ConfigError, InputTypeError, UnknownLevelError, nearest
from celmoe.hierarchy import HierarchicalCELMoE
from celmoe.names import path_key
from celmoe.norms import gradient_norms
from celmoe.routing.plan import RoutingPlan


def hierarchies(model: nn.Module) -> dict[str, HierarchicalCELMoE]:
    """The hierarchies in a model, by dotted name; the model itself has the name ``""``.

    Raises:
        InputTypeError: ``model`` is no module.
        ConfigError: There are none.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"'model' must be a torch.nn.Module (got {type(model).__name__})")
    found = {name: each for name, each in model.named_modules() if isinstance(each, HierarchicalCELMoE)}
    if not found:
        raise ConfigError(f"'model' must have experts (got a {type(model).__name__} without)")
    return found


def gradient_scalars(model: nn.Module) -> dict[str, float]:
    """The 2-norm of each expert's gradient at all places together; see `celmoe.gradient_norms`.

    Returns:
        By ``gradient_norm/<level>/<expert>``, in the names of `LoadTracker.scalars`, for experts with a gradient.

    Raises:
        InputTypeError, ConfigError: See `hierarchies`.
    """
    squares: dict[str, float] = {}
    for hierarchy in hierarchies(model).values():
        for level, norms in gradient_norms(hierarchy).items():
            for name, norm in norms.items():
                key = f"gradient_norm/{path_key(level, name)}"
                squares[key] = squares.get(key, 0.0) + norm * norm
    return {key: math.sqrt(square) for key, square in squares.items()}


def experts_of(model: nn.Module, level: str) -> list[str]:
    """The names of a level's experts, in their order, each once.

    Raises:
        InputTypeError, ConfigError: See `hierarchies`.
        UnknownLevelError: No hierarchy has such a level.
    """
    levels = [each for hierarchy in hierarchies(model).values() for each in hierarchy.levels]
    found = {name: None for each in levels if each.name == level for name in each.experts}
    if not found:
        known = list({each.name: None for each in levels})
        raise UnknownLevelError(f"'level' must be a level of the experts (got {level!r}; {nearest(level, known)})")
    return list(found)


def freeze(model: nn.Module, level: str, name: str) -> None:
    """Freeze an expert at all places; see `HierarchicalCELMoE.freeze`."""
    for hierarchy in hierarchies(model).values():
        if any(each.name == level and name in each.experts for each in hierarchy.levels):
            hierarchy.freeze(level, glob.escape(name))


def plan_in(batch: Any) -> RoutingPlan:
    """The plan in a batch: a plan, or an entry of a mapping, a tuple or a list.

    Raises:
        InputTypeError: There is none.
    """
    entries = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    for entry in entries:
        if isinstance(entry, RoutingPlan):
            return entry
    raise InputTypeError(
        f"batches must have a RoutingPlan among their entries (got a {type(batch).__name__} without; "
        f"celmoe.Collator puts one in)"
    )
