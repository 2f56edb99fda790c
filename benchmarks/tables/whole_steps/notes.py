"""The table of whole steps in notes: a block between two marks, which a run replaces, and its numbers as CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.harness.arguments import OptionError
from benchmarks.harness.setting import Setting
from benchmarks.tables.whole_steps.report import CONTENDERS, DASH, mean_line, write_steps
from benchmarks.tables.whole_steps.row import PEER, STACKED, Row
from benchmarks.workloads.workload import Workload


class Block:
    """A block of a file of notes.

    Args:
        path: The file.
        device: The device that the block is of, which its marks name.

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

    def fill(self, rows: Sequence[Row], goals: Mapping[Workload, tuple[float, float]], setting: Setting) -> None:
        """Write the table, and its CSV file in the folder ``figures`` beside the file."""
        date = f"{datetime.now(UTC):%Y-%m-%d}"
        lines = [
            self._marks[0],
            f"Measured on {date} at commit `{setting.commit[:7]}`{' with changes' * setting.is_changed}; {setting}.",
            f"[All figures](figures/{self._figures}).",
            "",
            *_table(rows, goals),
            "",
            f"{mean_line(rows).capitalize()}.",
        ]
        if any({STACKED, "by hand"} <= row.timings.seconds.keys() for row in rows):
            mean = mean_line(rows).split()[2]
            lines.append(f"<!-- {self._figures}: {mean} = gmean ratio where contender=stacked, against=by hand -->")
        write_steps(self._path.parent / "figures" / self._figures, rows)
        self._path.write_text(self._before + "\n".join(lines) + "\n" + self._after, encoding="utf-8")


def _table(rows: Sequence[Row], goals: Mapping[Workload, tuple[float, float]]) -> list[str]:
    others = [name for name in CONTENDERS if name != PEER]
    heads = ["whole step", "B", "E", f"{PEER}: ms", *others, "asked of stacked"]
    lines = [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
    for row in rows:
        workload, is_timed = row.workload, PEER in row.timings.seconds
        words = ", ".join([workload.expert, f"H = {workload.hidden_size}", f"{workload.routes} routes"])
        sizes = f"{workload.batch_size:,}", f"{workload.num_experts:,}"
        asked = f"{goals[workload][0]:g}, aim {goals[workload][1]:g}" if workload in goals else ""
        ms = f"{1e3 * row.timings.median(PEER):.2f}" if is_timed else DASH
        cells = [_ratio(row, name) if is_timed else DASH for name in others]
        lines.append(_line([words, *sizes, ms, *cells, asked]))
    return lines


def _ratio(row: Row, name: str) -> str:
    if name not in row.timings.seconds:
        return DASH
    low, high = row.timings.quartiles(PEER, name)
    return f"{row.timings.ratio(PEER, name):.2f} ({low:.2f} to {high:.2f})"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
