"""The three kinds of values that an expert computes with while one module stands for all experts of a class.

- `Rows`: one entry for each sample: the hidden states and what is made of them. Its row axis holds the rows of all
  members, one member's after the other's.
- `Stack`: one entry for each member: parameters, buffers and what is made of them alone.
- `Common`: the same for all: constants that the forward pass makes, and what the context shares.

To the expert's code each looks like the tensor that it would see if it ran alone, but for one thing: the number of rows
is a symbol, `RowCount`, that may size tensors and nothing else. Reading it, or a value, is a `CannotGroupError`.

Axes: R rows of all members, P members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from .directml import takes


class CannotGroupError(Exception):
    """Why experts can't run as one, in words that complete "looped, for its experts …"."""


class NeedsOwnRowsError(CannotGroupError):
    """They write into rows that are not theirs alone this time."""


class RowCount(torch.SymInt):
    """The number of rows of an expert, times ``factor`` positions: a size, of which only products are known.

    It is a symbolic integer because PyTorch takes those as sizes, while nothing in Python reads a value out of one
    without asking it first: ``range``, ``math.log``, comparison and formatting all come by here.
    """

    def __init__(self, factor: int = 1) -> None:
        super().__init__(None)  # type: ignore[no-untyped-call]  # torch annotates it not
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

    def __bool__(self) -> bool:
        # Experts without rows don't run.
        return True

    def __eq__(self, other: object) -> bool:
        if isinstance(other, RowCount):
            return self.factor == other.factor
        self._refuse_above(other, 0)
        return False

    def __gt__(self, other: object) -> bool:
        self._refuse_above(other, 0)
        return True

    def __ge__(self, other: object) -> bool:
        self._refuse_above(other, 1)
        return True

    def __lt__(self, other: object) -> bool:
        self._refuse_above(other, 1)
        return False

    def __le__(self, other: object) -> bool:
        self._refuse_above(other, 0)
        return False

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __repr__(self) -> str:
        return "rows"

    def _refuse(self, *_: object) -> NoReturn:
        raise CannotGroupError("read the number of their rows")

    def _refuse_above(self, other: object, known: int) -> None:
        """Of the number of rows it is known that there is one."""
        if type(other) is not int or other > known:
            self._refuse()

    __int__ = __index__ = __float__ = __hash__ = __str__ = __format__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = _refuse
    __truediv__ = __rtruediv__ = __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = __rdivmod__ = _refuse
    __pow__ = __rpow__ = __neg__ = __pos__ = __abs__ = __round__ = __trunc__ = __floor__ = __ceil__ = _refuse
    __lshift__ = __rshift__ = __and__ = __or__ = __xor__ = __invert__ = __reduce_ex__ = _refuse


_NOTHING = torch.empty(0)


def _of_inner(name: str) -> property:
    """An attribute of the tensor behind a value, read without coming by the mode that watches the experts."""

    def read(value: Ragged) -> Any:
        value = value._source if isinstance(value, Repeated) else value
        members = value.members if isinstance(value, Stack) else None
        with torch._C.DisableTorchFunction():
            return getattr(value.plain if members is None else members[0], name)

    return property(read)


class Ragged(torch.Tensor):
    """Base of the three: a tensor to Python, whose values only the operations of the grouped engine can reach.

    Attributes:
        plain: The plain tensor behind it.
        plain_shape: Its shape.
        origin: The value that an operation took, where this is what it was given in its place.
    """

    plain: torch.Tensor
    plain_shape: torch.Size
    origin: Ragged | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        # While experts run, a mode takes every call before it comes here.
        raise CannotGroupError(f"used a tensor outside of their forward pass ({getattr(func, '__name__', func)})")

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]  # an attribute of every tensor
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
        total: Any = 1
        for size in self.shape:
            total = total * size
        return total

    def is_floating_point(self) -> bool:
        """As for the tensor behind it."""
        return bool(self.dtype.is_floating_point)

    def is_complex(self) -> bool:
        """As for the tensor behind it."""
        return bool(self.dtype.is_complex)

    ndim = property(lambda self: self.dim())
    dtype = _of_inner("dtype")
    device = _of_inner("device")
    layout = _of_inner("layout")
    requires_grad = _of_inner("requires_grad")
    is_cuda = _of_inner("is_cuda")
    is_nested = is_sparse = is_quantized = is_meta = property(lambda _: False)


class Rows(Ragged):
    """One entry for each sample.

    Attributes:
        axis: The row axis.
        factor: Positions folded into it: it is R · factor long, and each row's positions stand together.
    """

    axis: int
    factor: int

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]  # an attribute of every tensor
        """The shape that the expert sees: the row axis is a `RowCount` long."""
        sizes: list[Any] = list(self.plain_shape)
        sizes[self.axis] = RowCount(self.factor)
        return torch.Size(sizes)


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
    # What ``isinstance(…, nn.Parameter)`` looks for.
    _is_param = False

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]  # an attribute of every tensor
        """The shape that the expert sees."""
        return self.plain_shape[1:]

    @property
    def plain(self) -> torch.Tensor:  # type: ignore[override]  # made when it is first asked for
        """The plain tensor behind it."""
        if self._stacked is None or (not self._has_graph and torch.is_grad_enabled()):
            members = list(self.members or ())
            require_axes(members[0].device, members[0].dim() + 1)
            with torch._C.DisableTorchFunction():
                self._stacked, self._has_graph = torch.stack(members), torch.is_grad_enabled()
        return self._stacked

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
    value = torch.Tensor._make_subclass(Rows, _NOTHING)
    value.plain, value.plain_shape, value.axis, value.factor = inner, inner.shape, axis, factor
    return value


def owned(value: Any) -> Any:
    """A new result, and its memory its own."""
    if isinstance(value, Stack):
        value.is_own = True
    return value


def repeated(source: Stack, write_out: Callable[[Stack], torch.Tensor], num_rows: int, factor: int) -> Repeated:
    """A stack for each row, the row axis in front of its entries' axes."""
    value = torch.Tensor._make_subclass(Repeated, _NOTHING)
    value._source, value._write_out, value._written = source, write_out, None
    value.plain_shape = torch.Size((num_rows * factor, *source.shape))
    value.axis, value.factor, value._has_graph = 0, factor, torch.is_grad_enabled()
    return value


def stack(inner: torch.Tensor, is_reduced: bool = False) -> Stack:
    """A value with one entry for each member along the first axis."""
    value = torch.Tensor._make_subclass(Stack, _NOTHING)
    value._stacked, value.plain_shape, value.is_reduced, value.members = inner, inner.shape, is_reduced, None
    value._has_graph, value.is_own = True, False
    return value


def registered(members: Sequence[torch.Tensor], is_parameter: bool) -> Stack:
    """The members' own parameters, or buffers."""
    value = torch.Tensor._make_subclass(Stack, _NOTHING)
    value._stacked, value.is_reduced, value.is_own = None, False, False
    value.members, value._is_param = members, is_parameter
    value.plain_shape = torch.Size((len(members), *members[0].shape))
    return value


def common(inner: torch.Tensor, is_given: bool = False) -> Common:
    """A value that is the same for all members."""
    value = torch.Tensor._make_subclass(Common, _NOTHING)
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
