"""The benchmarks slower than in another run, by ratios to a yardstick within each run, since machines differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.contenders.contender import DENSE, LATER_PEER, LOOK_UPS, ORACLE, OURS, PEER, STACK
from benchmarks.report.ratios import ratio_of
from benchmarks.report.reading import Record, Suite
from benchmarks.suite.stages import MEMORY

# In the order of preference: code that does not change, and does about the same work.
YARDSTICKS = (PEER, LATER_PEER, DENSE, STACK, ORACLE, LOOK_UPS)
# Less than this is no change, however far apart the quartiles are.
THRESHOLD = 0.10
SLOWER, FASTER, SAME = "slower", "faster", "same"
RULE = (
    "For each benchmark that both runs have, every engine of celmoe is held against the first of "
    f"{', '.join(YARDSTICKS)} that both runs timed: how many times as fast as that was it, round by round? It counts "
    "as slower where the quartiles of the old run and of the new one don't overlap and the median fell by more than "
    f"{THRESHOLD:.0%}; as faster, the other way round. Memory has no quartiles: there the {THRESHOLD:.0%} alone "
    "decide. Seconds are not compared, as machines differ."
)


@dataclass(frozen=True)
class Spread:
    """A ratio to the yardstick: more is better."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Change:
    """One engine on one benchmark, then and now."""

    record: Record
    contender: str
    yardstick: str
    then: Spread
    now: Spread

    @property
    def factor(self) -> float:
        """The growth of the ratio since the other run, as a factor."""
        return self.now.median / self.then.median

    @property
    def verdict(self) -> str:
        """`SLOWER`, `FASTER` or `SAME`, by the `RULE`."""
        if self.now.high < self.then.low and self.factor < 1 - THRESHOLD:
            return SLOWER
        if self.now.low > self.then.high and self.factor > 1 / (1 - THRESHOLD):
            return FASTER
        return SAME


@dataclass(frozen=True)
class Comparison:
    """Two runs.

    Attributes:
        old: The other run.
        changes: The changes of benchmarks that both have, the greatest loss first.
        only_old: Benchmarks that only the other run has.
        only_new: Benchmarks that only this one has.
    """

    old: Suite
    changes: Sequence[Change]
    only_old: Sequence[Record]
    only_new: Sequence[Record]

    def of(self, verdict: str) -> list[Change]:
        """The changes with a verdict."""
        return [each for each in self.changes if each.verdict == verdict]


def compare(old: Suite, new: Suite) -> Comparison:
    """Every benchmark of the new run beside that of the same key in the old one."""
    then, now = ({record.key: record for record in suite.records} for suite in (old, new))
    changes = [change for key in now.keys() & then.keys() for change in _changes(then[key], now[key])]
    return Comparison(
        old,
        sorted(changes, key=lambda change: (change.factor, change.record.name, change.contender)),
        [record for key, record in then.items() if key not in now],
        [record for key, record in now.items() if key not in then],
    )


def _changes(then: Record, now: Record) -> list[Change]:
    measured = _measured(then).keys() & _measured(now).keys()
    yardstick = next((name for name in YARDSTICKS if name in measured), None)
    if yardstick is None:
        return []
    engines = [name for name in OURS if name in measured]
    return [Change(now, name, yardstick, *(_spread(each, yardstick, name) for each in (then, now))) for name in engines]


def _measured(record: Record) -> Mapping[str, object]:
    return record.bytes if record.stage == MEMORY else record.timings.seconds


def _spread(record: Record, yardstick: str, contender: str) -> Spread:
    if record.stage == MEMORY:
        share = record.bytes[yardstick] / record.bytes[contender]
        return Spread(share, share, share)
    found = ratio_of(record, yardstick, contender)
    assert found is not None  # both were measured
    return Spread(found.low, found.ratio, found.high)
