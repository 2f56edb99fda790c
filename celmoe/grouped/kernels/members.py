"""A linear layer of every member, which reads the weights from the members' own parameters.

Stacking all weights first would write and read all their bytes at every call, and the processor's caches would lose the
weights before a product reads them. Here a few weights are stacked just before the product that reads them, few enough
for the second-level cache. Large weights are multiplied without stacking.

Axes: R rows (with positions folded in), P members, K and N widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.autograd import Function

from celmoe.grouped.segments import Segments

from .product import added, backend_of, is_batched, linear, outer, segment_sum

# Bytes stacked at a time. Measured: a quarter is a tenth slower, because of more calls; all at once is no faster.
_BYTES_AT_A_TIME = 1 << 20


class _Part(NamedTuple):
    """Neighbouring members that share a product, with their rows and the number of rows of each."""

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
    """Memory that each part's weights are stacked in, one part after another, so that it stays in a cache."""

    def __init__(self) -> None:
        self._whole: torch.Tensor | None = None

    def stacked(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """Stack weights to ``[members, N, K]``, valid until the next call."""
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
    """The gradients that are asked for."""

    rows: bool
    weights: bool
    biases: bool


class _Gradients(NamedTuple):
    """The gradients of rows ``[R, K]`` and of each member's weight and bias; none unless asked for."""

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
    # Each part makes its own tensor: one tensor for all would be fresh memory at every step, and getting that memory
    # costs more than filling it.
    grad_w: list[torch.Tensor] = []
    grad_b: list[torch.Tensor] = []
    together = added(grad_RN, segments, factor) if wanted.biases else None
    if together is not None:
        grad_b += together.unbind(0)
        wanted = wanted._replace(biases=False)
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
    """Compute `_gradients` as a graph that can be differentiated again."""
    return _Gradients(
        linear(grad_RN, torch.stack(list(weights)).mT.conj(), None, segments, factor) if wanted.rows else None,
        outer(grad_RN, x_RK.conj(), segments, factor).unbind(0) if wanted.weights else (),
        segment_sum(grad_RN, segments, factor).unbind(0) if wanted.biases else (),
    )


def _halves(values: Sequence[Any], has_bias: bool) -> tuple[Sequence[Any], Sequence[Any]]:
    """Split values into those of weights and those of biases."""
    return (values[: len(values) // 2], values[len(values) // 2 :]) if has_bias else (values, ())


def linear_of_members(
    x_RK: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    segments: Segments,
    factor: int,
) -> torch.Tensor:
    """Run each row through its member's linear layer, to ``[R, N]``; differentiable any number of times.

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
        # A custom Function inspects each of its many arguments.
        return _multiply(x_RK.contiguous(), weights, biases, segments, factor)
    return cast(torch.Tensor, _LinearOfMembers.apply(x_RK, segments, factor, bool(biases), *weights, *biases))
