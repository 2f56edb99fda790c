"""A line on the terminal for a user who waits."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

# Seconds that pass before the line appears.
PATIENCE = 2.0


def told(items: Iterable[Item], total: int, doing: str) -> Iterator[Item]:
    """Yield the items, and print a line on standard error once the items have taken longer than `PATIENCE`.

    Args:
        items: Items that may take long.
        total: Number of items.
        doing: The work on the items, in words.
    """
    start = time.monotonic()
    is_told = False
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - start > PATIENCE:
            is_live = sys.stderr.isatty()
            if is_live or not is_told:
                end = "" if is_live else "\n"
                print(f"\rcelmoe: {doing}: {done} of {total}", end=end, file=sys.stderr, flush=True)  # noqa: T201  # a line for people
            is_told = True
    if is_told and sys.stderr.isatty():
        print(file=sys.stderr)  # noqa: T201  # as above
