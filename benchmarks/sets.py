"""Which workloads each benchmark of the suite takes: a default set for minutes, a full one for hours.

Axes: B samples, H hidden size, E experts of the last level.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from benchmarks.bodies import LOW_RANK, PRODUCT, UNTOUCHED
from benchmarks.hierarchies import JOB, ONE_LEVEL, TREE, ZIPF
from benchmarks.points import (
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
)
from benchmarks.workloads import Workload

DEFAULT, FULL = "default", "full"
SETS = (DEFAULT, FULL)
# The widths of the job's network and of its batches.
_JOB = Workload("mlp", 192, 2048, 54, hierarchy=JOB)
_LOW_RANK = Workload(LOW_RANK, 64, 4096, 256)
_SKEWED = Workload("mlp", 64, 4096, 256, ZIPF)


def _one_level(workloads: Iterable[Workload]) -> list[Workload]:
    return [replace(each, hierarchy=ONE_LEVEL) for each in workloads]


def _planned(batch_size: int, num_experts: int, hierarchy: str = TREE) -> Workload:
    """As `points.PLANNED`."""
    return replace(PLANNED[0], batch_size=batch_size, num_experts=num_experts, hierarchy=hierarchy)


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
# How steps grow, by B and by E; and from which B on a device wins, for each E.
_GROWTH = [Workload("linear", 64, batch, count) for batch, count in itertools.product(BATCHES, COUNTS)]
_ALL_STEPS = list(
    dict.fromkeys(
        [
            *NAMED,
            *WORST,
            *_SHORT_STEPS,
            *(replace(_JOB, batch_size=batch, routes=routes) for batch in BATCHES for routes in ROUTES),
            *(
                Workload(LOW_RANK, width, batch, count, routes)
                for width, batch, count, routes in itertools.product(WIDTHS, BATCHES, COUNTS, ROUTES)
            ),
            *looped_grid(),
            *full_grid(),
        ]
    )
)
# By benchmark, and by set.
WORKLOADS: Mapping[str, Mapping[str, Sequence[Workload]]] = {
    "plan": {
        DEFAULT: _PLANS,
        FULL: [
            *_PLANS,
            *(_planned(batch, count) for batch in (16, *BATCHES) for count in COUNTS if (batch, count) != (64, 32)),
        ],
    },
    "dispatch": {
        DEFAULT: _MOVED,
        FULL: _one_level(
            Workload(UNTOUCHED, width, batch, count, routes)
            for width, batch, count, routes in itertools.product(WIDTHS, (*BATCHES, LARGEST_BATCH), COUNTS, ROUTES)
        ),
    },
    "grouped_product": {
        DEFAULT: _one_level([Workload(PRODUCT, 64, 4096, 256), Workload(PRODUCT, 256, 4096, 32, ZIPF)]),
        FULL: _one_level(
            Workload(PRODUCT, width, batch, count, routes)
            for width, batch, count, routes in itertools.product(WIDTHS, BATCHES, COUNTS, ROUTES)
        ),
    },
    "experts": {
        DEFAULT: _one_level(
            [
                Workload("linear", 64, 4096, 256),
                Workload("mlp", 64, 4096, 256),
                Workload("block", 64, 64, 32),
                Workload("gru", 64, 64, 32),
                Workload("two-widths", 64, 512, 32),
                _LOW_RANK,
            ]
        ),
        FULL: _one_level([*full_grid(), _LOW_RANK]),
    },
    "training_step": {DEFAULT: list(dict.fromkeys([*_SHORT_STEPS, *_GROWTH])), FULL: _ALL_STEPS},
    "inference": {
        DEFAULT: [Workload("linear", 64, 4096, 256), Workload("mlp", 64, 4096, 256), _JOB, _LOW_RANK],
        FULL: _ALL_STEPS,
    },
    "memory": {
        DEFAULT: [Workload("linear", 64, 4096, 256), Workload("mlp", 128, 4096, 128), Workload("gru", 64, 64, 32)],
        FULL: [*NAMED, *WORST, _SKEWED, _JOB, _LOW_RANK],
    },
}
