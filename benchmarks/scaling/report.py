"""What a run of the command leaves: tables, and a drawing of the numbers in the file beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.table import Table

from benchmarks.hierarchies import UNIFORM
from benchmarks.report.canvas import SERIES_COLOURS, Drawing, new_panels
from benchmarks.scaling.collectives import KINDS, NOTHING, QUANTITIES, Traffic, total
from benchmarks.scaling.counting import SocketBytes
from benchmarks.scaling.growth import (
    BASE,
    BASE_RANKS,
    EXPERTS_IN_NODES,
    LEVELS_IN_NODES,
    ROUTES,
    Point,
)
from benchmarks.scaling.layouts import DDP, EXPERTS, LEVELS, REDUCED
from benchmarks.scaling.runs import Case, Counted, differences, modelled, socket_differences

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
    """A panel for each axis, by routes: what the busiest rank sends."""
    figure, panels = new_panels(11, 6.4, len(ROUTES), len(_AXES), share_x=False, share_y=True)
    for row, routes in zip(panels, ROUTES, strict=True):
        for axes, axis in zip(row, _AXES, strict=True):
            _draw_panel(axes, [each for each in points if (each.axis, each.workload.routes) == (axis, routes)])
            axes.set_title("even routes" if routes == UNIFORM else "Zipf routes")
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


@dataclass(frozen=True)
class Compared:
    """A case, counted on all ranks.

    Attributes:
        case: What was trained.
        counted: Of each rank.
    """

    case: Case
    counted: Sequence[Counted]

    @property
    def differences(self) -> list[str]:
        """Where the model or TCP disagrees with what was counted, by rank."""
        return [
            f"{self.case}, rank {rank}: {text}"
            for rank, each in enumerate(self.counted)
            for text in (*differences(each.traffic, self.modelled(rank)), *socket_differences(each))
        ]

    @property
    def furthest(self) -> float:
        """The largest relative difference of counted payload from the model's, over ranks, kinds and directions."""
        return max(abs(got / wanted - 1) for _, _, got, wanted in self._pairs())

    def modelled(self, rank: int) -> dict[str, Traffic]:
        """What the model says of a rank."""
        return modelled(self.case, len(self.counted), rank)

    def rows(self) -> Iterator[dict[str, object]]:
        """One a rank, kind of collective and quantity."""
        for rank, each in enumerate(self.counted):
            for kind in KINDS:
                got, wanted = each.traffic.get(kind, NOTHING), self.modelled(rank).get(kind, NOTHING)
                for name in QUANTITIES if got != wanted else ():
                    yield {
                        **self._columns(rank),
                        "collective": kind,
                        "quantity": name,
                        "counted": round(getattr(got, name)),
                        "modelled": round(getattr(wanted, name)),
                    }
            for name in SocketBytes._fields:
                yield {
                    **self._columns(rank),
                    "collective": "TCP",
                    "quantity": name,
                    "counted": getattr(each.sockets, name),
                    "modelled": "",
                }

    def _columns(self, rank: int) -> dict[str, object]:
        workload = self.case.workload
        return {
            "ranks": len(self.counted),
            "rank": rank,
            "layout": self.case.layout,
            "copies": self.case.num_copies,
            "expert": workload.expert,
            "H": workload.hidden_size,
            "E": workload.num_experts,
            "B": workload.batch_size,
            "routes": workload.routes,
            "hierarchy": workload.hierarchy,
        }

    def _pairs(self) -> Iterator[tuple[str, str, float, float]]:
        for rank, each in enumerate(self.counted):
            for kind, wanted in self.modelled(rank).items():
                for name in QUANTITIES:
                    yield kind, name, getattr(each.traffic.get(kind, NOTHING), name), getattr(wanted, name)


def compared_table(compared: Sequence[Compared]) -> Table:
    """What the first rank sent, by the model, by its collectives, and by TCP."""
    table = Table(title="bytes that the first rank sends in a step, and how far any rank's payload is from the model")
    for name in ("ranks", "layout", "workload", "modelled", "counted", "by TCP", "furthest"):
        table.add_column(name, justify="left" if name in ("layout", "workload") else "right")
    for each in compared:
        copies = f", {each.case.num_copies} copies" if each.case.num_copies > 1 else ""
        table.add_row(
            str(len(each.counted)),
            f"{each.case.layout}{copies}",
            str(each.case.workload),
            f"{total(each.modelled(0).values()).sent:,.0f}",
            f"{total(each.counted[0].traffic.values()).sent:,.0f}",
            f"{each.counted[0].sockets.sent:,}",
            f"{100 * each.furthest:.2f} %",
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
