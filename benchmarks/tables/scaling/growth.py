"""The model's figures as ranks, experts or batches grow.

Axes: N ranks, E experts of the last level, B samples of a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from benchmarks.tables.scaling import layouts
from benchmarks.tables.scaling.collectives import Traffic, total
from benchmarks.tables.scaling.layouts import DDP, EXPERTS, LEVELS, REDUCED
from benchmarks.tables.scaling.load import Spread, expected_load, spread
from benchmarks.tables.scaling.sizes import sizes_of_workload
from benchmarks.workloads.hierarchies import UNIFORM, ZIPF
from benchmarks.workloads.workload import Workload

# Ranks of one machine, if only the ranks of one machine share parameters or experts.
NODE = 8
LEVELS_IN_NODES, EXPERTS_IN_NODES = f"{LEVELS}, {NODE} by copies", f"{EXPERTS}, {NODE} by copies"
EXPERTS_BY_LOAD = f"{EXPERTS}, by load"
BASE = Workload("mlp", 512, 256, 256)
BASE_RANKS = 64
ROUTES = (UNIFORM, ZIPF)
_RANKS = tuple(2**power for power in range(1, 13))
_EXPERTS = tuple(2**power for power in range(3, 14))
_BATCHES = tuple(2**power for power in range(4, 19))


@dataclass(frozen=True)
class Point:
    """One layout of one workload, whose B is a rank's.

    Attributes:
        axis: What grows: ``"N"``, ``"E"`` or ``"B"``.
        sent: Bytes that the busiest rank sends in a step by the model.
        mean_sent: Bytes that a rank sends in the mean.
    """

    axis: str
    layout: str
    workload: Workload
    num_ranks: int
    sent: float
    mean_sent: float

    @property
    def value(self) -> int:
        """The present size of the quantity that grows."""
        return {"N": self.num_ranks, "E": self.workload.num_experts, "B": self.workload.batch_size}[self.axis]


def grown() -> Iterator[tuple[str, Workload, int]]:
    """Yield the points to compute: the axis, the workload, ranks."""
    for routes in ROUTES:
        base = replace(BASE, routes=routes)
        yield from (("N", base, num_ranks) for num_ranks in _RANKS)
        yield from (("E", replace(base, num_experts=each), BASE_RANKS) for each in _EXPERTS)
        yield from (("B", replace(base, batch_size=each), BASE_RANKS) for each in _BATCHES)


def points_of(axis: str, workload: Workload, num_ranks: int) -> list[Point]:
    """All layouts that there are for so many ranks."""
    sizes, load = sizes_of_workload(workload), expected_load(workload, num_ranks)
    rows = layouts.rows_of(workload)

    def experts(num_parts: int, *, by_load: bool = False) -> tuple[float, float]:
        where = _spread(replace(workload, batch_size=1), num_parts, by_load)

        def sent(rank: int) -> float:
            copies = num_ranks // num_parts
            return total(layouts.expert_parallel(sizes, load, rows, where, num_parts, copies, rank)).sent

        return sent(where.busiest), float(np.mean([sent(rank) for rank in range(num_parts)]))

    found = {
        DDP: _alike(layouts.data_parallel(sizes, num_ranks)),
        REDUCED: _alike(layouts.reduced(sizes, load, num_ranks)),
        LEVELS: _alike(layouts.fully_sharded(sizes, num_ranks)),
    }
    if num_ranks > NODE:
        found[LEVELS_IN_NODES] = _alike(layouts.fully_sharded(sizes, NODE, num_ranks // NODE))
    found |= {EXPERTS: experts(num_ranks), EXPERTS_BY_LOAD: experts(num_ranks, by_load=True)}
    if num_ranks > NODE:
        found[EXPERTS_IN_NODES] = experts(NODE)
    return [Point(axis, layout, workload, num_ranks, *sent) for layout, sent in found.items()]


@cache
def _spread(workload: Workload, num_parts: int, by_load: bool) -> Spread:
    # The places of experts do not depend on the number of samples.
    return spread(sizes_of_workload(workload), expected_load(workload, 1), num_parts, by_load=by_load)


def _alike(traffic: list[Traffic]) -> tuple[float, float]:
    """The busiest rank and the mean of a layout in which all ranks send as much."""
    return (total(traffic).sent,) * 2
