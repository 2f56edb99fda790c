"""Sums of products by segment, and GRUs, as operators whose segments only the device knows: see `product` and `gru`.

A graph that a compiler makes takes each of them as one call, for any number of rows by member. A call reads the
segments' ends when it runs, and chooses the backend as ever. On a CPU this costs nothing, elsewhere the device is
waited for.

Axes: R rows, P members, K and N widths, S positions, H hidden width, G = 3H.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from celmoe.grouped.segments import FEW_OF_A_STACK, Segments
from celmoe.torch_internals import ON_THE_HOST

from .gru import gru, gru_gradients
from .product import BACKENDS, backend_of


class _Present(NamedTuple):
    """The members that a call computes with.

    Attributes:
        segments: Their rows.
        members: ``[Q]`` int64: the places of members with rows if these are few; ``None`` for all members.
    """

    segments: Segments
    members: torch.Tensor | None

    def taken(self, stack: torch.Tensor) -> torch.Tensor:
        """``[P, ...]`` to the members' entries."""
        return stack if self.members is None else stack.index_select(0, self.members)

    def put(self, entries: torch.Tensor, num_members: int) -> torch.Tensor:
        """The members' entries to ``[P, ...]``, with zeros for members without rows."""
        if self.members is None:
            return entries
        return entries.new_zeros(num_members, *entries.shape[1:]).index_copy_(0, self.members, entries)


def _present(ends_P: torch.Tensor) -> _Present:
    # By value: compilers use a tensor again for what another level's segments are.
    return _present_of(tuple(ends_P.tolist()), ends_P.device)


# All calls of a graph share their segments' index tensors, the backward pass's too.
@lru_cache(maxsize=16)
def _present_of(ends: tuple[int, ...], device: torch.device) -> _Present:
    segments = _segments_of(ends, device)
    members = [member for member, count in enumerate(segments.counts) if count]
    if not members or FEW_OF_A_STACK * len(members) >= len(ends):
        return _Present(segments, None)
    counts = [segments.counts[member] for member in members]
    return _Present(Segments(counts, device, is_stacked=True), torch.tensor(members, device=device))


@lru_cache(maxsize=16)
def _segments_of(ends: tuple[int, ...], device: torch.device) -> Segments:
    counts = [last - first for first, last in zip((0, *ends), ends, strict=False)]
    return Segments(counts, device, is_stacked=True)


@torch.library.custom_op("celmoe::multiply", mutates_args=(), **ON_THE_HOST)
def multiply(
    x_RK: torch.Tensor, w_PNK: torch.Tensor, bias_PN: torch.Tensor | None, ends_P: torch.Tensor
) -> torch.Tensor:
    """Multiply ``[R, K]`` by ``[P, N, K]`` to ``[R, N]``, with a bias by member."""
    present = _present(ends_P)
    w, bias = present.taken(w_PNK), None if bias_PN is None else present.taken(bias_PN)
    backend = BACKENDS[backend_of(present.segments, x_RK, w)]
    return backend.multiply(x_RK, w, bias, present.segments, 1)


@multiply.register_fake
def _(x_RK: torch.Tensor, w_PNK: torch.Tensor, _bias: torch.Tensor | None, _ends: torch.Tensor) -> torch.Tensor:
    return x_RK.new_empty(x_RK.shape[0], w_PNK.shape[1])


@torch.library.custom_op("celmoe::outer", mutates_args=(), **ON_THE_HOST)
def outer(y_RN: torch.Tensor, x_RK: torch.Tensor, ends_P: torch.Tensor) -> torch.Tensor:
    """Multiply and sum ``[R, N]`` and ``[R, K]`` to ``[P, N, K]``."""
    present = _present(ends_P)
    backend = BACKENDS[backend_of(present.segments, y_RN, x_RK)]
    return present.put(backend.outer(y_RN, x_RK, present.segments, 1), len(ends_P))


@outer.register_fake
def _(y_RN: torch.Tensor, x_RK: torch.Tensor, ends_P: torch.Tensor) -> torch.Tensor:
    return x_RK.new_empty(ends_P.shape[0], y_RN.shape[1], x_RK.shape[1])


@torch.library.custom_op("celmoe::segment_sum", mutates_args=(), **ON_THE_HOST)
def segment_sum(x_RK: torch.Tensor, ends_P: torch.Tensor) -> torch.Tensor:
    """Sum ``[R, K]`` to ``[P, K]``."""
    present = _present(ends_P)
    backend = BACKENDS[backend_of(present.segments, x_RK)]
    return present.put(backend.segment_sum(x_RK, present.segments, 1), len(ends_P))


@segment_sum.register_fake
def _(x_RK: torch.Tensor, ends_P: torch.Tensor) -> torch.Tensor:
    return x_RK.new_empty(ends_P.shape[0], x_RK.shape[1])


@torch.library.custom_op("celmoe::gru", mutates_args=(), **ON_THE_HOST)
def _gru(
    given_SRG: torch.Tensor,
    start_RH: torch.Tensor,
    w_PGH: torch.Tensor,
    b_PG: torch.Tensor | None,
    ends_P: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `gru.gru`."""
    return gru(given_SRG, start_RH, w_PGH, b_PG, _segments_of(tuple(ends_P.tolist()), ends_P.device))


@_gru.register_fake
def _(
    given_SRG: torch.Tensor,
    _start: torch.Tensor,
    w_PGH: torch.Tensor,
    _bias: torch.Tensor | None,
    _ends: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return given_SRG.new_empty(*given_SRG.shape[:2], w_PGH.shape[2]), torch.empty_like(given_SRG)


@torch.library.custom_op("celmoe::gru_gradients", mutates_args=(), **ON_THE_HOST)
def _gru_gradients(
    grad_SRH: torch.Tensor,
    given_SRG: torch.Tensor,
    before_SRH: torch.Tensor,
    kept_SRG: torch.Tensor,
    w_PGH: torch.Tensor,
    ends_P: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `gru.gru_gradients`."""
    return gru_gradients(
        grad_SRH, given_SRG, before_SRH, kept_SRG, w_PGH, _segments_of(tuple(ends_P.tolist()), ends_P.device)
    )


@_gru_gradients.register_fake
def _(
    _grad: torch.Tensor,
    _given: torch.Tensor,
    before_SRH: torch.Tensor,
    kept_SRG: torch.Tensor,
    _weights: torch.Tensor,
    _ends: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(kept_SRG), torch.empty_like(before_SRH), torch.empty_like(before_SRH[0])
