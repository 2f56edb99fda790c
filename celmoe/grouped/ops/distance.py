"""Distances and similarities of vectors, within each row."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from celmoe.grouped.values import CannotGroupError, Ragged, Rows, like

from .table import Run, align, arguments, operands, operation


@operation("cosine_similarity", "pairwise_distance", namespaces=(torch, F))
def along_one_axis(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Compare two tensors along an axis, and drop the axis unless ``keepdim``."""
    left, right, *rest = args
    num_axes = max(each.dim() for each in (left, right))
    keepdim, place = False, -1
    if name == "cosine_similarity":
        dim, eps = arguments(("dim", "eps"), rest, kwargs, (1, 1e-8))
        if not -num_axes <= dim < num_axes:
            raise IndexError(f"Dimension out of range (got {dim} for {num_axes} axes)")
        # The axis is counted from the back: there the operands' axes are the expert's own.
        place = dim % num_axes - num_axes
        options = [place, eps]
    else:
        *_, keepdim = options = arguments(("p", "eps", "keepdim"), rest, kwargs, (2.0, 1e-6, False))
    plain, wrap = align(run, name, [left, right])
    found = func(*plain, *options)
    made = wrap(found)
    if not isinstance(made, Rows):
        return made
    if made.axis == place + num_axes:
        raise CannotGroupError(f"mixed samples ({name} along the batch axis)")
    return made if keepdim else like(made, found, made.axis - (place + num_axes < made.axis))


@operation("cdist", namespaces=(torch,))
def between_all(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Measure distances between all vectors of one matrix and all of another, within each row."""
    left, right, *_ = values = args
    if operands([*args[2:], *kwargs.values()]) or len(values) < 2:
        raise CannotGroupError(f"passed arguments that are not known here (to {name})")
    if any(isinstance(each, Rows) and each.axis >= each.dim() - 2 for each in (left, right)):
        raise CannotGroupError(f"mixed samples ({name} between them)")
    plain, wrap = align(run, name, [left, right])
    return wrap(func(*plain, *args[2:], **kwargs))
