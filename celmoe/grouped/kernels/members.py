"""A linear layer of every member, with the weights where they are: in the members' own parameters.

Stacking all weights first would write, and then read, as many bytes as they have, every time; and by the time that a
product reads them the processor's caches no longer hold them. Here a few are stacked just before the product that reads
them, small enough for the second cache; large ones are multiplied as they are.

Axes: R rows (with positions folded in), P members, K and N widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.autograd import Function

from celmoe.grouped.segments import Segments

from .product import backend_of, is_batched, linear, outer, segment_sum

# What is stacked at a time. Measured: a quarter of it is a tenth slower, for more calls, and all at once no faster.
_BYTES_AT_A_TIME = 1 << 20


class _Part(NamedTuple):
    """Neighbouring members that share a product: their rows, and how many each has."""

    first: int
    last: int
    member: int
    members: int
    length: int


def _parts(segments: Segments, factor: int, weight: torch.Tensor) -> Iterator[_Part]:
    most = max(1, _BYTES_AT_A_TIME // weight.nbytes)
    for row, member, length, members in segments.runs:
        start = row * factor
        for done in range(0, members, most):
            some = min(most, members - done)
            last = start + length * factor * some
            yield _Part(start, last, member + done, some, length * factor)
            start = last


class _Space:
    """Where weights are stacked, one part's after another's: memory that is in a cache already."""

    def __init__(self) -> None:
        self._whole: torch.Tensor | None = None

    def stacked(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """``[members, N, K]``, until the next call."""
        if self._whole is None or len(self._whole) < len(weights):
            self._whole = weights[0].new_empty(len(weights), *weights[0].shape)
        return torch.stack(list(weights), out=self._whole[: len(weights)])


def _multiply(
    x_RK: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], segments: Segments, factor: int
) -> torch.Tensor:
    width = weights[0].shape[0]
    out_RN = x_RK.new_empty(x_RK.shape[0], width)
    space = _Space()
    for first, last, member, members, length in _parts(segments, factor, weights[0]):
        x, out = x_RK[first:last], out_RN[first:last]
        if members == 1:
            if biases:
                torch.addmm(biases[member], x, weights[member].t(), out=out)
            else:
                torch.mm(x, weights[member].t(), out=out)
            continue
        w = space.stacked(weights[member : member + members]).transpose(1, 2)
        x, out = x.view(members, length, -1), out.view(members, length, width)
        if biases:
            bias = torch.stack(list(biases[member : member + members])).unsqueeze(1)
            torch.baddbmm(bias, x, w, out=out)
        else:
            torch.bmm(x, w, out=out)
    return out_RN


class _Wanted(NamedTuple):
    """Which gradients are asked for."""

    rows: bool
    weights: bool
    biases: bool


class _Gradients(NamedTuple):
    """Of rows ``[R, K]``, and of each member's weight and bias; none where none is asked for."""

    rows: torch.Tensor | None
    weights: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor]


def _gradients(
    grad_RN: torch.Tensor,
    x_RK: torch.Tensor,
    weights: Sequence[torch.Tensor],
    segments: Segments,
    factor: int,
    wanted: _Wanted,
) -> _Gradients:
    (n, k) = weights[0].shape
    grad_x = torch.empty_like(x_RK) if wanted.rows else None
    # As many tensors as there are parts: one for all would be fresh memory at every step, which costs more to get than
    # to fill.
    grad_w: list[torch.Tensor] = []
    grad_b: list[torch.Tensor] = []
    space = _Space()
    for first, last, member, members, length in _parts(segments, factor, weights[0]):
        x, grad = x_RK[first:last], grad_RN[first:last]
        if members == 1:
            if grad_x is not None:
                torch.mm(grad, weights[member], out=grad_x[first:last])
            if wanted.weights:
                grad_w.append(torch.mm(grad.t(), x))
            if wanted.biases:
                grad_b.append(torch.sum(grad, 0))
            continue
        grad = grad.view(members, length, n)
        if grad_x is not None:
            w = space.stacked(weights[member : member + members])
            torch.bmm(grad, w, out=grad_x[first:last].view(members, length, k))
        if wanted.weights:
            grad_w += torch.bmm(grad.transpose(1, 2), x.view(members, length, k)).unbind(0)
        if wanted.biases:
            grad_b += torch.sum(grad, 1).unbind(0)
    return _Gradients(grad_x, grad_w, grad_b)


class _LinearOfMembers(Function):
    @staticmethod
    def forward(
        ctx: Any, x_RK: torch.Tensor, segments: Segments, factor: int, has_bias: bool, *tensors: torch.Tensor
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        weights, biases = _halves(tensors, has_bias)
        ctx.save_for_backward(x_RK, *weights)
        ctx.segments, ctx.factor, ctx.has_bias = segments, factor, has_bias
        return _multiply(x_RK.contiguous(), weights, biases, segments, factor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        x_RK, *weights = ctx.saved_tensors
        segments, factor, needed = ctx.segments, ctx.factor, ctx.needs_input_grad
        of_weights, of_biases = _halves(needed[4:], ctx.has_bias)
        wanted = _Wanted(needed[0], any(of_weights), any(of_biases))
        grad_RN = grads[0].contiguous()
        if torch.is_grad_enabled() or is_batched(grad_RN) or grad_RN.is_complex():
            found = _differentiable(grad_RN, x_RK, weights, segments, factor, wanted)
        else:
            found = _gradients(grad_RN, x_RK.contiguous(), weights, segments, factor, wanted)
        none = [None] * len(weights)
        by_member = [*(found.weights or none), *(found.biases or none if ctx.has_bias else ())]
        return found.rows, None, None, None, *by_member


def _differentiable(
    grad_RN: torch.Tensor,
    x_RK: torch.Tensor,
    weights: Sequence[torch.Tensor],
    segments: Segments,
    factor: int,
    wanted: _Wanted,
) -> _Gradients:
    """The same as a graph that can be differentiated again."""
    return _Gradients(
        linear(grad_RN, torch.stack(list(weights)).mT.conj(), None, segments, factor) if wanted.rows else None,
        outer(grad_RN, x_RK.conj(), segments, factor).unbind(0) if wanted.weights else (),
        segment_sum(grad_RN, segments, factor).unbind(0) if wanted.biases else (),
    )


def _halves(values: Sequence[Any], has_bias: bool) -> tuple[Sequence[Any], Sequence[Any]]:
    """Weights and biases."""
    return (values[: len(values) // 2], values[len(values) // 2 :]) if has_bias else (values, ())


def linear_of_members(
    x_RK: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    segments: Segments,
    factor: int,
) -> torch.Tensor:
    """``[R, N]``: each row through its member's weights, differentiable any number of times.

    Args:
        x_RK: ``[R, K]``, ``factor`` positions for each of the segments' rows.
        weights: P times ``[N, K]``.
        biases: P times ``[N]``, or none.
        segments: The rows of each member.
        factor: Positions folded into each row.
    """
    if backend_of(segments, x_RK, weights[0]) != "runs":
        bias = torch.stack(list(biases)) if biases else None
        return linear(x_RK, torch.stack(list(weights)), bias, segments, factor)
    if not torch.is_grad_enabled():
        # An autograd function looks at each of its arguments, which are many.
        return _multiply(x_RK.contiguous(), weights, biases, segments, factor)
    return cast(torch.Tensor, _LinearOfMembers.apply(x_RK, segments, factor, bool(biases), *weights, *biases))
