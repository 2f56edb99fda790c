"""The figure of speed-ups: a row a workload, a panel a contender."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.contenders.contender import FLOORS
from benchmarks.harness.tables import ratio_columns
from benchmarks.report.canvas import (
    BLUE,
    GREY,
    VERMILION,
    Drawing,
    label_rows,
    new_panels,
    plain_numbers,
    record_columns,
)
from benchmarks.report.ratios import Ratio, ratios
from benchmarks.report.reading import Record, in_order
from benchmarks.report.wording import DEVICE_NAMES, STAGE_NAMES, times_words, workload_words

_VERDICT_COLOURS = {"faster": BLUE, "slower": VERMILION, "even": GREY}
_ROW_HEIGHT, _PANEL_WIDTH, _LABEL_WIDTH = 0.27, 1.45, 2.2
_ROOM = 1.6
# More panels beside each other are wider than the page.
_COLUMNS = 6


def ratio_row(found: Ratio) -> dict[str, object]:
    """A ratio as the row of a CSV file."""
    timings = found.record.timings
    return {
        **record_columns(found.record),
        "contender": found.slower,
        "ms": f"{1e3 * timings.median(found.slower):.4f}",
        "celmoe_ms": f"{1e3 * timings.median(found.faster):.4f}",
        **ratio_columns(found),
        "rounds": found.rounds,
    }


def draw_speedups(records: Sequence[Record]) -> list[Drawing]:
    """Draw the records of one stage and one device; nothing if no other contender was timed."""
    found = ratios(records)
    if not found:
        return []
    record = found[0].record
    contenders = in_order({each.slower for each in found})
    rows = list(dict.fromkeys(each.record.name for each in found))
    columns = min(_COLUMNS, len(contenders))
    lines = -(-len(contenders) // columns)
    width, height = _LABEL_WIDTH + _PANEL_WIDTH * columns, 0.5 + (0.6 + _ROW_HEIGHT * len(rows)) * lines
    figure, panels = new_panels(width, height, lines, columns, share_x=True, share_y=True)
    spare = [axes for line in panels for axes in line]
    for contender in contenders:
        axes = spare.pop(0)
        axes.axvline(1.0, color="#444444", linewidth=0.9)
        for each in (each for each in found if each.slower == contender):
            row = rows.index(each.record.name)
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
    for axes in spare:
        axes.set_axis_off()
    panels[0][0].set_xlim(min(0.8, *(each.low for each in found)) / 1.15, max(e.high for e in found) * _ROOM)
    words = {each.record.name: workload_words(each.workload) for each in found}
    label_rows(panels[0][0], [words[name] for name in rows])
    figure.supxlabel(
        f"times as fast as this contender is {record.contender}, median and quartiles over the rounds", fontsize=9
    )
    stage, device = STAGE_NAMES[record.stage], DEVICE_NAMES.get(record.device, record.device)
    return [
        Drawing(
            f"speedup_{record.stage}_{record.device}",
            f"Speed-up by workload: {stage}, {device}",
            f"How many times as fast as each contender {record.contender} is; logarithmic. Blue: faster, and the "
            "middle half of the rounds says so too; vermilion: slower; grey: no difference to speak of.",
            figure,
            [ratio_row(each) for each in found],
        )
    ]
