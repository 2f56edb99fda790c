"""The command from its options to its exit code: find devices, run the suite, compare, write the page."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import benchmarks
from benchmarks.harness.arguments import OptionError, above_zero, make_parser, one_of, read_arguments
from benchmarks.harness.devices import find_devices
from benchmarks.harness.interrupts import InterruptGuard
from benchmarks.harness.setting import make_console, prepare_folder
from benchmarks.harness.wording import DEVICE_NAMES
from benchmarks.report.machine import machine_facts
from benchmarks.report.page import Findings, write_page
from benchmarks.report.reading import ReadError, Suite, read_suite
from benchmarks.report.regressions import SLOWER, compare
from benchmarks.report.running import Outcome, run_suite
from benchmarks.report.targets import find_marks
from benchmarks.report.terminal import progress_bar, tell
from benchmarks.suite.operations import count_all
from benchmarks.suite.sets import DEFAULT, FULL, GRID, GROUPED, SETS
from celmoe.devices import DEVICES

DEFAULT_REPORT = Path("celmoe-report") / "benchmarks"
RESULTS, MACHINE, LOG = "benchmarks.json", "machine.json", "pytest.log"
GOOD, BAD, REFUSED, INTERRUPTED = 0, 1, 2, 130
# Bounds the default set, the report included.
MINUTES = 6
# Seconds of the given minutes set aside for the suite's start and end, and for the figures.
_KEPT_SECONDS = 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks.

    Returns:
        0; 1 if a benchmark got slower or failed, or a target was missed; 2 if the command was refused or nothing was
        measured; 130 after Ctrl-C, with a page of the benchmarks measured before.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        return _measure(given, errors)
    except (OptionError, ReadError) as error:
        errors.print(" ".join(str(error).split()), markup=False)
        return REFUSED
    except OSError as error:
        errors.print(f"a file or folder could not be used: {error}", markup=False)
        return REFUSED
    except KeyboardInterrupt:
        errors.print("stopped at once; what was measured is lost", markup=False)
        return INTERRUPTED


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The options that these arguments mean: ``device``, ``set``, ``seconds``, ``compare`` and ``report``.

    Raises:
        OptionError: An argument is unknown, or has a value that can't be used.
    """
    parser = make_parser(
        "benchmarks", "Run the benchmarks and write a page of what came out, with its figures and numbers."
    )
    add = parser.add_argument
    add(
        "--device",
        nargs="+",
        action="extend",
        help=f"{', '.join(DEVICES)}; several may follow (default: all that work here)",
    )
    add(
        "--set",
        default=DEFAULT,
        help=f"{DEFAULT}: at most {MINUTES} minutes; {FULL}: hours; {GRID} and {GROUPED}: those with targets for the "
        "looped and the grouped engine; exit code 1 where one is missed",
    )
    add("--seconds", help="about how long each benchmark goes on; the default set then takes as long as it takes")
    add("--compare", metavar="OLD.json", help="the benchmarks.json of another run; exit code 1 where this is slower")
    add("--report", default=str(DEFAULT_REPORT), help=f"folder to write to (default {DEFAULT_REPORT})")
    given = read_arguments(parser, arguments)
    if not given.report:
        raise OptionError("'--report' must be a folder that can be written to (got '')")
    if given.device is not None:
        given.device = tuple(dict.fromkeys(one_of("--device", each, DEVICES) for each in given.device))
    one_of("--set", given.set, SETS)
    given.seconds = None if given.seconds is None else above_zero("--seconds", given.seconds)
    given.compare = None if given.compare is None else _other_run(given.compare)
    given.report = Path(given.report)
    return given


def _other_run(text: str) -> Suite:
    try:
        suite = read_suite(Path(text))
    except ReadError as error:
        raise OptionError(f"'--compare' must be the benchmarks.json of another run (got {error})") from None
    if not suite.records:
        raise OptionError(f"'--compare' must be the benchmarks.json of another run (got {text!r}: no benchmarks in it)")
    return suite


def _measure(given: Sequence[str], errors: Console) -> int:
    begun = time.monotonic()
    options = parse_options(given)
    prepare_folder(options.report)
    present, absent = find_devices(options.device)
    console = make_console()
    for device, why in absent.items():
        console.print(f"not on {DEVICE_NAMES[device]}: {why}", markup=False, soft_wrap=True)
    outcome, interrupted = _run(options, present, console, begun)
    if interrupted and not outcome.measured:
        raise KeyboardInterrupt
    suite = _suite(options.report / RESULTS, outcome)
    machine = machine_facts(present, ["python", "-m", "benchmarks", *given])
    (options.report / MACHINE).write_text(json.dumps(machine, indent=2) + "\n", encoding="utf-8")
    counts = count_all(console) if options.set == GROUPED else []
    marks = find_marks(options.set, suite, counts)
    comparison = None if options.compare is None else compare(options.compare, suite)
    unfinished = outcome.failed | outcome.left_out | ({"the suite": outcome.crash} if outcome.crash else {})
    page = write_page(options.report, Findings(suite, machine, absent, unfinished, comparison, marks, counts))
    tell(console, suite, outcome, comparison, marks)
    console.print(f"{time.monotonic() - begun:.0f} s; the page is {page}", markup=False, soft_wrap=True)
    if interrupted:
        return INTERRUPTED
    if comparison is not None and not comparison.changes:
        errors.print("'--compare' must be a run that shares benchmarks with this one (got none of them)", markup=False)
        return REFUSED
    slower = comparison is not None and comparison.of(SLOWER)
    missed = any(mark.verdict == "missed" for mark in marks)
    return BAD if slower or missed or outcome.failed or outcome.crash else GOOD


def _run(options: argparse.Namespace, present: Sequence[str], console: Console, begun: float) -> tuple[Outcome, bool]:
    root = Path(benchmarks.__file__).parents[1]
    results = options.report.absolute() / RESULTS
    results.unlink(missing_ok=True)
    arguments = [
        f"--rootdir={root}",
        f"--config-file={root / 'pyproject.toml'}",
        # One process: the tests' own option would start several.
        "--override-ini=addopts=--import-mode=importlib",
        "--override-ini=python_files=test_*.py bench_*.py",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        f"--benchmark-json={results}",
        f"--set={options.set}",
        *(f"--device={device}" for device in present),
        *([] if options.seconds is None else [f"--seconds={options.seconds}"]),
    ]
    bounded = options.set == DEFAULT and options.seconds is None
    seconds = 60 * MINUTES - _KEPT_SECONDS - (time.monotonic() - begun) if bounded else None
    targets = [str(root / "benchmarks" / "suite")]
    with progress_bar(console) as hear, InterruptGuard() as guard:
        outcome = run_suite(targets, arguments, options.report / LOG, seconds, hear, guard.requested)
    return outcome, guard.requested()


def _suite(results: Path, outcome: Outcome) -> Suite:
    """What is there.

    Raises:
        ReadError: Nothing is, and why.
    """
    # pytest-benchmark makes the file first and fills it in the end.
    if outcome.measured and results.stat().st_size:
        return read_suite(results)
    reasons = dict.fromkeys([*outcome.failed.values(), *outcome.left_out.values(), *filter(None, [outcome.crash])])
    raise ReadError(f"nothing was measured: {'; '.join(reasons) or 'the suite has no benchmarks'}")
