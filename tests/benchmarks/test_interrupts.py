"""Ctrl-C while children start: they don't hear it, and their parent does."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.interrupts import InterruptGuard, interrupts_held

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signal masks")

ROOT = Path(__file__).parents[2]


def said_by(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_an_interrupt_is_held_not_lost() -> None:
    with InterruptGuard() as guard:
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            assert not guard.requested()
        assert guard.requested()


def test_only_children_started_in_here_are_deaf() -> None:
    # The child sets its own handler, since this process may ignore interrupts.
    code = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); s.raise_signal(s.SIGINT); print('goes on')"
    with interrupts_held():
        assert said_by(code) == "goes on\n"
    with pytest.raises(subprocess.CalledProcessError):
        said_by(code)


def test_the_first_lock_between_processes_does_not_end_the_hold() -> None:
    # In a process of its own: in this one a lock may have been made already.
    code = """
import signal
from multiprocessing import get_context
from benchmarks.harness.interrupts import interrupts_held
with interrupts_held():
    get_context("spawn").Lock()
    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""
    assert said_by(code) == "True\n"
