"""Which members of a class a backward pass reaches, and by what.

An expert alone has no gradient where nothing of what it gave is differentiated. Run as one, all members are reached
when any of them is: with a loss of one expert for an objective the others would get zeros, and an optimizer would move
them; and where a zero meets a derivative that is not finite, what comes of it is no number. So what a class gives is
tallied by member on the way back, and wherever an operation took something, gradients are held back of the members none
of whose chosen results came of that: their own tensors get none, and rows get zeros, as from the batch.

Passes are told apart by the number that PyTorch gives each: they may run side by side, and one within another. One with
a graph of its own may be gone through by a later one, which then reaches what the first did without coming by the
losses; that shows where the gradients of the first had come out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, TypeAlias, cast

import torch
from torch.autograd import Function

from .product import is_batched

# By the name of a loss, the edges between operations that it came by; the rows do for `None`.
Reach: TypeAlias = Mapping[str | None, frozenset[int]]
# Passes that are remembered: of older ones all members count as reached.
_MOST_PASSES = 64


@dataclass
class _Pass:
    """One backward pass.

    Attributes:
        names: By member, the losses that it has come by.
        has_rows: Whether it has come by the rows of all.
        earlier: Passes whose graphs it goes through, and by whose gradients: a member's, or `None` for the rows.
    """

    names: list[set[str]]
    has_rows: bool = False
    earlier: set[tuple[int, int | None]] = field(default_factory=set)


class Tally:
    """What was reached, by backward pass.

    Args:
        num_members: Members P.

    Attributes:
        reach: What came by which edges; all by all where it is empty.
    """

    def __init__(self, num_members: int) -> None:
        self.reach: Reach = {}
        self._num_members = num_members
        self._passes: dict[int, _Pass] = {}
        self._lock = Lock()

    def _current(self) -> _Pass:
        task = torch._C._current_graph_task_id()
        # Passes may run in several threads.
        with self._lock:
            if task not in self._passes:
                self._passes[task] = _Pass([set() for _ in range(self._num_members)])
                if len(self._passes) > _MOST_PASSES:
                    del self._passes[min(self._passes)]
            return self._passes[task]

    def add(self, member: int | None, name: str | None) -> None:
        """A gradient has arrived at a member's loss, or at the rows of all."""
        if member is None or name is None:
            self._current().has_rows = True
        else:
            self._current().names[member].add(name)

    def give_up(self) -> None:
        """From now on all members count as reached."""
        self.reach = {}

    def go_through(self, task: int, member: int | None) -> None:
        """This pass goes through an earlier one's graph, by the gradients of a member's tensor, or of the rows."""
        self._current().earlier.add((task, member))

    def members_reached(self, edge: int) -> list[bool]:
        """Whether this pass has reached each member, by what came by the edge."""
        reached = [False] * self._num_members
        came_by = {name for name, edges in self.reach.items() if edge in edges}
        open_passes: list[tuple[int, int | None]] = [(torch._C._current_graph_task_id(), None)]
        seen = set(open_passes)
        while open_passes:
            task, only = open_passes.pop()
            found = self._passes.get(task)
            if found is None or not self.reach or (found.has_rows and None in came_by):
                return [True] * self._num_members
            for member, names in enumerate(found.names):
                if only in (None, member) and not names.isdisjoint(came_by):
                    reached[member] = True
            open_passes += found.earlier - seen
            seen |= found.earlier
        return reached


class _Exit(Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, tally: Tally, member: int | None, name: str | None) -> torch.Tensor:
        ctx.tally, ctx.member, ctx.name = tally, member, name
        ctx.set_materialize_grads(False)
        return value.view_as(value) if name is None else value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grads[0] is not None:
            ctx.tally.add(ctx.member, ctx.name)
        return grads[0], None, None, None


class _Gradient(Function):
    """A gradient that has a graph: a pass that comes by it goes through that graph."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, tally: Tally, task: int, member: int | None) -> torch.Tensor:
        ctx.tally, ctx.task, ctx.member = tally, task, member
        ctx.set_materialize_grads(False)
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grads[0] is not None:
            ctx.tally.go_through(ctx.task, ctx.member)
        return grads[0], None, None, None


def _given_out(grad: torch.Tensor, tally: Tally, member: int | None) -> torch.Tensor:
    if not (grad.requires_grad and torch.is_grad_enabled()):
        return grad
    if is_batched(grad):
        # There is no knowing who goes through its graph.
        tally.give_up()
        return grad
    return cast(torch.Tensor, _Gradient.apply(grad, tally, torch._C._current_graph_task_id(), member))


class _Members(Function):
    @staticmethod
    def forward(ctx: Any, tally: Tally, edge: int, *members: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.tally, ctx.edge = tally, edge
        ctx.set_materialize_grads(False)
        return tuple(member.view_as(member) for member in members)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        reached = ctx.tally.members_reached(ctx.edge)
        found = [
            _given_out(grad, ctx.tally, member) if grad is not None and reached[member] else None
            for member, grad in enumerate(grads)
        ]
        return None, None, *found


class _Blocks(Function):
    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, tally: Tally, edge: int, axis: int, sizes: Sequence[int]
    ) -> torch.Tensor:
        ctx.tally, ctx.edge, ctx.axis, ctx.sizes = tally, edge, axis, sizes
        ctx.set_materialize_grads(False)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        if grad is not None:
            reached = ctx.tally.members_reached(ctx.edge)
            if not all(reached):
                blocks = zip(grad.split(ctx.sizes, ctx.axis), reached, strict=True)
                grad = torch.cat([block if each else torch.zeros_like(block) for block, each in blocks], ctx.axis)
        return grad, None, None, None, None


class _Rows(Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, tally: Tally) -> torch.Tensor:
        ctx.tally = tally
        ctx.set_materialize_grads(False)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        return None if grad is None else _given_out(grad, ctx.tally, None), None


def leaving(value: torch.Tensor, tally: Tally, member: int | None, name: str | None = None) -> torch.Tensor:
    """A loss of a member, or the rows of all; losses are their own memory, which the caller may write into."""
    if not value.requires_grad:
        return value if name is None else value.clone()
    return cast(torch.Tensor, _Exit.apply(value, tally, member, name))


def rows_entering(rows: torch.Tensor, tally: Tally) -> torch.Tensor:
    """What the batch gives to all members, before anything is made of it."""
    if not rows.requires_grad or not torch.is_grad_enabled():
        return rows
    return cast(torch.Tensor, _Rows.apply(rows, tally))


def members_entering(members: Sequence[torch.Tensor], tally: Tally, edge: int) -> Sequence[torch.Tensor]:
    """The members' own tensors, whose gradients are to be theirs alone: none for those that are not reached."""
    return cast(Sequence[torch.Tensor], _Members.apply(tally, edge, *members))


def blocks_entering(value: torch.Tensor, tally: Tally, edge: int, axis: int, sizes: Sequence[int]) -> torch.Tensor:
    """A tensor with a block for each member along an axis: zeros come back to those that are not reached.

    Args:
        value: The tensor.
        tally: Who is reached.
        edge: By what.
        axis: Where the blocks stand one after another.
        sizes: Of each member's block.
    """
    return cast(torch.Tensor, _Blocks.apply(value, tally, edge, axis, sizes))
