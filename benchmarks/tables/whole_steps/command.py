"""Times whole steps: celmoe-vp, plain, stacked, by hand and compiled, on one device, within so many minutes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.harness.arguments import OptionError, above_zero, make_parser, one_of, read_arguments, whole_number
from benchmarks.harness.devices import open_device
from benchmarks.harness.setting import make_console, prepare_folder, read_setting
from benchmarks.tables.whole_steps.bounded import last_told
from benchmarks.tables.whole_steps.notes import Block
from benchmarks.tables.whole_steps.report import draw_growth, mean_line, steps_table, write_steps
from benchmarks.tables.whole_steps.row import MAKERS, Row, run_row
from benchmarks.workloads.points import NAMED
from benchmarks.workloads.workload import Workload

# Multiples of celmoe-vp's speed on one thread of a CPU that stacked steps must reach, and those they aim at.
GOALS = ((2.2, 3.0), (3.3, 4.0), (5.5, 7.0), (7.2, 8.0), (2.9, 3.5), (1.4, 1.8), (1.3, 1.45), (1.5, 1.8), (3.0, 4.0))
COUNTS = (4, 16, 64, 256, 1024)
KINDS = (("linear", 64), ("mlp", 128))
GROWTH = tuple(Workload(expert, width, 4096, count) for expert, width in KINDS for count in COUNTS)
ALL = "all"
SETS = {"named": NAMED, "growth": GROWTH, ALL: tuple(dict.fromkeys((*NAMED, *GROWTH)))}
BAD, REFUSED = 1, 2
# The first row's time, as a multiple of the others'.
FIRST_SHARES = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure.

    Returns:
        0; 1 if a contender is not equal or none was timed; 2 if an argument was refused.
    """
    parser = make_parser("benchmarks whole-steps", __doc__)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda or cuda:0 (default cpu)")
    add("--set", default=ALL, help=f"the workloads: {', '.join(SETS)} (default {ALL})")
    add("--minutes", default="10", help="bound on the whole run (default 10)")
    add("--threads", default="1", help="threads of the CPU (default 1)")
    add("--report", default="celmoe-report/whole-steps", help="folder to write to (default celmoe-report/whole-steps)")
    add("--notes", help="a file of notes whose table of whole steps is replaced by this run's")
    console, errors = make_console(), Console(stderr=True, highlight=False, soft_wrap=True)
    begun = time.monotonic()
    try:
        given = read_arguments(parser, sys.argv[1:] if arguments is None else arguments)
        workloads = SETS[one_of("--set", given.set, list(SETS))]
        seconds = 60 * above_zero("--minutes", given.minutes)
        threads = whole_number("--threads", given.threads, 1)
        device = open_device(given.device)
        report = Path(given.report)
        prepare_folder(report)
        notes = None if given.notes is None else Block(Path(given.notes), device.type)
    except OptionError as error:
        errors.print(str(error), markup=False)
        return REFUSED
    setting = read_setting(device, threads)
    told = f"{setting}, commit {setting.commit}{' with changes' * setting.is_changed}"
    console.print(told, markup=False)
    rows: list[Row] = []
    for place, workload in enumerate(track(workloads, "timing", console=console)):
        left = seconds - (time.monotonic() - begun)
        rows.append(_row(workload, given.device, threads, left * _share(place, len(workloads))))
        for name, why in rows[-1].absent.items():
            console.print(f"{workload}: without {name}: {why}", markup=False, soft_wrap=True)
        write_steps(report / "whole_steps.csv", rows)
    draw_growth(report / "whole_steps.png", rows, told)
    (report / "setting.txt").write_text(f"{told}\n", encoding="utf-8")
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
