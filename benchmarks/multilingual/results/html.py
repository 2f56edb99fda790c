"""Tables in HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def table_of(headings: Sequence[str], rows: Iterable[str], texts: int = 1) -> str:
    """A table that scrolls in its box; ``texts`` columns at its beginning are words."""
    cells = "".join(
        f"<th{' class=text' * (place < texts)}>{escape(heading)}</th>" for place, heading in enumerate(headings)
    )
    return f"<div class=wide><table><tr>{cells}</tr>{''.join(rows)}</table></div>"


def row_of(cells: Iterable[str], texts: int = 1, kind: str = "") -> str:
    """One row, of cells that are HTML."""
    told = "".join(f"<td{' class=text' * (place < texts)}>{cell}</td>" for place, cell in enumerate(cells))
    return f"<tr{f' class={kind}' if kind else ''}>{told}</tr>"
