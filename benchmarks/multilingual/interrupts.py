"""Ctrl-C: while training the first one asks for a stop at the end of the step, the second one does not ask."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self


class InterruptGuard:
    """While entered, an interrupt sets a flag. Outside the main thread it does nothing, as Python wants it."""

    def __init__(self) -> None:
        self._requested = False
        self._before: Any = None

    def requested(self) -> bool:
        """Whether somebody has pressed Ctrl-C."""
        return self._requested

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Children started in here are born deaf to Ctrl-C: a terminal sends it to all of them, and the parent decides."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
