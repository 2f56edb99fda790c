"""Ratios of speed within rounds, with their median and their quartiles, and the columns of their tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.harness.tables import geometric_mean, ratio_columns, workload_columns
from benchmarks.report.roster import in_order
from benchmarks.suite.record import Record
from benchmarks.workloads.workload import Workload


@dataclass(frozen=True)
class Ratio:
    """One contender's seconds by another's: median and quartiles. Above 1, `faster` is the faster one indeed."""

    record: Record
    slower: str
    faster: str
    ratio: float
    low: float
    high: float

    @property
    def workload(self) -> Workload:
        """What was run."""
        return self.record.workload

    @property
    def verdict(self) -> str:
        """``"faster"`` or ``"slower"`` if the middle half of the rounds is all on one side of 1, else ``"even"``."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "even"

    def columns(self) -> dict[str, object]:
        """As the row of a CSV file."""
        timings = self.record.timings
        return {
            **record_columns(self.record),
            "contender": self.slower,
            "ms": f"{1e3 * timings.median(self.slower):.4f}",
            "celmoe_ms": f"{1e3 * timings.median(self.faster):.4f}",
            **ratio_columns(timings, self.slower, self.faster),
            "rounds": timings.rounds,
        }


def ratio_of(record: Record, slower: str, faster: str) -> Ratio | None:
    """The ratio of two contenders' times, or ``None`` if one of them was not timed."""
    if not {slower, faster} <= record.timings.seconds.keys():
        return None
    return Ratio(
        record, slower, faster, record.timings.ratio(slower, faster), *record.timings.quartiles(slower, faster)
    )


def ratios(records: Iterable[Record]) -> list[Ratio]:
    """Every contender against the one that was timed for it."""
    found = [
        ratio_of(record, contender, record.contender)
        for record in records
        for contender in in_order(record.timings.seconds)
        if contender != record.contender
    ]
    return [each for each in found if each is not None]


def headline(records: Sequence[Record], against: str, ours: str) -> tuple[float, Ratio, Ratio, int] | None:
    """Geometric mean, least, greatest and number of the ratios to a contender; ``None`` if it was never timed."""
    found = [each for record in records if (each := ratio_of(record, against, ours)) is not None]
    if not found:
        return None
    by_ratio = sorted(found, key=lambda each: each.ratio)
    return geometric_mean([each.ratio for each in found]), by_ratio[0], by_ratio[-1], len(found)


def record_columns(record: Record) -> dict[str, object]:
    """The columns of a CSV file that describe the workload and the device."""
    return {
        "stage": record.stage,
        "device": record.device,
        **workload_columns(record.workload),
        "routes": record.workload.routes,
        "hierarchy": record.workload.hierarchy,
    }
