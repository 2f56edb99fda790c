"""Operations that move or cut axes, and those that make constants.

The row axis may move, and absorb the axes behind it. The row axis is never cut, and nothing is joined along it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from celmoe.directml import is_directml
from celmoe.grouped.segments import DeviceSegments
from celmoe.grouped.values import (
    CannotGroupError,
    Common,
    Ragged,
    RowCount,
    Rows,
    Stack,
    common,
    like,
    repeated,
    rows,
    stack,
)

from .table import (
    Run,
    align,
    arguments,
    axis_of,
    by_row,
    inner_axis,
    inner_axis_but_rows,
    loop,
    loop_batch_first,
    operands,
    operation,
    refuse_row_counts,
)


def _sizes(args: Sequence[Any]) -> list[Any]:
    """Sizes passed one by one or as one sequence."""
    return list(args[0]) if len(args) == 1 and isinstance(args[0], tuple | list) else list(args)


@operation("view", "reshape")
def reshape(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Fold axes: axes behind the row axis may be folded into the row axis and out again."""
    value, *rest = args
    sizes = _sizes(rest or [kwargs["shape"]])
    if len(sizes) == 1 and isinstance(sizes[0], torch.dtype):
        raise CannotGroupError("viewed memory as another dtype")
    if not isinstance(value, Rows):
        if any(isinstance(size, RowCount) for size in sizes):
            raise CannotGroupError(f"shaped a tensor of fixed size by the number of their rows ({name})")
        lead = value.plain.shape[: isinstance(value, Stack)]
        return like(value, value.plain.reshape(*lead, *_resolved(sizes, math.prod(value.shape))))
    symbols = [place for place, size in enumerate(sizes) if isinstance(size, RowCount)]
    unknown = [place for place, size in enumerate(sizes) if type(size) is int and size == -1]
    if len(symbols) + len(unknown) == 0 or len(symbols) > 1 or len(unknown) > 1:
        raise CannotGroupError(f"shaped their rows by plain numbers ({name})")
    axis = (symbols or unknown)[0]
    shape = value.plain.shape
    before, after = math.prod(shape[: value.axis]), math.prod(shape[value.axis + 1 :])
    if before * after == 0:
        raise CannotGroupError(f"shaped rows without elements ({name})")
    known = [size if type(size) is int and size != -1 else None for size in sizes]
    if symbols and unknown:
        rest_size = math.prod(size for size in known if size is not None) * sizes[axis].factor
        known[unknown[0]] = before * after * value.factor // rest_size if rest_size else 0
    head = [size for size in known[:axis] if size is not None]
    tail = [size for size in known[axis + 1 :] if size is not None]
    factor = value.factor * after // max(math.prod(tail), 1)
    fits = math.prod(head) == before and math.prod(tail) * factor == value.factor * after
    if not fits or (symbols and sizes[axis].factor != factor):
        raise CannotGroupError(f"mixed samples ({name} across the batch axis)")
    target = (*head, run.segments.num_rows * factor, *tail)
    if name == "view":
        return rows(value.plain.view(target), axis, factor)
    made = value.plain.reshape(target)
    run.note_copy(value, made, lambda some: _is_viewed(some, (*head, -1, *tail)))
    return rows(made, axis, factor)


def _is_viewed(inner: torch.Tensor, sizes: Sequence[int]) -> bool:
    try:
        inner.view(sizes)
    except RuntimeError:
        return False
    return True


def _resolved(sizes: Sequence[Any], numel: int) -> list[int]:
    known = math.prod(size for size in sizes if size != -1)
    return [(numel // known if known else 0) if size == -1 else size for size in sizes]


@operation("view_as", "reshape_as")
def reshape_as(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Reshape to the shape of another tensor."""
    return reshape(run, func, "reshape", (args[0], list(args[1].shape)), {})


@operation("flatten")
def flatten(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Fold a range of axes."""
    value, start, end = arguments(("input", "start_dim", "end_dim"), args, kwargs, (0, -1))
    first, last = axis_of(value, start), axis_of(value, end)
    shape = list(value.shape)
    if first == last or not shape:
        return like(value, value.plain)
    folded: Any = 1
    for size in shape[first : last + 1]:
        folded = folded * size
    return reshape(run, torch.Tensor.reshape, "reshape", (value, [*shape[:first], folded, *shape[last + 1 :]]), {})


@operation("unflatten")
def unflatten(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Unfold one axis."""
    value, dim, sizes = arguments(("input", "dim", "sizes"), args, kwargs)
    axis, shape = axis_of(value, dim), list(value.shape)
    if -1 in [size for size in sizes if type(size) is int] and isinstance(shape[axis], int):
        sizes = _resolved(sizes, shape[axis])
    return reshape(run, torch.Tensor.reshape, "reshape", (value, [*shape[:axis], *sizes, *shape[axis + 1 :]]), {})


@operation("transpose", "swapaxes", "swapdims")
def transpose(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Swap two axes."""
    value, *dims = args
    dims += list(kwargs.values())
    first, second = (inner_axis(value, dim) for dim in dims)
    swapped = {first: second, second: first}
    axis = swapped.get(value.axis, value.axis) if isinstance(value, Rows) else None
    return like(value, value.plain.transpose(first, second), axis)


@operation("t", "T", "mT", "adjoint", "mH", "H", "matrix_transpose")
def matrix_transpose(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Swap the last two axes, for some names with conjugates; a vector keeps its axis."""
    value = args[0]
    if name in {"adjoint", "mH", "H"} and value.is_complex():
        value = like(value, value.plain.conj())
    if value.dim() > 2 and name in {"t", "T", "H"}:
        raise CannotGroupError(f"transposed more than two axes ({name})")
    if value.dim() < 2:
        return like(value, value.plain)
    return transpose(run, func, name, (value, -2, -1), {})


@operation("permute")
def permute(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Reorder all axes."""
    value, *dims = args
    order = [inner_axis(value, dim) for dim in _sizes(dims or [kwargs["dims"]])]
    if isinstance(value, Stack):
        order = [0, *order]
    return like(value, value.plain.permute(order), order.index(value.axis) if isinstance(value, Rows) else None)


@operation("movedim", "moveaxis")
def movedim(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Move one axis."""
    value, source, destination = arguments(("input", "source", "destination"), args, kwargs)
    source, destination = axis_of(value, source), axis_of(value, destination)
    order = [dim for dim in range(value.dim()) if dim != source]
    order.insert(destination, source)
    return permute(run, func, name, (value, *order), {})


@operation("unsqueeze")
def unsqueeze(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Insert an axis of length one."""
    value, dim = arguments(("input", "dim"), args, kwargs)
    place = dim % (value.dim() + 1)
    axis = value.axis + (place <= value.axis) if isinstance(value, Rows) else None
    return like(value, value.plain.unsqueeze(place + isinstance(value, Stack)), axis)


@operation("squeeze")
def squeeze(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Drop one axis if its length is one; never the row axis."""
    value, dim = arguments(("input", "dim"), args, kwargs, (None,))
    if dim is None or not isinstance(dim, int):
        raise CannotGroupError("squeezed all axes, the batch axis if it happened to be one long")
    place = inner_axis_but_rows(value, dim, name)
    if value.plain.shape[place] != 1:
        return like(value, value.plain)
    axis = value.axis - (place < value.axis) if isinstance(value, Rows) else None
    return like(value, value.plain.squeeze(place), axis)


@operation("expand", "expand_as", "broadcast_to")
def expand(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Repeat axes of length one without a copy, also to the number of rows."""
    value, *rest = args
    sizes = list(rest[0].shape) if name == "expand_as" else _sizes(rest or [next(iter(kwargs.values()))])
    num_new = len(sizes) - value.dim()
    symbols = [place for place, size in enumerate(sizes) if isinstance(size, RowCount)]
    if isinstance(value, Rows):
        axis = value.axis + num_new
        if symbols not in ([], [axis]) or (symbols and sizes[axis].factor != value.factor):
            raise CannotGroupError(f"put samples side by side with others ({name})")
        if not symbols and sizes[axis] != -1:
            raise CannotGroupError(f"shaped their rows by plain numbers ({name})")
        sizes[axis] = value.plain.shape[value.axis]
        return rows(value.plain.expand(sizes), axis, value.factor)
    if not symbols:
        lead = value.plain.shape[: isinstance(value, Stack)]
        inner = value.plain
        if isinstance(value, Stack) and num_new:
            inner = inner.view(inner.shape[0], *(1,) * num_new, *inner.shape[1:])
        return like(value, inner.expand(*lead, *sizes))
    if len(symbols) > 1:
        raise CannotGroupError(f"put samples side by side with others ({name})")
    axis = symbols[0]
    factor = sizes[axis].factor
    sizes[axis] = run.segments.num_rows * factor
    place = axis - num_new
    if place >= 0 and value.shape[place] != 1:
        raise CannotGroupError(f"joined a tensor of fixed length to the batch axis ({name})")
    if isinstance(value, Common):
        return rows(value.plain.expand(sizes), axis, factor)

    run.expands = True

    def write_out(source: Stack, place: int = -1) -> torch.Tensor:
        written = by_row(run, source, name, factor, place, len(sizes) - 1 - axis).expand(sizes)
        run.spread.append(StorageWeakRef(written.untyped_storage()))
        return written

    source = value if place < 0 else stack(value.plain.squeeze(place + 1), value.is_reduced)
    own = list(source.shape)
    fits = len(own) == len(sizes) - 1 and all(size in (-1, known) for size, known in zip(sizes[1:], own, strict=True))
    if axis == 0 and fits and not value.is_reduced:
        return repeated(source, write_out, run.segments.num_rows, factor)
    return rows(write_out(value, place), axis, factor)


@operation("repeat", "tile")
def repeat(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Repeat axes with a copy; the row axis only once."""
    value, *rest = args
    times = _sizes(rest or [next(iter(kwargs.values()))])
    if not isinstance(value, Rows):
        symbols = [place for place, size in enumerate(times) if isinstance(size, RowCount)]
        num_new = len(times) - value.dim()
        if not symbols:
            if isinstance(value, Stack):
                return loop(run, func, name, args, kwargs, None)
            return like(value, value.plain.repeat(times))
        sizes = [1] * num_new + list(value.shape)
        if len(symbols) > 1 or sizes[symbols[0]] != 1 or any(t != 1 for i, t in enumerate(times) if i not in symbols):
            raise CannotGroupError(f"repeated in more ways than one ({name})")
        sizes[symbols[0]] = times[symbols[0]]
        return expand(run, func, name, (value, *sizes), {})
    if any(isinstance(size, RowCount) for size in times) or len(times) < value.dim():
        raise CannotGroupError(f"repeated by the number of their rows ({name})")
    axis = value.axis + len(times) - value.dim()
    if times[axis] != 1:
        raise CannotGroupError(f"repeated their rows ({name})")
    return rows(value.plain.repeat(times), axis, value.factor)


@operation("chunk", "split", "split_with_sizes", "tensor_split", "unbind")
def cut(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> tuple[Ragged, ...]:
    """Cut an axis into parts; never the row axis."""
    value, *rest = args
    dim = kwargs.get("dim", rest[-1] if len(rest) == (1 if name == "unbind" else 2) else 0)
    refuse_row_counts(name, [*rest, *kwargs.values()])
    how = [] if name == "unbind" else [rest[0] if rest else next(v for k, v in kwargs.items() if k != "dim")]
    if any(isinstance(each, Ragged) for each in how):
        raise CannotGroupError(f"cut by values ({name})")
    place = inner_axis_but_rows(value, dim, name)
    parts = getattr(torch.Tensor, name)(value.plain, *how, place)
    axis = value.axis - (name == "unbind" and place < value.axis) if isinstance(value, Rows) else None
    return tuple(like(value, part, axis) for part in parts)


@operation("narrow", "select")
def narrow(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Take a range, or one place, of an axis; never of the row axis."""
    value, dim, *rest = args
    refuse_row_counts(name, [*rest, *kwargs.values()])
    place = inner_axis_but_rows(value, dim, name)
    axis = value.axis - (name == "select" and place < value.axis) if isinstance(value, Rows) else None
    return like(value, getattr(torch.Tensor, name)(value.plain, place, *rest, **kwargs), axis)


def look_up(run: Run, table: Ragged, ids: Ragged, *, by_embedding: bool = False) -> Ragged:
    """``table[ids]``: entries along the table's first axis by integers.

    A member's ids must not reach its neighbour's entries, so ids are compared with the table's length first.
    """
    if ids.dtype not in (torch.int64, torch.int32, torch.uint8, torch.int16, torch.int8) or ids.dtype == torch.uint8:
        raise CannotGroupError(f"indexed by values of {ids.dtype}")
    if isinstance(table, Rows) or isinstance(ids, Stack):
        raise CannotGroupError("indexed their rows by values")
    if not isinstance(table, Stack):
        return like(ids, table.plain[ids.plain.long()])
    length = table.plain.shape[1]
    places = ids.plain.long()
    if places.device.type == "cpu" and not isinstance(run.segments, DeviceSegments) and places.numel():
        low, high = places.aminmax()
        if low < -length or high >= length:
            raise IndexError(f"index out of range for a table of {length} entries")
    places = places.where(places >= 0, places + length)
    flat = table.plain.flatten(0, 1)
    if not isinstance(ids, Rows):
        return stack(table.plain[:, places], table.is_reduced)
    if table.is_reduced:
        raise CannotGroupError("mixed samples (what was reduced over the batch was looked up)")
    offsets = run.segments.member_of_row(ids.factor) * length
    offsets = offsets.view(-1, *(1,) * (ids.dim() - 1 - ids.axis))
    # Elsewhere indices are checked when they are read, so an id out of range becomes one behind the last entry of all.
    reached = torch.where((places >= 0) & (places < length), places + offsets, flat.shape[0])
    if by_embedding and is_directml(flat.device):
        # On DirectML, indexing goes through the CPU both ways; an embedding, as the expert calls it, at most one way.
        return rows(F.embedding(reached, flat), ids.axis, ids.factor)
    return rows(flat[reached], ids.axis, ids.factor)


@operation("embedding", namespaces=(F,))
def embedding(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Look integers up in the table of each row's member."""
    ids, table, padding, max_norm, _, by_frequency, sparse = arguments(
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        args,
        kwargs,
        (None, None, 2.0, False, False),
    )
    if max_norm is not None or by_frequency or sparse:
        raise CannotGroupError("looked embeddings up with max_norm, scale_grad_by_freq or sparse gradients")
    # A negative index would count from the end.
    if isinstance(run.segments, DeviceSegments):
        ids = like(ids, ids.plain.where(ids.plain >= 0, table.shape[0]))
    elif ids.device.type == "cpu" and ids.plain.numel() and ids.plain.min() < 0:
        raise IndexError("index out of range in self")
    found = look_up(run, table, ids, by_embedding=True)
    if padding is None:
        return found
    length = table.plain.shape[int(isinstance(table, Stack))]
    is_padding = (ids.plain == padding % length).unsqueeze(-1)
    # The padding's entry gets no gradient.
    return like(found, torch.where(is_padding, found.plain.detach(), found.plain))


_BAG_NAMES = (
    *("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse"),
    *("per_sample_weights", "include_last_offset", "padding_idx"),
)
_BAG_DEFAULTS = (None, None, 2.0, False, "mean", False, None, False, None)


@operation("embedding_bag", namespaces=(F,))
def embedding_bag(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Look up one bag of ids a row, all of one length, one member after another."""
    given = dict(zip(_BAG_NAMES, arguments(_BAG_NAMES, args, kwargs, _BAG_DEFAULTS), strict=True))
    if given["max_norm"] is not None or given["scale_grad_by_freq"] or given["sparse"]:
        raise CannotGroupError("looked embeddings up with max_norm, scale_grad_by_freq or sparse gradients")
    if given["offsets"] is not None or given["input"].dim() != 2:
        raise CannotGroupError("looked up bags of ids that are not one a row")
    return loop_batch_first(run, func, name, (), given)


@operation("one_hot", namespaces=(F,))
def one_hot(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Encode ids with a given number of classes."""
    ids, num_classes = arguments(("input", "num_classes"), args, kwargs, (-1,))
    if type(num_classes) is not int or num_classes < 0:
        raise CannotGroupError("read values (the largest id, for one_hot without 'num_classes')")
    return like(ids, func(ids.plain, num_classes))


@operation("cat", "concat", "concatenate", "stack")
def join(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Join along any axis but the row axis."""
    values, dim = arguments(("tensors", "dim"), args, kwargs, (0,))
    values = list(values)
    first = next((value for value in values if isinstance(value, Rows)), None)
    if first is None:
        if all(isinstance(value, Common) for value in values):
            return common(func([value.plain for value in values], dim))
        sizes = list(values[0].shape)
        plain, wrap = align(run, name, values)
        place = (dim % (len(sizes) + (name == "stack"))) + 1
        members = run.num_members
        plain = [
            inner if isinstance(value, Stack) else inner.expand(members, *inner.shape)
            for inner, value in zip(plain, values, strict=True)
        ]
        return wrap(func(plain, place))
    if any(not isinstance(value, Rows) or (value.axis, value.factor) != (first.axis, first.factor) for value in values):
        raise CannotGroupError(f"joined rows with tensors of fixed size ({name})")
    place = dim % (first.dim() + (name == "stack"))
    if name != "stack" and place == first.axis:
        raise CannotGroupError(f"put samples side by side with others ({name} along the batch axis)")
    axis = first.axis + (name == "stack" and place <= first.axis)
    return rows(func([value.plain for value in values], place), axis, first.factor)


@operation("zeros", "ones", "full", "empty", "rand", "randn", namespaces=(torch,))
@operation("new_zeros", "new_ones", "new_full", "new_empty", namespaces=(torch.Tensor,))
def constant(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Make a constant; it has an entry for each sample if the number of rows is among its sizes."""
    receiver = [args[0].plain] if name.startswith("new_") else []
    args = args[len(receiver) :]
    if operands([*args, *kwargs.values()]):
        raise CannotGroupError(f"filled a tensor with another ({name})")
    fill: list[Any] = []
    if name in {"full", "new_full"}:
        sizes, value = arguments(
            ("size", "fill_value"), args, {k: kwargs.pop(k) for k in ("size", "fill_value") if k in kwargs}
        )
        fill = [value]
        refuse_row_counts(name, fill)
        sizes = list(sizes)
    else:
        sizes = _sizes(args or [kwargs.pop("size")])
    symbols = [place for place, size in enumerate(sizes) if isinstance(size, RowCount)]
    if name in {"rand", "randn"} and not symbols:
        raise CannotGroupError(f"drew random numbers that are not for rows ({name})")
    if len(symbols) > 1:
        raise CannotGroupError(f"made a table of rows by rows ({name})")
    factor = sizes[symbols[0]].factor if symbols else 1
    plain = [run.segments.num_rows * factor if isinstance(size, RowCount) else size for size in sizes]
    if name in {"rand", "randn"} and run.is_rehearsal:
        func, fill = torch.full, [0.5]
    if name in {"empty", "new_empty"}:
        # Nobody may read an empty tensor's entries; zeros are the same for all engines.
        func = torch.zeros if name == "empty" else torch.Tensor.new_zeros
    made = func(*receiver, plain, *fill, **kwargs)
    return rows(made, symbols[0], factor) if symbols else common(made)


@operation("arange", "linspace", "eye", "tensor", "as_tensor", "scalar_tensor", "tril_indices", namespaces=(torch,))
def fixed(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Make a constant of plain numbers."""
    refuse_row_counts(name, [*args, *kwargs.values()])
    if _has_tensors([*args, *kwargs.values()]):
        raise CannotGroupError(f"made a constant of tensors ({name})")
    return common(func(*args, **kwargs))


def _has_tensors(values: Sequence[Any]) -> bool:
    return any(
        isinstance(value, torch.Tensor | Ragged | RowCount)
        or hasattr(value, "__array__")
        or (isinstance(value, list | tuple) and _has_tensors(value))
        for value in values
    )


@operation("tril", "triu", "flip", "roll", "diagonal", "unfold")
def along_other_axes(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Move entries along the named axes, or the last two; never along the row axis."""
    value, *rest = args
    refuse_row_counts(name, [*rest, *kwargs.values()])
    if func is F.unfold:
        raise CannotGroupError("cut patches of images (unfold)")
    if isinstance(value, Common):
        return common(func(value.plain, *rest, **kwargs), value.is_given)
    if name in {"tril", "triu"} and (not isinstance(value, Rows) or value.axis < value.dim() - 2):
        return like(value, func(value.plain, *rest, **kwargs))
    if name == "unfold" and isinstance(value, Rows) and not kwargs:
        return like(value, func(value.plain, inner_axis_but_rows(value, rest[0], name), *rest[1:]))
    if name == "flip" and not kwargs:
        dims = [inner_axis_but_rows(value, dim, name) for dim in _sizes(rest)]
        return like(value, value.plain.flip(dims))
    if name == "roll":
        shifts, dims = arguments(("shifts", "dims"), rest, kwargs, (None,))
        if isinstance(dims, int):
            return like(value, value.plain.roll(shifts, inner_axis_but_rows(value, dims, name)))
    if isinstance(value, Stack):
        return loop(run, func, name, args, kwargs, None)
    raise CannotGroupError(f"called {name} on their rows")


@operation("pad")
def pad(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Pad the last axes; never the row axis."""
    value, widths, mode, fill = arguments(("input", "pad", "mode", "value"), args, kwargs, ("constant", None))
    refuse_row_counts(name, widths)
    if isinstance(value, Rows) and value.axis >= value.dim() - len(widths) // 2:
        raise CannotGroupError("padded the batch axis")
    if mode != "constant" and (not isinstance(value, Rows) or value.axis != 0):
        raise CannotGroupError(f"padded by {mode}")
    return like(value, F.pad(value.plain, widths, mode, fill))
