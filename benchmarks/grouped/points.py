"""The grid that the engine is held to, and which of it a short run takes.

Axes: B samples, S positions, H hidden size, E experts of the last level.
"""

from __future__ import annotations

import itertools

from benchmarks.workloads import EXPERTS, POSITIONS, Workload

WIDTHS, BATCHES, COUNTS, ROUTES = (64, 256), (64, 512, 4096), (4, 32, 256), ("uniform", "zipf")
LARGEST_BATCH = 65_536
# Two models with their gradients may take no more.
MOST_BYTES = 6 * 2**30
# Tensors of hidden size that the experts save for backward, for each row; and those of moving rows and of fusing.
_SAVED = {"linear": 1, "mlp": 6, "block": 10, "masked-block": 10, "gru": 8, "two-widths": 10}
_MOVED_AND_FUSED = 16
_LEVELS = 3
_FLOAT_BYTES = 4


def full_grid() -> list[Workload]:
    """Every combination that fits into memory."""
    points = [
        Workload(expert, width, batch, count, routes)
        for expert, width, batch, count, routes in itertools.product(EXPERTS, WIDTHS, BATCHES, COUNTS, ROUTES)
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
    """An estimate: parameters and gradients of two models, and what one of them saves for backward."""
    rows = workload.batch_size * (POSITIONS if workload.has_positions else 1)
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
    longest_batch = BATCHES[0] if workload.has_positions else BATCHES[-1]
    return workload.hidden_size == max(WIDTHS) and workload.batch_size > longest_batch
