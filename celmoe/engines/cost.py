"""When running a class as one is worth it: a few constants, no clock.

A loop calls every operation of an expert once for each expert present. As one, each is called once, dearer. On a CPU a
loop has the better of the caches in return: an expert's rows and weights are still there when the next operation wants
them, while those of a whole class have to be fetched again each time.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from celmoe.grouped.classes import Layout


class _Within(NamedTuple):
    """Calls behind one operation.

    Attributes:
        looped: In a loop.
        fused: The same without gradients: PyTorch fuses some then.
        grouped: As one.
        reads: How often it reads its weights.
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
# An operation to about so many tensors; attention and recurrent layers make more calls, and are for sequences.
_TENSORS_A_CALL = 1.2
_POSITIONS = 16
_WITHIN = {"in_proj_weight": _Within(26, 4, 27, 1), "weight_hh_l0": _Within(140, 38, 54, _POSITIONS)}
# What is left of either without a backward pass. Most of what runs a class as one is forward.
_LOOPED_FORWARD = 0.4
_GROUPED_FORWARD = 0.85


class Cost(NamedTuple):
    """The terms, in microseconds for a pass; what is the same either way is left out.

    Attributes:
        looped: Calling each expert's operations.
        grouped: Calling them once, and fetching all rows and weights anew for each.
    """

    looped: float
    grouped: float

    @property
    def pays(self) -> bool:
        """Whether running the experts as one costs less."""
        return self.grouped < self.looped

    def __str__(self) -> str:
        return f"an estimate of {self.looped:.0f} µs one by one, {self.grouped:.0f} µs as one"


def estimate(layout: Layout, members: int, rows: int, *, on_cpu: bool, has_backward: bool) -> Cost:
    """What experts cost either way.

    It is told from the tensors that an expert has and from the numbers of experts and rows, so it is the same before
    and after a call, and in every process.

    Args:
        layout: Of each expert.
        members: How many experts.
        rows: Samples of all of them.
        on_cpu: Whether they are on a CPU.
        has_backward: Whether a backward pass is to come.
    """
    terms = _terms(layout)
    looped = members * (terms.looped if has_backward else terms.fused)
    grouped = terms.grouped
    if on_cpu:
        grouped += terms.grouped_member * members + terms.grouped_row * rows
    return Cost(looped, grouped) if has_backward else Cost(_LOOPED_FORWARD * looped, _GROUPED_FORWARD * grouped)


class _Terms(NamedTuple):
    """Microseconds: of an expert alone, with gradients and without; of all as one, a member more and a row more."""

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
    """Whether a loop costs less with so many experts, or fewer, and any number of rows."""
    # Where it does not in training, it does not without gradients either.
    return not estimate(layout, members, 0, on_cpu=on_cpu, has_backward=True).pays
