"""Layouts of a hand-written level's rows, in which all its experts' products are one call.

Axes: B samples, E experts of the level, R rows sorted by expert (R = B), M rows of the largest expert, H and F widths.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch.nn import functional

import celmoe


class Layout(Protocol):
    """Rows of one level in the order that its experts take.

    A `per_expert` of ``[E, F]`` is spread so that it broadcasts against the rows; weights are ``[E, H, F]``.
    """

    def arrange(self, rows: torch.Tensor) -> torch.Tensor:
        """``[B, H]`` in batch order to the layout."""

    def restore(self, rows: torch.Tensor) -> torch.Tensor:
        """Back to ``[B, H]`` in batch order."""

    def spread(self, per_expert: torch.Tensor) -> torch.Tensor:
        """``[E, F]`` to a shape that broadcasts against the rows."""

    def affine(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Every row times its expert's weight ``[E, H, F]``, plus its bias ``[E, F]``."""


class Alone:
    """One expert: nothing moves."""

    def arrange(self, rows: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return rows

    def restore(self, rows: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return rows

    def spread(self, per_expert: torch.Tensor) -> torch.Tensor:
        """``[1, F]``."""
        return per_expert

    def affine(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """``[B, F]``."""
        return torch.addmm(bias, rows, weight[0])


class Ragged:
    """Rows ``[R, H]`` sorted by expert, for ``grouped_mm``."""

    def __init__(self, plan: celmoe.LevelPlan, num_experts: int) -> None:
        self._order, self._inverse = plan.order, plan.inverse
        self._ids, counts = _sorted_ids_and_counts(plan, num_experts)
        ends = counts.cumsum(0)
        self._starts = ends - counts
        self._offsets = ends.to(torch.int32)

    def arrange(self, rows: torch.Tensor) -> torch.Tensor:
        """``[R, H]``."""
        return _gathered(rows, self._order, self._inverse)

    def restore(self, rows: torch.Tensor) -> torch.Tensor:
        """``[B, H]``."""
        return _gathered(rows, self._inverse, self._order)

    def spread(self, per_expert: torch.Tensor) -> torch.Tensor:
        """``[R, F]``."""
        return cast(torch.Tensor, _Spread.apply(per_expert, self._ids, self._starts))

    def affine(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """``[R, F]``."""
        result: torch.Tensor = functional.grouped_mm(rows, weight, offs=self._offsets) + self.spread(bias)
        return result


class Padded:
    """Rows ``[E, M, H]``, for ``bmm``; nothing reads the padding, so its gradients are zero."""

    def __init__(self, plan: celmoe.LevelPlan, num_experts: int) -> None:
        ids, counts = _sorted_ids_and_counts(plan, num_experts)
        largest = max(plan.counts)
        self._shape = (num_experts, largest)
        starts = counts.cumsum(0) - counts
        slots = ids * largest + torch.arange(len(ids), device=ids.device) - starts.index_select(0, ids)
        # Any row will do at padding: the first one.
        self._sources = slots.new_zeros(num_experts * largest).index_copy_(0, slots, plan.order)
        self._slots = slots.index_select(0, plan.inverse)

    def arrange(self, rows: torch.Tensor) -> torch.Tensor:
        """``[E, M, H]``."""
        return _gathered(rows, self._sources, self._slots).view(*self._shape, *rows.shape[1:])

    def restore(self, rows: torch.Tensor) -> torch.Tensor:
        """``[B, H]``."""
        return _gathered(rows.flatten(0, 1), self._slots, None)

    def spread(self, per_expert: torch.Tensor) -> torch.Tensor:
        """``[E, 1, F]``."""
        return per_expert.unsqueeze(1)

    def affine(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """``[E, M, F]``."""
        return torch.baddbmm(bias.unsqueeze(1), rows, weight)


class _Gather(torch.autograd.Function):
    """``rows[forth]``; the gradient is ``grad[back]``, or ``grad`` put at ``forth`` if `forth` is no permutation."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, forth: torch.Tensor, back: torch.Tensor | None) -> torch.Tensor:
        ctx.forth, ctx.back, ctx.shape = forth, back, rows.shape
        return rows.index_select(0, forth)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.back is not None:
            return grads[0].index_select(0, ctx.back), None, None
        return grads[0].new_zeros(ctx.shape).index_copy_(0, ctx.forth, grads[0]), None, None


class _Spread(torch.autograd.Function):
    """``per_expert[ids]`` for ascending ids; backward, a bag of rows is summed 1.5 to 2 times as fast as by index."""

    @staticmethod
    def forward(ctx: Any, per_expert: torch.Tensor, ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        ctx.starts = starts
        return per_expert.index_select(0, ids)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        rows = torch.arange(len(grads[0]), device=grads[0].device)
        sums: torch.Tensor = functional.embedding_bag(rows, grads[0], ctx.starts, mode="sum")
        return sums, None, None


def _gathered(rows: torch.Tensor, forth: torch.Tensor, back: torch.Tensor | None) -> torch.Tensor:
    return cast(torch.Tensor, _Gather.apply(rows, forth, back))


def _sorted_ids_and_counts(plan: celmoe.LevelPlan, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[R]`` int64 ascending, and ``[E]`` int64 with zeros for the absent."""
    ids = plan.expert_ids.index_select(0, plan.order)
    return ids, torch.bincount(plan.expert_ids, minlength=num_experts)
