"""When running a class as one is worth it: a few constants, no clock.

A loop launches every operation of an expert once for each expert present. As one, each is launched once, dearer, and
the members' tensors are stacked first. What is computed is the same, so it does not count.
"""

from __future__ import annotations

from typing import NamedTuple

from .grouping import Unit

# Microseconds of a training step, on one thread of a CPU: see notes/performance.md.
_EXPERT = 60.0
_CALL = 35.0
_GROUPED_CALL = 90.0
_PASS = 1200.0
_TENSOR = 7.0
# An operation to about so many tensors; and what attention and recurrent layers launch beside.
_TENSORS_A_CALL = 1.2
_CALLS_WITHIN = {"in_proj_weight": 8, "weight_hh_l0": 20}


class Cost(NamedTuple):
    """The terms, in microseconds for a pass.

    Attributes:
        looped: Launching each expert's operations.
        grouped: Launching them once, and stacking the members' tensors.
    """

    looped: float
    grouped: float


def estimate(unit: Unit) -> Cost:
    """What launching costs either way, told from the tensors that an expert has: the same before and after a call."""
    leaves = unit.record.signature.leaves
    members = len(unit.members)
    calls = len(leaves) / _TENSORS_A_CALL + sum(_CALLS_WITHIN.get(places[0].name, 0) for places in leaves)
    looped = members * (_EXPERT + calls * _CALL)
    return Cost(looped, _PASS + calls * _GROUPED_CALL + members * len(leaves) * _TENSOR)


def judged(unit: Unit) -> Unit:
    """The unit, with a fault where a loop over it costs less."""
    if unit.fault is not None or len(unit.members) == 1:
        return unit
    cost = estimate(unit)
    if cost.grouped < cost.looped:
        return unit
    few = f"are few ({cost.looped:.0f} µs to launch one by one, {cost.grouped:.0f} µs as one)"
    return unit._replace(fault=few)
