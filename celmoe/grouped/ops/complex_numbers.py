"""Complex numbers, and Fourier transforms along other axes than the batch."""

from __future__ import annotations

from typing import Any

import torch

from celmoe.grouped.values import CannotGroupError, Ragged, Rows, common, like

from .table import Run, align, arguments, inner_axis_but_rows, operands, operation, refuse_row_counts


@operation("conj", "conj_physical", "resolve_conj", "real", "imag", "angle", "view_as_real", "view_as_complex")
def of_one(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Run element by element; the parts of a complex number may be an axis of their own, the last one."""
    (value,) = arguments(("input",), args, kwargs)
    if name == "view_as_complex" and isinstance(value, Rows) and value.axis == value.dim() - 1:
        raise CannotGroupError(f"mixed samples ({name} along the batch axis)")
    return like(value, getattr(torch, name)(value.plain))


@operation("complex", "polar", namespaces=(torch,))
def of_two(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Make complex numbers of two real tensors."""
    plain, wrap = align(run, name, [*args, *kwargs.values()])
    return wrap(func(*plain))


_ONE_AXIS = ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
_AXES = tuple(f"{name}{number}" for name in _ONE_AXIS for number in "2n")


@operation(*_ONE_AXIS, namespaces=(torch.fft,))
def along_one(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Transform along one axis."""
    value, length, dim, norm = arguments(("input", "n", "dim", "norm"), args, kwargs, (None, -1, None))
    refuse_row_counts(name, [length])
    return like(value, func(value.plain, length, inner_axis_but_rows(value, dim, name), norm))


@operation(*_AXES, namespaces=(torch.fft,))
def along_several(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Transform along the named axes, else the last two, or all for names that end in ``n``."""
    default = (-2, -1) if name.endswith("2") else None
    value, sizes, dims, norm = arguments(("input", "s", "dim", "norm"), args, kwargs, (None, default, None))
    refuse_row_counts(name, sizes or ())
    if dims is None:
        dims = range(-len(sizes), 0) if sizes is not None else range(value.dim())
    return like(value, func(value.plain, sizes, [inner_axis_but_rows(value, dim, name) for dim in dims], norm))


@operation("fftshift", "ifftshift", namespaces=(torch.fft,))
def shift(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Shift along the named axes, else along all."""
    value, dims = arguments(("input", "dim"), args, kwargs, (None,))
    named = range(value.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    return like(value, func(value.plain, [inner_axis_but_rows(value, dim, name) for dim in named]))


@operation("fftfreq", "rfftfreq", namespaces=(torch.fft,))
def frequencies(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Make a constant."""
    refuse_row_counts(name, [*args, *kwargs.values()])
    if operands([*args, *kwargs.values()]):
        raise CannotGroupError(f"made a constant of tensors ({name})")
    return common(func(*args, **kwargs))
