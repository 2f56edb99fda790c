"""The workloads of each benchmark of the suite: a default set for minutes, a full one for hours, two with targets.

Axes: B samples, H hidden size, E experts of the last level.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from benchmarks.contenders.contender import AUTO, BARE, LOOK_UPS, LOOPED, PEER, STACK, STACKED
from benchmarks.workloads.bodies import LOW_RANK, PRODUCT, UNTOUCHED
from benchmarks.workloads.hierarchies import JOB, ONE_LEVEL, TREE, ZIPF
from benchmarks.workloads.points import (
    BATCHES,
    COUNTS,
    LARGEST_BATCH,
    NAMED,
    PLANNED,
    ROUTES,
    WIDTHS,
    WORST,
    full_grid,
    looped_grid,
    short_grid,
)
from benchmarks.workloads.workload import Workload

DEFAULT, FULL, GRID, GROUPED = "default", "full", "grid", "grouped"
SETS = (DEFAULT, FULL, GRID, GROUPED)
# The bare loop bounds engines that loop: a figure of their grid alone.
_CONTENDERS = {
    GRID: frozenset({AUTO, LOOPED, PEER, BARE, LOOK_UPS}),
    GROUPED: frozenset({AUTO, STACKED, PEER, STACK}),
}
# The widths of the job's network and of its batches.
_JOB = Workload("mlp", 192, 2048, 54, hierarchy=JOB)
_LOW_RANK = Workload(LOW_RANK, 64, 4096, 256)
_SKEWED = Workload("mlp", 64, 4096, 256, ZIPF)


def _one_level(workloads: Iterable[Workload]) -> list[Workload]:
    return [replace(each, hierarchy=ONE_LEVEL) for each in workloads]


def _planned(batch_size: int, num_experts: int, hierarchy: str = TREE) -> Workload:
    """As `points.PLANNED`."""
    return replace(PLANNED[0], batch_size=batch_size, num_experts=num_experts, hierarchy=hierarchy)


_PASSES = [Workload("linear", 64, 4096, 256), Workload("mlp", 64, 4096, 256)]
_PLANS = [*PLANNED, _planned(4096, 54, JOB), _planned(64, 32)]
_MOVED = _one_level(
    [
        Workload(UNTOUCHED, 64, 4096, 256),
        Workload(UNTOUCHED, 64, 4096, 256, ZIPF),
        Workload(UNTOUCHED, 64, LARGEST_BATCH, 256),
        Workload(UNTOUCHED, 256, 512, 32),
    ]
)
_SHORT_STEPS = [
    Workload("linear", 64, LARGEST_BATCH, 256),
    Workload("linear", 64, 4096, 256),
    Workload("mlp", 64, 4096, 256),
    Workload("gru", 64, 64, 32),
    Workload("mlp", 64, 16, 4),
    _SKEWED,
    _JOB,
    _LOW_RANK,
]
# Growth of steps by B and by E, and the batch size from which a device wins, for each E.
_GROWTH = [Workload("linear", 64, batch, count) for batch, count in itertools.product(BATCHES, COUNTS)]
# The default set's workloads, by benchmark.
DEFAULTS: Mapping[str, Sequence[Workload]] = {
    "plan": _PLANS,
    "dispatch": _MOVED,
    "grouped_product": _one_level([Workload(PRODUCT, 64, 4096, 256), Workload(PRODUCT, 256, 4096, 32, ZIPF)]),
    "experts": _one_level(
        [
            Workload("linear", 64, 4096, 256),
            Workload("mlp", 64, 4096, 256),
            Workload("block", 64, 64, 32),
            Workload("gru", 64, 64, 32),
            Workload("two-widths", 64, 512, 32),
            _LOW_RANK,
        ]
    ),
    "whole_step": list(dict.fromkeys([*_SHORT_STEPS, *_GROWTH])),
    "forward": _PASSES,
    "backward": _PASSES,
    "inference": [*_PASSES, _JOB, _LOW_RANK],
    "memory": [Workload("linear", 64, 4096, 256), Workload("mlp", 128, 4096, 128), Workload("gru", 64, 64, 32)],
}


def workloads_of(benchmark: str, which: str) -> Sequence[Workload]:
    """The workloads of a benchmark.

    Args:
        benchmark: A key of `DEFAULTS`.
        which: One of `SETS`.
    """
    if which == DEFAULT:
        return DEFAULTS.get(benchmark, ())
    made = {FULL: _FULL, GRID: _GRID, GROUPED: _GROUPED}[which].get(benchmark)
    return () if made is None else made()


def takes_part(contender: str, which: str) -> bool:
    """True if a set times this contender."""
    named = _CONTENDERS.get(which)
    return contender != BARE if named is None else contender in named


def _crossed(expert: str, batches: Sequence[int] = BATCHES) -> list[Workload]:
    """A kind of expert over all widths, batches, numbers of experts and routes."""
    points = itertools.product(WIDTHS, batches, COUNTS, ROUTES)
    return [Workload(expert, width, batch, count, routes) for width, batch, count, routes in points]


@functools.cache
def _all_steps() -> list[Workload]:
    jobs = [replace(_JOB, batch_size=batch, routes=routes) for batch in BATCHES for routes in ROUTES]
    named = [*NAMED, *WORST, *_SHORT_STEPS, *jobs]
    return list(dict.fromkeys([*named, *_crossed(LOW_RANK), *looped_grid(), *full_grid()]))


# Made when asked for: whether a point of a grid fits into memory takes its experts' sizes to tell.
_FULL: Mapping[str, Callable[[], Sequence[Workload]]] = {
    "plan": lambda: list(
        dict.fromkeys([*_PLANS, *(_planned(batch, count) for batch in (16, *BATCHES) for count in COUNTS)])
    ),
    "routing": lambda: PLANNED,
    "dispatch": lambda: _one_level(_crossed(UNTOUCHED, (*BATCHES, LARGEST_BATCH))),
    "grouped_product": lambda: _one_level(_crossed(PRODUCT)),
    "experts": lambda: _one_level([*full_grid(), *_crossed(LOW_RANK)]),
    "whole_step": _all_steps,
    "forward": _all_steps,
    "backward": _all_steps,
    "inference": _all_steps,
    "memory": lambda: [*NAMED, *WORST, _SKEWED, _JOB, _LOW_RANK],
}
# The looped engine's, and the grouped engine's: `report.targets` says what they are held to.
_GRID: Mapping[str, Callable[[], Sequence[Workload]]] = {
    "plan": lambda: PLANNED,
    "routing": lambda: PLANNED,
    "whole_step": lambda: list(looped_grid()),
}
_GROUPED: Mapping[str, Callable[[], Sequence[Workload]]] = {"whole_step": short_grid, "inference": short_grid}
