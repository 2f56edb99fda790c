"""The tables that a run leaves: for the terminal, and as CSV files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.grid.report import ratio_columns, workload_columns, write_rows
from benchmarks.grouped.contest import Compared
from benchmarks.grouped.marks import Mark
from benchmarks.grouped.operations import FEW_EXPERTS, MANY_EXPERTS, OperationCount

_MOST_GROWN = 3
_STYLES = {"missed": "red", "reached": "", "aim": "green"}


def marks_table(marks: Sequence[Mark]) -> Table:
    """The measured figures beside the values they must reach and the values aimed at."""
    table = Table(title="Figures and what they are held to (operations: less is better)")
    for heading in ("line", "measure", "measured", "must", "aim", ""):
        table.add_column(heading, justify="right" if heading in ("measured", "must", "aim") else "left")
    for mark in marks:
        figures = (f"{each:.2f}" for each in (mark.measured, mark.goal.must, mark.goal.aim))
        table.add_row(mark.line, mark.measure, *figures, mark.verdict, style=_STYLES[mark.verdict])
    return table


def operations_table(counts: Sequence[OperationCount]) -> Table:
    """Operations with few and with many experts, and which of them grow most."""
    table = Table(title="Work-launching ATen operations of both passes, views not counted")
    headings = (
        "experts",
        "routes",
        "arranged for",
        f"E = {FEW_EXPERTS}",
        f"E = {MANY_EXPERTS}",
        "ratio",
        "what grows most",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in (*headings[:3], headings[-1]) else "right")
    for each in counts:
        numbers = f"{each.few:,}", f"{each.many:,}", f"{each.ratio:.2f}"
        table.add_row(each.expert, each.routes, each.arrangement, *numbers, _grown(each))
    return table


def write_marks(path: Path, marks: Sequence[Mark]) -> None:
    """One row a figure."""
    rows = [
        {
            "line": each.line,
            "measure": each.measure,
            "measured": f"{each.measured:.3f}",
            "must": each.goal.must,
            "aim": each.goal.aim,
            "verdict": each.verdict,
        }
        for each in marks
    ]
    write_rows(path, rows)


def write_compared(path: Path, compared: Sequence[Compared]) -> None:
    """One row a workload, measure and rival."""
    rows = [
        {
            **workload_columns(each.workload),
            "routes": each.workload.routes,
            "measure": each.measure,
            "against": each.against,
            "celmoe_ms": f"{each.ours_ms:.3f}",
            "against_ms": f"{each.other_ms:.3f}",
            **ratio_columns(each),
            "rounds": each.rounds,
        }
        for each in compared
    ]
    write_rows(path, rows)


def write_operations(path: Path, counts: Sequence[OperationCount]) -> None:
    """One row a kind of expert, routes and arrangement."""
    rows = [
        {
            "experts": each.expert,
            "routes": each.routes,
            "arranged_for": each.arrangement,
            "few": each.few,
            "many": each.many,
            "ratio": f"{each.ratio:.3f}",
            "grown": _grown(each),
        }
        for each in counts
    ]
    write_rows(path, rows)


def _grown(count: OperationCount) -> str:
    return ", ".join(f"{name} +{more}" for name, more in count.grown[:_MOST_GROWN])
