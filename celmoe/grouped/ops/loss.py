"""Losses over rows: first a loss for each row or element, then the sum or mean by segment.

A mean divides by its own expert's number of elements, or of targets that are not ignored.

Axes: R rows, P members.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from celmoe.directml import is_directml
from celmoe.grouped.values import CannotGroupError, Common, Ragged, Rows, Stack, common, owned, rows, stack

from .reduce import reduce
from .table import Run, align, loop, operands, operation, refuse_row_counts

_REDUCTIONS = ("none", "mean", "sum")
# The weights of these losses count in a mean, unlike those of other losses.
_WEIGHTED = {"mse_loss", "l1_loss", "huber_loss"}


@cache
def _signature(func: Any) -> inspect.Signature:
    return inspect.signature(func)


def _options(func: Any, name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """All arguments by name."""
    bound = _signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    options = bound.arguments
    if any(options.pop(each, None) is not None for each in ("size_average", "reduce")):
        raise CannotGroupError(f"called {name} with 'size_average' or 'reduce' in place of 'reduction'")
    refuse_row_counts(name, options.values())
    known = (*_REDUCTIONS, "batchmean") if name == "kl_div" else _REDUCTIONS
    if options["reduction"] not in known:
        raise CannotGroupError(f"called {name} with the reduction {options['reduction']!r}")
    return options


@operation(
    *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss", "kl_div"),
    *("binary_cross_entropy_with_logits", "poisson_nll_loss", "hinge_embedding_loss", "margin_ranking_loss"),
    namespaces=(F,),
)
def of_elements(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run a loss that is computed element by element."""
    options = _options(func, name, args, kwargs)
    reduction = options.pop("reduction")
    if name in _WEIGHTED and options.get("weight") is not None:
        raise CannotGroupError(f"called {name} with weights")
    first, second = list(options.values())[:2]
    if name.startswith("binary") and (type(first) is not type(second) or first.shape != second.shape):
        raise CannotGroupError(f"called {name} with a target of another shape")
    tensors = {key: value for key, value in options.items() if isinstance(value, Ragged)}
    plain, wrap = align(run, name, list(tensors.values()))
    if not any(isinstance(each, Rows) for each in tensors.values()) and first.shape == second.shape:
        # A stack has an axis more than a constant, and PyTorch warns of sizes that differ.
        plain[:2] = torch.broadcast_tensors(*plain[:2])
    each = wrap(func(**options | dict(zip(tensors, plain, strict=True)), reduction="none"))
    if reduction != "batchmean":
        return _reduced(run, each, reduction)
    total = _reduced(run, each, "sum")
    if isinstance(first, Rows) and first.axis == 0:
        return owned(stack(total.plain / _per_member(run, first.factor, total.plain), is_reduced=True))
    return _like(total, total.plain / first.shape[0])


def _reduced(run: Run, each: Ragged, reduction: str) -> Any:
    return each if reduction == "none" else reduce(run, getattr(torch.Tensor, reduction), reduction, (each,), {})


def _per_member(run: Run, factor: int, like: torch.Tensor) -> torch.Tensor:
    """The number of rows of each member, ``[P]``."""
    return torch.tensor([count * factor for count in run.segments.counts], device=like.device, dtype=like.dtype)


def _like(total: Ragged, inner: torch.Tensor) -> Ragged:
    return stack(inner, total.is_reduced) if isinstance(total, Stack) else common(inner)


@operation("cross_entropy", "nll_loss", namespaces=(F,))
def of_classes(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run a loss of each row's class scores, which stand along the second axis."""
    options = _options(func, name, args, kwargs)
    scores, target, reduction = options["input"], options["target"], options["reduction"]
    if not isinstance(scores, Rows):
        if any(isinstance(each, Rows) for each in operands(options.values())):
            raise CannotGroupError(f"called {name} with scores that are not the rows' own")
        return _of_members(run, func, name, options, 0)
    if scores.dim() < 2 or scores.axis == 1:
        raise CannotGroupError(f"mixed samples ({name} with the batch for classes)")
    is_by_share = isinstance(target, Ragged) and target.dim() == scores.dim()
    axis = scores.axis - (scores.axis > 1)
    target_axis = scores.axis if is_by_share else axis
    if not isinstance(target, Rows) or (target.axis, target.factor) != (target_axis, scores.factor):
        raise CannotGroupError(f"called {name} with targets that are not the rows' own")
    if options["weight"] is not None or (is_directml(scores.device) and reduction != "none"):
        # A mean divides by its targets' total weight, which may be zero, so PyTorch's own loss runs for each member.
        # On DirectML, cross_entropy has a gradient only with a reduction.
        return _of_members(run, func, name, options, axis)
    plain = {"input": scores.plain, "target": target.plain, "reduction": "none"}
    each = rows(func(**options | plain), axis, scores.factor)
    if reduction != "mean" or is_by_share:
        return _reduced(run, each, reduction)
    wide = torch.promote_types(each.dtype, torch.float32)
    total = _reduced(run, rows(each.plain.to(wide), axis, each.factor), "sum")
    kept = _reduced(run, rows(target.plain != options["ignore_index"], axis, each.factor), "sum")
    return owned(stack((total.plain / kept.plain).to(each.dtype), is_reduced=True))


@operation(
    *("cosine_embedding_loss", "triplet_margin_loss", "gaussian_nll_loss", "multi_margin_loss"),
    *("multilabel_margin_loss", "multilabel_soft_margin_loss"),
    namespaces=(F,),
)
def by_member(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run a loss of whole rows, one member after another; the batch is the first axis."""
    options = _options(func, name, args, kwargs)
    of_rows = [each for each in operands(options.values()) if isinstance(each, Rows)]
    if any((each.axis, each.factor) != (0, of_rows[0].factor) for each in of_rows):
        raise CannotGroupError(f"called {name} with another axis than the batch first")
    return _of_members(run, func, name, options, 0)


def _of_members(run: Run, func: Any, name: str, options: dict[str, Any], axis: int) -> Any:
    """Run one member after another; a result that is not reduced has the row axis at ``axis``."""
    tensors = operands(options.values())
    if all(isinstance(each, Common) for each in tensors):
        return common(func(**options | {key: each.plain for key, each in options.items() if isinstance(each, Common)}))
    of_rows = [each for each in tensors if isinstance(each, Rows)]
    if options["reduction"] != "none" or not of_rows:
        return owned(loop(run, func, name, (), options, None))
    if any(isinstance(each, Stack) and each.is_reduced for each in tensors):
        raise CannotGroupError(f"mixed samples (what was reduced over the batch came back to rows in {name})")
    factor = of_rows[0].factor
    losses = loop(run, func, name, (), options, axis).plain
    if losses.shape[axis] != run.segments.num_rows * factor:
        raise CannotGroupError(f"mixed samples ({name} without a loss for each row)")
    return rows(losses, axis, factor)
