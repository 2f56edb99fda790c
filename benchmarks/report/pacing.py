"""The order of benchmarks, and those that still fit into the time.

The smallest of each kind come first, and the kinds take turns. If the time is up early, every stage has been measured,
and only the largest workloads are missing.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any, TypeAlias

import pytest

# A benchmark's function and its device.
Kind: TypeAlias = tuple[str, str | None]


class Pace:
    """Orders benchmarks, and knows from those that ran how long others may take.

    Args:
        seconds: Within which all should end; ``None`` for as long as it takes.
    """

    def __init__(self, seconds: float | None) -> None:
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._running: tuple[pytest.Item, float] | None = None
        self._longest = 0.0
        self._last: dict[Kind, tuple[int, float]] = {}

    def order(self, items: list[pytest.Item]) -> None:
        """Sort them in place."""
        items.sort(key=_size)
        turns: Counter[Kind] = Counter()
        turn_of: dict[str, int] = {}
        for item in items:
            turn_of[item.nodeid] = turns[_kind(item)]
            turns[_kind(item)] += 1
        items.sort(key=lambda item: turn_of[item.nodeid])

    def fits(self, item: pytest.Item) -> bool:
        """True if the benchmark may begin: it is likely to end in time."""
        return self._deadline is None or time.monotonic() + self._guess(item) < self._deadline

    def begin(self, item: pytest.Item) -> None:
        """It begins."""
        self._running = (item, time.monotonic())

    def end(self) -> None:
        """Note the end of the running benchmark, if there is one."""
        if self._running is None:
            return
        item, begun = self._running
        seconds = time.monotonic() - begun
        self._longest = max(self._longest, seconds)
        self._last[_kind(item)] = (_size(item), seconds)
        self._running = None

    def _guess(self, item: pytest.Item) -> float:
        """The seconds of the last one of its kind, times the ratio of their sizes if it is larger."""
        size, seconds = self._last.get(_kind(item), (_size(item), self._longest))
        return seconds * max(1.0, _size(item) / size)


def _parameter(item: pytest.Item, name: str) -> Any:
    return getattr(getattr(item, "callspec", None), "params", {}).get(name)


def _kind(item: pytest.Item) -> Kind:
    return (item.nodeid.partition("[")[0], _parameter(item, "device_name"))


def _size(item: pytest.Item) -> int:
    """The number that the slowest contenders' time grows with: some look at all samples once for every expert."""
    workload = _parameter(item, "workload")
    if workload is None:
        return 1
    size: int = workload.batch_size * workload.num_experts * (workload.positions or 1)
    return size
