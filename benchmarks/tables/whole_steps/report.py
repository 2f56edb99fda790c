"""The output of a run: a table for the terminal, a CSV file, and a figure of the growth with the number of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.harness.canvas import (
    DOTS_PER_INCH,
    SERIES_COLOURS,
    draw_medians,
    label_values,
    new_panels,
    plain_numbers,
)
from benchmarks.harness.tables import geometric_mean, workload_columns, write_rows
from benchmarks.harness.wording import ms_words, times_words, workload_words
from benchmarks.tables.whole_steps.row import BY_HAND, MAKERS, PEER, PLAIN, STACKED, Row
from benchmarks.workloads.workload import Workload

# In the order of the table.
CONTENDERS = (PEER, *(name for name in MAKERS if name != PEER))
DASH = "\N{EN DASH}"
# Against whom ratios are told.
AGAINST = (PEER, BY_HAND, PLAIN)
_MEASURED = ("ms", "against", "ratio", "first_quartile", "third_quartile", "rounds", "first_seconds", "absent")
_HEIGHT, _WIDTH = 3.2, 4.4


def steps_table(rows: Sequence[Row], goals: Mapping[Workload, tuple[float, float]]) -> Table:
    """A row a workload: milliseconds, and the multiple of celmoe-vp's speed; with the target, if there is one."""
    table = Table(title="Whole steps: ms, and times as fast as celmoe-vp (asked of stacked: must, aim)")
    table.add_column("workload")
    for heading in (*CONTENDERS, "asked", "s of first steps"):
        table.add_column(heading, justify="right")
    for row in rows:
        asked = goals.get(row.workload)
        first = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row.first_seconds.items() if seconds >= 1)
        table.add_row(
            workload_words(row.workload),
            *(_cell(row, name) for name in CONTENDERS),
            "" if asked is None else f"{asked[0]:g}, {asked[1]:g}",
            first,
        )
    return table


def _cell(row: Row, name: str) -> str:
    if name not in row.timings.seconds:
        return DASH
    words = ms_words(1e3 * row.timings.median(name))
    if name == PEER or PEER not in row.timings.seconds:
        return words
    return f"{words}, {times_words(row.timings.ratio(PEER, name))}"


def mean_line(rows: Sequence[Row]) -> str:
    """Stacked beside the stack by hand, over all workloads that have one."""
    both = [each.timings for each in rows if {BY_HAND, STACKED} <= each.timings.seconds.keys()]
    if not both:
        return "no workload has a stack by hand beside the stacked one"
    # Rounded as in the CSV file, so that a reader of the file finds the same mean.
    mean = geometric_mean([round(timings.ratio(BY_HAND, STACKED), 3) for timings in both])
    return f"stacked is {mean:.2f} times as fast as by hand, geometric mean of {len(both)} workloads"


def write_steps(path: Path, rows: Sequence[Row]) -> None:
    """A line for each workload, contender, and contender that it is held against; absent ones with the reason."""
    write_rows(path, [line for row in rows for name in CONTENDERS for line in _lines(row, name)])


def _lines(row: Row, name: str) -> list[dict[str, object]]:
    what: dict[str, object] = {**workload_columns(row.workload), "routes": row.workload.routes, "contender": name}
    what |= dict.fromkeys(_MEASURED, "")
    if name not in row.timings.seconds:
        return [{**what, "absent": row.absent.get(name, "")}]
    what |= {"ms": f"{1e3 * row.timings.median(name):.4f}", "rounds": row.timings.rounds}
    what["first_seconds"] = f"{row.first_seconds[name]:.2f}"
    lines: list[dict[str, object]] = []
    for other in AGAINST:
        if other != name and other in row.timings.seconds:
            low, high = row.timings.quartiles(other, name)
            ratio = {"ratio": row.timings.ratio(other, name), "first_quartile": low, "third_quartile": high}
            lines.append({**what, "against": other, **{key: f"{value:.3f}" for key, value in ratio.items()}})
    return lines or [what]


def draw_growth(path: Path, rows: Sequence[Row], title: str) -> bool:
    """Draw milliseconds by number of experts, a panel for each kind, width, batch and routes.

    Returns:
        False if no line has two points.
    """
    lines: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        each = row.workload
        if row.timings.seconds:
            lines.setdefault((each.expert, each.hidden_size, each.batch_size, each.routes), []).append(row)
    drawn = [sorted(line, key=lambda row: row.workload.num_experts) for line in lines.values() if len(line) > 1]
    if not drawn:
        return False
    figure, (panels,) = new_panels(_WIDTH * len(drawn), _HEIGHT, 1, len(drawn))
    for axes, line in zip(panels, drawn, strict=True):
        for name, colour in zip(CONTENDERS, SERIES_COLOURS, strict=False):
            timed = [row for row in line if name in row.timings.seconds]
            at = [row.workload.num_experts for row in timed]
            draw_medians(axes, at, [row.timings for row in timed], name, colour, label=name)
        first = line[0].workload
        axes.set_title(f"{first.expert}, H = {first.hidden_size}, B = {first.batch_size:,}", fontsize=10)
        axes.set(xlabel="experts E of the last level", ylabel="ms a step")
        plain_numbers(axes, "x")
        plain_numbers(axes, "y")
        label_values(axes, {row.workload.num_experts for row in line})
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=7)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return True
