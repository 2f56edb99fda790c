"""Work in a process of its own, which sends its results as it goes, and which a clock ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

# Works until a time by ``time.time()``, and sends its results so far.
Work: TypeAlias = Callable[[float, Callable[[Any], None]], None]


def last_told(work: Work, seconds: float) -> tuple[Any, str]:
    """Run work in a process of its own, and end it after so many seconds.

    Args:
        work: Can be pickled.
        seconds: Limit on its time, from the start of its process.

    Returns:
        The last result, ``None`` if none was sent; and why the work did not end by itself, empty if it did.
    """
    context = get_context("spawn")
    ear, mouth = context.Pipe(duplex=False)
    deadline = time.time() + seconds
    child = context.Process(target=_run, args=(work, deadline, mouth), daemon=True)
    child.start()
    mouth.close()
    told, why = None, f"it took more than {seconds:.0f} s"
    try:
        while ear.poll(max(0.0, deadline - time.time())):
            told = ear.recv()
    except EOFError:
        child.join()
        why = f"its process ended with {child.exitcode}" if child.exitcode else ""
    finally:
        child.kill()
        child.join()
        ear.close()
    return told, why


def _run(work: Work, deadline: float, mouth: Connection) -> None:
    work(deadline, mouth.send)
    mouth.close()
