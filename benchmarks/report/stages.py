"""The figure of a step's time by part: a bar a workload, cut by its parts."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.canvas import SERIES_COLOURS, Drawing, label_rows, new_panels, record_columns
from benchmarks.report.reading import Record
from benchmarks.report.wording import DEVICE_NAMES, ms_words, workload_words

_ROW_HEIGHT = 0.32
# Narrower parts have no room for a number.
_LEAST_LABELLED = 0.07
_DARK = (SERIES_COLOURS[0], SERIES_COLOURS[2], SERIES_COLOURS[5], SERIES_COLOURS[7])


def draw_stages(records: Sequence[Record]) -> list[Drawing]:
    """Draw the whole steps of one device whose parts were timed; nothing if there are none."""
    timed = [record for record in records if sum(record.parts_ms.values()) > 0]
    if not timed:
        return []
    parts = list(dict.fromkeys(part for record in timed for part in record.parts_ms))
    figure, ((axes,),) = new_panels(10, 1.3 + _ROW_HEIGHT * len(timed), 1, 1)
    for row, record in enumerate(timed):
        total, end = sum(record.parts_ms.values()), 0.0
        for place, part in enumerate(parts):
            ms = record.parts_ms.get(part, 0.0)
            share = 100 * ms / total
            colour = SERIES_COLOURS[place % len(SERIES_COLOURS)]
            label = part if row == 0 else None
            axes.barh(row, share, left=end, height=0.72, color=colour, edgecolor="white", linewidth=0.6, label=label)
            if share >= 100 * _LEAST_LABELLED:
                ink = "white" if colour in _DARK else "black"
                axes.text(end + share / 2, row, ms_words(ms), fontsize=7, color=ink, ha="center", va="center")
            end += share
        axes.text(101, row, ms_words(total), fontsize=8, va="center", clip_on=False)
    label_rows(axes, [workload_words(record.workload) for record in timed])
    axes.set(xlim=(0, 100), xlabel="percent of the step; in the bars and behind them: time")
    axes.grid(visible=False)
    figure.legend(loc="outside upper center", ncols=min(len(parts), 8), frameon=False, fontsize=8)
    device = DEVICE_NAMES.get(timed[0].device, timed[0].device)
    return [
        Drawing(
            f"stages_{timed[0].device}",
            f"Where a whole step's time goes, {device}",
            f"{timed[0].contender}. Each part is timed on its own, and the experts are the rest of the forward pass; "
            "behind each bar stands how long all parts take.",
            figure,
            [
                {**record_columns(record), "part": part, "ms": f"{ms:.4f}"}
                for record in timed
                for part, ms in record.parts_ms.items()
            ],
        )
    ]
