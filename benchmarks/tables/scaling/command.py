"""The command: prints the model's figures as a run grows and, if asked, the bytes of real steps on loopback."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track

from benchmarks.harness.arguments import OptionError
from benchmarks.harness.setting import make_console, prepare_folder
from benchmarks.harness.tables import write_rows
from benchmarks.tables.scaling.compared import Compared, compared_table
from benchmarks.tables.scaling.growth import Point, grown, points_of
from benchmarks.tables.scaling.ranks import count_on_ranks
from benchmarks.tables.scaling.report import draw_growth, growth_table
from benchmarks.tables.scaling.runs import cases_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the model's figures, and count; returns the exit code: 1 if the two disagree."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=__doc__)
    parser.add_argument("--count", type=int, nargs="+", default=[], metavar="RANKS", help="count on so many ranks")
    parser.add_argument("--report", type=Path, default=Path("celmoe-report-scaling"), help="where the results go")
    options = parser.parse_args(arguments)
    if any(each < 2 for each in options.count):
        parser.error(f"'--count' must be at least 2 (got {min(options.count)})")
    try:
        prepare_folder(options.report)
    except OptionError as error:
        parser.error(str(error))
    console = make_console()
    compared: list[Compared] = []
    for num_ranks in options.count:
        cases = cases_of(num_ranks)
        with console.status(f"counting {len(cases)} cases on {num_ranks} ranks"):
            counted = count_on_ranks(cases, num_ranks)
        compared += [Compared(case, each) for case, each in zip(cases, counted, strict=True)]
    points: list[Point] = []
    for asked in track(list(grown()), "the model", console=console):
        points += points_of(*asked)
    console.print(growth_table(points))
    draw_growth(points).save(options.report)
    if not compared:
        return 0
    console.print(f"torch {torch.__version__}, gloo")
    console.print(compared_table(compared))
    write_rows(options.report / "scaling_counted.csv", [row for each in compared for row in each.rows()])
    differing = [text for each in compared for text in each.differences]
    for text in differing:
        console.print(f"too far apart: {text}", markup=False)
    return 1 if differing else 0
