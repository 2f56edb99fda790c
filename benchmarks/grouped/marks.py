"""An engine's targets over the grid: the figures it must reach, and the figures it aims at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.grid.report import geometric_mean
from benchmarks.grouped.contest import INFERENCE, PEER, STACK, TRAINING, Compared
from benchmarks.grouped.operations import ACCELERATOR, OperationCount


@dataclass(frozen=True)
class Goal:
    """The ratio that must be reached, and the ratio aimed at; above 1 ours is faster."""

    must: float
    aim: float


@dataclass(frozen=True)
class Mark:
    """A figure beside its target.

    Attributes:
        line: The name of the workload or the operation.
        measure: The name of the measure.
        measured: The figure.
        goal: Its target.
        is_count: True if less is better: a count of operations, not a ratio of times.
    """

    line: str
    measure: str
    measured: float
    goal: Goal
    is_count: bool = False

    @property
    def verdict(self) -> str:
        """``"missed"``, ``"reached"`` or ``"aim"``."""
        for verdict, bound in (("aim", self.goal.aim), ("reached", self.goal.must)):
            if self.measured <= bound if self.is_count else self.measured >= bound:
                return verdict
        return "missed"


_MEAN_GOALS = {TRAINING: Goal(2.2, 2.6), INFERENCE: Goal(2.0, 2.5)}
_STACK_GOAL = Goal(1.0, 1.1)
_COUNT_GOALS = {"uniform": Goal(1.2, 1.0), "zipf": Goal(2.0, 1.0)}


def grid_marks(compared: Sequence[Compared]) -> list[Mark]:
    """The geometric means over the grid, against the peer and against the stack."""
    marks = []
    for measure, goal in _MEAN_GOALS.items():
        if ratios := _ratios(compared, measure, PEER):
            marks.append(Mark(f"geometric mean of {len(ratios)}", f"{measure} vs peer", geometric_mean(ratios), goal))
    if ratios := _ratios(compared, TRAINING, STACK):
        line = f"Linear and MLP, geometric mean of {len(ratios)}"
        marks.append(Mark(line, f"{TRAINING} vs {STACK}", geometric_mean(ratios), _STACK_GOAL))
    return marks


def operation_marks(counts: Sequence[OperationCount]) -> list[Mark]:
    """By routes, the kind of expert whose operations grow most on an accelerator with the number of experts."""
    marks = []
    for routes, goal in _COUNT_GOALS.items():
        found = [each for each in counts if (each.routes, each.arrangement) == (routes, ACCELERATOR)]
        largest = max(found, key=lambda each: each.ratio, default=None)
        if largest is not None:
            line = f"most of all kinds: {largest.expert}, {routes}"
            marks.append(Mark(line, "operations, E=256 by E=4", largest.ratio, goal, is_count=True))
    return marks


def _ratios(compared: Sequence[Compared], measure: str, against: str) -> list[float]:
    return [each.ratio for each in compared if (each.measure, each.against) == (measure, against)]
