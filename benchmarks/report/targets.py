"""The figures that the sets ``grid`` and ``grouped`` are held to: what they must reach, and what they aim at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.contenders.contender import AUTO, LOOK_UPS, PEER, STACK
from benchmarks.harness.canvas import BLUE, VERMILION, Drawing, label_rows, new_panels, plain_numbers
from benchmarks.harness.tables import geometric_mean
from benchmarks.harness.wording import times_words
from benchmarks.report.ratios import ratio_of
from benchmarks.report.reading import Suite
from benchmarks.report.roster import STAGE_NAMES
from benchmarks.report.tables import Cell, Table
from benchmarks.suite.operations import ACCELERATOR, FEW_EXPERTS, MANY_EXPERTS, OperationCount
from benchmarks.suite.record import Record
from benchmarks.suite.sets import GRID, GROUPED
from benchmarks.suite.stages import INFERENCE, PLAN, ROUTING, WHOLE_STEP
from benchmarks.workloads.hierarchies import EVEN

_COLOURS = {"missed": VERMILION, "reached": BLUE, "aim": "#1b7837"}
_STYLES = {"missed": "slower", "reached": "", "aim": "faster"}
_MOST_GROWN = 3
_BY = ("plan_by_look_ups", "celmoe_vp_by_plan", "celmoe_vp_by_pass")
_PLAN_COLUMNS = ("plan_ms", "look_ups_ms", "celmoe_vp_ms", *_BY)


class Goal(NamedTuple):
    """The figure that must be reached, and the figure aimed at."""

    must: float
    aim: float


@dataclass(frozen=True)
class Mark:
    """A figure beside its goal; less is better of counts of operations, and of times as multiples of a bound."""

    line: str
    measure: str
    measured: float
    goal: Goal
    less_is_better: bool = False

    @property
    def verdict(self) -> str:
        """``"missed"``, ``"reached"`` or ``"aim"``."""
        for verdict, bound in (("aim", self.goal.aim), ("reached", self.goal.must)):
            if self.measured <= bound if self.less_is_better else self.measured >= bound:
                return verdict
        return "missed"


_MEANS = (
    (WHOLE_STEP, PEER, Goal(2.2, 2.6)),
    (INFERENCE, PEER, Goal(2.0, 2.5)),
    (WHOLE_STEP, STACK, Goal(1.0, 1.1)),
)
_COUNTS = {"uniform": Goal(1.2, 1.0), "zipf": Goal(2.0, 1.0)}
# Of three levels of 256 experts.
_BY_LOOK_UPS, _BY_PEER = Goal(2.5, 2.5), Goal(100, 100)


def find_marks(which: str, suite: Suite, counts: Sequence[OperationCount] = ()) -> list[Mark]:
    """The marks of one of `suite.sets.SETS`; those without a measurement are left out."""
    if which == GRID:
        return _planning_marks(suite)
    return [*_mean_marks(suite), *_operation_marks(counts)] if which == GROUPED else []


def _planning_marks(suite: Suite) -> list[Mark]:
    marks = []
    for record in (each for each in suite.of(PLAN) if each.workload.hierarchy == EVEN):
        line = f"{record.workload.batch_size:,} samples over three levels of {record.workload.num_experts}"
        found = _planned(record, suite)
        if "plan_by_look_ups" in found:
            measured = found["plan_by_look_ups"]
            marks.append(Mark(line, "planning by look-ups", measured, _BY_LOOK_UPS, less_is_better=True))
        if "celmoe_vp_by_plan" in found:
            marks.append(Mark(line, f"{PEER}'s routing pass by our planning", found["celmoe_vp_by_plan"], _BY_PEER))
    return marks


def _planned(record: Record, suite: Suite) -> dict[str, float]:
    """A plan's milliseconds, beside look-ups and beside both libraries' passes if they were timed."""
    found = {"plan_ms": 1e3 * record.timings.median(AUTO)}
    if (ratio := ratio_of(record, AUTO, LOOK_UPS)) is not None:
        found |= {"look_ups_ms": 1e3 * record.timings.median(LOOK_UPS), "plan_by_look_ups": ratio.ratio}
    for each in suite.of(ROUTING, record.device):
        if each.workload == record.workload and (ratio := ratio_of(each, PEER, AUTO)) is not None:
            theirs = 1e3 * each.timings.median(PEER)
            found |= {"celmoe_vp_ms": theirs, "celmoe_vp_by_plan": theirs / found["plan_ms"]}
            found["celmoe_vp_by_pass"] = ratio.ratio
    return found


def plan_rows(suite: Suite) -> list[dict[str, object]]:
    """Planning as the rows of a CSV file; experts are those of each level."""
    rows: list[dict[str, object]] = []
    for record in suite.of(PLAN):
        found = _planned(record, suite)
        experts = "/".join(str(len(names)) for names in record.workload.levels().values())
        measured = {name: f"{found[name]:.4g}" if name in found else "" for name in _PLAN_COLUMNS}
        rows.append({"experts": experts, "B": record.workload.batch_size, **measured})
    return rows


def _mean_marks(suite: Suite) -> list[Mark]:
    marks = []
    for stage, against, goal in _MEANS:
        found = [each.ratio for record in suite.of(stage) if (each := ratio_of(record, against, AUTO)) is not None]
        if found:
            line = f"geometric mean of {len(found)}"
            marks.append(Mark(line, f"{STAGE_NAMES[stage]}, beside {against}", geometric_mean(found), goal))
    return marks


def _operation_marks(counts: Sequence[OperationCount]) -> list[Mark]:
    """By routes, the kind of expert whose operations grow most on an accelerator with the number of experts."""
    marks = []
    for routes, goal in _COUNTS.items():
        found = [each for each in counts if (each.routes, each.arrangement) == (routes, ACCELERATOR)]
        largest = max(found, key=lambda each: each.ratio, default=None)
        if largest is not None:
            line = f"most of all kinds: {largest.expert}, {routes}"
            measure = f"operations, E={MANY_EXPERTS} by E={FEW_EXPERTS}"
            marks.append(Mark(line, measure, largest.ratio, goal, less_is_better=True))
    return marks


def marks_table(marks: Sequence[Mark]) -> Table:
    """The figures beside what they must reach and what they aim at."""
    rows = []
    for mark in marks:
        figures = [Cell(times_words(each)) for each in (mark.measured, mark.goal.must, mark.goal.aim)]
        verdict = Cell(mark.verdict, style=_STYLES[mark.verdict])
        rows.append([Cell(mark.line), Cell(mark.measure, "less is better" * mark.less_is_better), *figures, verdict])
    return Table(["workloads", "measure", "measured", "must", "aim", "verdict"], rows, 2)


def operations_rows(counts: Sequence[OperationCount]) -> list[dict[str, object]]:
    """Operations with few and with many experts, and which of them grow most, as the rows of a CSV file."""
    return [
        {
            "experts": each.expert,
            "routes": each.routes,
            "arranged_for": each.arrangement,
            "few": each.few,
            "many": each.many,
            "ratio": f"{each.ratio:.3f}",
            "grown": _grown(each),
        }
        for each in counts
    ]


def operations_table(counts: Sequence[OperationCount]) -> Table:
    """The same for the page."""
    rows = [[Cell(str(each)) for each in row.values()] for row in operations_rows(counts)]
    numbers = (f"E = {FEW_EXPERTS}", f"E = {MANY_EXPERTS}", "ratio", "what grows most")
    return Table(["experts", "routes", "arranged for", *numbers], rows, 3)


def _grown(count: OperationCount) -> str:
    return ", ".join(f"{name} +{more}" for name, more in count.grown[:_MOST_GROWN])


def draw_marks(marks: Sequence[Mark]) -> Drawing:
    """Every figure as a dot, with a bar from the value it must reach to the value aimed at."""
    figure, ((axes,),) = new_panels(9, 0.5 * len(marks) + 1.2, 1, 1)
    for row, mark in enumerate(marks):
        axes.plot([mark.goal.must, mark.goal.aim], [row, row], color="#cccccc", linewidth=7, solid_capstyle="butt")
        axes.plot(mark.goal.must, row, color="#444444", marker="|", markersize=13)
        axes.plot(mark.measured, row, color=_COLOURS[mark.verdict], marker="o", markersize=6)
        axes.annotate(f"{mark.measured:.2f}", (mark.measured, row), (0, 6), textcoords="offset points", ha="center")
    label_rows(axes, [f"{mark.line}\n{mark.measure}" for mark in marks])
    plain_numbers(axes, "x")
    rows = [
        {
            "line": each.line,
            "measure": each.measure,
            "measured": f"{each.measured:.3f}",
            "must": each.goal.must,
            "aim": each.goal.aim,
            "verdict": each.verdict,
        }
        for each in marks
    ]
    caption = "Dots are measured, ticks must be reached, and bars lead to the aim."
    return Drawing("marks", "Figures and what they are held to", caption, figure, rows)
