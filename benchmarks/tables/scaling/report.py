"""The model's figures as a run grows, as a drawing and a table."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.table import Table

from benchmarks.harness.canvas import SERIES_COLOURS, Drawing, new_panels
from benchmarks.tables.scaling.growth import (
    BASE,
    BASE_RANKS,
    EXPERTS_IN_NODES,
    LEVELS_IN_NODES,
    ROUTES,
    Point,
)
from benchmarks.tables.scaling.layouts import DDP, EXPERTS, LEVELS, REDUCED
from benchmarks.workloads.hierarchies import UNIFORM

_DRAWN = {
    DDP: (SERIES_COLOURS[0], "-"),
    REDUCED: (SERIES_COLOURS[1], "-"),
    LEVELS: (SERIES_COLOURS[2], "-"),
    LEVELS_IN_NODES: (SERIES_COLOURS[2], "--"),
    EXPERTS: (SERIES_COLOURS[3], "-"),
    EXPERTS_IN_NODES: (SERIES_COLOURS[3], "--"),
}
_AXES = {
    "N": f"ranks N (E = {BASE.num_experts}, B = {BASE.batch_size} each)",
    "E": f"experts E (N = {BASE_RANKS}, B = {BASE.batch_size})",
    "B": f"samples of a rank B (N = {BASE_RANKS}, E = {BASE.num_experts})",
}
_UNITS = ("B", "kB", "MB", "GB", "TB")


def in_units(nbytes: float) -> str:
    """Bytes in decimal units, three figures."""
    place = 0
    while nbytes >= 999.5 and place < len(_UNITS) - 1:
        nbytes, place = nbytes / 1000, place + 1
    return f"{nbytes:.3g} {_UNITS[place]}"


def draw_growth(points: Sequence[Point]) -> Drawing:
    """Draw a panel for each axis, by routes: the bytes that the busiest rank sends."""
    figure, panels = new_panels(11, 6.4, len(ROUTES), len(_AXES), share_y=True)
    for row, routes in zip(panels, ROUTES, strict=True):
        for axes, axis in zip(row, _AXES, strict=True):
            _draw_panel(axes, [each for each in points if (each.axis, each.workload.routes) == (axis, routes)])
            axes.set_title("uniform routes" if routes == UNIFORM else "Zipf routes")
    for axes, label in zip(panels[-1], _AXES.values(), strict=True):
        axes.set_xlabel(label)
    figure.supylabel("bytes that the busiest rank sends in a step, by the model", fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    rows = [
        {
            "axis": each.axis,
            "layout": each.layout,
            "expert": each.workload.expert,
            "H": each.workload.hidden_size,
            "N": each.num_ranks,
            "E": each.workload.num_experts,
            "B": each.workload.batch_size,
            "routes": each.workload.routes,
            "sent_busiest": round(each.sent),
            "sent_mean": round(each.mean_sent),
        }
        for each in points
    ]
    caption = f"MLP experts of width {BASE.hidden_size}, float32; a tree of one, √E and E experts."
    return Drawing("scaling_bytes", "Bytes by step and rank", caption, figure, rows)


def growth_table(points: Sequence[Point]) -> Table:
    """The ends of the lines that are drawn."""
    table = Table(title="bytes that the busiest rank sends in a step, by the model")
    for name in ("N", "E", "B", "routes", *_DRAWN):
        table.add_column(name, justify="right")
    settings = dict.fromkeys((each.num_ranks, each.workload) for each in points)
    ends = [
        (num_ranks, workload)
        for num_ranks, workload in settings
        if any(_is_end(each, points) for each in points if (each.num_ranks, each.workload) == (num_ranks, workload))
    ]
    for num_ranks, workload in ends:
        sent = {each.layout: each.sent for each in points if (each.num_ranks, each.workload) == (num_ranks, workload)}
        table.add_row(
            *(f"{each:,}" for each in (num_ranks, workload.num_experts, workload.batch_size)),
            workload.routes,
            *(in_units(sent[layout]) if layout in sent else "" for layout in _DRAWN),
        )
    return table


def _draw_panel(axes: Axes, points: Sequence[Point]) -> None:
    for layout, (colour, style) in _DRAWN.items():
        line = [each for each in points if each.layout == layout]
        axes.plot([each.value for each in line], [each.sent for each in line], style, color=colour, label=layout)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(LogLocator(base=4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.tick_params(axis="x", labelsize=8, rotation=30)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: in_units(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _is_end(point: Point, points: Sequence[Point]) -> bool:
    line = [each.value for each in points if (each.axis, each.workload.routes) == (point.axis, point.workload.routes)]
    return point.value in (min(line), max(line))
