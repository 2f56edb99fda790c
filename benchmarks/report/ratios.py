"""Ratios of speed within rounds, with their median and their quartiles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.report.reading import Record
from benchmarks.workloads.workload import Workload


@dataclass(frozen=True)
class Ratio:
    """One contender's seconds by another's.

    Attributes:
        record: The benchmark that gave the ratio.
        slower: The contender above the line.
        faster: The contender below: above 1 it is the faster one indeed.
        ratio: The median over the rounds.
        low: The first quartile.
        high: The third quartile.
        rounds: Rounds measured.
    """

    record: Record
    slower: str
    faster: str
    ratio: float
    low: float
    high: float
    rounds: int

    @property
    def workload(self) -> Workload:
        """What was run."""
        return self.record.workload

    @property
    def verdict(self) -> str:
        """``"faster"`` or ``"slower"`` if the middle half of the rounds is all on one side of 1, else ``"even"``."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "even"


def ratio_of(record: Record, slower: str, faster: str) -> Ratio | None:
    """The ratio of two contenders' times, or ``None`` if one of them was not timed."""
    if not {slower, faster} <= record.timings.seconds.keys():
        return None
    low, high = record.timings.quartiles(slower, faster)
    return Ratio(record, slower, faster, record.timings.ratio(slower, faster), low, high, record.timings.rounds)


def ratios(records: Iterable[Record]) -> list[Ratio]:
    """Every contender against the one that was timed for it."""
    found = [
        ratio_of(record, contender, record.contender)
        for record in records
        for contender in record.contenders
        if contender != record.contender
    ]
    return [each for each in found if each is not None]
