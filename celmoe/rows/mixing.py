"""Moving rows of a level with a mixture: a sample goes to several experts, and their weighted sum comes back.

Both ways are sums with weights: out, each row is its sample's; back, each sample is the sum of its rows, times their
weights. So each one's backward is the other with the same weights. There are no atomic adds: sums run over gathered
rows, in the order of the experts' names.

Axes: B samples; R rows of experts, and N rows of samples without one behind them; M samples with several experts, each
with at most W.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from celmoe.routing.plan import LevelPlan

from .blocks import Blocks, cut, records


class _Spread(torch.autograd.Function):
    """``[B, ...]`` to blocks of rows."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, plan: LevelPlan, is_weighted: bool) -> tuple[torch.Tensor, ...]:
        ctx.plan, ctx.is_weighted, ctx.trailing = plan, is_weighted, rows.shape[1:]
        ctx.set_materialize_grads(False)
        return tuple(_spread(rows, plan, is_weighted))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None]:
        some = next((grad for grad in grads if grad is not None), None)
        if some is None:
            return None, None, None
        blocks = [
            some.new_zeros((count, *ctx.trailing)) if grad is None else grad
            for grad, count in zip(grads, ctx.plan.block_counts, strict=True)
        ]
        return gathered(blocks, ctx.plan, is_weighted=ctx.is_weighted), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_spread(tangents[0], ctx.plan, ctx.is_weighted))


class _Gathered(torch.autograd.Function):
    """Blocks of rows to ``[B, ...]``."""

    @staticmethod
    def forward(ctx: Any, plan: LevelPlan, is_weighted: bool, *blocks: torch.Tensor) -> torch.Tensor:
        ctx.plan, ctx.is_weighted = plan, is_weighted
        return _gathered(blocks, plan, is_weighted)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *spread(grads[0], ctx.plan, is_weighted=ctx.is_weighted)

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        return _gathered([each for each in tangents if each is not None], ctx.plan, ctx.is_weighted)


def spread(rows: torch.Tensor, plan: LevelPlan, *, is_weighted: bool) -> Blocks:
    """One private block of rows for each expert present; and one of the samples without an expert, if there are some.

    Args:
        rows: ``[B, ...]`` in batch order.
        plan: The level's plan, with a mixture.
        is_weighted: If true, each row is multiplied by its weight.
    """
    if records(rows):
        return cast(Blocks, _Spread.apply(rows, plan, is_weighted))
    return _spread(rows, plan, is_weighted)


def gathered(blocks: Blocks, plan: LevelPlan, *, is_weighted: bool) -> torch.Tensor:
    """The sum of each sample's rows, ``[B, ...]``.

    Args:
        blocks: The blocks of `spread`.
        plan: The level's plan, with a mixture.
        is_weighted: If true, each row counts with its weight.
    """
    if records(*blocks):
        return cast(torch.Tensor, _Gathered.apply(plan, is_weighted, *blocks))
    return _gathered(blocks, plan, is_weighted)


def _spread(rows: torch.Tensor, plan: LevelPlan, is_weighted: bool) -> Blocks:
    assert plan.mixture is not None
    found = rows.index_select(0, plan.order)
    if is_weighted and plan.mixture.most:
        found = found * plan.mixture.row_weights(found)
    return cut(found, plan.block_counts)


def _gathered(blocks: Blocks, plan: LevelPlan, is_weighted: bool) -> torch.Tensor:
    mixture = plan.mixture
    assert mixture is not None
    if not mixture.most:
        return torch.cat([*blocks]).index_select(0, plan.inverse)
    # Room for the sums behind the rows: they are then gathered like any row.
    num_sums = mixture.slots.shape[0] // mixture.most
    first = blocks[0]
    every = torch.cat([*blocks, first.new_empty((num_sums, *first.shape[1:]))])
    rows = every.index_select(0, mixture.places)
    if is_weighted:
        rows = rows * mixture.row_weights(rows, mixture.places)
    if rows.shape[0] < mixture.slots.shape[0]:
        # Some samples have fewer experts than others: a row of zeros stands in.
        rows = torch.cat([rows, rows.new_zeros((1, *rows.shape[1:]))]).index_select(0, mixture.slots)
    every[plan.order.shape[0] :] = rows.view(num_sums, mixture.most, *rows.shape[1:]).sum(1)
    return every.index_select(0, plan.inverse)
