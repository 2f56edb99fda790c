"""The model's figures as ranks, experts or batches grow.

Axes: N ranks, E experts of the last level, B samples of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from benchmarks.tables.scaling import layouts
from benchmarks.tables.scaling.collectives import Traffic, total
from benchmarks.tables.scaling.layouts import DDP, EXPERTS, LEVELS, REDUCED
from benchmarks.tables.scaling.load import Load, Spread, expected_load, spread
from benchmarks.tables.scaling.sizes import ModelSizes, sizes_of_workload
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
    """One layout of one workload.

    Attributes:
        axis: What grows: ``"N"``, ``"E"`` or ``"B"``.
        layout: The layout.
        workload: Its B is a rank's.
        num_ranks: Ranks N.
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
    found = {}
    for layout, model in _MODELS.items():
        if layout in (LEVELS_IN_NODES, EXPERTS_IN_NODES) and num_ranks <= NODE:
            continue
        found[layout] = model(_Asked(workload, sizes, load, num_ranks))
    return [Point(axis, layout, workload, num_ranks, *sent) for layout, sent in found.items()]


@dataclass(frozen=True)
class _Asked:
    workload: Workload
    sizes: ModelSizes
    load: Load
    num_ranks: int

    def experts(self, num_parts: int, *, by_load: bool = False) -> tuple[float, float]:
        """Bytes sent if experts are spread over so many ranks: by the busiest rank, and in the mean."""
        where = _spread(self.workload, num_parts, by_load)
        num_copies = self.num_ranks // num_parts
        rows = layouts.rows_of(self.workload)

        def sent(rank: int) -> float:
            moved = layouts.expert_parallel(self.sizes, self.load, rows, where, num_parts, num_copies, rank)
            return total(moved).sent

        return sent(where.busiest), float(np.mean([sent(rank) for rank in range(num_parts)]))


@cache
def _spread(workload: Workload, num_parts: int, by_load: bool) -> Spread:
    # The places of experts do not depend on the number of samples, so the cache may ignore it.
    return spread(sizes_of_workload(workload), expected_load(workload, 1), num_parts, by_load=by_load)


def _alike(traffic: list[Traffic]) -> tuple[float, float]:
    """The busiest rank and the mean of a layout in which all ranks send as much."""
    return (total(traffic).sent,) * 2


_MODELS: Mapping[str, Callable[[_Asked], tuple[float, float]]] = {
    DDP: lambda asked: _alike(layouts.data_parallel(asked.sizes, asked.num_ranks)),
    REDUCED: lambda asked: _alike(layouts.reduced(asked.sizes, asked.load, asked.num_ranks)),
    LEVELS: lambda asked: _alike(layouts.fully_sharded(asked.sizes, asked.num_ranks)),
    LEVELS_IN_NODES: lambda asked: _alike(layouts.fully_sharded(asked.sizes, NODE, asked.num_ranks // NODE)),
    EXPERTS: lambda asked: asked.experts(asked.num_ranks),
    EXPERTS_BY_LOAD: lambda asked: asked.experts(asked.num_ranks, by_load=True),
    EXPERTS_IN_NODES: lambda asked: asked.experts(NODE),
}
