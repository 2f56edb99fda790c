"""Tells when running a class as one pays: by a count of calls, and by no clock.

A loop calls every operation of an expert once for each expert; a grouped run calls each operation once. A grouped run
in turn pays for its plan, its checks and its kernels, about as much as a hundred calls. Neither side depends on the
number of rows: arithmetic is the same either way.
"""

from __future__ import annotations

from typing import NamedTuple

from celmoe.grouped.classes import Layout

# Measured for nine kinds of experts, 2 to 256 of them, 4 to 65,536 samples. See notes/tracer.md.
_LEAST_CALLS = 100
# A loop's call without a backward pass costs a third, but a grouped run spends most in the forward pass.
_LEAST_CALLS_IN_EVALUATION = 250
# A recurrent layer calls once for each position.
_CALLS_OF_A_RECURRENCE = 24


class Cost(NamedTuple):
    """The calls that a loop makes, and those that a grouped run is worth.

    Attributes:
        calls: Number of calls that all experts make in a loop.
        least: Number of calls from which on a grouped run costs less.
    """

    calls: int
    least: int

    @property
    def pays(self) -> bool:
        """True if running the experts as one costs less."""
        return self.calls >= self.least

    def __str__(self) -> str:
        return f"about {self.calls} calls one by one; running as one pays from {self.least} on"


def estimate(layout: Layout, members: int, *, has_backward: bool) -> Cost:
    """Estimate the experts' cost either way.

    The estimate is the same before and after a call, and in every process.

    Args:
        layout: The layout of each expert. Each of its tensors stands for a call.
        members: Number of experts.
        has_backward: If true, a backward pass follows.
    """
    recurrences = sum("weight_hh_" in name for name, _, _ in layout.tensors)
    calls = members * (len(layout.tensors) + recurrences * _CALLS_OF_A_RECURRENCE)
    return Cost(calls, _LEAST_CALLS if has_backward else _LEAST_CALLS_IN_EVALUATION)
