"""The command: prints the model's figures as a run grows and, if asked, the bytes of real steps on loopback."""

from __future__ import annotations

from collections.abc import Sequence

from rich.progress import track

from benchmarks.harness.arguments import whole_number
from benchmarks.harness.one_table import BAD, Option, ask, refusing
from benchmarks.harness.tables import write_rows
from benchmarks.tables.scaling.compared import Compared
from benchmarks.tables.scaling.growth import Point, grown, points_of
from benchmarks.tables.scaling.report import compared_table, draw_growth, growth_table
from benchmarks.tables.scaling.runs import cases_of, count_on_ranks

COUNT = Option(
    "count",
    "",
    "count on so many ranks, too; several numbers are several runs",
    lambda option, text: [whole_number(option, each, 2) for each in text.split()],
    is_list=True,
)


@refusing
def main(arguments: Sequence[str]) -> int:
    """Print the model's figures, and count; returns the exit code: 1 if the two disagree."""
    asked = ask("scaling", __doc__, arguments, COUNT)
    console = asked.console
    compared: list[Compared] = []
    for num_ranks in asked[COUNT]:
        cases = cases_of(num_ranks)
        with console.status(f"counting {len(cases)} cases on {num_ranks} ranks"):
            counted = count_on_ranks(cases, num_ranks)
        compared += [Compared(case, each) for case, each in zip(cases, counted, strict=True)]
    points: list[Point] = []
    for each in track(list(grown()), "the model", console=console):
        points += points_of(*each)
    console.print(growth_table(points))
    draw_growth(points).save(asked.report)
    if not compared:
        return 0
    console.print(f"{asked.told}, gloo", markup=False)
    console.print(compared_table(compared))
    write_rows(asked.report / "scaling_counted.csv", [row for each in compared for row in each.rows()])
    differing = [text for each in compared for text in each.differences]
    for text in differing:
        console.print(f"too far apart: {text}", markup=False)
    return BAD if differing else 0
