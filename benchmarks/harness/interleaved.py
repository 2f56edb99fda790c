"""Timing contenders side by side in one process.

The contenders take one step each in turn, so that other load on the machine slows all of them alike. Results are
medians of the ratios within a round.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# Fewer rounds make no median, and more than this tell nothing new.
FEWEST_ROUNDS = 5
MOST_ROUNDS = 401
WARM_UP_ROUNDS = 1

Step = Callable[[], object]


@dataclass(frozen=True)
class Timings:
    """Seconds of each contender in each round."""

    seconds: Mapping[str, list[float]]

    @property
    def rounds(self) -> int:
        """The number of steps that every contender ran."""
        return min(map(len, self.seconds.values()))

    def median(self, name: str) -> float:
        """The median of a contender's seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, slower: str, faster: str) -> float:
        """The median over the rounds of one contender's seconds by the other's."""
        return statistics.median(self._ratios(slower, faster))

    def quartiles(self, slower: str, faster: str) -> tuple[float, float]:
        """Between which two ratios the middle half of the rounds lies."""
        low, _, high = statistics.quantiles(self._ratios(slower, faster), n=4)
        return low, high

    def spread(self, name: str) -> tuple[float, float]:
        """Between which two times the middle half of a contender's steps lies."""
        low, _, high = statistics.quantiles(self.seconds[name], n=4)
        return low, high

    def _ratios(self, slower: str, faster: str) -> list[float]:
        return [a / b for a, b in zip(self.seconds[slower], self.seconds[faster], strict=True)]


def interleave(
    steps: Mapping[str, Step],
    seconds: float,
    between: Step = lambda: None,
    after_round: Callable[[Timings], object] = lambda _: None,
) -> Timings:
    """Run all contenders in turn, each round in another order, since a step changes the caches for the next one.

    Args:
        steps: The timed steps, by contender.
        seconds: About how long to go on, the limits on rounds aside.
        between: Run before each timed step, unseen by the clock.
        after_round: Takes the timings so far, after each round.
    """
    names = list(steps)
    shuffle = random.Random(0).shuffle
    found: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(WARM_UP_ROUNDS):
            for step in steps.values():
                step()
        begun = time.perf_counter()
        while len(found[names[0]]) < MOST_ROUNDS:
            if len(found[names[0]]) >= FEWEST_ROUNDS and time.perf_counter() - begun > seconds:
                break
            gc.collect(0)
            for name in names:
                between()
                start = time.perf_counter()
                steps[name]()
                found[name].append(time.perf_counter() - start)
            after_round(Timings({name: list(taken) for name, taken in found.items()}))
            shuffle(names)
    finally:
        if collecting:
            gc.enable()
    return Timings(found)
