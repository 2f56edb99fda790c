"""The boundary of a run with losses: limits the members that a backward pass reaches if it leaves some losses out.

An expert alone gets no gradient if none of its results is differentiated. A grouped run computes with all members
together. A loss of one expert would then send zeros to all others, and optimizers take zeros for gradients. A zero
times a derivative that is not finite would even be NaN. Hence a rule decides for each kind of results, such as the
losses of one name. If a kind is differentiated for all members, the backward pass runs as usual. If a kind is
differentiated for some members only, gradients are computed apart, and only the share of these members is kept. The
share is exact, because no member has a part in another's rows or tensors.

A gradient that has a graph is a result, too: its kind is the kind of its tensor.

Axes: R rows of all members, one member's after the other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.autograd import Function
from torch.autograd.graph import get_gradient_edge


class Port(NamedTuple):
    """The description of a tensor that passes the boundary.

    Attributes:
        kind: Equal for all tensors of one kind: one tensor for each member, or one with the rows of all.
        members: The members that have a part in the tensor.
        is_rows: True for rows ``[R, ...]`` of all members.
    """

    kind: Any
    members: frozenset[int]
    is_rows: bool = False


class Entered(NamedTuple):
    """A tensor that passes into a run.

    Attributes:
        tensor: The tensor.
        start: The gradient edge at which gradients of its stand-in inside the run come out.
        port: The tensor's description.
    """

    tensor: torch.Tensor
    start: Any
    port: Port


class _Enter(Function):
    """Stand-ins for tensors: a backward pass through the results made of them can end there."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(each.view_as(each) for each in tensors)

    @staticmethod
    def backward(_ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return grads


class _Leave(Function):
    """Passes results on, and gives the entered tensors' gradients if a backward pass leaves results out."""

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
    """A gradient without its graph, because the graph may lead back into the run."""
    return None if grad is None else grad.detach().requires_grad_(grad.requires_grad)


class _Way(NamedTuple):
    """The way from some tensors to the results that were made of them.

    Attributes:
        counts: Number of rows of each member.
        results: The results' descriptions.
        ends: The gradient edges at which gradients of the results go in.
        entered: The tensors' descriptions.
        starts: The gradient edges at which gradients of the tensors come out.
        is_cut: True if PyTorch's graph of the results leads to some of the tensors only through this way.
    """

    counts: Sequence[int]
    results: Sequence[Port]
    ends: Sequence[Any]
    entered: Sequence[Port]
    starts: Sequence[Any]
    is_cut: bool

    def chosen(self, grads: Sequence[torch.Tensor | None]) -> tuple[list[int], list[list[int]]]:
        """The places of differentiated results: those of kinds that cover all members; and the others, by kind."""
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
        """The gradients of one group of results at a time: only the share of the members in that group.

        Returns:
            The gradients, their descriptions, and the places of their tensors among the entered ones.
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
        """A gradient's rows for some members, and zeros for all others."""
        if len(members) == len(self.counts):
            return grad
        blocks = enumerate(grad.split(list(self.counts)))
        return torch.cat([block if member in members else torch.zeros_like(block) for member, block in blocks])


def enter(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The tensors that a run is given in place of the caller's; tensors without gradients stay as they are.

    The caller's grad mode does not matter: an expert may enable gradients itself.
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
    """The results as a run gives them to its caller; ``None`` and results without gradients stay as they are.

    Args:
        results: The results, or ``None``.
        ports: The results' descriptions.
        entered: The tensors that the results were made of.
        counts: Number of rows of each member.
        is_cut: If true, some of those tensors get gradients through this function alone.
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
