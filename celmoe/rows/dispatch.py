"""Moving rows: dispatch into expert order and out to the experts, combine back into batch order.

Both are permutations, so each one's backward is the other: one ``index_select`` by the inverse permutation for a whole
level. Such a backward is O(rows), deterministic, without atomic adds, native on every device, and differentiable again.
(PyTorch's own backward handles a few rows on a CPU, which costs a scatter-add and no Python.)

Axes: B samples in batch order, R the same rows in expert order (R = B), P experts present. If some samples have several
experts, or none, `rows.mixing` moves the rows.

Blocks for experts are private: an expert that works in place reaches neither the caller's tensor, nor another expert's
rows, nor anything that autograd saved. Rows that already stand in expert order are therefore copied, though never
gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from celmoe.routing.plan import LevelPlan

from .blocks import Blocks, cut, records
from .mixing import gathered, spread

# Up to this many rows on a CPU, PyTorch's own backward beats a custom Function's Python, despite some useless work.
FEW_ROWS = 128


class _Dispatch(torch.autograd.Function):
    """``[B, ...]`` to P blocks of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        order: torch.Tensor,
        inverse: torch.Tensor,
        counts: Sequence[int],
        sorted_rows: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        ctx.order, ctx.inverse, ctx.counts, ctx.trailing = order, inverse, counts, rows.shape[1:]
        # `backward` makes the zeros for a block without a gradient, since it joins all blocks anyway.
        ctx.set_materialize_grads(False)
        return tuple(cut(rows.index_select(0, order) if sorted_rows is None else sorted_rows, counts))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None, None, None]:
        some = next((grad for grad in grads if grad is not None), None)
        if some is None:
            return None, None, None, None, None
        blocks = [
            some.new_zeros((count, *ctx.trailing)) if grad is None else grad
            for grad, count in zip(grads, ctx.counts, strict=True)
        ]
        return _gather_blocks(blocks, ctx.order, ctx.inverse, ctx.counts), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(cut(tangents[0].index_select(0, ctx.order), ctx.counts))


class _Combine(torch.autograd.Function):
    """P blocks of rows to ``[B, ...]``."""

    @staticmethod
    def forward(
        ctx: Any, order: torch.Tensor, inverse: torch.Tensor, counts: Sequence[int], *blocks: torch.Tensor
    ) -> torch.Tensor:
        ctx.order, ctx.inverse, ctx.counts = order, inverse, counts
        return _whole(blocks).index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, None, *_scatter_rows(grads[0], ctx.order, ctx.inverse, ctx.counts)

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        blocks = [tangent for tangent in tangents if tangent is not None]
        return _whole(blocks).index_select(0, ctx.inverse)


def dispatch(rows: torch.Tensor, plan: LevelPlan) -> Blocks:
    """One private block of rows for each expert present.

    Args:
        rows: ``[B, ...]`` in batch order.
        plan: The level's plan, on the rows' device.

    Returns:
        P tensors ``[counts[p], ...]``, rows in ascending batch order; with a mixture one more, of the samples without
        an expert, if there are some.
    """
    if rows.layout != torch.strided:
        return [rows.index_select(0, positions) for positions in plan.order.split(list(plan.block_counts))]
    if plan.mixture is not None:
        return spread(rows, plan, is_weighted=False)
    if plan.is_sorted:
        return cut(rows.clone(memory_format=torch.contiguous_format), plan.counts)
    if plan.order.numel() <= FEW_ROWS and plan.order.is_cpu:
        return cut(rows.index_select(0, plan.order), plan.counts)
    return _scatter_rows(rows, plan.order, plan.inverse, plan.counts)


def permuted(rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """The rows in an order, ``[B, ...]``, and gradients in the inverse order, as one block."""
    return _scatter_rows(rows, order, inverse, (rows.shape[0],))[0]


def relay(rows: torch.Tensor, blocks: Blocks, plan: LevelPlan) -> Blocks:
    """Like `dispatch`, for rows in the order of the level above: copies that level's blocks in place of a gather.

    Gradients are gathered in the backward pass, and so are a few rows on a CPU if gradients flow: see `FEW_ROWS`.

    Args:
        rows: ``[B, ...]``, the output of the level above. Gradients flow into the rows as through `dispatch`.
        blocks: The same rows, block by block.
        plan: The plan of the level below; `follows_previous` holds.

    Returns:
        The blocks of `dispatch`.
    """
    if not (torch.is_grad_enabled() and rows.requires_grad):
        return cut(_joined(blocks), plan.counts)
    if not records(rows) or (plan.order.numel() <= FEW_ROWS and plan.order.is_cpu):
        return dispatch(rows, plan)
    sorted_rows = _joined([block.detach() for block in blocks])
    return cast(Blocks, _Dispatch.apply(rows, plan.order, plan.inverse, plan.counts, sorted_rows))


def combine(blocks: Blocks, plan: LevelPlan) -> torch.Tensor:
    """The experts' rows back in batch order.

    Args:
        blocks: Tensors ``[counts[p], ...]`` of one dtype; with a mixture, those of `dispatch`.
        plan: The level's plan, on the blocks' device.

    Returns:
        ``[B, ...]``, contiguous.
    """
    if plan.mixture is not None:
        return gathered(blocks, plan, is_weighted=True)
    if len(blocks) == 1 and plan.is_sorted:
        # The block may be the expert's own parameter, buffer or cache: the caller's in-place work on a level's output
        # must not reach it. Joining copies several blocks.
        return blocks[0].clone(memory_format=torch.contiguous_format)
    if plan.is_sorted:
        return _joined(blocks)
    if plan.order.numel() <= FEW_ROWS and plan.order.is_cpu:
        return _whole(blocks).index_select(0, plan.inverse)
    return _gather_blocks(blocks, plan.order, plan.inverse, plan.counts)


def _whole(blocks: Blocks) -> torch.Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _joined(blocks: Blocks) -> torch.Tensor:
    # Joining keeps a memory format that all blocks have.
    return torch.cat(blocks).contiguous()


def _scatter_rows(rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, counts: Sequence[int]) -> Blocks:
    if records(rows):
        return cast(Blocks, _Dispatch.apply(rows, order, inverse, counts, None))
    return cut(rows.index_select(0, order), counts)


def _gather_blocks(blocks: Blocks, order: torch.Tensor, inverse: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    if records(*blocks):
        return cast(torch.Tensor, _Combine.apply(order, inverse, counts, *blocks))
    return _whole(blocks).index_select(0, inverse)
