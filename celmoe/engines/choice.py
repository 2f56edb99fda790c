"""Decides the engines of a level's experts: once a call, executed by `Level.run`, printed by ``explain()``.

Axes: P experts present.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from celmoe.errors import EngineRefusedError, listed
from celmoe.grouped.capture import WrongResult, is_being_traced, path_of
from celmoe.grouped.classes import ClassRecord, Layout, LevelClasses, LevelInputLike, Unit
from celmoe.grouped.program import Program
from celmoe.routing.plan import LevelPlan
from celmoe.stacked.stack import Slot, Stack, slots_of
from celmoe.torch_internals import (
    has_global_hooks,
    is_forward_differentiated,
    is_jit_traced,
    is_symbolic,
    transforms_are_active,
)

from .cost import Cost, estimate

AUTO = "auto"
LOOPED = "looped"
GROUPED = "grouped"


class Decision(NamedTuple):
    """The decision for some experts.

    Attributes:
        unit: The experts, and their class.
        cost: The cost of either way; ``None`` if an earlier decision holds.
    """

    unit: Unit
    cost: Cost | None = None

    @property
    def engine(self) -> str:
        """The engine that runs the experts: ``"grouped"`` or ``"looped"``."""
        return LOOPED if self.unit.is_alone else GROUPED

    @property
    def program(self) -> Program | None:
        """The experts' program; ``None`` if the experts are looped, or captured at the first call only."""
        return None if self.unit.is_alone or self.unit.record is None else self.unit.record.program

    @property
    def reason(self) -> str:
        """The reason for the engine, in words."""
        if len(self.unit.modules) == 1:
            return "the only one of its kind"
        if self.unit.fault is not None:
            return f"for its experts {self.unit.fault}"
        return f"{'run as one' if self.unit.record else 'once captured at the first call'} ({self.cost})"


class Present(NamedTuple):
    """The experts of a level that are present in a batch.

    Attributes:
        names: P names.
        experts: Their modules.
        scales: For each expert the factor of the gradient into its input.
        plan: The level's plan; ``None`` if nothing is known of the experts' rows.
    """

    names: Sequence[str]
    experts: Sequence[nn.Module]
    scales: Sequence[float]
    plan: LevelPlan | None

    def taken(self, places: Sequence[int]) -> Present:
        """Some of the experts."""
        return self._replace(
            names=[self.names[place] for place in places],
            experts=[self.experts[place] for place in places],
            scales=[self.scales[place] for place in places],
        )


class LevelChoice:
    """Decides for one level. A copy of a model starts without any findings.

    Args:
        level: The level's name.
        num_experts: Number of experts that the level was built with.

    Attributes:
        classes: The level's experts by class.
    """

    def __init__(self, level: str, num_experts: int) -> None:
        self.classes = LevelClasses()
        self._level = level
        self._num_experts = num_experts
        # Experts of classes that are too small for grouping ever to pay. No call checks these experts for changes,
        # because a loop is right for any expert.
        self._always_looped: dict[str, nn.Module] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> LevelChoice:
        return LevelChoice(self._level, self._num_experts)

    def __reduce__(self) -> tuple[type[LevelChoice], tuple[str, int]]:
        return LevelChoice, (self._level, self._num_experts)

    def decide(self, engine: str, present: Present, given: LevelInputLike) -> list[Decision]:
        """Decide for the experts of this call: one decision a class, none if all experts are looped.

        Args:
            engine: The name of the engine that was asked for.
            present: The experts.
            given: The level's input.

        Raises:
            EngineRefusedError: Experts that are alike can't run as one, and ``"grouped"`` was asked for.
        """
        if engine == LOOPED or len(present.experts) == 1 or (engine == AUTO and torch.compiler.is_dynamo_compiling()):
            return []
        slots = slots_of(present.experts)
        if any(slots):
            if (why_not := _refusal_of_stacks(slots)) is not None:
                if engine != AUTO:
                    raise refusal(self._level, present.names, present.experts[0], why_not)
                return []
            if (settled := self._settled(present, slots, given)) is not None:
                return settled
            twins = present._replace(experts=_ordinary(present.experts, slots))
            decisions = self._decide(engine, twins, given, slots)
            return [each._replace(unit=_on_stacks(each.unit, present, slots)) for each in decisions]
        return self._decide(engine, present, given, slots)

    def _settled(self, present: Present, slots: Sequence[Slot | None], given: LevelInputLike) -> list[Decision] | None:
        """The decisions of an earlier call, if all experts are of one stack, and nothing can have changed.

        Takes a time that depends little on the number of experts.
        """
        members = [slot.member for slot in slots if slot is not None]
        first, scale = slots[0], present.scales[0]
        if first is None or len(set(members)) < len(slots) or len({id(slot.stack) for slot in slots if slot}) > 1:
            return None
        if present.scales.count(scale) < len(members) or given.hidden.is_meta or not given.hidden.numel():
            return None
        if given.context.irregular is not None or _passing_refusal() is not None:
            return None
        frozen = first.stack.frozen
        # Frozen members are of another class.
        parts: list[Sequence[int]] = [range(len(members))]
        if frozen:
            parts = [[place for place, member in enumerate(members) if (member in frozen) == each] for each in (0, 1)]
        decisions = []
        for places in sorted(filter(None, parts), key=min):
            own = present if len(places) == len(members) else present.taken(places)
            decision = self._settled_part(first.stack, [members[place] for place in places], own, given)
            if decision is None:
                return None
            decisions.append(decision._replace(unit=decision.unit._replace(positions=tuple(places))))
        return [] if all(decision.unit.is_alone for decision in decisions) else decisions

    def _settled_part(
        self, stack: Stack, members: Sequence[int], present: Present, given: LevelInputLike
    ) -> Decision | None:
        """The decision of an earlier call for members of a stack that were one class before."""
        twin = stack.twins(present.experts[:1], members[:1])[0]
        scale = present.scales[0]
        record = self.classes.settled(stack, members, (present.names[0], twin), scale, given)
        if record is None:
            return None
        unit = Unit(tuple(range(len(members))), tuple(present.experts), record, scale, None)
        return Decision(unit._replace(stack=stack, members=tuple(members)))

    def _decide(
        self, engine: str, present: Present, given: LevelInputLike, slots: Sequence[Slot | None]
    ) -> list[Decision]:
        # Without values, or without elements, there is nothing that could be verified.
        if given.hidden.is_meta or not given.hidden.numel():
            return []
        if engine == AUTO and all(map(is_, map(self._always_looped.get, present.names), present.experts)):
            return []
        costed = self._costed(engine, present, slots)
        if (why_not := _refusal_of_all(present.experts, given)) is not None:
            if engine != AUTO:
                self._require_grouped(present.names, [unit._replace(fault=why_not) for unit, _ in costed])
            return []
        wanted = sorted(place for unit, _ in costed if unit.fault is None for place in unit.positions)
        if not wanted:
            return []
        asked = present.taken(wanted)
        found = self.classes.units(asked.names, asked.experts, asked.scales, given, retries=engine != AUTO)
        if any(slots):
            found = [
                part for unit in found for part in _by_stack(unit, [slots[wanted[each]] for each in unit.positions])
            ]
            for unit in found:
                self._settle(unit, asked, [slots[wanted[each]] for each in unit.positions])
        if len(found) > 1 or len(wanted) < len(present.experts):
            found = self._without_readers(found, present, wanted, given)
        if engine != AUTO:
            self._require_grouped(asked.names, found)
        elif all(unit.is_alone for unit in found):
            return []
        cost_of = {place: cost for unit, cost in costed for place in unit.positions}
        decisions = [decision for decision in costed if decision.unit.fault is not None]
        for unit in found:
            positions = tuple(wanted[place] for place in unit.positions)
            decisions.append(Decision(unit._replace(positions=positions), cost_of[positions[0]]))
        return sorted(decisions, key=lambda decision: decision.unit.positions[0])

    def _settle(self, unit: Unit, asked: Present, slots: Sequence[Slot | None]) -> None:
        """Keep what was found for a unit, if it is of a stack."""
        if slots[0] is not None and unit.fault is None:
            names = [asked.names[each] for each in unit.positions]
            members = [slot.member for slot in slots if slot is not None]
            self.classes.settle(slots[0].stack, names, unit, members)

    def survey(self, present: Present, given: LevelInputLike) -> list[Unit]:
        """The experts by class, whatever pays: for a graph that holds any of them.

        Args:
            present: The experts.
            given: The level's input, with values.
        """
        slots = slots_of(present.experts)
        if any(slots) and (why_not := _refusal_of_stacks(slots)) is not None:
            return [Unit(tuple(range(len(slots))), tuple(present.experts), None, 1.0, why_not)]
        ordinary = _ordinary(present.experts, slots)
        units = self.classes.units(present.names, ordinary, present.scales, given, retries=True)
        split = [part for unit in units for part in _by_stack(unit, [slots[each] for each in unit.positions])]
        return [_on_stacks(unit, present, slots) for unit in split]

    def holding(self, name: str, expert: nn.Module) -> ClassRecord | None:
        """The record of the graph that held for an expert when it was last asked for."""
        return self.classes.known(name, _ordinary([expert], slots_of([expert]))[0])

    def foresee(self, engine: str, present: Present) -> list[Decision]:
        """The decisions, as far as the last findings on the experts tell them before a call."""
        shares_module = len(set(map(id, present.experts))) < len(present.experts)
        slots = slots_of(present.experts)
        strays = _refusal_of_stacks(slots)
        if any(slots):
            present = present._replace(experts=_ordinary(present.experts, slots))
        decisions = []
        for unit, costed in self._costed(GROUPED, present, slots):
            assert costed is not None
            known: dict[Any, list[int]] = {}
            for place in unit.positions:
                name, expert = present.names[place], present.experts[place]
                record = self.classes.known(name, expert)
                fault = self.classes.refusal(name, expert) if record is None else record.fault
                if record is not None and fault is None:
                    fault = record.fault_of(expert)[1]
                first = None if record is None or fault is not None else record.first
                known.setdefault((first, first and first.last_identity_of(expert), fault), []).append(place)
            for (record, _, fault), places in known.items():
                modules = tuple(present.experts[place] for place in places)
                some = unit._replace(positions=tuple(places), modules=modules, record=record)
                layout = self.classes.layouts([present.names[places[0]]], modules[:1])[0]
                cost = _cost_of(layout, modules, is_stacked=not costed.least)
                is_costly = fault is None and engine == AUTO and not cost.pays
                why_not = "share a module" if shares_module else _too_costly(cost) if is_costly else fault
                decisions.append(Decision(some._replace(fault=strays or why_not), cost))
        return decisions

    def _costed(self, engine: str, present: Present, slots: Sequence[Slot | None]) -> list[Decision]:
        """The experts by layout, stack and scale, known without a capture.

        Experts that a loop serves better have a fault.
        """
        groups: dict[tuple[Layout, Stack | None, float], list[int]] = {}
        for place, layout in enumerate(self.classes.layouts(present.names, present.experts)):
            slot = slots[place]
            groups.setdefault((layout, slot and slot.stack, present.scales[place]), []).append(place)
        decisions = []
        for (layout, stack, scale), places in groups.items():
            modules = tuple(present.experts[place] for place in places)
            unit = Unit(tuple(places), modules, None, scale, None)
            cost = _cost_of(layout, modules, is_stacked=stack is not None)
            if engine == AUTO:
                if stack is None and not estimate(layout, self._num_experts, has_backward=True).pays:
                    self._always_looped.update((present.names[place], present.experts[place]) for place in places)
                if len(places) == 1 or not cost.pays:
                    unit = unit._replace(fault=_too_costly(cost))
            decisions.append(Decision(unit, cost))
        return decisions

    def _without_readers(
        self, found: list[Unit], present: Present, wanted: Sequence[int], given: LevelInputLike
    ) -> list[Unit]:
        """The units, of which none runs as one that reads what a looped expert of this call may write.

        In a loop, experts see what the experts before them wrote.
        """
        reads = {}
        for place, unit in enumerate(found):
            names = [present.names[wanted[position]] for position in unit.positions]
            if not unit.is_alone and (source := self._state_of(names, unit, given)) is not None:
                reads[place] = source
        if not reads:
            return found
        others = present.taken(sorted({*range(len(present.experts))}.difference(wanted)))
        units = [*found]
        if others.experts:
            units += self.classes.units(others.names, others.experts, others.scales, given)
        if all(unit.record is not None and unit.fault in (None, unit.record.fault) for unit in units):
            # What was captured writes nothing.
            return found
        return [
            unit._replace(fault=f"read what looped experts may change ({reads[place]})") if place in reads else unit
            for place, unit in enumerate(found)
        ]

    def _state_of(self, names: Sequence[str], unit: Unit, given: LevelInputLike) -> str | None:
        """What a unit's experts read and other experts might change, in words, or ``None``."""
        seen: set[int] = set()
        for name, expert in zip(names, unit.modules, strict=True):
            record = self.classes.known(name, expert)
            if record is None:
                continue
            guard = record.captured.guard
            if (source := guard.state(is_context_whole=given.context.is_whole)) is not None:
                return path_of(source)
            objects = guard.objects_of(expert)
            if not seen.isdisjoint(objects):
                return "an object that they share"
            seen |= objects
        return None

    def _require_grouped(self, names: Sequence[str], units: Sequence[Unit]) -> None:
        """Refuse experts that would be looped, before anything runs.

        Raises:
            EngineRefusedError: Experts that are alike can't run as one.
        """
        for unit in units:
            if unit.fault is not None and len(unit.modules) > 1 and not isinstance(unit.fault, WrongResult):
                raise refusal(self._level, [names[place] for place in unit.positions], unit.modules[0], unit.fault)


def refusal(level: str, names: Sequence[str], module: nn.Module, why_not: str) -> EngineRefusedError:
    """The error with the reason that experts can't run as one.

    Args:
        level: The level's name.
        names: The experts' names.
        module: One of the experts.
        why_not: The reason, in words that follow "its experts".
    """
    return EngineRefusedError(
        f"'engine' must be 'auto' or 'looped' for level {level!r} (got 'grouped'; its experts {listed(names)}, "
        f"{type(module).__name__}, {why_not})"
    )


def _too_costly(cost: Cost) -> str:
    return f"are few ({cost})"


def _cost_of(layout: Layout, modules: Sequence[nn.Module], *, is_stacked: bool) -> Cost:
    # The grad mode does not matter: a checkpoint computes once with and once without gradients.
    cost = estimate(layout, len(modules), has_backward=modules[0].training)
    # In a loop, each member's gradient is cut out of the stack's.
    return cost._replace(least=0) if is_stacked else cost


def _ordinary(experts: Sequence[nn.Module], slots: Sequence[Slot | None]) -> list[nn.Module]:
    """The experts, with ordinary modules of the same values for those that are stacked."""
    found = list(experts)
    by_stack: dict[int, list[int]] = {}
    for place, slot in enumerate(slots):
        if slot is not None:
            by_stack.setdefault(id(slot.stack), []).append(place)
    for places in by_stack.values():
        own = [cast(Slot, slots[place]) for place in places]
        twins = own[0].stack.twins([experts[place] for place in places], [slot.member for slot in own])
        for place, twin in zip(places, twins, strict=True):
            found[place] = twin
    return found


def _by_stack(unit: Unit, slots: Sequence[Slot | None]) -> list[Unit]:
    """The unit, split into experts of one stack each, frozen or not, and experts that are not stacked."""
    parts: dict[tuple[Stack, bool] | None, list[int]] = {}
    for place, slot in enumerate(slots):
        parts.setdefault(slot and (slot.stack, slot.member in slot.stack.frozen), []).append(place)
    return [unit] if len(parts) == 1 else [unit.taken(places) for places in parts.values()]


def _on_stacks(unit: Unit, present: Present, slots: Sequence[Slot | None]) -> Unit:
    """The unit with the experts themselves in place of ordinary ones."""
    own = [slots[position] for position in unit.positions]
    unit = unit._replace(modules=tuple(present.experts[position] for position in unit.positions))
    if own[0] is not None:
        unit = unit._replace(stack=own[0].stack, members=tuple(cast(Slot, each).member for each in own))
    return unit


def _refusal_of_all(experts: Sequence[nn.Module], given: LevelInputLike) -> str | None:
    """The reason that no experts can run as one, of whatever class, or ``None``."""
    if (passing := _passing_refusal()) is not None:
        return passing
    if len(set(map(id, experts))) < len(experts):
        # Only a single loop over all experts sees the shared module.
        return "share a module"
    if given.context.irregular is not None:
        # A list has no rows that could stand for those of several experts.
        return f"are given {given.context.irregular}, batch-aligned and no dense tensor"
    return None


def _refusal_of_stacks(slots: Sequence[Slot | None]) -> str | None:
    """The reason that stacked experts can't run as one now, or ``None``."""
    if transforms_are_active():
        return "are under a transform of torch.func"
    for stack in {slot.stack for slot in slots if slot is not None}:
        if not stack.intact.issuperset([slot.member for slot in slots if slot is not None and slot.stack is stack]):
            return "hold parameters that are not where they were stacked"
    return None


def _passing_refusal() -> str | None:
    """The reason that no experts can run as one for now, or ``None``."""
    if transforms_are_active():
        return "are under a transform of torch.func"
    if is_forward_differentiated():
        return "are differentiated forward"
    if has_global_hooks():
        return "are watched by global module hooks"
    if is_jit_traced() or is_being_traced() or is_symbolic():
        return "are being traced"
    return None
