"""What goes into a run with losses, and what comes out: whom a backward pass that leaves some losses out reaches.

An expert alone gets no gradient where nothing that it gave is differentiated. Run as one, all members are computed with
wherever one is: a loss of one expert would send zeros to all others, which optimizers take for gradients; and where a
zero meets a derivative that is not finite, what comes of it is no number. So there is a rule. Results of one kind, the
losses of one name say, are differentiated for all members, and then the backward pass goes its way; or for some, and
then they are differentiated apart, and of what comes back the share of those members alone is kept. That is exact, for
no member has a part in another's rows or tensors.

A gradient that has a graph is a result, too: of the kind of the tensor that it is of.

Axes: R rows of all members, one member's after the other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.autograd import Function
from torch.autograd.graph import get_gradient_edge


class Port(NamedTuple):
    """What a tensor is that passes the boundary.

    Attributes:
        kind: Equal for all that are of one kind: there is one for each member, or one of the rows of all.
        members: The members that have a part in it.
        is_rows: Whether it is rows ``[R, ...]`` of all members.
    """

    kind: Any
    members: frozenset[int]
    is_rows: bool = False


class Entered(NamedTuple):
    """A tensor that passes into a run.

    Attributes:
        tensor: It.
        start: Where gradients of what stands for it inside come out.
        port: What it is.
    """

    tensor: torch.Tensor
    start: Any
    port: Port


class _Enter(Function):
    """Tensors, each as another one, at which a backward pass through what is made of them can end."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(each.view_as(each) for each in tensors)

    @staticmethod
    def backward(_ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return grads


class _Leave(Function):
    """Results, and with them what they were made of, for whose gradients this speaks where some are left out."""

    @staticmethod
    def forward(ctx: Any, way: _Way, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.way = way
        results, entered = tensors[: len(way.results)], tensors[len(way.results) :]
        ctx.save_for_backward(*entered)
        return tuple(each.view_as(each) for each in results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        way: _Way = ctx.way
        has_graph = torch.is_grad_enabled()
        given = [*map(_cut, grads)] if has_graph else grads
        whole, parts = way.chosen(grads)
        passed: list[torch.Tensor | None] = [None] * len(grads)
        if has_graph or way.is_cut:
            parts = [whole, *parts] if whole else parts
        else:
            for place in whole:
                passed[place] = grads[place]
        results, ports, where = way.gradients_apart(parts, given)
        if has_graph:
            entered = list(map(Entered, ctx.saved_tensors, way.starts, way.entered))
            entered += [
                Entered(grad, get_gradient_edge(start), port)
                for grad, start, port in zip(grads, given, way.results, strict=True)
                if grad is not None and start is not None and start.requires_grad
            ]
            results = leave(results, ports, entered, way.counts, is_cut=True)
        found: list[torch.Tensor | None] = [None] * len(way.entered)
        for place, grad in zip(where, results, strict=True):
            known = found[place]
            found[place] = grad if known is None else known + grad
        return None, *passed, *found


def _cut(grad: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient without its graph: what is behind it may lead back into the run."""
    return None if grad is None else grad.detach().requires_grad_(grad.requires_grad)


class _Way(NamedTuple):
    """From some tensors to the results that were made of them.

    Attributes:
        counts: Rows of each member.
        results: What the results are.
        ends: Where gradients of the results go in.
        entered: What the tensors are.
        starts: Where their gradients come out.
        is_cut: Whether PyTorch's graph of the results leads to some of the tensors only by this.
    """

    counts: Sequence[int]
    results: Sequence[Port]
    ends: Sequence[Any]
    entered: Sequence[Port]
    starts: Sequence[Any]
    is_cut: bool

    def chosen(self, grads: Sequence[torch.Tensor | None]) -> tuple[list[int], list[list[int]]]:
        """The places of results that are differentiated: of kinds that are so for all; and by kind, of all others."""
        by_kind: dict[Any, list[int]] = {}
        for place, port in enumerate(self.results):
            by_kind.setdefault(port.kind, []).append(place)
        whole: list[int] = []
        parts: list[list[int]] = []
        for places in by_kind.values():
            reached = [place for place in places if grads[place] is not None]
            if len(self.members_of(reached)) == len(self.counts):
                whole += reached
            elif reached:
                parts.append(reached)
        return whole, parts

    def members_of(self, places: Sequence[int]) -> frozenset[int]:
        """The members that have a part in some results."""
        return frozenset().union(*(self.results[place].members for place in places))

    def gradients_apart(
        self, parts: Sequence[Sequence[int]], grads: Sequence[torch.Tensor | None]
    ) -> tuple[list[torch.Tensor], list[Port], list[int]]:
        """Gradients of some results at a time: the share of the members that have a part in those.

        Returns:
            The gradients, what they are, and of which of the tensors that were entered.
        """
        found, ports, where = [], [], []
        for number, places in enumerate(parts):
            members = self.members_of(places)
            for place, grad in enumerate(self._gradients(places, grads)):
                port = self.entered[place]
                if grad is not None and not port.members.isdisjoint(members):
                    found.append(self._share(grad, members) if port.is_rows else grad)
                    ports.append(Port((number, port.kind), port.members & members, port.is_rows))
                    where.append(place)
        return found, ports, where

    def _gradients(self, places: Sequence[int], grads: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        return torch.autograd.grad(
            [self.ends[place] for place in places],
            self.starts,
            [cast(torch.Tensor, grads[place]) for place in places],
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )

    def _share(self, grad: torch.Tensor, members: frozenset[int]) -> torch.Tensor:
        """Rows of the members, and zeros for all others."""
        if len(members) == len(self.counts):
            return grad
        blocks = enumerate(grad.split(list(self.counts)))
        return torch.cat([block if member in members else torch.zeros_like(block) for member, block in blocks])


def enter(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """What a run is to be given in place of tensors; those without gradients as they are.

    Whatever the caller's grad mode: an expert may enable gradients itself.
    """
    places = [place for place, each in enumerate(tensors) if each.requires_grad]
    if not places or torch.is_inference_mode_enabled():
        return tensors
    with torch.enable_grad():
        entered = dict(zip(places, _Enter.apply(*(tensors[place] for place in places)), strict=True))
    return [entered.get(place, each) for place, each in enumerate(tensors)]


def leave(
    results: Sequence[Any],
    ports: Sequence[Port],
    entered: Sequence[Entered],
    counts: Sequence[int],
    *,
    is_cut: bool = False,
) -> list[Any]:
    """What a run gives in place of its results; those that are none, or without gradients, as they are.

    Args:
        results: The results, or ``None``.
        ports: What they are.
        entered: What they were made of.
        counts: Rows of each member.
        is_cut: Whether gradients come back to some of that by this alone.
    """
    if torch.is_inference_mode_enabled():
        return list(results)
    places = [place for place, each in enumerate(results) if each is not None and each.requires_grad]
    if not places or not entered:
        return list(results)
    ends = [results[place] for place in places]
    way = _Way(
        tuple(counts),
        [ports[place] for place in places],
        list(map(get_gradient_edge, ends)),
        [each.port for each in entered],
        [each.start for each in entered],
        is_cut,
    )
    given = dict(zip(places, _Leave.apply(way, *ends, *(each.tensor for each in entered)), strict=True))
    return [given.get(place, each) for place, each in enumerate(results)]
