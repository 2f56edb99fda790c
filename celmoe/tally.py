"""Which members of a class a backward pass reaches, and by what.

An expert alone has no gradient where nothing of what it gave is differentiated. Run as one, all members are reached
when any of them is: with a loss of one expert for an objective the others would get zeros, and an optimizer would move
them; and where a zero meets a derivative that is not finite, what comes of it is no number. So what a class gives is
tallied by member on the way back, and wherever an operation took something, gradients are held back of the members none
of whose chosen results came of that: their own tensors get none, and rows get zeros, as from the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch.autograd import Function

# By the name of a loss, the edges between operations that it came by; the rows do for `None`.
Reach: TypeAlias = Mapping[str | None, frozenset[int]]
# Names by member, and whether the rows of all are reached.
_Reached: TypeAlias = tuple[list[set[str]], set[None]]


class Tally:
    """What was reached, by backward pass.

    Args:
        counts: Rows of each member.

    Attributes:
        reach: What came by which edges; all by all where it is empty.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = list(counts)
        self.reach: Reach = {}
        self._task: int | None = None
        self._reached = self._nothing()
        # Passes with a graph of their own: later ones may go through that, and reach members by other ways than losses.
        self._before: _Reached | None = None

    def _nothing(self) -> _Reached:
        return [set() for _ in self.counts], set()

    def add(self, member: int | None, name: str | None) -> None:
        """A gradient has arrived at a member's loss, or at the rows of all."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            # An earlier pass is over by now.
            self._task, self._reached = task, self._nothing()
        records = [self._reached]
        if torch.is_grad_enabled():
            self._before = self._before or self._nothing()
            records.append(self._before)
        for names, of_rows in records:
            if member is None or name is None:
                of_rows.add(None)
            else:
                names[member].add(name)

    def members_reached(self, edge: int) -> list[bool]:
        """Whether this pass has reached each member, by what came by the edge."""
        passes = [] if self._before is None else [self._before]
        if torch._C._current_graph_task_id() == self._task:
            passes.append(self._reached)
        if not passes or not self.reach:
            return [True] * len(self.counts)
        came_by = {name for name, edges in self.reach.items() if edge in edges}
        if None in came_by and any(of_rows for _, of_rows in passes):
            return [True] * len(self.counts)
        return [any(not names[member].isdisjoint(came_by) for names, _ in passes) for member in range(len(self.counts))]


class _Exit(Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, tally: Tally, member: int | None, name: str | None) -> torch.Tensor:
        ctx.tally, ctx.member, ctx.name = tally, member, name
        return value.view_as(value) if name is None else value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.tally.add(ctx.member, ctx.name)
        return grads[0], None, None, None


class _Members(Function):
    @staticmethod
    def forward(ctx: Any, tally: Tally, edge: int, *members: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.tally, ctx.edge = tally, edge
        ctx.set_materialize_grads(False)
        return tuple(member.view_as(member) for member in members)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        reached = ctx.tally.members_reached(ctx.edge)
        return None, None, *(grad if each else None for grad, each in zip(grads, reached, strict=True))


class _Blocks(Function):
    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, tally: Tally, edge: int, axis: int, sizes: Sequence[int]
    ) -> torch.Tensor:
        ctx.tally, ctx.edge, ctx.axis, ctx.sizes = tally, edge, axis, sizes
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        reached = ctx.tally.members_reached(ctx.edge)
        if not all(reached):
            blocks = zip(grad.split(ctx.sizes, ctx.axis), reached, strict=True)
            grad = torch.cat([block if each else torch.zeros_like(block) for block, each in blocks], ctx.axis)
        return grad, None, None, None, None


def leaving(value: torch.Tensor, tally: Tally, member: int | None, name: str | None = None) -> torch.Tensor:
    """A loss of a member, or the rows of all; losses are their own memory, which the caller may write into."""
    if not value.requires_grad:
        return value if name is None else value.clone()
    return cast(torch.Tensor, _Exit.apply(value, tally, member, name))


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
