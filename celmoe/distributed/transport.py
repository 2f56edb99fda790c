"""Send rows to their experts' ranks and back: one all-to-all each way, in the backward pass too.

Both Functions carry a *token*, a scalar that joins all exchanges of a pass into one chain. A backward pass then makes
all exchanges, in one order, on every rank: also on a rank whose experts got no rows, are frozen, or detach their input.

Axes: R rows, the rows of one rank next to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Way(NamedTuple):
    """The numbers of rows that an exchange moves.

    Attributes:
        group: The ranks.
        sent: Rows from here to each rank.
        received: Rows from each rank to here.
    """

    group: dist.ProcessGroup
    sent: tuple[int, ...]
    received: tuple[int, ...]

    def back(self) -> Way:
        """The way back: ``sent`` and ``received`` swapped."""
        return Way(self.group, self.received, self.sent)


def exchange(tensors: Sequence[torch.Tensor], way: Way) -> list[torch.Tensor]:
    """Exchange all tensors' rows in one all-to-all, as bytes: dtypes may differ, and a row stays together.

    Args:
        tensors: ``[R, ...]`` each, of the same dtypes and trailing shapes on all ranks.
        way: The numbers of rows; R is the sum of ``sent``.
    """
    rows = sum(way.sent)
    packed = [_as_bytes(tensor.detach().reshape(rows, tensor.shape[1:].numel())) for tensor in tensors]
    given = packed[0] if len(packed) == 1 else torch.cat(packed, 1)
    taken = given.new_empty((sum(way.received), given.shape[1]))
    dist.all_to_all_single(taken, given, list(way.received), list(way.sent), way.group)
    parts = taken.split([each.shape[1] for each in packed], 1)
    return [_as_rows(part, tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """``[R, bytes of a row]``. PyTorch calls any strides contiguous if a tensor has one element or none."""
    rows = rows.contiguous()
    return (rows if rows.stride(1) == 1 else rows.clone(memory_format=torch.contiguous_format)).view(torch.uint8)


def _as_rows(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``[R, ...]`` of the dtype and trailing shape of another tensor, from the bytes of each row.

    A view as a wider dtype needs strides and an offset that the dtype's size divides, even with one row or none.
    """
    shape = (len(part), *like.shape[1:])
    if not part.numel():
        return part.new_empty(shape, dtype=like.dtype)
    if part.stride(0) != part.shape[1]:
        part = part.clone(memory_format=torch.contiguous_format)
    return part.view(like.dtype).reshape(shape)


class _ToExperts(Function):
    @staticmethod
    def forward(
        ctx: Any, way: Way, differentiated: tuple[bool, ...], token: torch.Tensor, *rows: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.way, ctx.differentiated = way, differentiated
        ctx.set_materialize_grads(False)
        received = exchange(rows, way)
        ctx.received = [each.new_empty(()).expand(each.shape) for each in received]
        ctx.mark_non_differentiable(*(each for each, has in zip(received, differentiated, strict=True) if not has))
        ctx.token = torch.zeros_like(token)
        return torch.zeros_like(token), *received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _token: torch.Tensor | None, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        sent = [
            torch.zeros_like(like, memory_format=torch.contiguous_format) if grad is None else grad
            for grad, like, has in zip(grads, ctx.received, ctx.differentiated, strict=True)
            if has
        ]
        returned = iter(exchange(sent, ctx.way.back()) if sent else ())
        return None, None, ctx.token, *(next(returned) if has else None for has in ctx.differentiated)


class _FromExperts(Function):
    @staticmethod
    def forward(ctx: Any, way: Way, token: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.way = way
        ctx.set_materialize_grads(False)
        (returned,) = exchange([rows], way)
        ctx.returned = returned.new_empty(()).expand(returned.shape)
        ctx.token = torch.zeros_like(token)
        return torch.zeros_like(token), returned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _token: torch.Tensor | None, grad: torch.Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            grad = torch.zeros_like(ctx.returned, memory_format=torch.contiguous_format)
        (rows,) = exchange([grad], ctx.way.back())
        return None, ctx.token, rows


def to_experts(
    rows: Sequence[torch.Tensor], way: Way, differentiated: Sequence[bool], token: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Send rows to their experts' ranks.

    Args:
        rows: ``[R, ...]`` each, in the order of their destination ranks.
        way: The numbers of rows.
        differentiated: For each tensor, if gradients come back; the same on all ranks.
        token: The token of the exchange before.

    Returns:
        The token for the exchange after, and the rows received, in the order of their source ranks.
    """
    token, *received = cast(tuple[torch.Tensor, ...], _ToExperts.apply(way, tuple(differentiated), token, *rows))
    return token, received


def from_experts(rows: torch.Tensor, way: Way, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Send rows back to their source ranks; arguments and result as for `to_experts`."""
    return cast(tuple[torch.Tensor, torch.Tensor], _FromExperts.apply(way.back(), token, rows))
