"""A level inside a graph: its experts run as one, for all numbers of rows by expert.

Axes: B samples in batch order, R the same rows in expert order (R = B), M members.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.autograd import Function

from celmoe.errors import ChangedError
from celmoe.grouped.capture import Sample, sample_of
from celmoe.grouped.classes import ClassRecord, Unit
from celmoe.grouped.program import Bound, run_program
from celmoe.grouped.segments import DeviceSegments
from celmoe.level import scaled
from celmoe.rows.context import ContextRows
from celmoe.rows.dispatch import permuted
from celmoe.stacked.presence import follow
from celmoe.stacked.stack import Stack
from celmoe.torch_internals import apart

from .decision import Way
from .modes import Modes, as_called


def run_inside(
    level: Any,
    way: Way,
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    context: Any,
    indices: Sequence[torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    seen: torch.Tensor | None,
) -> torch.Tensor:
    """Run a level's experts as one.

    Args:
        level: The level.
        way: The decision for it.
        hidden: ``[B, ...]``.
        mask: ``[B, ...]`` or ``None``.
        context: The context as passed.
        indices: The plan's order, its inverse, and the expert ids, ``[B]`` int64 each.
        tensors: By path in an expert, the members' tensors ``[M, ...]``.
        seen: The stack's `Stack.seen`, or ``None``.

    Returns:
        ``[B, ...]``: the experts' rows in batch order.
    """
    order, inverse, ids = indices
    unit = way.unit
    assert unit is not None
    record = unit.record
    assert record is not None
    assert record.program is not None
    names = sorted(level.experts)
    rank = {name: place for place, name in enumerate(names)}
    member_of_id = [rank[name] for name in level.experts]
    members = ids.index_select(0, order)
    if member_of_id != sorted(member_of_id):
        members = torch.tensor(member_of_id, device=ids.device).index_select(0, members)
    if unit.stack is not None and not torch.compiler.is_exporting():
        members = torch.ops.celmoe.looked(members, _looked_at(unit, way))
    rows = permuted(scaled(hidden, unit.scale), order, inverse)
    given = ContextRows(context, hidden.shape[0], hidden.device)
    aligned = [permuted(each, order, inverse) for each in given.aligned]
    mask_rows = None if mask is None else permuted(mask, order, inverse)
    sample = Sample(rows, mask_rows, given.build(aligned))
    bound = Bound(sample, [tensors[name] for name in record.captured.names], unit.modules[0])
    # Kernels were resolved for rows that the host counts.
    program = replace(record.program, calls=None)
    segments = DeviceSegments(members, len(names))
    result = run_program(program, bound, segments).hidden
    if seen is not None and torch.is_grad_enabled():
        ends = segments.ends()
        result = cast(Any, _Counted.apply)(result, seen, torch.diff(ends, prepend=ends.new_zeros(1)))
    return permuted(result, inverse, order)


class _Counted(Function):
    """The identity, which counts the members' rows once a backward pass reaches them."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, seen: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        ctx.seen, ctx.counts = seen, counts
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.seen.add_(ctx.counts)
        return grads[0], None, None


@dataclass(frozen=True)
class _Look:
    """What a graph depends on beside tensors and marks.

    Attributes:
        stack: The stack.
        record: The record of the graph that holds for its first member.
        question: The arguments of the capture's guard.
        modes: The modes of the trace.
    """

    stack: weakref.ref[Stack]
    record: weakref.ref[ClassRecord]
    question: dict[str, Any]
    modes: Modes


_LOOKS: dict[str, _Look] = {}
_NUMBERS = itertools.count()


def _looked_at(unit: Unit, way: Way) -> str:
    """The name under which `looked` finds what the graph depends on."""
    is_detached = unit.scale == 0.0
    hidden = way.given.hidden.detach() if is_detached else way.given.hidden
    with apart(), torch.inference_mode(False), torch.set_grad_enabled(way.modes.is_grad_enabled):
        question = sample_of(hidden, way.given.mask, way.given.context).arguments()
    assert unit.stack is not None
    assert way.holds is not None
    name = str(next(_NUMBERS))
    _LOOKS[name] = _Look(weakref.ref(unit.stack), weakref.ref(way.holds), question, way.modes)
    return name


@torch.library.custom_op("celmoe::looked", mutates_args=())
def looked(members: torch.Tensor, name: str) -> torch.Tensor:
    """Look if the experts are still those that the graph was made for.

    Args:
        members: ``[R]`` int64: each row's member.
        name: Where the graph's needs are kept.

    Returns:
        ``[R]`` int64: the same.

    Raises:
        ChangedError: The experts have changed.
    """
    look = _LOOKS[name]
    stack, record = look.stack(), look.record()
    if stack is not None and record is not None:
        member = stack.registry[stack.names[0]]
        look.question["expert"] = stack.twins([member], [0])[0]
        with as_called(look.modes):
            if record.captured.guard.holds(look.question):
                if look.modes.is_grad_enabled:
                    follow(stack)
                return members.clone()
        stack.changed()
    raise ChangedError(
        "'model' must have experts like those that the compiled graph was made for (got experts of which something "
        "has changed that they share; the next call compiles the model anew)"
    )


@looked.register_fake
def _(members: torch.Tensor, _name: str) -> torch.Tensor:
    return torch.empty_like(members)
