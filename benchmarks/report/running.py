"""Runs the suite in a process of its own, and hears from it about its progress.

A device's driver may end the suite's process, and the suite's threads and warnings should not reach the parent.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from benchmarks.report.pacing import Pace

FOUND, BEGUN, DONE = "found", "begun", "done"
PASSED = "passed"
OUT_OF_TIME, STOPPED = "left out: the time was up", "left out: stopped by Ctrl-C"
# With failures, with files that can't be imported, or with nothing to run: it came to its own end.
_ENDINGS = (
    pytest.ExitCode.OK,
    pytest.ExitCode.TESTS_FAILED,
    pytest.ExitCode.INTERRUPTED,
    pytest.ExitCode.NO_TESTS_COLLECTED,
)
_LOOK_AFTER_SECONDS = 0.2


@dataclass(frozen=True)
class News:
    """A message of the suite's process: all names are `FOUND`, one benchmark has `BEGUN`, or is `DONE`.

    The outcome of one that is done is `PASSED`, or why it has no result: it failed, or was left out.
    """

    kind: str
    name: str = ""
    names: tuple[str, ...] = ()
    outcome: str = ""
    failed: bool = False


@dataclass
class Outcome:
    """The end of a run: how many have a result, by name why others have none, and why its process ended early."""

    measured: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    crash: str = ""


class Beacon:
    """A pytest plugin: reports events to the parent, and begins nothing after a stop or too late to end in time."""

    def __init__(self, connection: Connection, stop: Event, seconds: float | None) -> None:
        self._connection, self._stop, self._pace = connection, stop, Pace(seconds)
        self._why, self._failed = "", False

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """All benchmarks are there, in the order of their files."""
        self._pace.order(items)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """All benchmarks are known."""
        self._connection.send(News(FOUND, names=tuple(item.nodeid for item in session.items)))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """From before one begins until after it has ended."""
        self._connection.send(News(BEGUN, item.nodeid))
        self._why, self._failed = "", False
        try:
            return (yield)
        finally:
            self._pace.end()
            self._connection.send(News(DONE, item.nodeid, outcome=self._why or PASSED, failed=self._failed))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Before any fixture is made."""
        if self._stop.is_set():
            pytest.skip(STOPPED)
        if not self._pace.fits(item):
            pytest.skip(OUT_OF_TIME)
        self._pace.begin(item)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the report of its setup, run or teardown; the first failure is the reason for a missing result."""
        if report.outcome != PASSED and not self._why:
            self._why = _reason(report)
            self._failed = report.outcome == "failed"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that can't be imported is a failure too."""
        if report.outcome == "failed":
            self._connection.send(News(DONE, report.nodeid, outcome=_last_line(report.longreprtext), failed=True))


def run_suite(
    targets: Sequence[str],
    arguments: Sequence[str],
    log: Path,
    seconds: float | None,
    hear: Callable[[News], None],
    stopped: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Run pytest on the targets to its end.

    Args:
        targets: Files or folders.
        arguments: Further arguments of pytest.
        log: The file of its output.
        seconds: The time within which to end; ``None`` for no limit.
        hear: Takes each piece of news as it comes.
        stopped: True to begin no further benchmark.
    """
    context = get_context("spawn")
    ear, mouth = context.Pipe(duplex=False)
    stop = context.Event()
    child = context.Process(target=_child, args=([*arguments, *targets], mouth, stop, str(log), seconds))
    child.start()
    mouth.close()
    outcome = Outcome()
    running = ""
    try:
        while True:
            while not ear.poll(_LOOK_AFTER_SECONDS):
                if stopped():
                    stop.set()
            news: News = ear.recv()
            hear(news)
            running = news.name if news.kind == BEGUN else ""
            if news.kind == DONE and news.outcome == PASSED:
                outcome.measured += 1
            elif news.kind == DONE:
                (outcome.failed if news.failed else outcome.left_out)[news.name] = news.outcome
    except EOFError:
        child.join()
    finally:
        child.terminate()
    if child.exitcode not in _ENDINGS:
        during = f" during {running}" if running else ""
        outcome.crash = f"the suite's process ended with {child.exitcode}{during}; {log} holds its last words"
    return outcome


def _child(arguments: Sequence[str], mouth: Connection, stop: Event, log: str, seconds: float | None) -> None:
    # A terminal sends Ctrl-C to both, and the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Options that a user adds to every run of pytest are meant for tests: more processes, say.
    os.environ.pop("PYTEST_ADDOPTS", None)
    # By their numbers, so that a driver's last words get there too.
    with Path(log).open("w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    sys.exit(int(pytest.main(list(arguments), plugins=[Beacon(mouth, stop, seconds)])))


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return _last_line(report.longreprtext) if crash is None else str(crash.message).splitlines()[0]


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
