"""The length of training: its planned steps, the learning rate on the way, and the clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from benchmarks.multilingual.learning.ranks import ALONE, Ranks
from benchmarks.multilingual.words.corpus import FORMS_PER_LANGUAGE

# Two cores of an ordinary machine do more: 150 steps of 4,096 words. The plan follows from the options alone, so that
# timing noise does not change it, and counts words, so that small batches see as many as large ones.
WORDS_PER_MINUTE = 150 * 4_096
# More rounds over the same words than this make unseen words worse, however many minutes there are.
MOST_EPOCHS = 6
# Beyond these minutes more words teach more than more rounds over the same ones do, up to so many times as many.
MINUTES_OF_FEW_PAIRS = 15
MOST_PAIRS = 4
LEARNING_RATE = 8e-3
# A share of the learning rate, for a trained network that goes on or gets a language. At the whole rate a language's
# few words are learned by heart; at a quarter its many words are learned slowly.
FURTHER_PEAK = 0.5
WARM_UP_STEPS = 40
FINAL_SHARE = 0.02


def plan_steps(minutes: float, batch_size: int, steps_per_epoch: int) -> int:
    """The number of steps of ``batch_size`` words that are worth planning for so many minutes."""
    return max(1, min(round(WORDS_PER_MINUTE * minutes / batch_size), steps_per_epoch * MOST_EPOCHS))


def plan_pairs(minutes: float) -> int:
    """The number of pairs of each dictionary that are worth drawing for so many minutes."""
    return FORMS_PER_LANGUAGE * max(1, min(MOST_PAIRS, int(minutes / MINUTES_OF_FEW_PAIRS)))


def learning_rate(step: int, total_steps: int, peak: float = LEARNING_RATE) -> float:
    """Linear warm-up to the peak, then half a cosine down to `FINAL_SHARE` of it."""
    warm_up = min(WARM_UP_STEPS, max(1, total_steps // 5))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, total_steps - warm_up)
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class Deadline:
    """The moment by which training has to be over, and how many steps still fit.

    Several ranks agree on both: the strictest clock decides, and all of them must ask.
    """

    def __init__(self, ends_at: float, clock: Callable[[], float] = time.monotonic, ranks: Ranks = ALONE) -> None:
        self._ends_at = ends_at
        self._clock = clock
        self._ranks = ranks

    def passed(self) -> bool:
        """True if no further step may begin."""
        return self._ranks.any(self._clock() >= self._ends_at)

    def steps_that_fit(self, seconds_per_step: float) -> int:
        """The number of further steps that end in time."""
        return self._ranks.least(max(0, int((self._ends_at - self._clock()) / seconds_per_step)))
