"""The noise of the machine: the spread of repeated timings of one thing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.harness.interleaved import FEWEST_ROUNDS

# A series is restless if its middle half is wider than this share of its median; a run is noisy if more than this
# share of its series are.
RESTLESS, NOISY = 0.10, 0.25


@dataclass(frozen=True)
class Noise:
    """The number of a run's series of repeated timings, and of those wider than `RESTLESS`."""

    series: int
    restless: int

    @property
    def is_noisy(self) -> bool:
        """True if the run's seconds should be taken with care."""
        return self.restless > NOISY * self.series

    def __str__(self) -> str:
        if not self.series:
            return "Nothing was timed often enough to tell whether the machine was noisy."
        return (
            f"In {self.restless:,} of {self.series:,} series of timings, the middle half is wider than {RESTLESS:.0%} "
            f"of the median. More than {NOISY:.0%} of them make a run noisy."
        )


def measure_noise(series: Iterable[Sequence[float]]) -> Noise:
    """Measure the spread of each series of timings; series of fewer than 5 timings are left out."""
    widths = [_width(each) for each in series if len(each) >= FEWEST_ROUNDS]
    return Noise(len(widths), sum(width > RESTLESS for width in widths))


def _width(timings: Sequence[float]) -> float:
    low, median, high = statistics.quantiles(timings, n=4)
    return (high - low) / median
