"""The command line's way in and out: options, exit codes, interrupts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.multilingual.checkpoint import CheckpointError
from benchmarks.multilingual.compare import compare
from benchmarks.multilingual.console import Reporter
from benchmarks.multilingual.job import INTERRUPTED, run
from benchmarks.multilingual.options import OptionError, parse_options

REFUSED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code: 0, 2 for a refused command line, 130 where somebody pressed Ctrl-C."""
    reporter = Reporter()
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments)
        return compare(options, reporter) if options.compare else run(options, reporter)
    except (OptionError, CheckpointError) as error:
        reporter.fail(str(error))
        return REFUSED
    except KeyboardInterrupt:
        reporter.fail("stopped; the dictionaries that were read and the last checkpoint are kept")
        return INTERRUPTED
