"""The output of a run of the grid: tables, a figure, and the lines that sum them up."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.grid.measure import PlanTiming, StepTiming
from benchmarks.workloads.bodies import EXPERTS
from benchmarks.workloads.points import LARGEST_BATCH
from benchmarks.workloads.workload import Workload

Timing = TypeVar("Timing", bound="RatioOfTimes")

COLOURS = ("#0b6e99", "#e08214", "#6a3d9a")
DOTS_PER_INCH = 130


class RatioOfTimes(Protocol):
    """A workload's ratio of times, with its quartiles over the rounds."""

    @property
    def workload(self) -> Workload:
        """What was run."""

    @property
    def ratio(self) -> float:
        """The median."""

    @property
    def low(self) -> float:
        """The first quartile."""

    @property
    def high(self) -> float:
        """The third quartile."""


def write_steps(path: Path, steps: Sequence[StepTiming]) -> None:
    """One row a workload."""
    rows = [
        {
            **workload_columns(each.workload),
            "celmoe_ms": f"{each.ours_ms:.3f}",
            "celmoe_vp_ms": f"{each.peer_ms:.3f}",
            "bare_loop_ms": f"{each.bare_ms:.3f}",
            **ratio_columns(each),
            "bound": f"{each.bound:.3f}",
            "rounds": each.rounds,
        }
        for each in steps
    ]
    write_rows(path, rows)


def write_plans(path: Path, plans: Sequence[PlanTiming]) -> None:
    """One row a hierarchy."""
    rows = [
        {
            "experts": "/".join(map(str, each.experts)),
            "B": LARGEST_BATCH,
            "plan_ms": f"{each.plan_ms:.2f}",
            "look_ups_ms": f"{each.look_ups_ms:.2f}",
            "celmoe_pass_ms": f"{each.ours_ms:.1f}",
            "celmoe_vp_ms": f"{each.peer_ms:.0f}",
            "plan_by_look_ups": f"{each.by_look_ups:.2f}",
            "celmoe_vp_by_plan": f"{each.by_plan:.0f}",
            "celmoe_vp_by_pass": f"{each.by_pass:.1f}",
        }
        for each in plans
    ]
    write_rows(path, rows)


def draw_steps(path: Path, steps: Sequence[StepTiming]) -> None:
    """A panel for each kind of expert and width: the ratio by batch size, a line for each number of experts.

    Thin dotted lines are the bounds: the speed of a loop over the experts that routes and moves rows in no time.
    """

    def draw_line(axes: Axes, line: Sequence[StepTiming], colour: str) -> None:
        draw_ratios(axes, line, colour)
        batches = [each.workload.batch_size for each in line]
        axes.plot(batches, [each.bound for each in line], color=colour, linewidth=0.9, linestyle=":")

    draw_panels(path, steps, draw_line)


def draw_panels(
    path: Path,
    steps: Sequence[Timing],
    draw_line: Callable[[Axes, Sequence[Timing], str], None],
    note: str = "",
) -> None:
    """A panel for each kind of expert and width, by batch size.

    Args:
        path: The file to write.
        steps: The timings to draw.
        draw_line: Draws the timings of one panel and one number of experts, in its colour.
        note: A remark for the reader, on the label of the axis.
    """
    kinds = [kind for kind in EXPERTS if any(each.workload.expert == kind for each in steps)]
    widths = sorted({each.workload.hidden_size for each in steps})
    counts = sorted({each.workload.num_experts for each in steps})
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(3 * len(kinds), 2.6 * len(widths) + 0.6), layout="constrained")
        panels = figure.subplots(len(widths), len(kinds), squeeze=False, sharey=True)
    for row, width in enumerate(widths):
        for column, kind in enumerate(kinds):
            axes = panels[row][column]
            panel = [each for each in steps if (each.workload.expert, each.workload.hidden_size) == (kind, width)]
            if not panel:
                axes.set_axis_off()
                continue
            for count, colour in zip(counts, COLOURS, strict=False):
                if line := [each for each in panel if each.workload.num_experts == count]:
                    draw_line(axes, line, colour)
            axes.axhline(1.0, color="#444444", linewidth=0.8, linestyle="--")
            axes.set(xscale="log", yscale="log", title=f"{kind}, H = {width}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value in (2, 5) else ""))
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("batch size")
    keys = [_key(count, colour) for count, colour in zip(counts, COLOURS, strict=False)]
    panels[0][0].legend(handles=keys, frameon=False, fontsize=8)
    figure.supylabel(f"times as fast as celmoe-vp 1.1.4{note}", fontsize=9)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def draw_ratios(axes: Axes, line: Sequence[RatioOfTimes], colour: str, style: str = "-") -> None:
    """Ratios by batch size, with the middle half of the rounds as a band."""
    batches = [each.workload.batch_size for each in line]
    low, high = [each.low for each in line], [each.high for each in line]
    axes.fill_between(batches, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(batches, [each.ratio for each in line], color=colour, linestyle=style, marker="o", markersize=3.5)


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(steps: Sequence[StepTiming]) -> str:
    """The geometric means of the ratios and their bounds, on which side of 1 the rounds are, and the worst ratio."""
    mean = geometric_mean([each.ratio for each in steps])
    bound = geometric_mean([each.bound for each in steps])
    worst = min(steps, key=lambda each: each.ratio)
    faster, slower = sum(each.low > 1 for each in steps), sum(each.high < 1 for each in steps)
    return (
        f"{len(steps)} workloads: {mean:.2f} times as fast as celmoe-vp 1.1.4 in the geometric mean (a loop that "
        f"routes and moves for nothing: {bound:.2f}); faster in {faster}, slower in {slower}, a tie in "
        f"{len(steps) - faster - slower} (the middle half of their rounds holds 1); least {worst.ratio:.3f} "
        f"({worst.workload})"
    )


def plan_name(plan: PlanTiming) -> str:
    """The batch and the hierarchy."""
    return f"{LARGEST_BATCH:,} samples over {'/'.join(map(str, plan.experts))} experts"


def plan_line(plan: PlanTiming) -> str:
    """One hierarchy's planning."""
    return (
        f"planning {plan_name(plan)}: {plan.plan_ms:.1f} ms, "
        f"{plan.by_look_ups:.2f} times the bare look-ups; celmoe-vp's pass over one column, which routes, takes "
        f"{plan.by_plan:.0f} times as long, and {plan.by_pass:.1f} times as long as the same pass of ours"
    )


def _key(count: int, colour: str) -> Line2D:
    return Line2D([], [], color=colour, marker="o", markersize=3.5, label=f"{count} experts")


def workload_columns(workload: Workload) -> dict[str, object]:
    """The columns of a CSV file that describe the workload."""
    return {
        "experts": workload.expert,
        "H": workload.hidden_size,
        "B": workload.batch_size,
        "E": workload.num_experts,
    }


def ratio_columns(timing: RatioOfTimes) -> dict[str, str]:
    """The columns that say how fast."""
    return {
        "ratio": f"{timing.ratio:.3f}",
        "first_quartile": f"{timing.low:.3f}",
        "third_quartile": f"{timing.high:.3f}",
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """A CSV file with the first row's keys for its header."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
