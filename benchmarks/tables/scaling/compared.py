"""Counted steps beside the model of the same steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.tables.scaling.collectives import NOTHING, PAYLOAD, QUANTITIES, Traffic, total
from benchmarks.tables.scaling.counting import SocketBytes
from benchmarks.tables.scaling.load import expected_load
from benchmarks.tables.scaling.runs import (
    ROUNDING,
    TOLERANCE,
    Case,
    Counted,
    differences,
    drawn_load,
    modelled,
    socket_differences,
)

_COLUMNS = ("collective", "quantity", "counted", "expected", "given_the_batches")


@dataclass(frozen=True)
class Compared:
    """A case, counted on all ranks.

    Attributes:
        case: What was trained.
        counted: Of each rank.
    """

    case: Case
    counted: Sequence[Counted]

    @property
    def differences(self) -> list[str]:
        """The quantities, by rank, in which the model or TCP disagrees with the count."""
        found: list[str] = []
        for rank, each in enumerate(self.counted):
            texts = differences(each.traffic, self.expected(rank), TOLERANCE)
            texts += differences(each.traffic, self.given_the_batches(rank), ROUNDING, PAYLOAD)
            texts += socket_differences(each)
            found += [f"{self.case}, rank {rank}: {text}" for text in texts]
        return found

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
        num_ranks = len(self.counted)
        return modelled(self.case, num_ranks, rank, expected_load(self.case.workload, num_ranks))

    def given_the_batches(self, rank: int) -> dict[str, Traffic]:
        """The traffic that the model gives for the counted batches."""
        return modelled(self.case, len(self.counted), rank, drawn_load(self.case, len(self.counted), rank))

    def rows(self) -> Iterator[dict[str, object]]:
        """One a rank, kind of collective and quantity; by TCP all collectives together."""
        for rank, each in enumerate(self.counted):
            expected, exact = self.expected(rank), self.given_the_batches(rank)
            for kind, name in itertools.product(expected, QUANTITIES):
                values = (round(getattr(of.get(kind, NOTHING), name)) for of in (each.traffic, expected, exact))
                yield self._columns(rank) | dict(zip(_COLUMNS, (kind, name, *values), strict=True))
            for name in SocketBytes._fields:
                yield self._columns(rank) | dict(
                    zip(_COLUMNS, ("by TCP", name, getattr(each.sockets, name), "", ""), strict=True)
                )

    def _columns(self, rank: int) -> dict[str, object]:
        workload = self.case.workload
        return {
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


def compared_table(compared: Sequence[Compared]) -> Table:
    """The bytes that the first rank sent, by the model, by its collectives, and by TCP."""
    table = Table(title="bytes that the first rank sends in a step; how far any collective of any rank is from it")
    for name in ("ranks", "layout", "workload", "expected", "counted", "by TCP", "furthest"):
        table.add_column(name, justify="left" if name in ("layout", "workload") else "right")
    for each in compared:
        copies = f", {each.case.num_copies} copies" if each.case.num_copies > 1 else ""
        table.add_row(
            str(len(each.counted)),
            f"{each.case.layout}{copies}",
            str(each.case.workload),
            f"{total(each.expected(0).values()).sent:,.0f}",
            f"{total(each.counted[0].traffic.values()).sent:,.0f}",
            f"{each.counted[0].sockets.sent:,}",
            f"{100 * each.furthest:.2f} %",
        )
    return table
