"""When running a class as one is worth it: a few constants, no clock.

A loop launches every operation of an expert once for each expert present. As one, each is launched once, dearer, and
the members' tensors are stacked first. What is computed is the same, so it does not count.
"""

from __future__ import annotations

from typing import NamedTuple

from .grouping import Unit

# Microseconds, measured on one thread of a CPU: see notes/performance.md.
_CALL = 8.0
_GROUPED_CALL = 25.0
_PASS = 250.0
_TENSOR = 2.0
_BYTES_PER_MICROSECOND = 8_000.0


class Cost(NamedTuple):
    """The terms, in microseconds for a pass.

    Attributes:
        looped: Launching each expert's operations.
        grouped: Launching them once, and stacking the members' tensors.
    """

    looped: float
    grouped: float


def estimate(unit: Unit) -> Cost:
    """What launching costs either way, for the operations that an expert of its size has."""
    signature = unit.record.signature
    members = len(unit.members)
    # Before a program is known: a tensor is used about once, between two other operations.
    operations = max(map(len, unit.record.programs), default=3 * max(1, len(signature.leaves)))
    size = sum(tensor.nbytes for tensor in unit.members[0].tensors)
    looped = members * operations * _CALL
    stacking = members * (len(signature.leaves) * _TENSOR + size / _BYTES_PER_MICROSECOND)
    return Cost(looped, _PASS + operations * _GROUPED_CALL + stacking)


def judged(unit: Unit) -> Unit:
    """The unit, with a fault where a loop over it costs less."""
    if unit.fault is not None or len(unit.members) == 1:
        return unit
    cost = estimate(unit)
    if cost.grouped < cost.looped:
        return unit
    few = f"are few ({cost.looped:.0f} µs to launch one by one, {cost.grouped:.0f} µs as one)"
    return unit._replace(fault=few)
