"""The figures with a row a workload: speed-ups, a step's time by part, peak memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from benchmarks.contenders.contender import AUTO, FLOORS
from benchmarks.harness.canvas import (
    BLUE,
    GREY,
    SERIES_COLOURS,
    VERMILION,
    Drawing,
    label_rows,
    new_panels,
    plain_numbers,
)
from benchmarks.harness.wording import DEVICE_NAMES, ms_words, times_words, workload_words
from benchmarks.report.ratios import ratios, record_columns
from benchmarks.report.roster import STAGE_NAMES, colour_of, in_order
from benchmarks.suite.record import Record

_VERDICT_COLOURS = {"faster": BLUE, "slower": VERMILION, "even": GREY}
# More panels beside each other are wider than the page.
_MOST_COLUMNS = 6
# Narrower parts have no room for a number.
_LEAST_LABELLED = 7.0
_DARK = (SERIES_COLOURS[0], SERIES_COLOURS[2], SERIES_COLOURS[5], SERIES_COLOURS[7])


def draw_speedups(records: Sequence[Record]) -> Drawing | None:
    """Draw the records of one stage and one device, a panel a contender; nothing if no other one was timed."""
    found = ratios(records)
    if not found:
        return None
    record = found[0].record
    contenders = in_order(each.slower for each in found)
    rows = list(dict.fromkeys(each.workload for each in found))
    columns = min(_MOST_COLUMNS, len(contenders))
    lines = -(-len(contenders) // columns)
    size = 2.2 + 1.45 * columns, 0.5 + (0.6 + 0.27 * len(rows)) * lines
    figure, panels = new_panels(*size, lines, columns, share_x=True, share_y=True)
    for axes, contender in itertools.zip_longest(itertools.chain(*panels), contenders):
        if contender is None:
            axes.set_axis_off()
            continue
        axes.axvline(1.0, color="#444444", linewidth=0.9)
        for each in (each for each in found if each.slower == contender):
            row = rows.index(each.workload)
            # The floor is not there to be beaten.
            colour = GREY if contender in FLOORS else _VERDICT_COLOURS[each.verdict]
            axes.plot([each.low, each.high], [row, row], color=colour, linewidth=4, alpha=0.35, solid_capstyle="butt")
            axes.plot(each.ratio, row, color=colour, marker="o", markersize=4.5)
            # Beyond the quartiles, and never on the line of no difference.
            axes.annotate(
                times_words(each.ratio),
                (max(each.high, each.ratio), row),
                (5, 0),
                textcoords="offset points",
                fontsize=7.5,
                va="center",
                color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
            )
        axes.set_title(contender, fontsize=9)
        plain_numbers(axes, "x")
        axes.tick_params(axis="x", labelbottom=True)
        axes.tick_params(axis="y", length=0, labelsize=8)
    panels[0][0].set_xlim(min(0.8, *(each.low for each in found)) / 1.15, max(each.high for each in found) * 1.6)
    label_rows(panels[0][0], [workload_words(each) for each in rows])
    figure.supxlabel(
        f"times as fast as this contender is {record.contender}, median and quartiles over the rounds", fontsize=9
    )
    return Drawing(
        f"speedup_{record.stage}_{record.device}",
        f"Speed-up by workload: {STAGE_NAMES[record.stage]}, {DEVICE_NAMES[record.device]}",
        f"How many times as fast as each contender {record.contender} is; logarithmic. Blue: faster, and the "
        "middle half of the rounds says so too; vermilion: slower; grey: no difference to speak of.",
        figure,
        [each.columns() for each in found],
    )


def draw_stages(records: Sequence[Record]) -> Drawing | None:
    """Draw the whole steps of one device whose parts were timed; nothing if there are none."""
    timed = [record for record in records if sum(record.parts_ms.values()) > 0]
    if not timed:
        return None
    parts = list(dict.fromkeys(part for record in timed for part in record.parts_ms))
    figure, ((axes,),) = new_panels(10, 1.3 + 0.32 * len(timed), 1, 1)
    for row, record in enumerate(timed):
        total, end = sum(record.parts_ms.values()), 0.0
        for place, part in enumerate(parts):
            ms = record.parts_ms.get(part, 0.0)
            share = 100 * ms / total
            colour = SERIES_COLOURS[place % len(SERIES_COLOURS)]
            label = part if row == 0 else None
            axes.barh(row, share, left=end, height=0.72, color=colour, edgecolor="white", linewidth=0.6, label=label)
            if share >= _LEAST_LABELLED:
                ink = "white" if colour in _DARK else "black"
                axes.text(end + share / 2, row, ms_words(ms), fontsize=7, color=ink, ha="center", va="center")
            end += share
        axes.text(101, row, ms_words(total), fontsize=8, va="center", clip_on=False)
    label_rows(axes, [workload_words(record.workload) for record in timed])
    axes.set(xlim=(0, 100), xlabel="percent of the step; in the bars and behind them: time")
    axes.grid(visible=False)
    figure.legend(loc="outside upper center", ncols=min(len(parts), 8), frameon=False, fontsize=8)
    device = timed[0].device
    caption = (
        f"{timed[0].contender}. Each part is timed on its own, and the experts are the rest of the forward pass; "
        "behind each bar stands how long all parts take."
    )
    rows = [
        {**record_columns(record), "part": part, "ms": f"{ms:.4f}"}
        for record in timed
        for part, ms in record.parts_ms.items()
    ]
    return Drawing(f"stages_{device}", f"Where a whole step's time goes, {DEVICE_NAMES[device]}", caption, figure, rows)


def draw_memory(records: Sequence[Record]) -> Drawing | None:
    """The memory records of one device, a dot a contender; nothing if there are none."""
    measured = [record for record in records if record.bytes]
    if not measured:
        return None
    figure, ((axes,),) = new_panels(9, 1.5 + 0.34 * len(measured), 1, 1)
    for row, record in enumerate(measured):
        sizes = [each / 2**20 for each in record.bytes.values()]
        axes.plot([min(sizes), max(sizes)], [row, row], color="#dddddd", linewidth=2, zorder=1)
    for contender in in_order(name for record in measured for name in record.bytes):
        dots = {row: each.bytes[contender] / 2**20 for row, each in enumerate(measured) if contender in each.bytes}
        size = 60 if contender == AUTO else 30
        axes.scatter([*dots.values()], [*dots], s=size, color=colour_of(contender), label=contender, zorder=3)
    label_rows(axes, [workload_words(record.workload) for record in measured])
    axes.set_xlabel("peak memory, MiB")
    plain_numbers(axes, "x")
    figure.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    device = measured[0].device
    caption = "The most that a forward and a backward pass hold; logarithmic. Further to the left is better."
    rows = [
        {**record_columns(record), "contender": contender, "bytes": size}
        for record in measured
        for contender, size in record.bytes.items()
    ]
    return Drawing(f"memory_{device}", f"Peak memory, {DEVICE_NAMES[device]}", caption, figure, rows)
