"""The order of the rows of a level's experts: unit by unit.

Axes: R rows, P experts present.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from celmoe.grouped.classes import Unit
from celmoe.routing.plan import LevelPlan

# On a CPU, members are sorted by number of rows up to this many rows an expert: members with equally many share a call.
# On other devices members are always sorted: members with about as many share a call.
FEW_ROWS_PER_EXPERT = 96


class Arrangement(NamedTuple):
    """The order of the rows of a level's experts.

    Attributes:
        plan: The level's plan in that order, with one count for each unit.
        counts: By unit, the number of rows of each member.
        names: By unit, the members' names.
        units: The units, with their members in that order.
    """

    plan: LevelPlan
    counts: list[tuple[int, ...]]
    names: list[tuple[str, ...]]
    units: list[Unit]


def arrange(units: Sequence[Unit], plan: LevelPlan) -> Arrangement:
    """Order the rows unit by unit.

    Args:
        units: All units of the level.
        plan: The level's plan.
    """
    arranged = [_by_count(unit, plan) if unit.fault is None else unit for unit in units]
    names = [tuple([plan.present[position] for position in unit.positions]) for unit in arranged]
    positions = [position for unit in arranged for position in unit.positions]
    counts = [tuple([plan.counts[position] for position in unit.positions]) for unit in arranged]
    sizes = tuple(map(sum, counts))
    if positions == sorted(positions):
        return Arrangement(plan._replace(counts=sizes), counts, names, arranged)
    per_expert = np.asarray(plan.counts, dtype=np.int64)
    starts = np.cumsum(per_expert) - per_expert
    wanted = per_expert[positions]
    shifts = starts[positions] - (np.cumsum(wanted) - wanted)
    source = np.repeat(shifts, wanted) + np.arange(int(wanted.sum()), dtype=np.int64)
    return Arrangement(plan.rearranged(source, sizes), counts, names, arranged)


def _by_count(unit: Unit, plan: LevelPlan) -> Unit:
    """The unit with its members sorted by their number of rows, if the order saves calls."""
    if unit.stack is not None and plan.order.device.type == "cpu":
        # In the stack's order no weight moves.
        return unit
    total = sum(plan.counts[position] for position in unit.positions)
    if plan.order.device.type == "cpu" and total > FEW_ROWS_PER_EXPERT * len(unit.positions):
        return unit
    counts = [plan.counts[position] for position in unit.positions]
    order = sorted(range(len(counts)), key=counts.__getitem__)
    if order == list(range(len(order))):
        return unit
    return unit.taken(order)
