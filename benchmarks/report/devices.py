"""The figure of devices: the same step on each of them, by batch size."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.report.canvas import (
    FEWEST_POINTS,
    SERIES_COLOURS,
    Drawing,
    End,
    draw_medians,
    label_ends,
    label_values,
    new_panels,
    plain_numbers,
    record_columns,
)
from benchmarks.report.reading import Record, Suite
from benchmarks.report.wording import DEVICE_NAMES
from benchmarks.suite.stages import WHOLE_STEP
from benchmarks.workloads.workload import Workload

_MOST_PANELS = 8
_COLUMNS = 3


def draw_devices(suite: Suite) -> list[Drawing]:
    """A panel for each kind and number of experts that several devices ran at several sizes; else nothing."""
    lines: dict[Workload, dict[str, list[Record]]] = {}
    for record in suite.of(WHOLE_STEP):
        if record.contender in record.timings.seconds:
            key = replace(record.workload, batch_size=0)
            lines.setdefault(key, {}).setdefault(record.device, []).append(record)
    shared = {key: of for key, of in lines.items() if len(of) > 1 and min(map(len, of.values())) >= FEWEST_POINTS}
    # The longest tell most, but are drawn in the order in which they ran.
    longest = sorted(shared, key=lambda key: -min(map(len, shared[key].values())))[:_MOST_PANELS]
    keys = [key for key in shared if key in longest]
    if not keys:
        return []
    columns = min(_COLUMNS, len(keys))
    height = -(-len(keys) // columns)
    figure, panels = new_panels(3.3 * columns, 2.8 * height, height, columns)
    colours = dict(zip(suite.devices, SERIES_COLOURS, strict=False))
    rows: list[dict[str, object]] = []
    spare = [axes for row in panels for axes in row]
    for key in keys:
        axes = spare.pop(0)
        ends: dict[str, End] = {}
        for device, records in shared[key].items():
            line = sorted(records, key=lambda record: record.workload.batch_size)
            sizes = [record.workload.batch_size for record in line]
            ours = line[0].contender
            numbers = draw_medians(axes, sizes, [record.timings for record in line], ours, colours[device])
            ends[DEVICE_NAMES.get(device, device)] = End(1e3 * line[-1].timings.median(ours), colours[device])
            rows += [
                {**record_columns(record), "contender": ours, **each}
                for record, each in zip(line, numbers, strict=True)
            ]
        plain_numbers(axes, "x")
        plain_numbers(axes, "y")
        label_values(axes, {record.workload.batch_size for of in shared[key].values() for record in of})
        axes.set(xlabel="samples B", ylabel="ms a step")
        axes.set_title(f"{key.expert}, H = {key.hidden_size}, E = {key.num_experts}", fontsize=10)
        label_ends(axes, ends)
    for axes in spare:
        axes.set_axis_off()
    return [
        Drawing(
            "devices",
            "The same whole step on each device",
            "Lines are median milliseconds of celmoe auto, and the band around each is the middle half of its rounds. "
            "Both axes are logarithmic. Devices are timed one after another.",
            figure,
            rows,
        )
    ]
