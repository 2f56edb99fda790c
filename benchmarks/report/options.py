"""The command line, checked: every refusal is one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.arguments import OptionError, above_zero, make_parser, one_of, read_arguments
from benchmarks.report.reading import ReadError, Suite, read_suite
from benchmarks.suite.sets import DEFAULT, FULL, GRID, GROUPED, SETS
from celmoe.devices import DEVICES

MODULE = "benchmarks"
DEFAULT_REPORT = Path("celmoe-report") / "benchmarks"
# Bounds the default set, the report included.
MINUTES = 6


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line.

    Attributes:
        devices: The devices asked for; ``None`` for all that work here.
        workloads: One of `SETS`.
        seconds: About how long each benchmark goes on; ``None`` for the suite's own choice.
        compare: The run to compare with.
        report: The folder to write to.
    """

    devices: tuple[str, ...] | None
    workloads: str
    seconds: float | None
    compare: Suite | None
    report: Path


def parse_options(arguments: Sequence[str]) -> Options:
    """The options that these arguments mean.

    Raises:
        OptionError: An argument is unknown, or has a value that can't be used.
    """
    given = read_arguments(_parser(), arguments)
    if not given.report:
        raise OptionError("'--report' must be a folder that can be written to (got '')")
    devices = None if given.device is None else tuple(dict.fromkeys(map(_device, given.device)))
    return Options(
        devices=devices,
        workloads=one_of("--set", given.set, SETS),
        seconds=None if given.seconds is None else above_zero("--seconds", given.seconds),
        compare=None if given.compare is None else _other_run(given.compare),
        report=Path(given.report),
    )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, "Run the benchmarks and write a page of what came out, with its figures and numbers.")
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
    return parser


def _device(text: str) -> str:
    return one_of("--device", text, DEVICES)


def _other_run(text: str) -> Suite:
    try:
        suite = read_suite(Path(text))
    except ReadError as error:
        raise OptionError(f"'--compare' must be the benchmarks.json of another run (got {error})") from None
    if not suite.records:
        raise OptionError(f"'--compare' must be the benchmarks.json of another run (got {text!r}: no benchmarks in it)")
    return suite
