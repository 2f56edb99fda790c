"""Operations that the grouped engine knows, and the helpers that all of them share; `operation` adds one.

An operation in `OPERATIONS` acts on each row alone, or raises that it does not. Any other operation is refused: a list
of operations known to be right is sound, a list of operations known to be wrong is not.

Axes: R rows of all members, P members.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, TypeAlias, cast

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from celmoe.grouped.kernels.product import spread
from celmoe.grouped.segments import Segments
from celmoe.grouped.values import (
    CannotGroupError,
    Common,
    Ragged,
    RowCount,
    Rows,
    Stack,
    common,
    like,
    require_axes,
    rows,
    stack,
)
from celmoe.torch_internals import NAMESPACES


class Run:
    """One pass of a module that stands for all members of a class.

    Attributes:
        segments: The rows of each member.
        operations: Names of the operations so far: the program.
        looped: The number of times that each operation was looped over the members.
        draws: True if an operation drew random numbers, or would have outside a rehearsal.
        may_write: True if the rows that the class was given are its own copy.
        writes: True if anything was written in place.
        expands: True if rows were made of a member's entries, which are a view to the expert.
        spread: Memory of rows that were made of a member's entries.
        entered: Autocast modes that the program has entered and not left.
        ambiguous: Memory of rows that were copied, and of the copies, if one row alone would have been viewed.
    """

    def __init__(
        self,
        segments: Segments,
        *,
        is_rehearsal: bool = False,
        may_write: bool = True,
    ) -> None:
        self.segments = segments
        self.may_write = may_write
        self.writes = False
        self.expands = False
        self.spread: list[StorageWeakRef] = []
        self.ambiguous: list[StorageWeakRef] = []
        self.operations: list[str] = []
        self.looped: Counter[str] = Counter()
        self.draws = False
        self.entered: list[Any] = []
        self._is_rehearsal = is_rehearsal

    @property
    def is_rehearsal(self) -> bool:
        """True if random operations must be comparable; only operations that draw ask, and asking sets ``draws``."""
        self.draws = True
        return self._is_rehearsal

    @property
    def num_members(self) -> int:
        """The number of members, P."""
        return self.segments.num_members

    def note_copy(self, value: Ragged, copy: torch.Tensor, viewed: Callable[[torch.Tensor], bool]) -> None:
        """Note a possible copy of rows.

        Args:
            value: The value that may have been copied.
            copy: The possible copy.
            viewed: Tells if an expert with these rows of the value would be given a view.
        """
        if not isinstance(value, Rows) or (value.plain.is_contiguous() and not self.spread):
            return
        inner = value.plain.detach()
        memory = StorageWeakRef(inner.untyped_storage())
        if memory in self.spread or (not viewed(inner) and viewed(inner.narrow(value.axis, 0, value.factor))):
            self.ambiguous += [memory, StorageWeakRef(copy.untyped_storage())]

    def is_ambiguous(self, inner: torch.Tensor) -> bool:
        """Tells if an expert of one row would see a write elsewhere, and other experts would not."""
        return bool(self.ambiguous) and StorageWeakRef(inner.untyped_storage()) in self.ambiguous


Handler: TypeAlias = Callable[..., Any]

# The name and handler, by the very function or method that an expert calls.
OPERATIONS: dict[Any, tuple[str, Handler]] = {}


def operation(*names: str, namespaces: Sequence[Any] = NAMESPACES) -> Callable[[Handler], Handler]:
    """Register a handler ``(run, func, name, args, kwargs) -> value`` for functions and methods of these names."""

    def register(handler: Handler) -> Handler:
        for name in names:
            for namespace in namespaces:
                if (func := getattr(namespace, name, None)) is not None:
                    OPERATIONS[func] = (name, handler)
        return handler

    return register


def axis_of(value: Ragged, dim: int) -> int:
    """A dimension, counted from the front."""
    if type(dim) is not int:
        raise CannotGroupError(f"named an axis by {dim!r}")
    num_axes = value.dim()
    if not -max(num_axes, 1) <= dim < max(num_axes, 1):
        raise IndexError(f"Dimension out of range (got {dim} for {num_axes} axes)")
    return dim % num_axes if num_axes else 0


def inner_axis(value: Ragged, dim: int) -> int:
    """The axis, in the tensor behind the value, of a dimension that the expert names."""
    return axis_of(value, dim) + isinstance(value, Stack)


def inner_axis_but_rows(value: Ragged, dim: int, name: str) -> int:
    """`inner_axis` for operations that mix entries along the axis: refuses the row axis."""
    axis = inner_axis(value, dim)
    if isinstance(value, Rows) and axis == value.axis:
        raise CannotGroupError(f"mixed samples ({name} along the batch axis)")
    return axis


def operands(values: Iterable[Any]) -> list[Ragged]:
    """The tensors among arguments."""
    return [value for value in values if isinstance(value, Ragged)]


def refuse_row_counts(name: str, values: Iterable[Any]) -> None:
    """Refuse the number of rows as a value that an operation would read; row counts may only size tensors."""
    if any(isinstance(value, RowCount) for value in values):
        raise CannotGroupError(f"read the number of their rows as a value (in {name})")


def align(run: Run, name: str, values: Sequence[Any]) -> tuple[list[Any], Callable[[torch.Tensor], Ragged]]:
    """Plain tensors that broadcast as the expert's own operands would, and a function that wraps a result.

    Broadcasting aligns axes from the back, so all operands get the same row axis or member axis, counted from there.
    """
    refuse_row_counts(name, values)
    values = _promoted(values)
    ragged = operands(values)
    num_axes = max((value.dim() for value in ragged), default=0)
    of_rows = [value for value in ragged if isinstance(value, Rows)]
    if of_rows:
        axis, factor = of_rows[0].axis + num_axes - of_rows[0].dim(), of_rows[0].factor
        for value in of_rows[1:]:
            if (value.axis + num_axes - value.dim(), value.factor) != (axis, factor):
                raise CannotGroupError(f"put samples side by side with others ({name})")
        plain = [
            _to_rows(run, name, value, axis, factor, num_axes) if isinstance(value, Ragged) else value
            for value in values
        ]
        return plain, lambda result: rows(result, axis, factor)
    of_members = [value for value in ragged if isinstance(value, Stack)]
    if of_members:
        is_reduced = any(value.is_reduced for value in of_members)
        require_axes(run.segments.device, num_axes + 1)
        plain = [_to_members(value, num_axes) if isinstance(value, Ragged) else value for value in values]
        return plain, lambda result: stack(result, is_reduced)
    return [value.plain if isinstance(value, Ragged) else value for value in values], common


def _promoted(values: Sequence[Any]) -> Sequence[Any]:
    """Cast operands without axes to the dtype of those with axes, because they promote as numbers do."""
    flat = [value for value in values if isinstance(value, Ragged) and value.dim() == 0]
    dtypes = {value.dtype for value in operands(values) if value.dim()}
    if not flat or not dtypes or {value.dtype for value in flat} == dtypes:
        return values
    dtype = reduce(torch.promote_types, dtypes)
    return [
        like(value, value.plain.to(dtype))
        if isinstance(value, Ragged) and value.dim() == 0 and _is_led(value.dtype, dtype)
        else value
        for value in values
    ]


def _is_led(dtype: torch.dtype, by: torch.dtype) -> bool:
    """Tells if a number of the first dtype takes the dtype of a tensor."""
    if dtype.is_floating_point:
        return by.is_floating_point or by.is_complex
    return dtype != torch.bool and dtype.is_complex == by.is_complex and not by.is_floating_point


def _to_rows(run: Run, name: str, value: Ragged, axis: int, factor: int, num_axes: int) -> torch.Tensor:
    if isinstance(value, Rows):
        return value.plain
    # The place of the row axis among the value's own axes.
    place = axis - (num_axes - value.dim())
    if place >= 0 and value.shape[place] != 1:
        raise CannotGroupError(f"joined a tensor of fixed length to the batch axis ({name})")
    if isinstance(value, Common):
        return value.plain
    return by_row(run, cast(Stack, value), name, factor, place, num_axes - 1 - axis)


def by_row(run: Run, value: Stack, name: str, factor: int, place: int, num_after: int) -> torch.Tensor:
    """Each row's entry of a stack.

    Args:
        run: The pass.
        value: One entry for each member.
        name: The operation that asks.
        factor: Positions folded into a row.
        place: The value's axis, of length one, that becomes the row axis; negative if all its axes come behind.
        num_after: The number of axes behind the row axis.
    """
    if value.is_reduced:
        raise CannotGroupError(f"mixed samples (what was reduced over the batch came back to rows in {name})")
    inner = value.plain
    if place < 0:
        shape = inner.shape[1:]
        entries = spread(inner, run.segments, factor)
        return entries.view(entries.shape[0], *(1,) * (num_after - len(shape)), *shape)
    return spread(inner.squeeze(place + 1), run.segments, factor).movedim(0, place)


def _to_members(value: Ragged, num_axes: int) -> torch.Tensor:
    if isinstance(value, Stack):
        shape = value.plain.shape
        missing = num_axes - value.dim()
        return value.plain.view(shape[0], *(1,) * missing, *shape[1:]) if missing else value.plain
    return value.plain


def by_members(run: Run, value: Any) -> list[Any]:
    """Each member's part of an argument."""
    if isinstance(value, Rows):
        counts = [count * value.factor for count in run.segments.counts]
        return list(value.plain.split(counts, value.axis))
    if isinstance(value, Stack):
        return list(value.members or value.plain.unbind(0))
    if isinstance(value, Common):
        return [value.plain] * run.num_members
    if isinstance(value, tuple | list):
        items = [by_members(run, item) for item in value]
        return [type(value)(parts) for parts in zip(*items, strict=True)] if items else [value] * run.num_members
    return [value] * run.num_members


def loop(run: Run, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], axis: int | None) -> Any:
    """Run an operation without a grouped form, one member after another.

    Args:
        run: The pass.
        func: The operation.
        name: Its name.
        args: The arguments that the expert passed.
        kwargs: The keyword arguments that the expert passed.
        axis: The result's row axis; ``None`` if the result is one entry a member, or a tuple of such.
    """
    run.looped[name] += 1
    each_args = by_members(run, list(args))
    each_kwargs = [dict(zip(kwargs, values, strict=True)) for values in by_members(run, list(kwargs.values()))]
    results = [func(*some, **named) for some, named in zip(each_args, each_kwargs, strict=True)]
    if axis is not None:
        return rows(torch.cat(results, axis), axis)
    ragged = operands([*args, *kwargs.values()])
    is_reduced = any(isinstance(each, Rows) or (isinstance(each, Stack) and each.is_reduced) for each in ragged)
    if isinstance(results[0], tuple):
        return type(results[0])(stack(torch.stack(parts), is_reduced) for parts in zip(*results, strict=True))
    return stack(torch.stack(results), is_reduced)


def loop_batch_first(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Rows:
    """`loop` for operations on rows along their first axis."""
    refuse_row_counts(name, [*args, *kwargs.values()])
    values = operands([*args, *kwargs.values()])
    if not isinstance(values[0], Rows) or any(isinstance(each, Rows) and each.axis != 0 for each in values):
        raise CannotGroupError(f"called {name} with another axis than the batch first")
    if any(isinstance(each, Stack) and each.is_reduced for each in values):
        raise CannotGroupError(f"mixed samples (what was reduced over the batch came back to rows in {name})")
    return rows(loop(run, func, name, args, kwargs, 0).plain, 0, values[0].factor)


def arguments(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any], defaults: Any = ()) -> list[Any]:
    """The arguments in the order of ``names``, passed either way; ``defaults`` belong to the last names."""
    if len(args) > len(names) or not kwargs.keys() <= set(names[len(args) :]):
        raise CannotGroupError(f"passed arguments that are not known here ({', '.join(map(str, kwargs))})")
    found = dict(zip(names, args, strict=False)) | kwargs
    optional = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)) if defaults else {}
    missing = [name for name in names if name not in found and name not in optional]
    if missing:
        raise CannotGroupError(f"left out the argument {missing[0]!r}")
    return [found[name] if name in found else optional[name] for name in names]


def lowered(*tensors: torch.Tensor | None) -> list[Any]:
    """Cast the tensors to autocast's dtype if autocast is on: PyTorch casts only for its own linear, not for ours."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    eligible = [
        tensor is not None and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16) for tensor in tensors
    ]
    return [
        tensor.to(dtype) if ok and tensor is not None else tensor for tensor, ok in zip(tensors, eligible, strict=True)
    ]
