"""Figures that notes quote, beside the values in the CSV files.

A comment follows a sentence or a table, and names the source of its figures::

    The geometric mean is 1.31.
    <!-- steps.csv: 1.31 = gmean ratio; 0.755 = celmoe_vp_ms where experts=linear, H=64, B=16, E=4 -->

The file is one of ``notes/figures``. A figure is a column, of the one row that ``where`` leaves, or an aggregate of all
rows that it leaves: ``mean``, ``gmean`` (geometric), ``min``, ``max`` and ``sum`` of a column, before it
``points`` for a share in percent and ``giga`` for bytes in GB, or a number of rows:
``rows``, and by the quartiles of a ratio ``faster`` (both above 1), ``slower`` (both below), ``tied`` (neither), by the
ratio alone ``below``. In place of a column may stand two with ``-`` or ``/`` between.
"""

import csv
import functools
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "notes" / "figures"
MARKER = re.compile(r"<!-- (?P<file>\w+\.csv): (?P<quotes>.*?) -->", re.DOTALL)
_QUOTE = re.compile(r"(?P<quoted>[+-]?[\d.,]+ ?%?) = (?P<what>.+?)(?: where (?P<where>.+))?", re.DOTALL)
_OVER_ROWS = {
    "mean": statistics.fmean,
    "gmean": lambda values: math.exp(statistics.fmean(map(math.log, values))),
    "min": min,
    "max": max,
    "sum": sum,
}
_FACTORS = {"points": 100.0, "giga": 1e-9}
_COUNTS = {
    "rows": lambda row: True,
    "faster": lambda row: float(row["first_quartile"]) > 1,
    "slower": lambda row: float(row["third_quartile"]) < 1,
    "tied": lambda row: float(row["first_quartile"]) <= 1 <= float(row["third_quartile"]),
    "below": lambda row: float(row["ratio"]) < 1,
}


class MisquotedError(AssertionError):
    """A figure differs from the value in its file."""


@dataclass(frozen=True)
class Quote:
    """A figure in a text, and its source."""

    quoted: str
    file: str
    what: str
    where: str

    def check(self, text):
        """Refuse a figure that its text has not, or its file has otherwise."""
        if not re.search(rf"(?<![\d.,]){re.escape(self.quoted)}(?!\d|[.,]\d)", text):
            raise MisquotedError(f"{self.quoted} ({self.what} of {self.file}) must stand before its comment")
        if not agrees(self.quoted, found := self.value()):
            raise MisquotedError(f"{self.quoted} must be {found:.6g}: {self.what} of {self.file} where {self.where}")

    def value(self):
        """The value in the file."""
        chosen = rows_of(self.file, **dict(each.strip().split("=") for each in self.where.split(",") if each.strip()))
        if self.what in _COUNTS:
            return float(sum(map(_COUNTS[self.what], chosen)))
        *over, column = self.what.split()
        factor = _FACTORS[over.pop(0)] if over and over[0] in _FACTORS else 1.0
        values = [_cell(row, column) for row in chosen]
        if over:
            return factor * float(_OVER_ROWS[over[0]](values))
        if len(values) != 1:
            raise MisquotedError(f"{self.quoted} must be of one row of {self.file} (got {len(values)}: {self.where})")
        return factor * values[0]


def _cell(row, column):
    first, operator, second = re.fullmatch(r"(\w+)(?:([-/])(\w+))?", column).groups()
    if operator is None:
        return float(row[first])
    return float(row[first]) - float(row[second]) if operator == "-" else float(row[first]) / float(row[second])


@functools.cache
def _read(file):
    with (FIGURES / file).open(encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def rows_of(file, **wanted):
    """The rows of a file of ``notes/figures`` whose columns have these values."""
    if unknown := wanted.keys() - _read(file)[0].keys():
        raise MisquotedError(f"{file} has no column {', '.join(sorted(unknown))}")
    return [row for row in _read(file) if all(row[name] == str(value) for name, value in wanted.items())]


def agrees(quoted, value):
    """True if a figure is this value, rounded to the figure's own digits; ``%`` is of a share."""
    number = quoted.replace(",", "").replace("%", "").strip()
    decimals = len(number.partition(".")[2])
    scaled = 100 * value if "%" in quoted else value
    # A value that lies between two figures may be either: files are rounded too.
    return abs(float(number) - scaled) <= 0.5 * 10**-decimals * (1 + 1e-9) + 1e-12


def quotes_in(text):
    """Every quote of a text, with the text before its comment back to an empty line."""
    found = []
    for marker in MARKER.finditer(text):
        before = text[: marker.start()].rpartition("\n\n")[2]
        for each in marker["quotes"].split(";"):
            match = _QUOTE.fullmatch(" ".join(each.split()))
            if match is None:
                raise MisquotedError(f"a comment must say 'figure = column where column=value' (got {each.strip()!r})")
            found.append(
                (MARKER.sub("", before), Quote(match["quoted"], marker["file"], match["what"], match["where"] or ""))
            )
    return found


def tables_of(text):
    """Every table of a text: its rows of cells, the head first and the rule left out."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        found.append([rows[0], *rows[2:]])
    return found


def table_of(text, *head):
    """The one table whose head begins so."""
    (found,) = [table for table in tables_of(text) if tuple(table[0][: len(head)]) == head]
    return found
