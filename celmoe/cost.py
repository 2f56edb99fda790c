"""When running a class as one is worth it: a few constants, no clock.

A loop calls every operation of an expert once for each expert present. As one, each is called once, dearer, in a mode
that takes every call apart. On a CPU a loop has the better of the caches in return: an expert's rows and weights are
still there when the next operation wants them, while those of a whole class have to be fetched again each time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .grouping import Unit


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


def estimate(unit: Unit, rows: int, *, has_backward: bool, members: int | None = None) -> Cost:
    """What a unit costs either way.

    It is told from the tensors that an expert has and from the numbers of experts and rows, so it is the same before
    and after a call, and in every process.

    Args:
        unit: The experts.
        rows: Samples of all of them.
        has_backward: Whether gradients are recorded.
        members: How many experts to take it for, if not for those of the unit.
    """
    members = len(unit.members) if members is None else members
    first = unit.members[0]
    within = [_WITHIN[places[0].name] for places in unit.record.signature.leaves if places[0].name in _WITHIN]
    calls = len(first.tensors) / _TENSORS_A_CALL
    looped = _CALL * members * (calls + sum(each.looped if has_backward else each.fused for each in within))
    grouped = _PASS + _GROUPED_CALL * (calls + sum(each.grouped for each in within))
    if all(tensor.is_cpu for tensor in first.tensors):
        kilobytes = sum(tensor.nbytes for tensor in first.tensors) / 1024
        features = sum(tensor.shape[0] for tensor in first.tensors if tensor.dim())
        grouped += _KILOBYTE_OF_WEIGHTS * kilobytes * members * max((each.reads for each in within), default=1)
        grouped += _ROW_OF_A_FEATURE * features * rows * (_POSITIONS if within else 1)
    return Cost(looped, grouped) if has_backward else Cost(_LOOPED_FORWARD * looped, _GROUPED_FORWARD * grouped)


def never_pays(unit: Unit, members: int) -> bool:
    """Whether a loop costs less for this class with so many experts, or fewer, and any number of rows."""
    # Where it does not in training, it does not without gradients either.
    cost = estimate(unit, 0, has_backward=True, members=members)
    return cost.looped <= cost.grouped


def judged(unit: Unit, rows: int) -> Unit:
    """The unit, with a fault where a loop over it costs less."""
    if unit.is_alone:
        return unit
    cost = estimate(unit, rows, has_backward=torch.is_grad_enabled())
    if cost.grouped < cost.looped:
        return unit
    few = f"are few or large ({cost.looped:.0f} µs one by one, {cost.grouped:.0f} µs as one)"
    return unit._replace(fault=few)
