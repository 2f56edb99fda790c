"""The grids that the engines are held to, half of the grouped one for a short run, and points with lines of their own.

Axes: B samples, S positions, H hidden size, E experts of the last level.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from benchmarks.workloads.bodies import GROUPED_EXPERTS, LOOPED_EXPERTS, UNTOUCHED
from benchmarks.workloads.hierarchies import EVEN
from benchmarks.workloads.workload import Workload

WIDTHS, BATCHES, COUNTS, ROUTES = (64, 256), (64, 512, 4096), (4, 32, 256), ("uniform", "zipf")
LARGEST_BATCH = 65_536
# Two models with their gradients may take no more.
MOST_BYTES = 6 * 2**30
# Tensors of hidden size that the experts save for backward, for each row; and those of moving rows and of fusing.
_SAVED = {"linear": 1, "mlp": 6, "block": 10, "masked-block": 10, "gru": 8, "two-widths": 10}
_MOVED_AND_FUSED = 16
_LEVELS = 3
_FLOAT_BYTES = 4
# Planning sees no hidden states: they are one column.
PLANNED = (
    Workload(UNTOUCHED, 1, LARGEST_BATCH, 256, hierarchy=EVEN),
    Workload(UNTOUCHED, 1, LARGEST_BATCH, 256),
)
# The workloads of whole steps that have targets.
NAMED = (
    Workload("linear", 64, 64, 256),
    Workload("linear", 64, 512, 256, "zipf"),
    Workload("linear", 64, 4096, 256),
    Workload("linear", 64, LARGEST_BATCH, 256),
    Workload("mlp", 64, 4096, 256),
    Workload("mlp", 128, 512, 128),
    Workload("mlp", 128, 4096, 128),
    Workload("block", 64, 64, 32),
    Workload("gru", 64, 64, 32),
)
# Bound by computing, or tiny.
WORST = (
    *(Workload("mlp", 256, batch, 4) for batch in (64, 512, 4096)),
    *(Workload(expert, width, 64, 4) for expert in ("block", "gru") for width in (64, 256)),
)


def looped_grid() -> Iterator[Workload]:
    """Every combination of expert, H, B and E that the looped engine is held to."""
    for point in itertools.product(LOOPED_EXPERTS, WIDTHS, (16, *BATCHES, LARGEST_BATCH), COUNTS):
        workload = Workload(*point)
        if workload.batch_size < LARGEST_BATCH or workload.expert == "linear":
            yield workload


def full_grid() -> list[Workload]:
    """Every combination that fits into memory."""
    points = [
        Workload(expert, width, batch, count, routes)
        for expert, width, batch, count, routes in itertools.product(GROUPED_EXPERTS, WIDTHS, BATCHES, COUNTS, ROUTES)
    ]
    points += [
        Workload("linear", width, LARGEST_BATCH, count, routes)
        for width, count, routes in itertools.product(WIDTHS, COUNTS, ROUTES)
    ]
    return [point for point in points if needed_bytes(point) <= MOST_BYTES]


def short_grid() -> list[Workload]:
    """Half of the grid, without the wide ones that take a minute or more each.

    The half is such that every value of H, B, E and routes is in it about equally often, and so is every pair of them.
    """
    return [point for point in full_grid() if _is_in_half(point) and not _takes_long(point)]


def needed_bytes(workload: Workload) -> int:
    """Estimate the bytes of two models' parameters and gradients, and of one model's tensors saved for backward."""
    rows = workload.batch_size * (workload.positions or 1)
    saved = _LEVELS * _SAVED[workload.expert] + _MOVED_AND_FUSED
    return _FLOAT_BYTES * (4 * workload.parameters_of_experts() + rows * workload.hidden_size * saved)


def _is_in_half(workload: Workload) -> bool:
    batches = (*BATCHES, LARGEST_BATCH)
    places = (
        WIDTHS.index(workload.hidden_size),
        batches.index(workload.batch_size),
        COUNTS.index(workload.num_experts),
        ROUTES.index(workload.routes),
    )
    return sum(places) % 2 == 0


def _takes_long(workload: Workload) -> bool:
    longest_batch = BATCHES[0] if workload.positions else BATCHES[-1]
    return workload.hidden_size == max(WIDTHS) and workload.batch_size > longest_batch
