"""Scale and shift each row by its member's vectors, the last step of a normalization.

    affine(x, w, b)[r] = w[m(r)] x[r] + b[m(r)]

Spreading the vectors over the rows first would move as many bytes as the rows have, once for each vector and once for
its gradient. Members of equally many rows share a broadcast product instead.

Axes: R rows (with positions folded in), P members, K width; m(r) is row r's member.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.autograd import Function

from celmoe.grouped.segments import Segments

from .product import added, is_batched, segment_sum, spread


def _scale(
    x_RK: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], segments: Segments, factor: int
) -> torch.Tensor:
    out_RK = torch.empty_like(x_RK)
    for first, last, member, members in segments.row_runs(factor):
        x, out = (each[first:last].view(members, -1, x_RK.shape[1]) for each in (x_RK, out_RK))
        w, b = _stacked(weights, member, members), _stacked(biases, member, members)
        if w is None:
            torch.add(x, b, out=out)
        elif b is None:
            torch.mul(x, w, out=out)
        else:
            torch.addcmul(b, x, w, out=out)
    return out_RK


def _stacked(vectors: Sequence[torch.Tensor], member: int, members: int) -> Any:
    """Stack vectors to ``[members, 1, K]``; ``None`` if there are none."""
    if not vectors:
        return None
    if members == 1:
        return vectors[member].view(1, 1, -1)
    return torch.stack(list(vectors[member : member + members])).unsqueeze(1)


def _sums(values_RK: torch.Tensor, segments: Segments, factor: int) -> list[torch.Tensor]:
    """P times ``[K]``: the sum over each member's rows."""
    if (together := added(values_RK, segments, factor)) is not None:
        return list(together.unbind(0))
    found: list[torch.Tensor] = []
    for first, last, _, members in segments.row_runs(factor):
        found += torch.sum(values_RK[first:last].view(members, -1, values_RK.shape[1]), 1).unbind(0)
    return found


class _Affine(Function):
    @staticmethod
    def forward(
        ctx: Any, x_RK: torch.Tensor, segments: Segments, factor: int, num_weights: int, *vectors: torch.Tensor
    ) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        weights, biases = vectors[:num_weights], vectors[num_weights:]
        ctx.save_for_backward(x_RK, *weights)
        ctx.segments, ctx.factor, ctx.num_biases = segments, factor, len(biases)
        return _scale(x_RK, weights, biases, segments, factor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        x_RK, *weights = ctx.saved_tensors
        segments, factor, needed = ctx.segments, ctx.factor, ctx.needs_input_grad
        grad_RK = grads[0].contiguous()
        of_weights, of_biases = any(needed[4 : 4 + len(weights)]), any(needed[4 + len(weights) :])
        grad_w: Sequence[torch.Tensor | None] = [None] * len(weights)
        grad_b: Sequence[torch.Tensor | None] = [None] * ctx.num_biases
        if torch.is_grad_enabled() or is_batched(grad_RK) or grad_RK.is_complex():
            # Build a graph that can be differentiated again.
            w_RK = spread(torch.stack(weights), segments, factor) if weights else None
            grad_x = grad_RK if w_RK is None else grad_RK * w_RK.conj()
            if of_weights:
                grad_w = segment_sum(grad_RK * x_RK.conj(), segments, factor).unbind(0)
            if of_biases:
                grad_b = segment_sum(grad_RK, segments, factor).unbind(0)
        else:
            grad_x = _scale(grad_RK, weights, (), segments, factor) if weights else grad_RK
            if of_weights:
                grad_w = _sums(grad_RK * x_RK, segments, factor)
            if of_biases:
                grad_b = _sums(grad_RK, segments, factor)
        return grad_x if needed[0] else None, None, None, None, *grad_w, *grad_b


def affine_of_stack(
    x_RK: torch.Tensor, w_PK: torch.Tensor, b_PK: torch.Tensor, segments: Segments, factor: int
) -> torch.Tensor:
    """`affine_of_members` with the members' vectors in two stacks."""
    return torch.addcmul(spread(b_PK, segments, factor), x_RK, spread(w_PK, segments, factor))


def affine_of_members(
    x_RK: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    segments: Segments,
    factor: int,
) -> torch.Tensor:
    """Scale and shift each row by its member's vectors, to ``[R, K]``; differentiable any number of times.

    Args:
        x_RK: ``[R, K]``, ``factor`` positions for each of the segments' rows.
        weights: P times ``[K]``, or none.
        biases: P times ``[K]``, or none.
        segments: The rows of each member.
        factor: Positions folded into each row.
    """
    x_RK = x_RK.contiguous()
    if not torch.is_grad_enabled():
        return _scale(x_RK, weights, biases, segments, factor)
    return cast(torch.Tensor, _Affine.apply(x_RK, segments, factor, len(weights), *weights, *biases))
