"""Which members of a class a backward pass reaches, and by what.

An expert alone has no gradient where nothing of what it gave is differentiated. Run as one, all members are reached
when any of them is: with a loss of one expert for an objective the others would get zeros, and an optimizer would move
them; where their own loss is not finite, what comes back is no zero either. So what a class gives is tallied by member
on the way back. Of their own tensors members get gradients only where something was reached that depends on them, and
rows of members that were not reached get zeros, as from the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch.autograd import Function

# By the name of a loss, the places of the tensors of an expert's that it depends on; the rows do for `None`.
Reach: TypeAlias = Mapping[str | None, frozenset[int]]


class Tally:
    """What was reached, by backward pass.

    Args:
        counts: Rows of each member.

    Attributes:
        reach: What depends on which tensors; all on all where it is empty.
        values: By name, the members' losses, without their graphs.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = list(counts)
        self.reach: Reach = {}
        self.values: dict[str, list[torch.Tensor]] = {}
        # Names by member, whose rows are reached for all.
        self._reached: dict[int, tuple[list[set[str]], set[None]]] = {}
        self._checked: int | None = None
        # The first pass with a graph of its own: those that go through it reach members by other ways than losses.
        self._first_with_graph: int | None = None

    def add(self, member: int | None, name: str | None) -> None:
        """A gradient has arrived at a member's loss, or at the rows of all."""
        task = torch._C._current_graph_task_id()
        if task not in self._reached:
            # An earlier pass is over by now.
            self._reached.clear()
            self._checked = None
            self._reached[task] = [set() for _ in self.counts], set()
        if self._first_with_graph is None and torch.is_grad_enabled():
            self._first_with_graph = task
        names, of_rows = self._reached[task]
        if member is None or name is None:
            of_rows.add(None)
        else:
            names[member].add(name)

    def members_reached(self, leaf: int | None) -> list[bool]:
        """Whether this pass has reached each member; only by what depends on one of its tensors, if that is given.

        Raises:
            RuntimeError: A member is reached, and not by one of its losses that is not finite, but by such of others.
        """
        task = torch._C._current_graph_task_id()
        if task not in self._reached or self._first_with_graph not in (None, task):
            return [True] * len(self.counts)
        names, of_rows = self._reached[task]
        if self._checked != task:
            self._checked = task
            self._check(names, bool(of_rows))
        if leaf is None or not self.reach:
            return [bool(of_rows) or bool(each) for each in names]
        depending = {name for name, leaves in self.reach.items() if leaf in leaves}
        if of_rows and None in depending:
            return [True] * len(names)
        return [not each.isdisjoint(depending) for each in names]

    def _check(self, names: Sequence[set[str]], has_rows: bool) -> None:
        """A zero that comes back through what is not finite would be none, and reach what the member's others give."""
        used = set().union(*names)
        for member, own in enumerate(names):
            for name in used - own if own or has_rows else ():
                if not bool(self.values[name][member].isfinite().all()):
                    raise RuntimeError(
                        f"an expert's loss {name!r} must be finite where an objective leaves it out and has those of "
                        "others run as one with it (got NaN or infinity, whose gradient of zero is none; "
                        "engine='looped' keeps experts apart)"
                    )


class _Exit(Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, tally: Tally, member: int | None, name: str | None) -> torch.Tensor:
        ctx.tally, ctx.member, ctx.name = tally, member, name
        return value.view_as(value) if name is None else value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.tally.add(ctx.member, ctx.name)
        return grads[0], None, None, None


class _Entry(Function):
    @staticmethod
    def forward(ctx: Any, tally: Tally, leaf: int, *members: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.tally, ctx.leaf = tally, leaf
        ctx.set_materialize_grads(False)
        return tuple(member.view_as(member) for member in members)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        reached = ctx.tally.members_reached(ctx.leaf)
        return None, None, *(grad if each else None for grad, each in zip(grads, reached, strict=True))


class _RowsEntry(Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, tally: Tally) -> torch.Tensor:
        ctx.tally = tally
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        reached = ctx.tally.members_reached(None)
        if not all(reached):
            blocks = zip(grad.split(ctx.tally.counts), reached, strict=True)
            grad = torch.cat([block if each else torch.zeros_like(block) for block, each in blocks])
        return grad, None


def leaving(value: torch.Tensor, tally: Tally, member: int | None, name: str | None = None) -> torch.Tensor:
    """A loss of a member, or the rows of all; losses are their own memory, which the caller may write into."""
    if not value.requires_grad:
        return value if name is None else value.clone()
    return cast(torch.Tensor, _Exit.apply(value, tally, member, name))


def entering(members: Sequence[torch.Tensor], tally: Tally, leaf: int) -> Sequence[torch.Tensor]:
    """The members' own tensors, whose gradients are to be theirs alone."""
    if not torch.is_grad_enabled() or not any(member.requires_grad for member in members):
        return members
    return cast(Sequence[torch.Tensor], _Entry.apply(tally, leaf, *members))


def entering_rows(rows: torch.Tensor, tally: Tally) -> torch.Tensor:
    """The rows of all members, one member's after the other's."""
    if not torch.is_grad_enabled() or not rows.requires_grad:
        return rows
    return cast(torch.Tensor, _RowsEntry.apply(rows, tally))
