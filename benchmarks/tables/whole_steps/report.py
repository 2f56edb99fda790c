"""The output of a run: one table for the terminal and for notes, a CSV file, a figure of the growth with E."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from benchmarks.harness.arguments import OptionError
from benchmarks.harness.canvas import (
    DOTS_PER_INCH,
    SERIES_COLOURS,
    draw_medians,
    label_values,
    new_panels,
    plain_numbers,
)
from benchmarks.harness.one_table import ratio_words
from benchmarks.harness.setting import Setting
from benchmarks.harness.tables import geometric_mean, ratio_columns, workload_columns, write_rows
from benchmarks.tables.whole_steps.row import BY_HAND, MAKERS, PEER, PLAIN, STACKED, Row
from benchmarks.workloads.workload import Workload

# In the order of the table.
CONTENDERS = (PEER, *(name for name in MAKERS if name != PEER))
HEADINGS = ("whole step", "B", "E", f"{PEER}: ms", *CONTENDERS[1:], f"asked of {STACKED}")
DASH = "\N{EN DASH}"
# Against whom ratios are told.
AGAINST = (PEER, BY_HAND, PLAIN)
_MEASURED = ("ms", "against", "ratio", "first_quartile", "third_quartile", "rounds", "first_seconds", "absent")
_HEIGHT, _WIDTH = 3.2, 4.4

Goals = Mapping[Workload, tuple[float, float]]


def steps_table(rows: Sequence[Row], goals: Goals) -> Table:
    """The table for the terminal."""
    table = Table(title=f"Whole steps: times as fast as {PEER}, median and middle half; without it ms")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    for row in rows:
        table.add_row(*_cells(row, goals))
    return table


def _cells(row: Row, goals: Goals) -> list[str]:
    workload = row.workload
    words = f"{workload.expert}, H = {workload.hidden_size}, {workload.routes} routes"
    must, aim = goals.get(workload, (None, None))
    asked = "" if must is None else f"{must:g}, aim {aim:g}"
    contenders = [_cell(row, name) for name in CONTENDERS]
    return [words, f"{workload.batch_size:,}", f"{workload.num_experts:,}", *contenders, asked]


def _cell(row: Row, name: str) -> str:
    if name not in row.timings.seconds:
        return DASH
    if name == PEER or PEER not in row.timings.seconds:
        return f"{1e3 * row.timings.median(name):.2f}"
    return ratio_words(ratio_columns(row.timings, PEER, name))


def _mean(rows: Sequence[Row]) -> tuple[float, int]:
    """Stacked beside the stack by hand, over all workloads that have one; and how many have."""
    both = [each.timings for each in rows if {BY_HAND, STACKED} <= each.timings.seconds.keys()]
    # Rounded as in the CSV file, so that a reader of the file finds the same mean.
    ratios = [float(ratio_columns(timings, BY_HAND, STACKED)["ratio"]) for timings in both]
    return (geometric_mean(ratios) if ratios else 0.0), len(ratios)


def mean_line(rows: Sequence[Row]) -> str:
    """Stacked beside the stack by hand, in words."""
    mean, count = _mean(rows)
    if not count:
        return "no workload has a stack by hand beside the stacked one"
    return f"stacked is {mean:.2f} times as fast as by hand, geometric mean of {count} workloads"


def write_steps(path: Path, rows: Sequence[Row]) -> None:
    """A line for each workload, contender, and contender that it is held against; absent ones with the reason."""
    write_rows(path, [line for row in rows for name in CONTENDERS for line in _lines(row, name)])


def _lines(row: Row, name: str) -> Iterator[dict[str, object]]:
    line: dict[str, object] = {**workload_columns(row.workload), "routes": row.workload.routes, "contender": name}
    line |= dict.fromkeys(_MEASURED, "")
    timings = row.timings
    if name not in timings.seconds:
        yield {**line, "absent": row.absent.get(name, "")}
        return
    line |= {"ms": f"{1e3 * timings.median(name):.4f}", "rounds": timings.rounds}
    line["first_seconds"] = f"{row.first_seconds[name]:.2f}"
    others = [other for other in AGAINST if other != name and other in timings.seconds]
    yield from ({**line, "against": other, **ratio_columns(timings, other, name)} for other in others)
    if not others:
        yield line


def draw_growth(path: Path, rows: Sequence[Row], title: str) -> bool:
    """Draw milliseconds by number of experts, a panel for each kind, width, batch and routes.

    Returns:
        False if no line has two points.
    """
    lines: dict[tuple[object, ...], list[Row]] = {}
    for row in sorted((row for row in rows if row.timings.seconds), key=lambda row: row.workload.num_experts):
        each = row.workload
        lines.setdefault((each.expert, each.hidden_size, each.batch_size, each.routes), []).append(row)
    drawn = [line for line in lines.values() if len(line) > 1]
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


class Block:
    """A block of a file of notes, which a run replaces: the table, and its numbers in a CSV file.

    Args:
        path: The file.
        device: The kind of device that the block is of, which its marks name.

    Raises:
        OptionError: The file has no such block.
    """

    def __init__(self, path: Path, device: str) -> None:
        self._path = path
        self._marks = tuple(f"<!-- whole steps, {device}: {which} -->" for which in ("begin", "end"))
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        places = [text.find(mark) for mark in self._marks]
        if not 0 <= places[0] < places[1]:
            raise OptionError(
                f"'--notes' must be a file with the lines {' and '.join(map(repr, self._marks))} (got {str(path)!r})"
            )
        self._before, self._after = text[: places[0]], text[places[1] :]
        self._figures = f"whole_steps_{device}.csv"

    def fill(self, rows: Sequence[Row], goals: Goals, setting: Setting) -> None:
        """Write the table, and its CSV file in the folder ``figures`` beside the file."""
        date = f"{datetime.now(UTC):%Y-%m-%d}"
        table = [HEADINGS, ["---", *["---:"] * (len(HEADINGS) - 1)], *(_cells(row, goals) for row in rows)]
        lines = [
            self._marks[0],
            f"Measured on {date} at commit `{setting.commit}`{' with changes' * setting.is_changed}; {setting}.",
            f"[All figures](figures/{self._figures}).",
            "",
            *(f"| {' | '.join(cells)} |" for cells in table),
            "",
            f"{mean_line(rows).capitalize()}.",
        ]
        mean, count = _mean(rows)
        if count:
            quoted = f"{mean:.2f} = gmean ratio where contender={STACKED}, against={BY_HAND}"
            lines.append(f"<!-- {self._figures}: {quoted} -->")
        write_steps(self._path.parent / "figures" / self._figures, rows)
        self._path.write_text(self._before + "\n".join(lines) + "\n" + self._after, encoding="utf-8")
