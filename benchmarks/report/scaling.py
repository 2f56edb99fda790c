"""The figure of growth: time of a whole step by batch size and by number of experts, with the dense floor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from matplotlib.axes import Axes

from benchmarks.contenders.contender import AUTO, DENSE, ORACLE, OURS, STACK, STACKED
from benchmarks.report.canvas import (
    CONTENDER_COLOURS,
    FEWEST_POINTS,
    GREY,
    Drawing,
    End,
    label_ends,
    label_values,
    new_panels,
    plain_numbers,
    record_columns,
)
from benchmarks.report.reading import LATER_PEER, PEER, Record, in_order
from benchmarks.report.wording import DEVICE_NAMES
from benchmarks.workloads import Workload

# Who is drawn: more lines would hide each other.
_DRAWN = (PEER, LATER_PEER, ORACLE, STACK, DENSE, STACKED, AUTO)
_WIDTH, _HEIGHT = 3.9, 2.9

Line = Sequence[Record]


def draw_scaling(records: Sequence[Record]) -> list[Drawing]:
    """The whole steps of one device; a column a kind of expert, by B above, by E below."""
    lines = {
        "B": _longest_lines(records, lambda workload: replace(workload, batch_size=0), lambda each: each.batch_size),
        "E": _longest_lines(records, lambda workload: replace(workload, num_experts=0), lambda each: each.num_experts),
    }
    kinds = [
        kind for kind in dict.fromkeys(r.workload.expert for r in records) if any(kind in of for of in lines.values())
    ]
    axes_drawn = [axis for axis, of in lines.items() if of]
    if not kinds:
        return []
    # A single kind has its panels side by side.
    columns = len(kinds) if len(kinds) > 1 else len(axes_drawn)
    height = len(kinds) * len(axes_drawn) // columns
    figure, panels = new_panels(_WIDTH * columns, _HEIGHT * height, height, columns)
    rows: list[dict[str, object]] = []
    spare = [axes for row in panels for axes in row]
    for axis, kind in itertools.product(axes_drawn, kinds):
        axes = spare.pop(0)
        if (line := lines[axis].get(kind)) is None:
            axes.set_axis_off()
        else:
            rows += _draw_line(axes, line, axis)
    device = DEVICE_NAMES.get(records[0].device, records[0].device)
    return [
        Drawing(
            f"scaling_{records[0].device}",
            f"How a whole step grows, {device}",
            "Median milliseconds, both axes logarithmic. Dashed grey is the dense floor: the same rows through one "
            "expert a level, nothing routed, nothing moved.",
            figure,
            rows,
        )
    ]


def _longest_lines(
    records: Sequence[Record], without: Callable[[Workload], Workload], value: Callable[[Workload], int]
) -> dict[str, Line]:
    """For each kind of expert the line with the most points, all else being equal; of equals the longest-running."""
    lines: dict[Workload, dict[int, Record]] = {}
    for record in records:
        lines.setdefault(without(record.workload), {})[value(record.workload)] = record
    best: dict[str, Line] = {}
    for key, by_value in lines.items():
        line = [by_value[each] for each in sorted(by_value)]
        if len(line) >= FEWEST_POINTS and _weight(line) > _weight(best.get(key.expert, [])):
            best[key.expert] = line
    return best


def _weight(line: Line) -> tuple[int, int]:
    if not line:
        return (0, 0)
    workload = line[-1].workload
    return (len(line), workload.batch_size * workload.num_experts)


def _draw_line(axes: Axes, line: Line, axis: str) -> list[dict[str, object]]:
    shared = line[0].workload
    fixed = f"E = {shared.num_experts}" if axis == "B" else f"B = {shared.batch_size:,}"
    rows: list[dict[str, object]] = []
    ends: dict[str, End] = {}
    for contender in in_order({name for record in line for name in record.contenders if name in _DRAWN}):
        timed = [record for record in line if contender in record.timings.seconds]
        at = [each.workload.batch_size if axis == "B" else each.workload.num_experts for each in timed]
        ms = [1e3 * record.timings.median(contender) for record in timed]
        colour = CONTENDER_COLOURS.get(contender, GREY)
        style = "--" if contender == DENSE else "-"
        heavy = contender in OURS
        axes.plot(at, ms, color=colour, linestyle=style, linewidth=2.2 if heavy else 1.3, marker="o", markersize=3.5)
        ends[contender] = End(ms[-1], colour)
        rows += [
            {"axis": axis, **record_columns(record), "contender": contender, "ms": f"{each:.4f}"}
            for record, each in zip(timed, ms, strict=True)
        ]
    plain_numbers(axes, "x")
    plain_numbers(axes, "y")
    label_values(axes, {each.workload.batch_size if axis == "B" else each.workload.num_experts for each in line})
    axes.set(
        xlabel="samples B" if axis == "B" else "experts E of the last level",
        ylabel="ms a step",
    )
    axes.set_title(f"{shared.expert}, H = {shared.hidden_size}, {fixed}", fontsize=10)
    label_ends(axes, ends)
    return rows
