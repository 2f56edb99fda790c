"""The command: measures an engine by its targets, writes tables and drawings, and prints the results."""

from __future__ import annotations

import sys

from benchmarks.extras import missing_extra

if __name__ == "__main__" and (missing := missing_extra("bench")):
    sys.exit(missing)

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.progress import track

from benchmarks.contenders.stack import HAND_STACKED
from benchmarks.grouped.contest import INFERENCE, PEER, STACK, TRAINING, Compared, TooLongError, compare
from benchmarks.grouped.figures import draw_grid, draw_marks
from benchmarks.grouped.marks import Mark, grid_marks, operation_marks
from benchmarks.grouped.operations import ARRANGEMENTS, OperationCount, count_growth
from benchmarks.grouped.tables import (
    marks_table,
    operations_table,
    write_compared,
    write_marks,
    write_operations,
)
from benchmarks.harness.equality import UnequalError
from benchmarks.harness.setting import make_console, prepare
from benchmarks.workloads.bodies import GROUPED_EXPERTS
from benchmarks.workloads.points import ROUTES, full_grid, short_grid
from benchmarks.workloads.workload import Workload
from celmoe.engines.registry import AUTO, ENGINES, GROUPED

GRID, OPERATIONS = "grid", "operations"


@dataclass
class Run:
    """A run of the command.

    Attributes:
        engine: Our engine.
        stacked: True if our experts are stacked.
        seconds: About how long a measure goes on.
        experts: The kinds of experts that are measured.
        report: The folder of the results.
        console: The console for the lines.
        peer: The peer's package.
        refused: The reason for each workload that was refused, since its contenders are not equal.
    """

    engine: str
    stacked: bool
    seconds: float
    experts: Sequence[str]
    report: Path
    console: Console
    peer: ModuleType
    refused: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def compare(self, workload: Workload, rivals: Sequence[str], measures: Sequence[str]) -> list[Compared]:
        """Time a workload and print the result; return nothing if contenders differ or take too long."""
        try:
            found = compare(workload, self.peer, self.engine, self.seconds, rivals, measures, is_stacked=self.stacked)
        except UnequalError as error:
            self.refused.append(f"{workload}: {error}")
            self.say(f"REFUSED {self.refused[-1]}")
            return []
        except TooLongError as error:
            self.say(f"left out {workload}: {error}")
            return []
        for each in found:
            self.say(
                f"{workload!s:42} {each.measure:25} {each.ratio:7.3f} ({each.low:.3f} to {each.high:.3f}), "
                f"{each.ours_ms:.2f} ms against {each.other_ms:.2f} ms of {each.against}, {each.rounds} rounds"
            )
        return found

    def wanted(self, workloads: Sequence[Workload]) -> list[Workload]:
        """The workloads whose kinds of experts are measured."""
        return [each for each in workloads if each.expert in self.experts]

    def grid(self, workloads: Sequence[Workload]) -> list[Mark]:
        """All kinds and sizes against the peer, and those that can be stacked against the stack."""
        compared: list[Compared] = []
        for workload in track(self.wanted(workloads), "grid", console=self.console):
            rivals = [PEER, STACK] if workload.expert in HAND_STACKED else [PEER]
            compared += self.compare(workload, rivals, [TRAINING, INFERENCE])
            if compared:
                write_compared(self.report / "grid.csv", compared)
        for measure, name in ((TRAINING, "training.png"), (INFERENCE, "inference.png")):
            if drawn := [each for each in compared if (each.measure, each.against) == (measure, PEER)]:
                draw_grid(self.report / name, drawn)
        return grid_marks(compared)

    def operations(self) -> list[Mark]:
        """Count the operations that a step launches, by kind of expert and routes."""
        counts: list[OperationCount] = []
        # 'auto' may choose the looped engine; this count is about the launches of the grouped one.
        engine = GROUPED if self.engine == AUTO else self.engine
        points = itertools.product(self.experts, ROUTES, ARRANGEMENTS)
        for expert, routes, arrangement in track(list(points), "operations", console=self.console):
            counts.append(count_growth(expert, routes, engine, arrangement, is_stacked=self.stacked))
            write_operations(self.report / "operations.csv", counts)
        self.console.print(operations_table(counts))
        return operation_marks(counts)


def main() -> int:
    """Measure; returns the exit code: 1 if a figure was missed or a workload refused."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grouped", description=__doc__)
    parser.add_argument("--engine", choices=list(ENGINES), default=AUTO, help="our engine")
    parser.add_argument("--stacked", action="store_true", help="stack our experts")
    parser.add_argument("--only", choices=[GRID, OPERATIONS], help="one part of the figures")
    parser.add_argument(
        "--experts", choices=GROUPED_EXPERTS, nargs="+", default=GROUPED_EXPERTS, help="kinds to measure"
    )
    parser.add_argument("--full", action="store_true", help="the whole grid in place of half of it; takes hours")
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long each measure goes on")
    parser.add_argument("--report", type=Path, default=Path("celmoe-report-grouped"), help="where the results go")
    options = parser.parse_args()
    console = make_console()
    peer = prepare(options.report, console)
    if peer is None:
        return 1
    run = Run(options.engine, options.stacked, options.seconds, options.experts, options.report, console, peer)
    run.say(f"engine {options.engine}{', stacked' if options.stacked else ''}")
    marks: list[Mark] = []
    if options.only in (None, OPERATIONS):
        marks += run.operations()
    if options.only in (None, GRID):
        marks = run.grid(full_grid() if options.full else short_grid()) + marks
    if marks:
        console.print(marks_table(marks))
        write_marks(options.report / "marks.csv", marks)
        draw_marks(options.report / "marks.png", marks)
    for why in run.refused:
        run.say(f"refused: {why}")
    return 1 if run.refused or any(mark.verdict == "missed" for mark in marks) else 0


if __name__ == "__main__":
    sys.exit(main())
