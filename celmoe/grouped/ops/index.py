"""Indexing, to read and to assign: along all axes but the row axis, or by each row's own integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from celmoe.grouped.values import CannotGroupError, Common, Ragged, RowCount, Rows, Stack, like

from .elementwise import in_place, writable
from .shape import look_up
from .table import Run, align, arguments, inner_axis_but_rows, loop, operands, operation, refuse_row_counts

_INTEGERS = (torch.int64, torch.int32)


class _Keys(NamedTuple):
    """A key, spelled out.

    Attributes:
        all: One key for each axis: a number, a slice or a tensor of integers; and ``None`` for each new axis.
        axis: The axis of rows, or of members, in the result.
    """

    all: list[Any]
    axis: int


def _spelled(value: Ragged, key: Any) -> _Keys:
    """Spell a key out in numbers, slices and integers that leave rows and members whole.

    Raises:
        CannotGroupError: The key reads values, or takes some of the rows.
    """
    given = list(key) if isinstance(key, tuple) else [key]
    keys: list[Any] = []
    for each in given:
        keys += _tensors_of(each, value)
    taken = sum(each is not None and each is not Ellipsis for each in keys)
    place = next((place for place, each in enumerate(keys) if each is Ellipsis), len(keys))
    keys[place : place + 1] = [slice(None)] * (value.dim() - taken)
    axis = None
    if isinstance(value, Rows):
        axis = value.axis
        _keep_rows(value, keys)
    if any(type(part) not in (int, type(None)) for each in keys if isinstance(each, slice) for part in _parts(each)):
        raise CannotGroupError("cut by the number of their rows, or by values")
    if isinstance(value, Stack):
        keys, axis = [slice(None), *keys], 0
    return _Keys(keys, 0 if axis is None else _axis_behind(keys, axis))


def _tensors_of(key: Any, value: Ragged) -> list[Any]:
    """Replace one part of a key: a list becomes a tensor, a mask becomes the integers of its true entries."""
    if key is None or key is Ellipsis or type(key) in (int, slice):
        return [key]
    if isinstance(key, list):
        try:
            key = torch.tensor(key, device=value.device)
        except (TypeError, ValueError):
            raise CannotGroupError("indexed by values") from None
    elif isinstance(key, Stack) and key.dtype in _INTEGERS and key.dim():
        return [key]
    elif isinstance(key, Common):
        key = key.plain
    if not isinstance(key, torch.Tensor) or not key.dim():
        raise CannotGroupError("indexed by values")
    if key.dtype == torch.bool:
        return list(key.nonzero(as_tuple=True))
    if key.dtype not in _INTEGERS:
        raise CannotGroupError(f"indexed by values of {key.dtype}")
    return [key]


# A tensor key is the same for all members, or each member's own.
_TENSORS = (torch.Tensor, Ragged)


def _parts(each: slice) -> tuple[Any, Any, Any]:
    return each.start, each.stop, each.step


def _keep_rows(value: Rows, keys: list[Any]) -> None:
    """Write out the key that takes all rows; refuse a key that takes some of the rows."""
    places = [place for place, each in enumerate(keys) if each is not None]
    if len(places) != value.dim():
        raise IndexError(f"too many indices for a tensor of {value.dim()} axes")
    each = keys[places[value.axis]]
    start, stop, step = _parts(each) if isinstance(each, slice) else (0, 0, 0)
    is_whole = stop is None or (isinstance(stop, RowCount) and stop.factor == value.factor)
    if not isinstance(each, slice) or start not in (None, 0) or step not in (None, 1) or not is_whole:
        raise CannotGroupError("took some of their samples")
    keys[places[value.axis]] = slice(None)


def _axis_behind(keys: Sequence[Any], axis: int) -> int:
    """The place in the result of an axis that is taken whole.

    The axes of tensor keys stand in the keys' place if the keys are neighbours, else in front. Numbers are taken first.
    """
    source, found = 0, []
    for each in keys:
        if each is None:
            found.append("new")
            continue
        if not isinstance(each, int):
            found.append("tensor" if isinstance(each, _TENSORS) else "whole" if source == axis else "slice")
        source += 1
    tensors = [each for each in keys if isinstance(each, _TENSORS)]
    places = [place for place, each in enumerate(found) if each == "tensor"]
    whole = found.index("whole")
    if not tensors:
        return whole
    num_axes = max(each.dim() for each in tensors)
    are_neighbours = places[-1] - places[0] == len(places) - 1
    before = whole - sum(place < whole for place in places)
    return before + num_axes if not are_neighbours or places[0] < whole else before


@operation("__getitem__")
def index(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Take the same entries of all rows, along any axis but the row axis, or look the rows' integers up in a table."""
    value, key = args
    if isinstance(key, Rows | Stack):
        return look_up(run, value, key)
    keys = _spelled(value, key)
    if any(isinstance(each, Stack) for each in keys.all):
        if not isinstance(value, Rows):
            raise CannotGroupError("indexed by values")
        return like(value, loop(run, _item, name, (value, tuple(keys.all)), {}, keys.axis).plain, keys.axis)
    found = value.plain[tuple(keys.all)]
    if isinstance(value, Stack):
        return like(value, found.movedim(keys.axis, 0) if keys.axis else found)
    return like(value, found, keys.axis)


def _item(value: torch.Tensor, key: tuple[Any, ...]) -> torch.Tensor:
    return value[key]


@operation("__setitem__")
def assign(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> None:
    """Assign to the part of a tensor that a key takes; a mask of the tensor's own rows takes only a number."""
    given, key, new = args
    refuse_row_counts(name, [new])
    if isinstance(key, Rows) and key.dtype == torch.bool:
        if not isinstance(given, Rows) or (key.axis, key.factor) != (given.axis, given.factor):
            raise CannotGroupError(f"put samples side by side with others ({name})")
        if isinstance(new, Ragged) and new.dim():
            raise CannotGroupError("assigned to as many places as values say")
        mask = key.plain[(..., *(None,) * (given.dim() - key.dim()))]
        in_place(run, torch.Tensor.masked_fill_, "masked_fill_", (given, like(key, mask), new), {})
        return
    target = writable(run, name, given, operands([new]))
    if isinstance(target, Stack):
        raise CannotGroupError(f"wrote into a parameter or buffer, or what was made of one ({name})")
    keys = _spelled(target, key)
    if any(isinstance(each, Stack) for each in keys.all):
        raise CannotGroupError("assigned to places that differ by expert")
    if isinstance(new, Ragged):
        part = like(target, target.plain[tuple(keys.all)], keys.axis)
        if new.dim() > part.dim():
            raise CannotGroupError(f"wrote more axes than there are ({name})")
        (_, new), _ = align(run, name, [part, new])
    target.plain[tuple(keys.all)] = new


@operation("index_fill", "index_select")
def by_common_index(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Fill, or take, places of an axis that are the same for all rows of an expert."""
    value, dim, places, *rest = args
    refuse_row_counts(name, [*rest, *kwargs.values()])
    if operands([*rest, *kwargs.values()]):
        raise CannotGroupError(f"indexed by values ({name})")
    axis = inner_axis_but_rows(value, dim, name)
    if isinstance(value, Rows) and isinstance(places, Stack):
        return like(value, loop(run, func, name, args, kwargs, value.axis).plain)
    if not isinstance(places, Common):
        raise CannotGroupError(f"indexed by values ({name})")
    return like(value, func(value.plain, axis, places.plain, *rest, **kwargs))


@operation("index_add", "index_copy")
def put(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Put rows' entries at places of an axis that are the same for all."""
    value, dim, places, source = arguments(("input", "dim", "index", "source"), args, kwargs)
    if not isinstance(places, Common) or not _stand_together(value, source):
        raise CannotGroupError(f"indexed by values ({name})")
    return like(value, func(value.plain, inner_axis_but_rows(value, dim, name), places.plain, source.plain))


def _stand_together(*values: Any) -> bool:
    """Tells if all are rows, with equally many axes and the row axis in the same place."""
    found = {(each.axis, each.factor, each.dim()) if isinstance(each, Rows) else None for each in values}
    return len(found) == 1 and None not in found


@operation("gather", "scatter", "scatter_add", "scatter_reduce", "scatter_", "scatter_add_", "scatter_reduce_")
def by_own_index(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Take, or put, each row's entries by its own indices; never along the row axis."""
    given = dict(zip(("input", "dim", "index"), args, strict=False)) | kwargs
    rest, options = args[3:], {key: given[key] for key in given if key not in ("input", "dim", "index")}
    value, dim, places = given["input"], given["dim"], given["index"]
    refuse_row_counts(name, [*rest, *options.values()])
    if not _stand_together(value, places, *operands([*rest, *options.values()])):
        raise CannotGroupError(f"indexed by values ({name} of other tensors than rows side by side)")
    plain = [each.plain if isinstance(each, Ragged) else each for each in rest]
    plain_options = {key: each.plain if isinstance(each, Ragged) else each for key, each in options.items()}
    axis = inner_axis_but_rows(value, dim, name)
    found = getattr(torch, name.removesuffix("_"))(value.plain, axis, places.plain, *plain, **plain_options)
    if name.endswith("_"):
        return in_place(run, torch.Tensor.copy_, "copy_", (value, like(value, found)), {})
    return like(value, found)
