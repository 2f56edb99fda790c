"""Estimates when running a class as one is worth the cost: a few constants, no clock.

A loop calls every operation of an expert once for each expert present. A grouped run calls each operation once, but one
call costs more. On a CPU a loop uses the caches better: an expert's rows and weights are still cached for the next
operation. A grouped run fetches the rows and weights of a whole class again for each operation.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from celmoe.grouped.classes import Layout


class _Within(NamedTuple):
    """Calls behind one operation.

    Attributes:
        looped: Calls in a loop.
        fused: Calls in a loop without gradients: PyTorch then fuses some calls.
        grouped: Calls in a grouped run.
        reads: Number of times that the operation reads its weights.
    """

    looped: int
    fused: int
    grouped: int
    reads: int


# Microseconds of a training step, on one thread of a CPU: fitted to both engines' times for four kinds of experts, 2 to
# 256 of them and 16 to 4,096 samples. See notes/performance.md.
_CALL = 28.0
_GROUPED_CALL = 90.0
_PASS = 1500.0
_KILOBYTE_OF_WEIGHTS = 0.13
_ROW_OF_A_FEATURE = 0.001
# Tensors for each operation, about; attention and recurrent layers make more calls, and are for sequences.
_TENSORS_A_CALL = 1.2
_POSITIONS = 16
_WITHIN = {"in_proj_weight": _Within(26, 4, 27, 1), "weight_hh_l0": _Within(140, 38, 54, _POSITIONS)}
# The share of either cost that is left without a backward pass. A grouped run spends most in the forward pass.
_LOOPED_FORWARD = 0.4
_GROUPED_FORWARD = 0.85


class Cost(NamedTuple):
    """The terms, in microseconds for a pass, without costs that are the same either way.

    Attributes:
        looped: Calling each expert's operations.
        grouped: Calling each operation once, and fetching all rows and weights anew for each.
    """

    looped: float
    grouped: float

    @property
    def pays(self) -> bool:
        """True if running the experts as one costs less."""
        return self.grouped < self.looped

    def __str__(self) -> str:
        return f"an estimate of {self.looped:.0f} µs one by one, {self.grouped:.0f} µs as one"


def estimate(layout: Layout, members: int, rows: int, *, on_cpu: bool, has_backward: bool) -> Cost:
    """Estimate the experts' cost either way.

    The estimate follows from an expert's tensors and from the numbers of experts and rows. The estimate is the same
    before and after a call, and in every process.

    Args:
        layout: The layout of each expert.
        members: Number of experts.
        rows: Number of samples of all experts.
        on_cpu: If true, the experts are on a CPU.
        has_backward: If true, a backward pass follows.
    """
    terms = _terms(layout)
    looped = members * (terms.looped if has_backward else terms.fused)
    grouped = terms.grouped
    if on_cpu:
        grouped += terms.grouped_member * members + terms.grouped_row * rows
    return Cost(looped, grouped) if has_backward else Cost(_LOOPED_FORWARD * looped, _GROUPED_FORWARD * grouped)


class _Terms(NamedTuple):
    """Microseconds: an expert alone with gradients, and without; all as one, and then for each member and each row."""

    looped: float
    fused: float
    grouped: float
    grouped_member: float
    grouped_row: float


@lru_cache(maxsize=1024)
def _terms(layout: Layout) -> _Terms:
    names = [name.rpartition(".")[2] for name, _, _ in layout.tensors]
    within = [_WITHIN[name] for name in names if name in _WITHIN]
    calls = len(names) / _TENSORS_A_CALL
    kilobytes = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in layout.tensors) / 1024
    features = sum(shape[0] for _, shape, _ in layout.tensors if shape)
    return _Terms(
        _CALL * (calls + sum(each.looped for each in within)),
        _CALL * (calls + sum(each.fused for each in within)),
        _PASS + _GROUPED_CALL * (calls + sum(each.grouped for each in within)),
        _KILOBYTE_OF_WEIGHTS * kilobytes * max((each.reads for each in within), default=1),
        _ROW_OF_A_FEATURE * features * (_POSITIONS if within else 1),
    )


def never_pays(layout: Layout, members: int, *, on_cpu: bool) -> bool:
    """True if a loop costs less with so many experts, or fewer, and any number of rows."""
    # Grouping that does not pay in training does not pay without gradients either.
    return not estimate(layout, members, 0, on_cpu=on_cpu, has_backward=True).pays
