"""Counted steps beside the model of the same steps."""

from __future__ import annotations

import itertools
from collections import Counter as Counts
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.tables.scaling import layouts
from benchmarks.tables.scaling.collectives import KINDS, NOTHING, PAYLOAD, QUANTITIES, REDUCE_SCATTER, Traffic, by_kind
from benchmarks.tables.scaling.counting import SocketBytes
from benchmarks.tables.scaling.layouts import DDP, LEVELS, REDUCED
from benchmarks.tables.scaling.load import Load, expected_load, spread
from benchmarks.tables.scaling.runs import STEPS, Case, Counted, seed_of
from benchmarks.tables.scaling.sizes import sizes_of_workload

# The model may be off by the first share if it expects batches, and by the second if it is given the batches.
TOLERANCE, ROUNDING = 0.05, 1e-9
_COLUMNS = ("collective", "quantity", "counted", "expected", "given_the_batches")


@dataclass(frozen=True)
class Compared:
    """A case, and the counts of each rank."""

    case: Case
    counted: Sequence[Counted]

    @property
    def differences(self) -> list[str]:
        """The quantities, by rank, in which the model or TCP disagrees with the count."""
        return [
            f"{self.case}, rank {rank}: {text}"
            for rank, each in enumerate(self.counted)
            for text in (
                *_differences(each.traffic, self.expected(rank), TOLERANCE, QUANTITIES),
                *_differences(each.traffic, self.given_the_batches(rank), ROUNDING, PAYLOAD),
                *_socket_differences(each),
            )
        ]

    @property
    def furthest(self) -> float:
        """The largest relative difference of counted bytes from those expected, over ranks, kinds and quantities."""
        return max(
            abs(float(getattr(each.traffic.get(kind, NOTHING), name)) / float(getattr(wanted, name)) - 1)
            for rank, each in enumerate(self.counted)
            for kind, wanted in self.expected(rank).items()
            for name in QUANTITIES
        )

    def expected(self, rank: int) -> dict[str, Traffic]:
        """The traffic that the model expects of a rank if its batches are unknown."""
        return self._modelled(rank, expected_load(self.case.workload, len(self.counted)))

    def given_the_batches(self, rank: int) -> dict[str, Traffic]:
        """The traffic that the model gives for the counted batches."""
        return self._modelled(rank, drawn_load(self.case, len(self.counted), rank))

    def _modelled(self, rank: int, load: Load) -> dict[str, Traffic]:
        num_ranks, copies, workload = len(self.counted), self.case.num_copies, self.case.workload
        num_parts, sizes = num_ranks // copies, sizes_of_workload(workload)
        if self.case.layout == DDP:
            return by_kind(layouts.data_parallel(sizes, num_ranks))
        if self.case.layout == REDUCED:
            return by_kind(layouts.reduced(sizes, load, num_ranks))
        if self.case.layout == LEVELS:
            return by_kind(layouts.fully_sharded(sizes, num_parts, copies))
        rows, where = layouts.rows_of(workload), spread(sizes, load, num_parts)
        return by_kind(layouts.expert_parallel(sizes, load, rows, where, num_parts, copies, rank % num_parts))

    def rows(self) -> Iterator[dict[str, object]]:
        """One a rank, kind of collective and quantity; by TCP all collectives together."""
        workload = self.case.workload
        for rank, each in enumerate(self.counted):
            columns: dict[str, object] = {
                "ranks": len(self.counted),
                "rank": rank,
                "layout": self.case.layout,
                "copies": self.case.num_copies,
                "expert": workload.expert,
                "H": workload.hidden_size,
                "E": workload.num_experts,
                "B": workload.batch_size,
                "routes": workload.routes,
                "hierarchy": workload.hierarchy,
            }
            expected, exact = self.expected(rank), self.given_the_batches(rank)
            for kind, name in itertools.product(expected, QUANTITIES):
                values = (round(getattr(of.get(kind, NOTHING), name)) for of in (each.traffic, expected, exact))
                yield columns | dict(zip(_COLUMNS, (kind, name, *values), strict=True))
            for name in SocketBytes._fields:
                sent = getattr(each.sockets, name)
                yield columns | dict(zip(_COLUMNS, ("by TCP", name, sent, "", ""), strict=True))


def drawn_load(case: Case, num_ranks: int, rank: int) -> Load:
    """The true load of the counted steps: the mean of their samples by expert.

    Shares are of the samples of the ranks that this one exchanges rows with.
    """
    num_parts = num_ranks // case.num_copies
    first = rank - rank % num_parts
    shares, present = {}, {}
    routings = [[case.workload.routing(seed_of(each, step + 1)) for each in range(num_ranks)] for step in range(STEPS)]
    for level, names in case.workload.levels().items():
        counts = [[Counts(routing[level]) for routing in step] for step in routings]
        found = np.array([[[each[name] for name in names] for each in step] for step in counts])
        mine = found[:, first : first + num_parts].sum((0, 1))
        shares[level], present[level] = mine / mine.sum(), (found.sum(1) > 0).mean(0)
    return Load(shares, present)


def _differences(
    counted: dict[str, Traffic], wanted: dict[str, Traffic], tolerance: float, quantities: Sequence[str]
) -> Iterator[str]:
    """Name each kind of collective and quantity that differs by more than `tolerance` of the wanted value."""
    for kind, name in itertools.product(KINDS, quantities):
        ours, theirs = (getattr(each.get(kind, NOTHING), name) for each in (counted, wanted))
        if abs(ours - theirs) > tolerance * theirs:
            yield f"{kind}: {ours:,.0f} bytes {name}, not {theirs:,.0f}"


def _socket_differences(counted: Counted) -> Iterator[str]:
    """Name the directions whose bytes over TCP differ by more than `TOLERANCE` from the collectives' bytes."""
    for name in SocketBytes._fields:
        # Gloo reduces all and keeps a share.
        wanted = sum(
            (2 if kind == REDUCE_SCATTER else 1) * float(getattr(each, name)) for kind, each in counted.traffic.items()
        )
        got = getattr(counted.sockets, name)
        if abs(got - wanted) > TOLERANCE * wanted:
            yield f"TCP: {got:,.0f} bytes {name}, not {wanted:,.0f}"
