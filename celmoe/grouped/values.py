"""The three kinds of values that a program computes with for all experts of a class.

- `Rows`: one entry for each sample: the hidden states and what is made of them. Its row axis holds the rows of all
  members, one member's after the other's.
- `Stack`: one entry for each member: parameters, buffers and what is made of them alone.
- `Common`: the same for all: constants that the forward pass makes, and what the context shares.

Each has the axes of the tensor that an expert would compute with alone, but for one thing: the number of rows is a
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
    """Why experts can't run as one, in words that complete "looped, for its experts …"."""


class NeedsOwnRowsError(CannotGroupError):
    """They write into rows that are not theirs alone this time."""


class RowCount:
    """The number of rows of an expert, times ``factor`` positions: a size, of which only products are known."""

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
        # Experts without rows don't run: no number that is known to be less equals it.
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
    """Base of the three.

    Attributes:
        plain: The plain tensor behind it.
        plain_shape: Its shape.
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
        """One of its dtype and device that is there: a stack that has not been made stays so."""
        return self.plain

    @property
    def dtype(self) -> torch.dtype:
        """As of the tensor behind it."""
        return self.a_tensor.dtype

    @property
    def device(self) -> torch.device:
        """As of the tensor behind it."""
        return self.a_tensor.device

    @property
    def requires_grad(self) -> bool:
        """As of the tensor behind it."""
        return self.a_tensor.requires_grad

    def is_floating_point(self) -> bool:
        """As of the tensor behind it."""
        return self.dtype.is_floating_point

    def is_complex(self) -> bool:
        """As of the tensor behind it."""
        return self.dtype.is_complex


class Rows(Ragged):
    """One entry for each sample.

    Attributes:
        axis: The row axis.
        factor: Positions folded into it: it is R · factor long, and each row's positions stand together.
    """

    axis: int
    factor: int

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape that the expert sees: the row axis is a `RowCount` long."""
        sizes = self.plain_shape
        return (*sizes[: self.axis], RowCount(self.factor), *sizes[self.axis + 1 :])


class Stack(Ragged):
    """One entry for each member: ``plain`` is ``[P, *shape]``.

    Attributes:
        is_reduced: Whether it was made of rows: then it may be a loss, but must not reach rows again.
        is_own: Whether its memory is a result's own, which the expert may write into: no parameter's, nor a view.
        members: The members' own tensors, where it is nothing but those: stacked only when something asks for all.
    """

    is_reduced: bool
    is_own: bool
    members: Sequence[torch.Tensor] | None
    _stacked: torch.Tensor | None
    # Not where it was first asked for under `no_grad`: then it is stacked again for who wants gradients.
    _has_graph: bool

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape that the expert sees."""
        return self.plain_shape[1:]

    @property
    def plain(self) -> torch.Tensor:  # type: ignore[override]  # made when it is first asked for
        """The plain tensor behind it."""
        if self._stacked is None or (not self._has_graph and torch.is_grad_enabled()):
            members = list(self.members or ())
            require_axes(members[0].device, members[0].dim() + 1)
            self._stacked, self._has_graph = torch.stack(members), torch.is_grad_enabled()
        return self._stacked

    @property
    def a_tensor(self) -> torch.Tensor:
        """One of the members' own, or the stack."""
        return self.plain if self.members is None else self.members[0]

    def dim(self) -> int:
        """The number of axes that the expert sees."""
        return len(self.plain_shape) - 1


class Repeated(Rows):
    """A stack that each row has its member's entry of: written out only when something asks for that.

    Attributes:
        source: The stack, whose entries' axes are those behind the row axis, while it says all: once written out, the
            rows may have been written into; and what was made without gradients stays without.
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
        """Of the stack, while that says all."""
        return self.plain if self.source is None else self._source.a_tensor

    @property
    def plain(self) -> torch.Tensor:  # type: ignore[override]  # made when it is first asked for
        """The plain tensor behind it."""
        if self._written is None:
            with torch.set_grad_enabled(self._has_graph):
                self._written = self._write_out(self._source)
        return self._written


class Common(Ragged):
    """The same for all members.

    Attributes:
        is_given: Whether it is the context's, and not the run's own.
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
    """A new result, and its memory its own."""
    if isinstance(value, Stack):
        value.is_own = True
    return value


def repeated(source: Stack, write_out: Callable[[Stack], torch.Tensor], num_rows: int, factor: int) -> Repeated:
    """A stack for each row, the row axis in front of its entries' axes."""
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
    """The members' own parameters, or buffers."""
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
