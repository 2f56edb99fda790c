"""The figure of a grid: times as fast as the peer by batch size, a panel for each kind of expert and width."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.lines import Line2D

from benchmarks.contenders.contender import AUTO, BARE, LOOPED, PEER
from benchmarks.harness.tables import ratio_columns
from benchmarks.report.canvas import SERIES_COLOURS, Drawing, new_panels, plain_numbers, record_columns
from benchmarks.report.ratios import Ratio, ratio_of
from benchmarks.report.reading import Record
from benchmarks.report.wording import DEVICE_NAMES, STAGE_NAMES
from benchmarks.workloads.bodies import EXPERTS

# Fewer batch sizes make no grid.
_FEWEST_BATCHES = 3
_STYLES = {"uniform": "-", "zipf": "--"}


def draw_panels(records: Sequence[Record]) -> list[Drawing]:
    """Draw the records of one stage and one device that are of a grid; nothing if they are of none."""
    is_loop = any(BARE in record.contenders for record in records)
    ours = LOOPED if is_loop else AUTO
    found = [each for record in records if (each := ratio_of(record, PEER, ours)) is not None]
    kinds = [kind for kind in EXPERTS if any(each.workload.expert == kind for each in found)]
    widths = sorted({each.workload.hidden_size for each in found})
    counts = sorted({each.workload.num_experts for each in found})
    batches = {each.workload.batch_size for each in found}
    if len(batches) < _FEWEST_BATCHES or len(found) < len(kinds) * len(widths) * _FEWEST_BATCHES:
        return []
    figure, panels = new_panels(3 * len(kinds), 2.6 * len(widths) + 0.6, len(widths), len(kinds), share_y=True)
    for width, line in zip(widths, panels, strict=True):
        for kind, axes in zip(kinds, line, strict=True):
            own = [each for each in found if (each.workload.expert, each.workload.hidden_size) == (kind, width)]
            if not own:
                axes.set_axis_off()
                continue
            for count, colour in zip(counts, SERIES_COLOURS, strict=False):
                for routes, style in _STYLES.items():
                    drawn = _by_batch(own, count, routes)
                    sizes = [each.workload.batch_size for each in drawn]
                    lows, highs = [each.low for each in drawn], [each.high for each in drawn]
                    axes.fill_between(sizes, lows, highs, color=colour, alpha=0.15, linewidth=0)
                    medians = [each.ratio for each in drawn]
                    axes.plot(sizes, medians, color=colour, linestyle=style, marker="o", markersize=3.5)
                    if is_loop:
                        bounds = [each.record.timings.ratio(PEER, BARE) for each in drawn]
                        axes.plot(sizes, bounds, color=colour, linewidth=0.9, linestyle=":")
            axes.axhline(1.0, color="#444444", linewidth=0.8, linestyle="--")
            axes.set_title(f"{kind}, H = {width}")
            plain_numbers(axes, "x")
            plain_numbers(axes, "y")
    for axes in panels[-1]:
        axes.set_xlabel("batch size")
    colours = zip(counts, SERIES_COLOURS, strict=False)
    keys = [
        Line2D([], [], color=colour, marker="o", markersize=3.5, label=f"{count} experts") for count, colour in colours
    ]
    panels[0][0].legend(handles=keys, frameon=False, fontsize=8)
    figure.supylabel(f"times as fast as {PEER}", fontsize=9)
    first = found[0].record
    stage, device = STAGE_NAMES[first.stage], DEVICE_NAMES.get(first.device, first.device)
    bound = " Dotted lines are the bounds: loops that route and move rows in no time." if is_loop else ""
    rows = [{**record_columns(each.record), **ratio_columns(each), "rounds": each.rounds} for each in found]
    return [
        Drawing(
            f"grid_{first.stage}_{first.device}",
            f"{ours} beside {PEER}: {stage}, {device}",
            f"Medians and the middle half of the rounds; dashed: Zipf routes.{bound}",
            figure,
            rows,
        )
    ]


def _by_batch(found: Sequence[Ratio], count: int, routes: str) -> list[Ratio]:
    own = [each for each in found if (each.workload.num_experts, each.workload.routes) == (count, routes)]
    return sorted(own, key=lambda each: each.workload.batch_size)
