"""The figure of peak memory: a row a workload, a dot a contender."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.contenders.contender import AUTO
from benchmarks.report.canvas import (
    CONTENDER_COLOURS,
    GREY,
    Drawing,
    label_rows,
    new_panels,
    plain_numbers,
    record_columns,
)
from benchmarks.report.reading import Record, in_order
from benchmarks.report.wording import DEVICE_NAMES, workload_words

_ROW_HEIGHT = 0.34


def draw_memory(records: Sequence[Record]) -> list[Drawing]:
    """The memory records of one device; empty if there are none."""
    measured = [record for record in records if record.bytes]
    if not measured:
        return []
    figure, ((axes,),) = new_panels(9, 1.5 + _ROW_HEIGHT * len(measured), 1, 1)
    contenders = in_order({name for record in measured for name in record.bytes})
    for row, record in enumerate(measured):
        sizes = [each / 2**20 for each in record.bytes.values()]
        axes.plot([min(sizes), max(sizes)], [row, row], color="#dddddd", linewidth=2, zorder=1)
    for contender in contenders:
        rows = [row for row, record in enumerate(measured) if contender in record.bytes]
        axes.scatter(
            [measured[row].bytes[contender] / 2**20 for row in rows],
            rows,
            s=60 if contender == AUTO else 30,
            color=CONTENDER_COLOURS.get(contender, GREY),
            label=contender,
            zorder=3,
        )
    label_rows(axes, [workload_words(record.workload) for record in measured])
    axes.set_xlabel("peak memory, MiB")
    plain_numbers(axes, "x")
    figure.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    device = DEVICE_NAMES.get(measured[0].device, measured[0].device)
    return [
        Drawing(
            f"memory_{measured[0].device}",
            f"Peak memory, {device}",
            "The most that a forward and a backward pass hold; logarithmic. Further to the left is better.",
            figure,
            [
                {**record_columns(record), "contender": contender, "bytes": size}
                for record in measured
                for contender, size in record.bytes.items()
            ],
        )
    ]
