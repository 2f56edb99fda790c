"""Compiling the names of a batch into a plan: the work that every batch needs before anything moves."""

from benchmarks.suite.contest import Contest
from benchmarks.suite.stages import PLAN, ROUTING


def test_plan(contest: Contest) -> None:
    """Names of all levels to index tensors on the device."""
    contest.run(PLAN)


def test_routing(contest: Contest) -> None:
    """A pass over one column with experts that return it: the least that holds celmoe-vp's routing."""
    contest.run(ROUTING)
