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
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch.autograd import Function

from .product import is_batched

# By the name of a loss, the edges between operations that it came by; the rows do for `None`.
Reach: TypeAlias = Mapping[str | None, frozenset[int]]


@dataclass(eq=False)
class _Pass:
    """One backward pass.

    Attributes:
        names: By member, the losses that it has come by.
        has_rows: Whether it has come by the rows of all.
        entered: Gradients of earlier passes whose graphs it goes through.
        behind: By the node that made a gradient of its own, the edges that further gradients come by.
    """

    names: list[set[str]]
    has_rows: bool = False
    entered: list[_Graph] = field(default_factory=list)
    behind: dict[Any, frozenset[int]] = field(default_factory=dict)

    def reached(self, came_by: set[str | None]) -> set[int]:
        """The members that it has reached by any of these, or through the graph of a gradient that came by them."""
        return self.by_results(came_by).union(*(graph.reached(came_by) for graph in self.entered))

    def by_results(self, came_by: set[str | None]) -> set[int]:
        """The members that it has reached by any of these."""
        if self.has_rows and None in came_by:
            return set(range(len(self.names)))
        return {member for member, names in enumerate(self.names) if not names.isdisjoint(came_by)}


class _Graph(NamedTuple):
    """What is behind a gradient that has a graph.

    Attributes:
        edges: The edges that gradients come by, going through it.
        made_by: The pass that gave the gradient out.
        member: Whose tensor it is of; `None` where it is of the rows.
    """

    edges: frozenset[int]
    made_by: _Pass
    member: int | None

    def reached(self, came_by: set[str | None]) -> set[int]:
        """The members that have a part in it by any of these: no member has one in another's tensors."""
        members = self.made_by.reached(came_by)
        return members if self.member is None else members & {self.member}


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
        self._running: dict[int, _Pass] = {}
        # Passes may run in several threads.
        self._lock = Lock()

    def current(self) -> _Pass:
        """The pass that runs."""
        task = torch._C._current_graph_task_id()
        with self._lock:
            found = self._running.get(task)
            if found is None:
                found = self._running[task] = _Pass([set() for _ in range(self._num_members)])
                engine = cast(Any, torch.autograd.Variable)._execution_engine
                engine.queue_callback(lambda: self._end(task))
        return found

    def _end(self, task: int) -> None:
        with self._lock:
            ended = self._running.pop(task, None)
        if ended is not None:
            ended.behind.clear()

    def add(self, member: int | None, name: str | None) -> None:
        """A gradient has arrived at a member's loss, or at the rows of all."""
        if member is None or name is None:
            self.current().has_rows = True
        else:
            self.current().names[member].add(name)

    def members_reached(self, edge: int) -> list[bool]:
        """Whether this pass has reached each member, by what came by the edge."""
        came_by = {name for name, edges in self.reach.items() if edge in edges}
        current = self.current()
        graphs = [graph for graph in current.entered if edge in graph.edges]
        is_known = bool(current.has_rows or current.entered or any(current.names))
        if not is_known or not (came_by or graphs):
            # How the pass came here, or what came by the edge: so nothing is held back.
            return [True] * self._num_members
        found = current.by_results(came_by).union(*(graph.reached(came_by) for graph in graphs))
        return [member in found for member in range(self._num_members)]


class _Exit(Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, tally: Tally, member: int | None, name: str | None) -> torch.Tensor:
        ctx.tally, ctx.member, ctx.name = tally, member, name
        ctx.set_materialize_grads(False)
        return value.view_as(value) if name is None else value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        if grad is not None:
            ctx.tally.add(ctx.member, ctx.name)
            grad = entering(grad, ctx.tally)
        return grad, None, None, None


class _Gradient(Function):
    """A gradient that has a graph: a pass that comes by it goes through that graph."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, tally: Tally, graph: _Graph) -> torch.Tensor:
        ctx.tally, ctx.graph = tally, graph
        ctx.set_materialize_grads(False)
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        if grad is not None:
            ctx.tally.current().entered.append(ctx.graph)
            grad = entering(grad, ctx.tally)
        return grad, None, None


def _given_out(grad: torch.Tensor, tally: Tally, member: int | None) -> torch.Tensor:
    if not (grad.requires_grad and torch.is_grad_enabled()):
        return grad
    if is_batched(grad):
        # There is no knowing who goes through its graph.
        tally.reach = {}
        return grad
    current = tally.current()
    if grad.grad_fn not in current.behind:
        current.behind[grad.grad_fn] = edges_behind(grad, tally)
    return cast(torch.Tensor, _Gradient.apply(grad, tally, _Graph(current.behind[grad.grad_fn], current, member)))


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


class _Entry(Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, tally: Tally) -> torch.Tensor:
        ctx.tally = tally
        ctx.set_materialize_grads(False)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        return None if grad is None else _given_out(grad, ctx.tally, None), None


def leaving(value: torch.Tensor, tally: Tally, member: int | None, name: str | None = None) -> torch.Tensor:
    """A loss of a member, or the rows of all; losses are their own memory, which the caller may write into."""
    if not value.requires_grad:
        return value if name is None else value.clone()
    return cast(torch.Tensor, _Exit.apply(value, tally, member, name))


def entering(value: torch.Tensor, tally: Tally) -> torch.Tensor:
    """What is given to all members, before anything is made of it; or to a pass that has a graph."""
    if not (value.requires_grad and torch.is_grad_enabled()):
        return value
    if is_batched(value):
        tally.reach = {}
        return value
    return cast(torch.Tensor, _Entry.apply(value, tally))


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


def edges_behind(value: torch.Tensor, tally: Tally) -> frozenset[int]:
    """The edges of a tally that gradients of a tensor come by, of all that PyTorch's graph has."""
    found = set()
    nodes = [value.grad_fn]
    seen = set(nodes)
    while nodes:
        node: Any = nodes.pop()
        if node is None or isinstance(node, _ENTRY) or getattr(node, "tally", tally) is not tally:
            continue
        if isinstance(node, _EDGES):
            found.add(node.edge)
        following = {each for each, _ in node.next_functions}
        if isinstance(node, _MEMBERS):
            # Behind those there may be another such edge; else, whatever tensors they have come of.
            following = {each for each in following if isinstance(each, _MEMBERS)}
        nodes += following - seen
        seen |= following
    return frozenset(found)


_MEMBERS, _ENTRY = cast(Any, _Members)._backward_cls, cast(Any, _Entry)._backward_cls
_EDGES = (_MEMBERS, cast(Any, _Blocks)._backward_cls)
