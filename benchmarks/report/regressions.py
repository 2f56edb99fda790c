"""The benchmarks slower than in another run, by ratios to a yardstick within each run, since machines differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.contenders.contender import DENSE, LATER_PEER, LOOK_UPS, ORACLE, OURS, PEER, STACK
from benchmarks.report.ratios import Ratio, ratio_of
from benchmarks.report.reading import Suite
from benchmarks.suite.record import Record
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
class Change:
    """The ratio of a yardstick to one engine on one benchmark, then and now: more is better."""

    then: Ratio
    now: Ratio

    @property
    def record(self) -> Record:
        """The benchmark as it is now."""
        return self.now.record

    @property
    def factor(self) -> float:
        """The growth of the ratio since the other run, as a factor."""
        return self.now.ratio / self.then.ratio

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
    """Two runs: the changes of benchmarks that both have, the greatest loss first, and what only one has."""

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
        sorted(changes, key=lambda each: (each.factor, each.record.stage, str(each.record.workload), each.now.faster)),
        [record for key, record in then.items() if key not in now],
        [record for key, record in now.items() if key not in then],
    )


def _changes(then: Record, now: Record) -> list[Change]:
    measured = _measured(then).keys() & _measured(now).keys()
    yardstick = next((name for name in YARDSTICKS if name in measured), None)
    if yardstick is None:
        return []
    engines = [name for name in OURS if name in measured]
    return [Change(_ratio(then, yardstick, name), _ratio(now, yardstick, name)) for name in engines]


def _measured(record: Record) -> Mapping[str, object]:
    return record.bytes if record.stage == MEMORY else record.timings.seconds


def _ratio(record: Record, yardstick: str, contender: str) -> Ratio:
    if record.stage == MEMORY:
        share = record.bytes[yardstick] / record.bytes[contender]
        return Ratio(record, yardstick, contender, share, share, share)
    found = ratio_of(record, yardstick, contender)
    assert found is not None  # both were measured
    return found
