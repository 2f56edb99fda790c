"""The three kinds of values that a program computes with for all experts of a class.

- `Rows`: one entry for each sample: the hidden states and values made of them. The row axis holds the rows of all
  members, one member's after the other's.
- `Stack`: one entry for each member: parameters, buffers and values made of these alone.
- `Common`: the same for all members: constants that the forward pass makes, and the context's shared tensors.

Each value has the axes of the tensor that an expert alone would compute with. Only the number of rows differs: it is a
symbol, `RowCount`, that may size tensors and nothing else.

Axes: R rows of all members, P members.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from celmoe.directml import takes


class CannotGroupError(Exception):
    """Experts can't run as one; the message completes "looped, for its experts …"."""


class RowCount:
    """The number of an expert's rows, times ``factor`` positions: a size that knows only products."""

    __slots__ = ("factor",)

    def __init__(self, factor: int = 1) -> None:
        self.factor = factor

    def __mul__(self, other: object) -> Any:
        if type(other) is not int or other < 0:
            self._refuse()
        return RowCount(self.factor * other) if other else 0

    __rmul__ = __mul__

    def __floordiv__(self, other: object) -> RowCount:
        if type(other) is not int or other < 1 or self.factor % other:
            self._refuse()
        return RowCount(self.factor // other)

    def __eq__(self, other: object) -> bool:
        # Experts without rows don't run, so no number below 1 equals the number of rows.
        if not isinstance(other, RowCount) and (type(other) is not int or other > 0):
            self._refuse()
        return isinstance(other, RowCount) and self.factor == other.factor

    def __repr__(self) -> str:
        return "rows"

    def _refuse(self, *_: object) -> NoReturn:
        raise CannotGroupError("read the number of their rows")

    __bool__ = __int__ = __index__ = __float__ = __hash__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __sub__ = __rsub__ = _refuse
    __truediv__ = __rtruediv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __neg__ = _refuse


class Ragged:
    """Base class of the three kinds of values.

    Attributes:
        plain: The plain tensor behind the value.
        plain_shape: The plain tensor's shape.
    """

    plain: torch.Tensor
    plain_shape: torch.Size

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape that the expert sees."""
        return self.plain_shape

    def size(self, dim: int | None = None) -> Any:
        """The shape that the expert sees, or one axis of it."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """The number of axes that the expert sees."""
        return len(self.plain_shape)

    def numel(self) -> Any:
        """The product of the shape that the expert sees."""
        return math.prod(self.shape)

    @property
    def a_tensor(self) -> torch.Tensor:
        """An existing tensor of the value's dtype and device; builds no stack."""
        return self.plain

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the plain tensor."""
        return self.a_tensor.dtype

    @property
    def device(self) -> torch.device:
        """The device of the plain tensor."""
        return self.a_tensor.device

    @property
    def requires_grad(self) -> bool:
        """True if the plain tensor requires gradients."""
        return self.a_tensor.requires_grad

    def is_floating_point(self) -> bool:
        """True if the plain tensor is floating-point."""
        return self.dtype.is_floating_point

    def is_complex(self) -> bool:
        """True if the plain tensor is complex."""
        return self.dtype.is_complex


class Rows(Ragged):
    """One entry for each sample.

    Attributes:
        axis: The row axis.
        factor: Positions folded into the row axis, which is R · factor long: each row's positions stand together.
    """

    axis: int
    factor: int

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape that the expert sees: the row axis has a `RowCount` as size."""
        sizes = self.plain_shape
        return (*sizes[: self.axis], RowCount(self.factor), *sizes[self.axis + 1 :])


class Stack(Ragged):
    """One entry for each member: ``plain`` is ``[P, *shape]``.

    Attributes:
        is_reduced: True if the stack was made of rows: it may be a loss, but must not reach rows again.
        is_own: True if the memory is a result's own, which the expert may write into: no parameter's, nor a view.
        members: The members' own tensors if the stack holds nothing else: stacked only when something asks for all.
    """

    is_reduced: bool
    is_own: bool
    members: Sequence[torch.Tensor] | None
    _stacked: torch.Tensor | None
    # False if first stacked under `no_grad`: the members are then stacked again once gradients are enabled.
    _has_graph: bool

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape that the expert sees."""
        return self.plain_shape[1:]

    @property
    def plain(self) -> torch.Tensor:  # type: ignore[override]  # made when it is first asked for
        """The plain tensor behind the stack."""
        if self._stacked is None or (not self._has_graph and torch.is_grad_enabled()):
            members = list(self.members or ())
            require_axes(members[0].device, members[0].dim() + 1)
            self._stacked, self._has_graph = torch.stack(members), torch.is_grad_enabled()
        return self._stacked

    @property
    def a_tensor(self) -> torch.Tensor:
        """One of the members' own tensors, or the stack."""
        return self.plain if self.members is None else self.members[0]

    def dim(self) -> int:
        """The number of axes that the expert sees."""
        return len(self.plain_shape) - 1


class Repeated(Rows):
    """Rows that hold their member's entry of a stack: written out only when something asks for the plain tensor.

    Attributes:
        source: The stack, while the stack says all. The entries' axes are the axes behind the row axis. Once written
            out, rows may have been changed in place. Rows made without gradients stay without gradients.
    """

    _source: Stack
    _write_out: Callable[[Stack], torch.Tensor]
    _written: torch.Tensor | None
    _has_graph: bool

    @property
    def source(self) -> Stack | None:
        """The stack, or ``None``."""
        says_all = self._written is None and (self._has_graph or not torch.is_grad_enabled())
        return self._source if says_all else None

    @property
    def a_tensor(self) -> torch.Tensor:
        """The stack's tensor, as long as the stack says all."""
        return self.plain if self.source is None else self._source.a_tensor

    @property
    def plain(self) -> torch.Tensor:  # type: ignore[override]  # made when it is first asked for
        """The plain tensor behind the rows."""
        if self._written is None:
            with torch.set_grad_enabled(self._has_graph):
                self._written = self._write_out(self._source)
        return self._written


class Common(Ragged):
    """A value that is the same for all members.

    Attributes:
        is_given: True for the context's tensors, false for the run's own.
    """

    is_given: bool


def require_axes(device: torch.device, num_axes: int) -> None:
    """Refuse a tensor with more axes than its device takes."""
    if not takes(device, num_axes):
        raise CannotGroupError(f"have parameters of {num_axes - 1} axes, which have one too many for DirectML together")


def rows(inner: torch.Tensor, axis: int = 0, factor: int = 1) -> Rows:
    """A value with one entry for each sample along ``axis``."""
    value = Rows()
    value.plain, value.plain_shape, value.axis, value.factor = inner, inner.shape, axis, factor
    return value


def owned(value: Any) -> Any:
    """A new result, marked as the owner of its memory."""
    if isinstance(value, Stack):
        value.is_own = True
    return value


def repeated(source: Stack, write_out: Callable[[Stack], torch.Tensor], num_rows: int, factor: int) -> Repeated:
    """A stack's entry for each row, with the row axis in front of the entries' axes."""
    value = Repeated()
    value._source, value._write_out, value._written = source, write_out, None
    value.plain_shape = torch.Size((num_rows * factor, *source.shape))
    value.axis, value.factor, value._has_graph = 0, factor, torch.is_grad_enabled()
    return value


def stack(inner: torch.Tensor, is_reduced: bool = False) -> Stack:
    """A value with one entry for each member along the first axis."""
    value = Stack()
    value._stacked, value.plain_shape, value.is_reduced, value.members = inner, inner.shape, is_reduced, None
    value._has_graph, value.is_own = True, False
    return value


def registered(members: Sequence[torch.Tensor]) -> Stack:
    """A stack of the members' own parameters, or buffers."""
    value = Stack()
    value._stacked, value.is_reduced, value.is_own = None, False, False
    value.members = members
    value.plain_shape = torch.Size((len(members), *members[0].shape))
    return value


def common(inner: torch.Tensor, is_given: bool = False) -> Common:
    """A value that is the same for all members."""
    value = Common()
    value.is_given = is_given
    value.plain, value.plain_shape = inner, inner.shape
    return value


def like(value: Ragged, inner: torch.Tensor, axis: int | None = None) -> Ragged:
    """A value of the same kind, with its row axis at ``axis`` if given."""
    if isinstance(value, Rows):
        return rows(inner, value.axis if axis is None else axis, value.factor)
    if isinstance(value, Stack):
        return stack(inner, value.is_reduced)
    return common(inner, isinstance(value, Common) and value.is_given)
