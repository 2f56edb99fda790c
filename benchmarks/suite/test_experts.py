"""The experts of one level, forward and backward: their products alone, and the whole of them."""

from benchmarks.suite.contest import Contest
from benchmarks.suite.stages import EXPERTS


def test_grouped_product(contest: Contest) -> None:
    """Sorted rows through one linear layer an expert."""
    contest.run(EXPERTS)


def test_experts(contest: Contest) -> None:
    """A level that is planned already: rows to its experts, through them, and back."""
    contest.run(EXPERTS)
