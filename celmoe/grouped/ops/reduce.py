"""Operations that reduce or normalize along an axis.

Along other axes than the batch, they act on each row alone. A sum or mean over the batch becomes a sum by segment, with
one entry for each member, which may be a loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from celmoe.grouped.kernels.product import segment_sum
from celmoe.grouped.values import CannotGroupError, Ragged, Rows, Stack, like, owned, stack

from .table import (
    Run,
    align,
    arguments,
    axis_of,
    inner_axis_but_rows,
    loop,
    operands,
    operation,
    refuse_row_counts,
)

REDUCTIONS = [
    "sum",
    "mean",
    "amax",
    "amin",
    "prod",
    "var",
    "std",
    "norm",
    "logsumexp",
    "all",
    "any",
    "argmax",
    "argmin",
    "max",
    "min",
    "median",
    "nansum",
    "nanmean",
]
# These return the index of their result, too.
_PAIRS = {"max", "min", "median"}
_OF_ONE_AXIS = {*_PAIRS, "argmax", "argmin", "prod", "all", "any"}


@operation(*REDUCTIONS)
def reduce(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run any of `REDUCTIONS`."""
    return owned(_reduce(run, func, name, args, kwargs))


def _reduce(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    value, *rest = args
    refuse_row_counts(name, [*rest, *kwargs.values()])
    if operands([*rest, *kwargs.values()]):
        return _between(run, name, args, kwargs)
    is_of_matrices = func is torch.linalg.norm and bool(rest) and rest[0] not in (None, "fro")
    dim, keepdim, options = _how(name, rest, kwargs)
    dims = sorted({axis_of(value, each) for each in _dims(dim, value.dim())})
    if value.dim() == 0:
        if name not in {"sum", "mean"}:
            raise CannotGroupError(f"reduced a number ({name})")
        # A number is reduced as a vector of one entry: PyTorch sums booleans as integers.
        return like(value, getattr(torch, name)(value.plain.unsqueeze(-1), -1, **options))
    if isinstance(value, Rows) and value.axis in dims:
        if name in {"sum", "mean"} and {*options} <= {"dtype"} and options.get("dtype") is not torch.bool:
            return _over_rows(run, name, value, dims, keepdim, options.get("dtype"))
        return loop(run, func, name, args, kwargs, None)
    if is_of_matrices and len(dims) > 1:
        raise CannotGroupError("took a norm of matrices")
    places = [each + isinstance(value, Stack) for each in dims]
    axis = None
    if isinstance(value, Rows):
        axis = value.axis if keepdim else value.axis - sum(place < value.axis for place in places)
    if name not in _OF_ONE_AXIS:
        return like(value, getattr(torch, name)(value.plain, dim=places, keepdim=keepdim, **options), axis)
    if (dim is None or len(places) != 1) and isinstance(value, Stack):
        return loop(run, func, name, args, kwargs, None)
    if dim is None or len(places) != 1:
        raise CannotGroupError(f"reduced over several axes ({name})")
    found = getattr(torch, name)(value.plain, places[0], keepdim, **options)
    if name in _PAIRS:
        return type(found)(like(value, part, axis) for part in found)
    return like(value, found, axis)


@operation("count_nonzero")
def count_nonzero(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Count as a sum of booleans."""
    value, *rest = args
    return reduce(run, torch.Tensor.sum, "sum", (like(value, value.plain != 0), *rest), kwargs)


def _how(name: str, rest: list[Any], kwargs: Any) -> tuple[Any, bool, dict[str, Any]]:
    """The axes, ``keepdim`` and the other options."""
    options = dict(kwargs)
    if name == "norm":
        if rest:
            options["p"] = rest.pop(0)
        if options.get("p") == "fro":
            options["p"] = 2
        if not isinstance(options.get("p", 2), int | float):
            raise CannotGroupError("took a norm of a name")
    dim = rest.pop(0) if rest else options.pop("dim", None)
    if rest and name in {"var", "std"}:
        options["unbiased"] = rest.pop(0)
    if rest:
        options["keepdim"] = rest.pop(0)
    if rest:
        raise CannotGroupError(f"passed arguments that are not known here (to {name})")
    return dim, options.pop("keepdim", False), options


def _dims(dim: Any, num_axes: int) -> Sequence[int]:
    if dim is None or (isinstance(dim, tuple | list) and not dim):
        return range(num_axes)
    return dim if isinstance(dim, tuple | list) else [dim]


def _over_rows(run: Run, name: str, value: Rows, dims: list[int], keepdim: bool, wanted: torch.dtype | None) -> Stack:
    inner = value.plain if wanted is None else value.plain.to(wanted)
    if not (inner.is_floating_point() or inner.is_complex()):
        if name == "mean":
            raise CannotGroupError("took the mean of integers")
        # PyTorch sums integers in int64.
        inner = inner.to(torch.int64 if wanted is None else wanted)
    dtype = inner.dtype
    if name == "mean" and dtype in (torch.float16, torch.bfloat16):
        # The sum needs more range and precision than the mean.
        inner = inner.float()
    others = [each for each in dims if each != value.axis]
    if others:
        inner = inner.sum(others, keepdim=True)
    total = segment_sum(inner.movedim(value.axis, 0), run.segments, value.factor)
    if name == "mean":
        width = math.prod(value.plain.shape[each] for each in others) * value.factor
        counts = torch.tensor([count * width for count in run.segments.counts], device=total.device, dtype=total.dtype)
        total = (total / counts.view(-1, *(1,) * (total.dim() - 1))).to(dtype)
    else:
        # Autograd forbids writes into a view that a custom Function returned.
        total = total.clone()
    # The row axis comes back in its place, with length one.
    total = total.unsqueeze(value.axis + 1)
    if not keepdim:
        total = total.flatten(1) if len(dims) == value.dim() else total.squeeze([each + 1 for each in dims])
        if len(dims) == value.dim():
            total = total[:, 0]
    return stack(total, is_reduced=True)


def _between(run: Run, name: str, args: Any, kwargs: Any) -> Ragged:
    """Run ``max`` or ``min`` of two tensors element by element."""
    from_two = {"max": torch.maximum, "min": torch.minimum}
    if name not in from_two or len(args) != 2 or kwargs:
        raise CannotGroupError(f"called {name} with tensors for options")
    plain, wrap = align(run, name, args)
    return wrap(from_two[name](*plain))


@operation("softmax", "log_softmax", "softmin", "normalize", namespaces=(torch, torch.Tensor, F))
def along(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Normalize along one axis."""
    value, *rest = args
    refuse_row_counts(name, [*rest, *kwargs.values()])
    if operands([*rest, *kwargs.values()]):
        raise CannotGroupError(f"called {name} with tensors for options")
    options = dict(kwargs)
    options.pop("_stacklevel", None)
    if name == "normalize":
        p, dim, eps, out = arguments(("p", "dim", "eps", "out"), rest, options, (2.0, 1, 1e-12, None))
        if out is not None or not isinstance(dim, int):
            raise CannotGroupError("normalized into a tensor of their own, or along several axes")
        return like(value, F.normalize(value.plain, p, inner_axis_but_rows(value, dim, name), eps))
    dim = rest.pop(0) if rest else options.pop("dim", None)
    if dim is None or (
        rest and func is not getattr(torch, name, None) and func is not getattr(torch.Tensor, name, None)
    ):
        raise CannotGroupError(f"left the axis of {name} open")
    dtype = rest.pop(0) if rest else options.pop("dtype", None)
    place = inner_axis_but_rows(value, dim, name)
    return like(value, getattr(F, name)(value.plain, place, dtype=dtype))


@operation("gumbel_softmax", namespaces=(F,))
def gumbel_softmax(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Run on rows only: each row draws its own numbers, as it would alone."""
    names = ("logits", "tau", "hard", "eps", "dim")
    value, tau, hard, eps, dim = arguments(names, args, kwargs, (1, False, 1e-10, -1))
    if not isinstance(value, Rows) or operands([tau]):
        raise CannotGroupError(f"drew random numbers that are not for rows ({name})")
    refuse_row_counts(name, [tau])
    place = inner_axis_but_rows(value, dim, name)
    if not run.is_rehearsal:
        return like(value, F.gumbel_softmax(value.plain, tau, hard, eps, place))
    return like(value, without_gumbel_noise(value.plain, tau, hard, eps, place))


def without_gumbel_noise(
    logits: torch.Tensor, tau: float = 1, hard: bool = False, _eps: float = 1e-10, dim: int = -1
) -> torch.Tensor:
    """Compute ``gumbel_softmax`` without its random numbers, so that results can be compared."""
    soft = (logits / tau).softmax(dim)
    if not hard:
        return soft
    return torch.zeros_like(soft).scatter(dim, soft.argmax(dim, keepdim=True), 1.0) - soft.detach() + soft


@operation("cumsum", "cumprod", "logcumsumexp", "sort", "argsort", "topk", "glu")
def ordered(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run along one axis, and keep the axis."""
    value, *rest = args
    refuse_row_counts(name, [*rest, *kwargs.values()])
    if operands([*rest, *kwargs.values()]):
        raise CannotGroupError(f"called {name} with tensors for options")
    options = dict(kwargs)
    how = []
    if name == "topk":
        how = [rest.pop(0) if rest else options.pop("k")]
    default = None if name.startswith("cum") or name == "logcumsumexp" else -1
    dim = rest.pop(0) if rest else options.pop("dim", default)
    if rest or dim is None:
        raise CannotGroupError(f"passed arguments that are not known here (to {name})")
    place = inner_axis_but_rows(value, dim, name)
    found = (
        F.glu(value.plain, place) if name == "glu" else getattr(torch, name)(value.plain, *how, dim=place, **options)
    )
    return type(found)(like(value, part) for part in found) if isinstance(found, tuple) else like(value, found)
