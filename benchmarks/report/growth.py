"""The figures of growth: a whole step by batch size and by experts, with the dense floor; and on each device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from matplotlib.axes import Axes

from benchmarks.contenders.contender import AUTO, DENSE, LATER_PEER, ORACLE, OURS, PEER, STACK, STACKED
from benchmarks.harness.canvas import (
    FEWEST_POINTS,
    SERIES_COLOURS,
    Drawing,
    End,
    draw_medians,
    label_ends,
    label_values,
    new_panels,
    plain_numbers,
)
from benchmarks.harness.wording import DEVICE_NAMES
from benchmarks.report.ratios import record_columns
from benchmarks.report.reading import Suite
from benchmarks.report.roster import colour_of, in_order
from benchmarks.suite.record import Record
from benchmarks.suite.stages import WHOLE_STEP
from benchmarks.workloads.workload import Workload

# Who is drawn: more lines would hide each other.
_DRAWN = (PEER, LATER_PEER, ORACLE, STACK, DENSE, STACKED, AUTO)
_AXES = {"B": ("batch_size", "samples B"), "E": ("num_experts", "experts E of the last level")}
_BAND = "Lines are median milliseconds{of}, and the band around each is the middle half of its rounds. Both axes are "
_MOST_DEVICE_PANELS, _DEVICE_COLUMNS = 8, 3


class _Line(NamedTuple):
    """One contender of some records, under a label."""

    label: str
    colour: str
    contender: str
    records: Sequence[Record]
    dashes: str = "-"
    width: float = 1.5


def draw_scaling(records: Sequence[Record]) -> Drawing | None:
    """The whole steps of one device; a row a kind of expert, by B on the left, by E on the right."""
    lines = {axis: _longest_lines(records, field) for axis, (field, _) in _AXES.items()}
    kinds = [
        kind for kind in dict.fromkeys(r.workload.expert for r in records) if any(kind in of for of in lines.values())
    ]
    drawn = [axis for axis, of in lines.items() if of]
    if not kinds:
        return None
    figure, panels = new_panels(4.9 * len(drawn), 3.2 * len(kinds), len(kinds), len(drawn))
    rows: list[dict[str, object]] = []
    for (kind, axis), axes in zip(itertools.product(kinds, drawn), itertools.chain(*panels), strict=True):
        if (line := lines[axis].get(kind)) is None:
            axes.set_axis_off()
            continue
        contenders = in_order({name for record in line for name in record.timings.seconds if name in _DRAWN})
        timed = [(name, [each for each in line if name in each.timings.seconds]) for name in contenders]
        found = [
            _Line(name, colour_of(name), name, some, "--" if name == DENSE else "-", 2.2 if name in OURS else 1.3)
            for name, some in timed
        ]
        rows += [{"axis": axis, **row} for row in _draw_lines(axes, found, axis)]
        shared = line[0].workload
        fixed = f"E = {shared.num_experts}" if axis == "B" else f"B = {shared.batch_size:,}"
        axes.set_title(f"{kind}, H = {shared.hidden_size}, {fixed}", fontsize=10)
    device = records[0].device
    caption = f"{_BAND.format(of='')}logarithmic. Dashed grey is the dense floor."
    return Drawing(f"scaling_{device}", f"How a whole step grows, {DEVICE_NAMES[device]}", caption, figure, rows)


def draw_devices(suite: Suite) -> Drawing | None:
    """A panel for each kind and number of experts that several devices ran at several sizes; else nothing."""
    lines: dict[Workload, dict[str, list[Record]]] = {}
    for record in suite.of(WHOLE_STEP):
        if record.contender in record.timings.seconds:
            key = replace(record.workload, batch_size=0)
            lines.setdefault(key, {}).setdefault(record.device, []).append(record)
    shared = {key: of for key, of in lines.items() if len(of) > 1 and min(map(len, of.values())) >= FEWEST_POINTS}
    # The longest tell most, but are drawn in the order in which they ran.
    longest = sorted(shared, key=lambda key: -min(map(len, shared[key].values())))[:_MOST_DEVICE_PANELS]
    keys = [key for key in shared if key in longest]
    if not keys:
        return None
    columns = min(_DEVICE_COLUMNS, len(keys))
    height = -(-len(keys) // columns)
    figure, panels = new_panels(3.3 * columns, 2.8 * height, height, columns)
    colours = dict(zip(suite.devices, SERIES_COLOURS, strict=False))
    rows: list[dict[str, object]] = []
    for axes, key in itertools.zip_longest(itertools.chain(*panels), keys):
        if key is None:
            axes.set_axis_off()
            continue
        found = []
        for device, records in shared[key].items():
            line = sorted(records, key=lambda record: record.workload.batch_size)
            found.append(_Line(DEVICE_NAMES[device], colours[device], line[0].contender, line))
        rows += _draw_lines(axes, found, "B")
        axes.set_title(f"{key.expert}, H = {key.hidden_size}, E = {key.num_experts}", fontsize=10)
    caption = f"{_BAND.format(of=' of celmoe auto')}logarithmic. Devices are timed one after another."
    return Drawing("devices", "The same whole step on each device", caption, figure, rows)


def _longest_lines(records: Sequence[Record], field: str) -> dict[str, Sequence[Record]]:
    """For each kind of expert the line with the most points, all else being equal; of equals the longest-running."""
    lines: dict[Workload, dict[int, Record]] = {}
    for record in records:
        key = replace(record.workload, **{field: 0})  # type: ignore[arg-type]  # both fields are whole numbers
        lines.setdefault(key, {})[getattr(record.workload, field)] = record
    best: dict[str, Sequence[Record]] = {}
    for key, by_value in lines.items():
        line = [by_value[each] for each in sorted(by_value)]
        if len(line) >= FEWEST_POINTS and _weight(line) > _weight(best.get(key.expert, [])):
            best[key.expert] = line
    return best


def _weight(line: Sequence[Record]) -> tuple[int, int]:
    if not line:
        return (0, 0)
    return (len(line), line[-1].workload.batch_size * line[-1].workload.num_experts)


def _draw_lines(axes: Axes, lines: Sequence[_Line], axis: str) -> list[dict[str, object]]:
    """Milliseconds by B or E, with each line's label at its end; returns the numbers."""
    field, words = _AXES[axis]
    rows: list[dict[str, object]] = []
    ends: dict[str, End] = {}
    for line in lines:
        at = [getattr(each.workload, field) for each in line.records]
        timings = [each.timings for each in line.records]
        style = {"linestyle": line.dashes, "linewidth": line.width}
        numbers = draw_medians(axes, at, timings, line.contender, line.colour, **style)
        ends[line.label] = End(1e3 * timings[-1].median(line.contender), line.colour)
        rows += [
            {**record_columns(record), "contender": line.contender, **each}
            for record, each in zip(line.records, numbers, strict=True)
        ]
    plain_numbers(axes, "x")
    plain_numbers(axes, "y")
    label_values(axes, {getattr(each.workload, field) for line in lines for each in line.records})
    axes.set(xlabel=words, ylabel="ms a step")
    label_ends(axes, ends)
    return rows
