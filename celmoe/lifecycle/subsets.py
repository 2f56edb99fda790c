"""A smaller model of some experts, with copies of their own."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from celmoe.config import CELMoEConfig, HierarchyLevelConfig
from celmoe.errors import ConfigError, ConfigTypeError, UnknownLevelError, listed, nearest
from celmoe.level import Level
from celmoe.names import FROZEN, NamedModules
from celmoe.patterns import matching
from celmoe.routing.compiler import RoutingCompiler
from celmoe.stacked.stack import slot_of

from .alone import require_alone


@torch.inference_mode(False)
def subset(model: Any, experts: Mapping[str, str | Collection[str]]) -> Any:
    """See `HierarchicalCELMoE.subset`."""
    require_alone(model, "subset")
    model.check_config()
    kept = _kept(model.config, _named(model.config, experts))
    levels = [
        replace(
            level,
            experts={name: replace(each) for name, each in level.experts.items() if name in names},
            fallback_expert=level.fallback_expert if level.fallback_expert in names else None,
        )
        for level, names in zip(model.config.levels, kept, strict=True)
    ]
    config = replace(model.config, levels=levels)
    enabled = [level for level in levels if level.enabled]
    compiler = RoutingCompiler(config)
    memo: dict[int, Any] = {}
    registries = {level.name: _copied(model.level_modules[level.name], level, memo) for level in enabled}
    modules = NamedModules(registries)
    modules.training = model.level_modules.training
    # The rest of the model is copied as it is, with these in the places of its own.
    memo |= {
        id(model.config): config,
        id(model.levels): enabled,
        id(model.level_modules): modules,
        id(model._compiler): compiler,
        id(model._levels): [Level(level) for level in enabled],
        id(model._stacks): {},
    }
    return copy.deepcopy(model, memo)


def _copied(registry: NamedModules, level: HierarchyLevelConfig, memo: dict[int, Any]) -> NamedModules:
    """Copies of some of a level's experts, which share what the experts share; none is stacked."""
    copies: dict[str, nn.Module] = {}
    for name in level.experts:
        copies[name] = copy.deepcopy(registry[name], memo)
        slot = slot_of(registry[name])
        if slot is not None and slot.member in slot.stack.frozen:
            copies[name].__dict__[FROZEN] = (*copies[name].__dict__.get(FROZEN, ()), *slot.stack.trained_paths)
    made = NamedModules(copies)
    made.training = registry.training
    return made


def _named(config: CELMoEConfig, experts: Any) -> dict[str, list[str]]:
    """By level, the experts that a user names or matches."""
    if not isinstance(experts, Mapping) or not experts:
        raise ConfigTypeError(f"'experts' must map levels to names of experts, at least one (got {experts!r})")
    enabled = {level.name: level for level in config.levels if level.enabled}
    found: dict[str, list[str]] = {}
    for level, given in experts.items():
        if level not in enabled:
            raise UnknownLevelError(
                f"'experts' must have levels of the model for keys (got {level!r}; {nearest(level, enabled)})"
            )
        known = enabled[level].experts
        patterns = [given] if isinstance(given, str) else given
        if not isinstance(patterns, Collection) or not patterns:
            raise ConfigTypeError(f'"experts[{level!r}]" must be names of experts, at least one (got {given!r})')
        names = set[str]()
        for pattern in patterns:
            is_name = isinstance(pattern, str) and pattern in known
            names |= {pattern} if is_name else {*matching(pattern, known, f"experts of level {level!r}")}
        found[level] = [name for name in known if name in names]
    return found


def _kept(config: CELMoEConfig, named: Mapping[str, Sequence[str]]) -> list[set[str]]:
    """The experts of each level of the config that are kept.

    Raises:
        ConfigError: A level keeps none.
    """
    levels = config.levels
    wanted = [set(named[level.name]) if level.enabled and level.name in named else None for level in levels]
    lowest = max(place for place, names in enumerate(wanted) if names is not None)
    kept: list[set[str]] = [set() for _ in levels]
    # True if some expert of the enabled level below has no ancestor here.
    has_orphans = False
    for place in range(lowest, -1, -1):
        level, own = levels[place], wanted[place]
        kept[place] |= own or set()
        if has_orphans and level.enabled:
            if level.fallback_expert in level.experts:
                kept[place].add(level.fallback_expert)
            elif own is None:
                kept[place] |= {*level.experts}
        parents = {level.experts[name].parent for name in kept[place]}
        has_orphans = None in parents or (has_orphans and not level.enabled)
        if place:
            kept[place - 1] |= parents - {None}  # type: ignore[arg-type]  # no None
    for place in range(lowest + 1, len(levels)):
        kept[place] = {
            name
            for name, each in levels[place].experts.items()
            if each.parent is None or each.parent in kept[place - 1]
        }
    if empty := [level.name for level, names in zip(levels, kept, strict=True) if level.enabled and not names]:
        raise ConfigError(
            f"'experts' must leave an expert to each level (got none for {listed(empty)}; name some of its experts)"
        )
    return kept
