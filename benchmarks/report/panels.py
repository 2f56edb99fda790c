"""The figure of a grid: times as fast as the peer by batch size, a panel for each kind of expert and width."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from matplotlib.lines import Line2D

from benchmarks.contenders.contender import AUTO, BARE, LOOPED, PEER
from benchmarks.harness.canvas import SERIES_COLOURS, Drawing, new_panels, plain_numbers
from benchmarks.harness.tables import ratio_columns, workload_columns
from benchmarks.harness.wording import DEVICE_NAMES
from benchmarks.report.ratios import Ratio, ratio_of
from benchmarks.report.roster import STAGE_NAMES
from benchmarks.suite.record import Record
from benchmarks.workloads.bodies import EXPERTS

# Fewer batch sizes make no grid.
_FEWEST_BATCHES = 3
_STYLES = {"uniform": "-", "zipf": "--"}


def draw_panels(records: Sequence[Record]) -> Drawing | None:
    """Draw the records of one stage and one device that are of a grid; nothing if they are of none."""
    is_loop = any(BARE in record.timings.seconds for record in records)
    ours = LOOPED if is_loop else AUTO
    found = [each for record in records if (each := ratio_of(record, PEER, ours)) is not None]
    kinds = [kind for kind in EXPERTS if any(each.workload.expert == kind for each in found)]
    widths = sorted({each.workload.hidden_size for each in found})
    counts = sorted({each.workload.num_experts for each in found})
    batches = {each.workload.batch_size for each in found}
    if len(batches) < _FEWEST_BATCHES or len(found) < len(kinds) * len(widths) * _FEWEST_BATCHES:
        return None
    colours = dict(zip(counts, SERIES_COLOURS, strict=False))
    figure, panels = new_panels(3 * len(kinds), 2.6 * len(widths) + 0.6, len(widths), len(kinds), share_y=True)
    for (width, kind), axes in zip(itertools.product(widths, kinds), itertools.chain(*panels), strict=True):
        own = [each for each in found if (each.workload.expert, each.workload.hidden_size) == (kind, width)]
        if not own:
            axes.set_axis_off()
            continue
        for (count, colour), routes in itertools.product(colours.items(), _STYLES):
            drawn = _by_batch(own, count, routes)
            sizes = [each.workload.batch_size for each in drawn]
            lows, highs = [each.low for each in drawn], [each.high for each in drawn]
            axes.fill_between(sizes, lows, highs, color=colour, alpha=0.15, linewidth=0)
            medians = [each.ratio for each in drawn]
            axes.plot(sizes, medians, color=colour, linestyle=_STYLES[routes], marker="o", markersize=3.5)
            if is_loop:
                bounds = [each.record.timings.ratio(PEER, BARE) for each in drawn]
                axes.plot(sizes, bounds, color=colour, linewidth=0.9, linestyle=":")
        axes.axhline(1.0, color="#444444", linewidth=0.8, linestyle="--")
        axes.set_title(f"{kind}, H = {width}")
        plain_numbers(axes, "x")
        plain_numbers(axes, "y")
    for axes in panels[-1]:
        axes.set_xlabel("batch size")
    keys = [
        Line2D([], [], color=colour, marker="o", markersize=3.5, label=f"{count} experts")
        for count, colour in colours.items()
    ]
    panels[0][0].legend(handles=keys, frameon=False, fontsize=8)
    figure.supylabel(f"times as fast as {PEER}", fontsize=9)
    first = found[0].record
    bound = " Dotted lines are the bounds: loops that route and move rows in no time." if is_loop else ""
    return Drawing(
        f"grid_{first.stage}_{first.device}",
        f"{ours} beside {PEER}: {STAGE_NAMES[first.stage]}, {DEVICE_NAMES[first.device]}",
        f"Medians and the middle half of the rounds; dashed: Zipf routes.{bound}",
        figure,
        [_columns(each) for each in found],
    )


def _by_batch(found: Sequence[Ratio], count: int, routes: str) -> list[Ratio]:
    own = [each for each in found if (each.workload.num_experts, each.workload.routes) == (count, routes)]
    return sorted(own, key=lambda each: each.workload.batch_size)


def _columns(found: Ratio) -> dict[str, object]:
    timings = found.record.timings
    ms = {"celmoe_ms": found.faster, "celmoe_vp_ms": PEER, "bare_loop_ms": BARE}
    has_bound = BARE in timings.seconds
    return {
        **workload_columns(found.workload),
        "routes": found.workload.routes,
        **{column: f"{1e3 * timings.median(name):.3f}" for column, name in ms.items() if name in timings.seconds},
        **ratio_columns(timings, PEER, found.faster),
        **({"bound": f"{timings.ratio(PEER, BARE):.3f}"} if has_bound else {}),
        "rounds": timings.rounds,
    }
