"""The most memory that a forward and a backward pass take, weights included."""

import pytest

from benchmarks.harness.memory import can_measure
from benchmarks.suite.contest import Contest
from benchmarks.suite.stages import MEMORY


def test_memory(contest: Contest) -> None:
    """Forward, backward and the gradients of one step from scratch."""
    if not can_measure(contest.device):
        pytest.skip(f"the memory of {contest.device_name} can not be counted")
    contest.run(MEMORY)
