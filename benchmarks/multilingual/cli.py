"""The command line's way in and out: options, exit codes, interrupts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.harness.arguments import OptionError
from benchmarks.multilingual.adding import add
from benchmarks.multilingual.console import Reporter
from benchmarks.multilingual.job import INTERRUPTED, run
from benchmarks.multilingual.learning.checkpoint import CheckpointError
from benchmarks.multilingual.learning.ranks import RANK_LOST, RankLostError, joined_ranks, launched_rank
from benchmarks.multilingual.options import parse_options
from benchmarks.multilingual.studies.compare import compare
from celmoe.errors import CELMoEError

REFUSED = 2


def answered(work: Callable[[], int], reporter: Reporter) -> int:
    """The exit code: the work's own, 2 for a refusal or a file that can't be read or written, 130 for Ctrl-C.

    On one of several ranks, the code is 1 if another rank is gone.
    """
    try:
        return work()
    except (OptionError, CheckpointError) as error:
        reporter.refuse(str(error))
        return REFUSED
    except CELMoEError as error:
        reporter.fail(str(error))
        return REFUSED
    except RankLostError as error:
        reporter.fail(str(error))
        return RANK_LOST
    except OSError as error:
        reporter.fail(f"a file or folder could not be used: {error}")
        return REFUSED
    except KeyboardInterrupt:
        reporter.fail("stopped; the dictionaries that were read are kept")
        return INTERRUPTED


def command(work: Callable[[Sequence[str], Reporter], int]) -> Callable[[Sequence[str]], int]:
    """A command's ``main``: its arguments to its exit code."""

    def main(arguments: Sequence[str]) -> int:
        reporter = Reporter()
        return answered(lambda: work(arguments, reporter), reporter)

    return main


def main(arguments: Sequence[str]) -> int:
    """Run the job; returns the exit code."""
    reporter = Reporter(rank=launched_rank())

    def work() -> int:
        options = parse_options(arguments)
        if options.compare:
            return compare(options, reporter)
        if options.add is not None:
            return add(options, reporter)
        if options.parallel is None:
            return run(options, reporter)
        with joined_ranks() as ranks:
            return run(options, reporter, ranks)

    return answered(work, reporter)
