"""Compiling the names of a batch into a plan: the work that every batch needs before anything moves."""

from benchmarks.contest import Contest
from benchmarks.stages import PLAN


def test_plan(contest: Contest) -> None:
    """Names of all levels to index tensors on the device."""
    contest.run(PLAN)
