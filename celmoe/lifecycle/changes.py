"""Adds, removes and renames experts of a model, with all that goes along: config, routing, stacks and optimizers."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from celmoe.config import ExpertConfig
from celmoe.errors import ConfigError, ConfigTypeError, InputTypeError, StackedError, UnknownExpertError, nearest
from celmoe.level import Level
from celmoe.names import NamedModules
from celmoe.stacked.assembly import number_of, stack_members, unstack_members
from celmoe.stacked.fitness import Owners, alive, holding, likeness
from celmoe.stacked.stack import Stack, ordinary, slot_of
from celmoe.traced.registered import MODELS, register

from .alone import require_alone
from .grouping import groups_for
from .newcomer import Factory, made, random_numbers_given_back, settle
from .places import Places
from .shares import Row, ordinary_parameters
from .structure import Structure

Optimizers = torch.optim.Optimizer | Collection[torch.optim.Optimizer] | None


@torch.inference_mode(False)
def add(
    model: Any,
    level: str,
    name: str,
    config: ExpertConfig,
    *,
    warm_start: str | None,
    factory: Factory | None,
    optimizer: Optimizers,
) -> None:
    """See `HierarchicalCELMoE.add_expert`."""
    change = _Change(model, level, "add_expert", optimizer)
    change.structure.add(name, config)
    if warm_start is not None and warm_start not in change.registry:
        raise UnknownExpertError(
            f"'warm_start' must be an expert of level {level!r} (got {warm_start!r}; "
            f"{nearest(warm_start, change.registry)})"
        )
    if factory is not None and not callable(factory):
        raise ConfigTypeError(f"'factory' must be callable (got {factory!r})")
    if (make := model._factory.factory if factory is None else factory) is None:
        raise ConfigError("'factory' must be given, for a model that was unpickled has none (got None)")
    with random_numbers_given_back():
        expert = made(make, level, name, config.metadata)
        experts = dict(change.registry.items())
        settle(expert, experts, level, warm_start)
        stack = _stack_for(model, change.registry, level, expert)
        change.open([] if stack is None else [stack])
        rows = [(name, path) for path, _ in ordinary_parameters(expert)]
        known = {(each, path) for each in experts for path, _ in experts[each].named_parameters()}
        groups = groups_for(change.places, rows, known, warm_start, stack)
        if stack is not None:
            for places in change.places:
                places.require_first_values(stack)
    change.commit({**experts, name: expert}, joining=None if stack is None else name, groups=groups)


@torch.inference_mode(False)
def remove(model: Any, level: str, name: str, *, optimizer: Optimizers) -> None:
    """See `HierarchicalCELMoE.remove_expert`."""
    change = _Change(model, level, "remove_expert", optimizer)
    change.structure.remove(name)
    change.open(_stacks_of(change.registry[name]))
    change.commit({each: module for each, module in change.registry.items() if each != name}, removed=name)


@torch.inference_mode(False)
def rename(model: Any, level: str, name: str, new_name: str, *, optimizer: Optimizers) -> None:
    """See `HierarchicalCELMoE.rename_expert`."""
    change = _Change(model, level, "rename_expert", optimizer)
    change.structure.rename(name, new_name)
    change.open(_stacks_of(change.registry[name]))
    modules = {new_name if each == name else each: module for each, module in change.registry.items()}
    change.commit(modules, renamed={name: new_name})


class _Change:
    """One change of a level; nothing changes before `commit`.

    Args:
        model: The model.
        level: The level's name.
        call: The name of the user's call, for errors.
        optimizer: The optimizer or optimizers that go along.

    Attributes:
        structure: The structure that the config will have.
        registry: The level's experts.
        places: By optimizer, the places of parameters before the change.
    """

    def __init__(self, model: Any, level: str, call: str, optimizer: Optimizers) -> None:
        require_alone(model, call)
        model.check_config()
        self._model, self._level = model, level
        self._optimizers = _listed(optimizer)
        self.structure = Structure(model.config, level)
        self.registry = cast(NamedModules, model.level_modules[level])
        if {*self.registry} != {*self.structure.experts}:
            raise ConfigError(
                f'"level_modules[{level!r}]" must hold the experts of the config (got others, or not all; put the '
                f"missing ones back, and call add_expert and remove_expert)"
            )
        self._opened: list[Stack] = []
        self.places: list[Places] = []

    def open(self, stacks: Sequence[Stack]) -> None:
        """Prepare to make stacks anew, and to let optimizers go along.

        Raises:
            StackedError: An optimizer holds a stack, and was not given.
            InputTypeError, ConfigError: See `Places`.
        """
        self._opened = [*stacks]
        wholes = [cast(nn.Parameter, stack.whole(path)) for stack in stacks for path in stack.keys]
        given = set(map(id, self._optimizers))

        def others() -> list[Any]:
            return [each for each in holding(torch.optim.Optimizer, wholes) if id(each) not in given]

        if wholes and others():
            # An optimizer that is gone may wait for the collector.
            gc.collect()
        if wholes and (held := others()):
            raise StackedError(
                f"'optimizer' must be given, for stacked parameters are made anew (got none that holds them, and a "
                f"{type(held[0]).__name__} does; pass it, or a list of all that do)"
            )
        self.places = [Places(self._model, each, self.registry, stacks) for each in self._optimizers]

    def commit(
        self,
        modules: Mapping[str, nn.Module],
        *,
        renamed: Mapping[str, str] | None = None,
        removed: str | None = None,
        joining: str | None = None,
        groups: Sequence[Mapping[Row, int | None]] = (),
    ) -> None:
        """Change the model.

        Args:
            modules: The level's experts after the change.
            renamed: By old name of an expert, the new one.
            removed: The name of the expert that goes.
            joining: The name of a new expert that joins the opened stack.
            groups: By optimizer, the groups of a new expert's rows.
        """
        model, registry, renamed = self._model, self.registry, renamed or {}
        gone = None if removed is None else registry[removed]
        order = {key: place for place, key in enumerate(registry._parameters)}
        opened = [_Opened(stack) for stack in self._opened]
        registry.arrange({name: modules[name] for name in self.structure.experts})
        anew: dict[int, Stack] = {}
        for each in opened:
            names = [renamed.get(name, name) for name in each.intact if name != removed]
            if members := sorted([*names, *([] if joining is None else [joining])]):
                anew[id(each.stack)] = stack_members(registry, members, each.number)
        own = sorted(registry._parameters.items(), key=lambda item: order.get(item[0], len(order)))
        registry._parameters.clear()
        registry._parameters.update(own)
        if self._level in model._stacks:
            stacks = [anew.get(id(each), None if each in self._opened else each) for each in model._stacks[self._level]]
            model._stacks[self._level] = [each for each in stacks if each is not None]
        changed = self.structure.changed
        model._compiler = self.structure.commit()
        model._levels = [
            Level(config) if any(config is each for each in changed) else level
            for level, config in zip(model._levels, model.levels, strict=True)
        ]
        # Compiled graphs find the model by its key.
        MODELS.pop(model._key, None)
        model._key = register(model)
        dropped = set() if gone is None or not self.places else _dropped(model, gone)
        for number, places in enumerate(self.places):
            places.move(anew, renamed, dropped, groups[number] if groups else {})


class _Opened:
    """A stack that was taken apart.

    Attributes:
        stack: The stack.
        number: Its number among the level's.
        intact: The names of the members whose tensors were all in the stack.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack, self.number = stack, number_of(stack)
        self.intact = [stack.names[place] for place in sorted(stack.intact)]
        unstack_members(stack)
        for key in stack.keys.values():
            del stack.registry._parameters[key]


def _listed(optimizer: Any) -> list[torch.optim.Optimizer]:
    if optimizer is None:
        return []
    given = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
    for each in given:
        if not isinstance(each, torch.optim.Optimizer):
            raise InputTypeError(
                f"'optimizer' must be a torch.optim.Optimizer, or several of them (got {type(each).__name__})"
            )
    return list({id(each): each for each in given}.values())


def _stacks_of(expert: nn.Module) -> list[Stack]:
    """The stacks that an expert's modules are of: one, or none."""
    return list(dict.fromkeys(slot.stack for module in expert.modules() if (slot := slot_of(module)) is not None))


def _stack_for(model: Any, registry: NamedModules, level: str, expert: nn.Module) -> Stack | None:
    """The level's first stack whose members the expert is like; ``None`` if there is none."""
    stacks: list[Stack] = model._stacks.get(level, [])
    if not stacks or Owners(nn.ModuleList([model, expert]), [expert]).obstacle(expert) is not None:
        return None
    own = likeness(expert)
    for stack in stacks:
        if places := sorted(stack.intact):
            member = ordinary(registry[stack.names[places[0]]], {})
            if likeness(member, frozenset(stack.trained_paths)) == own:
                return stack
    return None


def _dropped(model: Any, expert: nn.Module) -> set[int]:
    """The ids of a removed expert's parameters that nobody else holds."""
    own = {id(parameter) for parameter in expert.parameters()} - {id(each) for each in model.parameters()}
    inside = {id(module) for module in expert.modules()}
    held = {
        id(parameter)
        for module in alive(nn.Module)
        if id(module) not in inside
        for parameter in module.__dict__.get("_parameters", {}).values()
    }
    return own - held
