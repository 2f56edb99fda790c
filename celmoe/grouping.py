"""The experts present at a level, put in classes: which run as one, in which order their rows stand, and what is known of them.

Axes: R rows, P experts present.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .plan import LevelPlan
from .signature import Inspected, Signature, Watched, global_hooks, shared_tensor
from .template import Template

# Up to so many rows an expert, members stand in the order of their number of rows: those with equally many share a call.
FEW_ROWS_PER_EXPERT = 96
_MOST_CLASSES = 1024


@dataclass
class ClassRecord:
    """What is known of a class.

    Attributes:
        signature: What its members share.
        programs: The proven sequences of operations, each with those looped over members.
        faults: Why it can't be grouped, by the kind of input.
        attempts: Proofs so far.
        templates: Likenesses at rest: a pass takes one, for several threads may run at once.
        writes: Whether its experts write into their rows.
    """

    signature: Signature
    programs: dict[tuple[str, ...], dict[str, int]] = field(default_factory=dict)
    faults: dict[Any, str] = field(default_factory=dict)
    attempts: int = 0
    templates: list[Template] = field(default_factory=list)
    writes: bool = False


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


class LevelClasses:
    """The experts of one level and their classes. A copy of a model starts without any."""

    def __init__(self) -> None:
        self._watched: dict[str, Watched] = {}
        self._records: dict[tuple[Any, ...], ClassRecord] = {}

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
        inspected = Inspected()
        found: dict[tuple[Any, ...], list[tuple[int, Watched]]] = {}
        for position, (name, expert, scale) in enumerate(zip(names, experts, scales, strict=True)):
            watched = self._watched.get(name)
            if watched is None or watched.module is not expert:
                watched = self._watched[name] = Watched(expert)
            watched.refresh(inspected)
            found.setdefault((watched.signature.id, scale), []).append((position, watched))
        hooks = global_hooks()
        return [self._unit(scale, members, hooks) for (_, scale), members in found.items()]

    def _unit(self, scale: float, members: list[tuple[int, Watched]], hooks: str | None) -> Unit:
        positions = tuple(position for position, _ in members)
        watched = tuple(each for _, each in members)
        signature = watched[0].signature
        record = self._records.get(signature.key)
        if record is None:
            if len(self._records) >= _MOST_CLASSES:
                self._records.clear()
            record = self._records[signature.key] = ClassRecord(signature)
        fault = None
        if len({id(each.module) for each in watched}) < len(watched):
            fault = "share a module"
        elif len(watched) > 1:
            fault = hooks or signature.fault
            if fault is None and (name := shared_tensor(watched)) is not None:
                fault = f"share the tensor {name!r}"
        return Unit(positions, watched, record, scale, fault)


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
    names = [tuple(plan.experts[position] for position in unit.positions) for unit in arranged]
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
    if plan.order.device.type != "cpu" or total > FEW_ROWS_PER_EXPERT * len(unit.positions):
        return unit
    order = sorted(range(len(unit.positions)), key=lambda place: plan.counts[unit.positions[place]])
    if order == list(range(len(order))):
        return unit
    return unit._replace(
        positions=tuple(unit.positions[place] for place in order), members=tuple(unit.members[place] for place in order)
    )
