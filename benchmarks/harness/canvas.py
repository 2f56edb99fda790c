"""The parts that all drawings share: colours, axes, labels at the ends of lines, and the files of their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks.harness.interleaved import Timings
from benchmarks.harness.tables import write_rows

DOTS_PER_INCH = 130
# Okabe and Ito's palette, which stays apart for colour-blind readers, and two of Paul Tol's.
BLUE, VERMILION, GREY = "#0072b2", "#d55e00", "#7a7a7a"
SERIES_COLOURS = (BLUE, "#e69f00", "#009e73", "#cc79a7", "#56b4e9", VERMILION, "#f0e442", GREY)
# Fewer make no line.
FEWEST_POINTS = 2
# The least distance between the ends of lines, as a share of the axis.
_LEAST_GAP = 0.055


@dataclass(frozen=True)
class Drawing:
    """One figure with its numbers, one row a mark; the name is its files' without an ending."""

    name: str
    title: str
    caption: str
    figure: Figure
    rows: Sequence[Mapping[str, object]]

    def save(self, folder: Path) -> Path:
        """Write PNG and CSV; returns the PNG's path."""
        path = folder / f"{self.name}.png"
        self.figure.savefig(path, dpi=DOTS_PER_INCH)
        write_rows(folder / f"{self.name}.csv", self.rows)
        return path


def new_panels(
    width: float, height: float, rows: int, columns: int, *, share_x: bool = False, share_y: bool = False
) -> tuple[Figure, list[list[Axes]]]:
    """A figure, in inches, and its axes row by row."""
    # Figure itself, without pyplot: no window system is asked, and nothing has to be closed.
    with mpl.rc_context({"font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharex=share_x, sharey=share_y)
    for axes in panels.flat:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, [list(row) for row in panels]


def plain_numbers(axes: Axes, which: str) -> None:
    """A logarithmic axis (``"x"`` or ``"y"``) with its numbers written out."""
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    axes.set(**{f"{which}scale": "log"})
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    low, high = axis.get_view_interval()
    if high / low < 60:
        axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))
    else:
        axis.set_minor_formatter(NullFormatter())


def label_values(axes: Axes, values: set[int]) -> None:
    """Put numbers below a logarithmic axis at the measured values, and nowhere else."""
    axes.set_xticks(sorted(values), [f"{value:,}" for value in sorted(values)])
    axes.xaxis.set_minor_locator(NullLocator())


def label_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Label one row for each label, the first on top."""
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


@dataclass(frozen=True)
class End:
    """The height at which a line ends, and its colour."""

    y: float
    colour: str


def label_ends(axes: Axes, ends: Mapping[str, End]) -> None:
    """Put names at the right edge of a logarithmic panel, as high as their lines end, moved apart if they meet."""
    low, high = axes.get_ylim()
    names = sorted(ends, key=lambda name: ends[name].y)
    heights = _apart([ends[name].y for name in names], (high / low) ** _LEAST_GAP, high)
    for name, height in zip(names, heights, strict=True):
        axes.annotate(
            name,
            xy=(1, height),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            color=ends[name].colour,
            fontsize=8,
            va="center",
            annotation_clip=False,
        )


def _apart(heights: Sequence[float], gap: float, highest: float) -> list[float]:
    """Ascending heights with at least this ratio between neighbours: upwards, and down again from the top."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] * gap) if found else height)
    ceiling = highest
    for place in reversed(range(len(found))):
        found[place] = min(found[place], ceiling)
        ceiling = found[place] / gap
    return found


def draw_medians(
    axes: Axes, at: Sequence[int], timings: Sequence[Timings], name: str, colour: str, **style: Any
) -> list[dict[str, str]]:
    """A contender's median milliseconds as a line, the middle half of its rounds as a band; returns the numbers."""
    found = [[1e3 * seconds for seconds in (each.median(name), *each.spread(name))] for each in timings]
    medians, lows, highs = ([each[place] for each in found] for place in range(3))
    axes.fill_between(at, lows, highs, color=colour, alpha=0.18, linewidth=0)
    axes.plot(at, medians, **{"color": colour, "marker": "o", "markersize": 3.5, **style})
    names = ("ms", "first_quartile_ms", "third_quartile_ms")
    return [{name: f"{ms:.4f}" for name, ms in zip(names, each, strict=True)} for each in found]
