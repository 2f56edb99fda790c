"""The experts present at a level, put in classes: which run as one, and in which order their rows stand.

Axes: R rows, P experts present.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .plan import LevelPlan
from .signature import Gathered, Inspected, Signature, Watched, global_hooks, shared_tensor
from .template import Template

# Up to so many rows an expert, on a CPU, members stand by their number of rows: those with equally many share a call.
# Elsewhere they always do: those with about as many do.
FEW_ROWS_PER_EXPERT = 96
_MOST_CLASSES = 1024
# Calls in a row that may go by what is remembered of the experts: asking them all can take a tenth of a small one.
_MOST_FROM_MEMORY = 32


@dataclass
class ClassRecord:
    """What is known of a class.

    Attributes:
        signature: What its members share.
        programs: The proven sequences of operations, each with those looped over members.
        faults: Why it can't be grouped, by the kind of input.
        repeated_faults: Why calls can't be that a checkpoint may run again: they are tried each time.
        kinds: The kinds of input that it has been grouped for.
        attempts: Proofs so far.
        templates: Likenesses at rest: a pass takes one, for several threads may run at once.
        writes: Whether its experts write into their rows.
        has_losses: Whether they return losses.
    """

    signature: Signature
    programs: dict[tuple[str, ...], dict[str, int]] = field(default_factory=dict)
    faults: dict[Any, str] = field(default_factory=dict)
    repeated_faults: dict[Any, str] = field(default_factory=dict)
    kinds: set[Any] = field(default_factory=set)
    attempts: int = 0
    templates: list[Template] = field(default_factory=list)
    writes: bool = False
    has_losses: bool = False


class Unit(NamedTuple):
    """Experts that run together.

    Attributes:
        positions: Their places among the experts present.
        members: They, watched.
        record: What is known of their class.
        scale: What the gradient into their input is multiplied by.
        fault: Why they can't run as one, found without running them.
    """

    positions: tuple[int, ...]
    members: tuple[Watched, ...]
    record: ClassRecord
    scale: float
    fault: str | None

    @property
    def is_alone(self) -> bool:
        """Whether its experts run one by one."""
        return self.fault is not None or len(self.members) == 1


class LevelClasses:
    """The experts of one level and their classes. A copy of a model starts without any.

    Attributes:
        looped_anyway: By name, experts of classes that are too small for grouping ever to pay. They are not asked again
            whether they have changed, for a loop is right whatever they are.
    """

    def __init__(self) -> None:
        self.looped_anyway: dict[str, nn.Module] = {}
        self._watched: dict[str, Watched] = {}
        self._modules: dict[str, nn.Module] = {}
        self._numbers: dict[str, int] = {}
        self._records: dict[int, ClassRecord] = {}
        self._everyone: Gathered | None = None
        self._shares_tensors = False
        self._calls_since = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> LevelClasses:
        return LevelClasses()

    def __reduce__(self) -> tuple[type[LevelClasses], tuple[()]]:
        return LevelClasses, ()

    def units(self, names: Sequence[str], experts: Sequence[nn.Module], scales: Sequence[float]) -> list[Unit]:
        """The experts present by class, in the order of their first members.

        Args:
            names: Of the experts present, P.
            experts: They.
            scales: What the gradient into each one's input is multiplied by.
        """
        self._refresh(names, experts)
        self._calls_since = 0
        return self._parted(names, scales)

    def remembered(
        self, names: Sequence[str], experts: Sequence[nn.Module], scales: Sequence[float]
    ) -> list[Unit] | None:
        """As `units`, but as the experts were when they were last looked at.

        ``None`` where one is new, and now and then: they are to be looked at again.
        """
        if self._calls_since >= _MOST_FROM_MEMORY or not self._knows(names, experts):
            return None
        self._calls_since += 1
        return self._parted(names, scales)

    def _parted(self, names: Sequence[str], scales: Sequence[float]) -> list[Unit]:
        numbers = [self._numbers[name] for name in names]
        members = [self._watched[name] for name in names]
        if numbers.count(numbers[0]) == len(numbers) and scales.count(scales[0]) == len(scales):
            return [self._unit(tuple(range(len(names))), tuple(members), scales[0])]
        found: dict[tuple[int, float], list[int]] = {}
        for position, key in enumerate(zip(numbers, scales, strict=True)):
            found.setdefault(key, []).append(position)
        return [
            self._unit(tuple(positions), tuple(members[position] for position in positions), scale)
            for (_, scale), positions in found.items()
        ]

    def _knows(self, names: Sequence[str], experts: Sequence[nn.Module]) -> bool:
        # The same modules, not equal ones: a class may say which of its modules are.
        return all(map(is_, map(self._modules.get, names), experts))

    def _refresh(self, names: Sequence[str], experts: Sequence[nn.Module]) -> None:
        """Make true what is known of these experts."""
        inspected = Inspected()
        if self._knows(names, experts):
            # What is kept of all is asked faster than what must be gathered first.
            asks_all = 3 * len(names) >= 2 * len(self._watched)
            if asks_all:
                gathered = self._everyone = self._everyone or Gathered(list(self._watched.values()))
            else:
                gathered = Gathered([self._watched[name] for name in names])
            if gathered.is_true(inspected):
                return
            if asks_all:
                names, experts = list(self._modules), list(self._modules.values())
        for name, expert in zip(names, experts, strict=True):
            watched = self._watched.get(name)
            if watched is None or watched.module is not expert:
                watched = self._watched[name] = Watched(expert)
                self._modules[name] = expert
            watched.refresh(inspected)
            self._numbers[name] = watched.signature.id
        self._everyone = None
        self._shares_tensors = shared_tensor(list(self._watched.values())) is not None

    def _unit(self, positions: tuple[int, ...], members: tuple[Watched, ...], scale: float) -> Unit:
        signature = members[0].signature
        record = self._records.get(signature.id)
        if record is None:
            if len(self._records) >= _MOST_CLASSES:
                self._records.clear()
            record = self._records[signature.id] = ClassRecord(signature)
        fault = None
        if len(members) > 1:
            fault = global_hooks() or signature.fault
            if len({id(each.module) for each in members}) < len(members):
                fault = "share a module"
            elif fault is None and self._shares_tensors and (name := shared_tensor(members)) is not None:
                fault = f"share the tensor {name!r}"
        return Unit(positions, members, record, scale, fault)


class Arrangement(NamedTuple):
    """In which order the rows of a level's experts are to stand.

    Attributes:
        plan: The level's plan with that order, and with one count for each unit.
        counts: By unit, the rows of each of its members.
        names: By unit, its members' names.
        units: The units, their members in that order.
    """

    plan: LevelPlan
    counts: list[tuple[int, ...]]
    names: list[tuple[str, ...]]
    units: list[Unit]


def arrange(units: Sequence[Unit], plan: LevelPlan) -> Arrangement:
    """The rows unit by unit.

    Args:
        units: All of the level's.
        plan: The level's plan.
    """
    arranged = [_by_count(unit, plan) if unit.fault is None else unit for unit in units]
    names = [tuple(plan.present[position] for position in unit.positions) for unit in arranged]
    positions = [position for unit in arranged for position in unit.positions]
    counts = [tuple(plan.counts[position] for position in unit.positions) for unit in arranged]
    sizes = tuple(map(sum, counts))
    if positions == sorted(positions):
        return Arrangement(plan._replace(counts=sizes), counts, names, arranged)
    per_expert = np.asarray(plan.counts, dtype=np.int64)
    starts = np.cumsum(per_expert) - per_expert
    wanted = per_expert[positions]
    shifts = starts[positions] - (np.cumsum(wanted) - wanted)
    rows = np.arange(plan.order.numel(), dtype=np.int64)
    # Which sorted row stands at each place, and where each sorted row has gone.
    source = np.repeat(shifts, wanted) + rows
    place = np.empty_like(source)
    place[source] = rows
    both = torch.from_numpy(np.concatenate([source, place])).to(plan.order.device, non_blocking=True)
    moved = plan._replace(
        order=plan.order.index_select(0, both[: len(rows)]),
        inverse=both[len(rows) :].index_select(0, plan.inverse),
        counts=sizes,
        is_sorted=False,
        follows_previous=False,
    )
    return Arrangement(moved, counts, names, arranged)


def _by_count(unit: Unit, plan: LevelPlan) -> Unit:
    """The unit with its members by their number of rows, where that saves calls."""
    total = sum(plan.counts[position] for position in unit.positions)
    if plan.order.device.type == "cpu" and total > FEW_ROWS_PER_EXPERT * len(unit.positions):
        return unit
    counts = [plan.counts[position] for position in unit.positions]
    order = sorted(range(len(counts)), key=counts.__getitem__)
    if order == list(range(len(order))):
        return unit
    return unit._replace(
        positions=tuple(unit.positions[place] for place in order), members=tuple(unit.members[place] for place in order)
    )
