"""Which members of a class a backward pass reaches.

An expert alone has no gradient where nothing of what it gave is differentiated. Run as one, all members are reached
when any of them is: with a loss of one expert for an objective the others would get zeros, and an optimizer would move
them. So what a class gives is tallied by member on the way back, and members that were not reached get nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.autograd import Function


class Tally:
    """The members reached, by backward pass."""

    def __init__(self) -> None:
        # All of them for `None`.
        self._reached: dict[int, set[int | None]] = {}

    def add(self, member: int | None) -> None:
        """A gradient has arrived at something that one member gave, or all."""
        task = torch._C._current_graph_task_id()
        if task not in self._reached:
            # An earlier pass is over by now.
            self._reached.clear()
        self._reached.setdefault(task, set()).add(member)

    def is_reached(self, member: int) -> bool:
        """Whether this pass has reached a member."""
        reached = self._reached.get(torch._C._current_graph_task_id())
        return reached is None or None in reached or member in reached


class _Exit(Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, tally: Tally, member: int | None) -> torch.Tensor:
        ctx.tally, ctx.member = tally, member
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.tally.add(ctx.member)
        return grads[0], None, None


class _Entry(Function):
    @staticmethod
    def forward(ctx: Any, tally: Tally, *members: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.tally = tally
        ctx.set_materialize_grads(False)
        return tuple(member.view_as(member) for member in members)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return None, *(grad if ctx.tally.is_reached(member) else None for member, grad in enumerate(grads))


def leaving(value: torch.Tensor, tally: Tally, member: int | None) -> torch.Tensor:
    """What a member gave, or all together for ``None``."""
    return cast(torch.Tensor, _Exit.apply(value, tally, member)) if value.requires_grad else value


def entering(members: Sequence[torch.Tensor], tally: Tally) -> Sequence[torch.Tensor]:
    """The members' own tensors, whose gradients are to be theirs alone."""
    if not torch.is_grad_enabled() or not any(member.requires_grad for member in members):
        return members
    return cast(Sequence[torch.Tensor], _Entry.apply(tally, *members))
