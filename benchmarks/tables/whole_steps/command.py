"""Times whole steps: celmoe-vp, plain, stacked, by hand and compiled, on one device, within so many minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.progress import track

from benchmarks.harness.one_table import BAD, DEVICE, THREADS, Option, amount, ask, choice, refusing
from benchmarks.tables.whole_steps.bounded import last_told
from benchmarks.tables.whole_steps.report import Block, draw_growth, mean_line, steps_table, write_steps
from benchmarks.tables.whole_steps.row import MAKERS, Row, run_row
from benchmarks.workloads.points import NAMED
from benchmarks.workloads.workload import Workload

# Multiples of celmoe-vp's speed on one thread of a CPU that stacked steps must reach, and those they aim at.
GOALS = ((2.2, 3.0), (3.3, 4.0), (5.5, 7.0), (7.2, 8.0), (2.9, 3.5), (1.4, 1.8), (1.3, 1.45), (1.5, 1.8), (3.0, 4.0))
COUNTS = (4, 16, 64, 256, 1024)
KINDS = (("linear", 64), ("mlp", 128))
GROWTH = tuple(Workload(expert, width, 4096, count) for expert, width in KINDS for count in COUNTS)
SETS = {"named": NAMED, "growth": GROWTH, "all": tuple(dict.fromkeys((*NAMED, *GROWTH)))}
SET = choice("set", "all", "the workloads", list(SETS))
MINUTES = amount("minutes", "10", "bound on the whole run")
NOTES = Option(
    "notes", "", "a file of notes whose table of whole steps is replaced by this run's", lambda _, text: text
)
# The first row's time, as a multiple of the others'.
FIRST_SHARES = 3


@refusing
def main(arguments: Sequence[str]) -> int:
    """Measure; returns the exit code: 1 if a contender is not equal, or none was timed."""
    begun = time.monotonic()
    asked = ask("whole-steps", __doc__, arguments, DEVICE, SET, MINUTES, THREADS, NOTES)
    device, setting, console = asked[DEVICE], asked.setting, asked.console
    notes = Block(Path(asked[NOTES]), device.partition(":")[0]) if asked[NOTES] else None
    asked.start()
    rows: list[Row] = []
    workloads = SETS[asked[SET]]
    for place, workload in enumerate(track(workloads, "timing", console=console)):
        left = 60 * asked[MINUTES] - (time.monotonic() - begun)
        rows.append(_row(workload, device, setting.threads, left * _share(place, len(workloads))))
        for name, why in rows[-1].absent.items():
            console.print(f"{workload}: without {name}: {why}", markup=False, soft_wrap=True)
        write_steps(asked.report / "whole_steps.csv", rows)
    draw_growth(asked.report / "whole_steps.png", rows, asked.told)
    (asked.report / "setting.txt").write_text(f"{asked.told}\n", encoding="utf-8")
    goals = dict(zip(NAMED, GOALS, strict=True))
    console.print(steps_table(rows, goals))
    console.print(mean_line(rows), markup=False)
    if not any(row.timings.seconds for row in rows) or any(row.is_unequal for row in rows):
        return BAD
    if notes is not None:
        notes.fill(rows, goals, setting)
    return 0


def _share(place: int, count: int) -> float:
    """The share of the time left for the row at this place; the first row also compiles code that all rows need."""
    return FIRST_SHARES / (FIRST_SHARES + count - 1) if place == 0 else 1 / (count - place)


def _row(workload: Workload, device: str, threads: int, seconds: float) -> Row:
    told, why = last_told(partial(run_row, workload, device, threads), seconds)
    row: Row = Row(workload) if told is None else told
    for name in MAKERS if why else ():
        if name not in {*row.timings.seconds, *row.absent}:
            row = row.without(name, why)
    return row
