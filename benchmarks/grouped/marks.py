"""What the grouped engine is held to: for each line of its figures what must be reached, and what is aimed at.

Axes: B samples, S positions, H hidden size, E experts of the last level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.grid.report import geometric_mean
from benchmarks.grouped.contest import DENSE, INFERENCE, PEER, STACK, TRAINING, Compared
from benchmarks.grouped.operations import ACCELERATOR, OperationCount
from benchmarks.points import NAMED
from benchmarks.workloads import Workload


@dataclass(frozen=True)
class Goal:
    """What must be reached, and what is aimed at: ratios of times, above 1 where ours is faster."""

    must: float
    aim: float


@dataclass(frozen=True)
class NamedLine:
    """A workload with a line of its own.

    Attributes:
        workload: What is run, as a training step.
        goals: By contender, what the ratio to it is held to.
    """

    workload: Workload
    goals: Mapping[str, Goal]


@dataclass(frozen=True)
class Mark:
    """A figure beside what it is held to.

    Attributes:
        line: What was measured.
        measure: How.
        measured: What came out.
        goal: What it is held to.
        is_count: Whether less is better: a count of operations, not a ratio of times.
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


_NAMED_GOALS: tuple[Mapping[str, Goal], ...] = (
    {PEER: Goal(11, 13), DENSE: Goal(0.85, 0.95)},
    {PEER: Goal(7, 8.4), DENSE: Goal(0.50, 0.6)},
    {DENSE: Goal(0.75, 0.85)},
    {DENSE: Goal(0.52, 0.65)},
    {DENSE: Goal(0.40, 0.58)},
    {DENSE: Goal(0.30, 0.48)},
    {PEER: Goal(2.5, 4)},
)
NAMED_LINES = tuple(NamedLine(workload, goals) for workload, goals in zip(NAMED, _NAMED_GOALS, strict=True))
# The least ratio of the worst workloads is a line, so they are measured longer: this many times.
WORST_GOAL = Goal(1.0, 1.05)
LONGER = 3

_MEAN_GOALS = {TRAINING: Goal(2.2, 2.6), INFERENCE: Goal(2.0, 2.5)}
_STACK_GOAL = Goal(0.95, 1.05)
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


def named_marks(compared: Sequence[Compared]) -> list[Mark]:
    """Each named line against those that it is held to."""
    found = {(each.workload, each.against): each for each in compared}
    return [
        Mark(str(line.workload), f"{TRAINING} vs {_short(rival)}", found[line.workload, rival].ratio, goal)
        for line in NAMED_LINES
        for rival, goal in line.goals.items()
        if (line.workload, rival) in found
    ]


def worst_mark(compared: Sequence[Compared]) -> Mark:
    """The least ratio of the worst workloads."""
    least = min(compared, key=lambda each: each.ratio)
    return Mark(f"least of {len(compared)}: {least.workload}", f"{TRAINING} vs peer", least.ratio, WORST_GOAL)


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


def _short(rival: str) -> str:
    return "peer" if rival == PEER else rival
