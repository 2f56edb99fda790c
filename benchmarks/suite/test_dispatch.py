"""Moving rows into expert order and back, forward and backward."""

from benchmarks.suite.contest import Contest
from benchmarks.suite.stages import DISPATCH


def test_dispatch(contest: Contest) -> None:
    """Dispatch and combine of one level that is planned already."""
    contest.run(DISPATCH)
