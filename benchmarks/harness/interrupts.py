"""Ctrl-C: while training the first one asks for a stop at the end of the step, the second one does not ask."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType, TracebackType
from typing import Any, Self


class InterruptGuard:
    """While entered, an interrupt sets a flag. Outside the main thread it does nothing, as Python wants it."""

    def __init__(self) -> None:
        self._requested = False
        self._before: Any = None

    def requested(self) -> bool:
        """True after Ctrl-C was pressed."""
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
def interrupts_held() -> Iterator[None]:
    """Children started in here are born deaf to Ctrl-C: a terminal sends it to all of them, and the parent decides.

    One that is pressed meanwhile reaches the parent afterwards. Windows has nothing that children inherit.
    """
    if sys.platform == "win32":
        yield
        return
    # Started in here by the first child's locks, it would take the mask away.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
