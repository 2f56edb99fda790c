"""The figure of growth: time of a whole step by batch size and by number of experts, with the dense floor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from matplotlib.axes import Axes

from benchmarks.contenders.contender import AUTO, DENSE, LATER_PEER, ORACLE, OURS, PEER, STACK, STACKED
from benchmarks.report.canvas import (
    CONTENDER_COLOURS,
    FEWEST_POINTS,
    GREY,
    Drawing,
    End,
    draw_medians,
    label_ends,
    label_values,
    new_panels,
    plain_numbers,
    record_columns,
)
from benchmarks.report.reading import Record, in_order
from benchmarks.report.wording import DEVICE_NAMES
from benchmarks.workloads.workload import Workload

# Who is drawn: more lines would hide each other.
_DRAWN = (PEER, LATER_PEER, ORACLE, STACK, DENSE, STACKED, AUTO)
_WIDTH, _HEIGHT = 4.9, 3.2

Line = Sequence[Record]


def draw_scaling(records: Sequence[Record]) -> list[Drawing]:
    """The whole steps of one device; a row a kind of expert, by B on the left, by E on the right."""
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
    figure, panels = new_panels(_WIDTH * len(axes_drawn), _HEIGHT * len(kinds), len(kinds), len(axes_drawn))
    rows: list[dict[str, object]] = []
    for (kind, axis), axes in zip(itertools.product(kinds, axes_drawn), itertools.chain(*panels), strict=True):
        if (line := lines[axis].get(kind)) is None:
            axes.set_axis_off()
        else:
            rows += _draw_line(axes, line, axis)
    device = DEVICE_NAMES.get(records[0].device, records[0].device)
    return [
        Drawing(
            f"scaling_{records[0].device}",
            f"How a whole step grows, {device}",
            "Lines are median milliseconds, and the band around each is the middle half of its rounds. Both axes are "
            "logarithmic. Dashed grey is the dense floor.",
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
        colour = CONTENDER_COLOURS.get(contender, GREY)
        style = "--" if contender == DENSE else "-"
        heavy = contender in OURS
        timings = [record.timings for record in timed]
        numbers = draw_medians(axes, at, timings, contender, colour, linestyle=style, linewidth=2.2 if heavy else 1.3)
        ends[contender] = End(1e3 * timings[-1].median(contender), colour)
        rows += [
            {"axis": axis, **record_columns(record), "contender": contender, **each}
            for record, each in zip(timed, numbers, strict=True)
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
