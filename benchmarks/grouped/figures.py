"""The drawings of a run, of the numbers in the CSV files beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.grid.report import COLOURS, DOTS_PER_INCH, draw_panels, draw_ratios
from benchmarks.grouped.contest import Compared
from benchmarks.grouped.marks import Mark

_VERDICT_COLOURS = {"missed": "#b2182b", "reached": COLOURS[0], "aim": "#1b7837"}
_ROUTE_STYLES = {"uniform": "-", "zipf": "--"}
_ROW_HEIGHT = 0.3


def draw_grid(path: Path, compared: Sequence[Compared]) -> None:
    """Ratios to the peer of one measure; dashed lines are Zipf routes."""

    def draw_line(axes: Axes, line: Sequence[Compared], colour: str) -> None:
        for routes, style in _ROUTE_STYLES.items():
            if drawn := [each for each in line if each.workload.routes == routes]:
                draw_ratios(axes, drawn, colour, style)

    draw_panels(path, compared, draw_line, " (dashed: Zipf routes)")


def draw_marks(path: Path, marks: Sequence[Mark]) -> None:
    """Draw every figure as a dot, with a bar from the value it must reach to the value aimed at."""
    figure, axes = _new_rows([f"{mark.line}\n{mark.measure}" for mark in marks], 1.6 * _ROW_HEIGHT)
    for row, mark in enumerate(marks):
        axes.plot([mark.goal.must, mark.goal.aim], [row, row], color="#cccccc", linewidth=7, solid_capstyle="butt")
        axes.plot(mark.goal.must, row, color="#444444", marker="|", markersize=13)
        axes.plot(mark.measured, row, color=_VERDICT_COLOURS[mark.verdict], marker="o", markersize=6)
        axes.annotate(f"{mark.measured:.2f}", (mark.measured, row), (0, 6), textcoords="offset points", ha="center")
    axes.set(xscale="log", title="measured (dots), what must be reached (ticks), up to the aim (bars)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:g}"[-1] in "25" else ""))
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _new_rows(labels: Sequence[str], row_height: float) -> tuple[Figure, Axes]:
    """Make axes with one labelled row for each label, the first on top."""
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(9, row_height * len(labels) + 1.2), layout="constrained")
        axes = figure.subplots()
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
