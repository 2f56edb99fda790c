"""Resolves a program's calls beforehand: the kernel of each call, and its plain tensors.

A value's kind does not depend on the rows at hand: one run by the operations' handlers shows all kinds. Later runs use
plain tensors for each call that treats the rows of all members like the rows of one. Linear layers and normalizations
use plain tensors, too. All other calls go by their handlers, as at first.

Axes: R rows, P members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.nn import functional as F

from celmoe.directml import is_directml
from celmoe.grouped.kernels.affine import affine_of_members, affine_of_stack
from celmoe.grouped.kernels.members import linear_of_members
from celmoe.grouped.kernels.product import backend_of, linear
from celmoe.grouped.ops.elementwise import ELEMENTWISE, place_of_inplace
from celmoe.grouped.ops.table import Run, arguments

from .values import Common, Repeated, RowCount, Rows, Stack, common, rows

# A resolved call takes the values by place, and the pass.
Call: TypeAlias = Callable[[list[Any], Run], Any]


class Place(NamedTuple):
    """A value's place among all values of a program."""

    number: int


class Step(NamedTuple):
    """One call.

    Attributes:
        name: The operation's name; empty for plain Python on sizes or parts.
        call: A handler ``(run, func, name, args, kwargs)``, or the plain function.
        func: The PyTorch function that the expert called.
        args: The arguments, with `Place`s for values.
        kwargs: The keyword arguments, likewise.
        last_uses: Places that no later step reads.
    """

    name: str
    call: Callable[..., Any]
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    last_uses: tuple[int, ...]


class RowsKind(NamedTuple):
    """The kind of rows: row axis, positions folded into that axis, number of axes, dtype."""

    axis: int
    factor: int
    num_axes: int
    dtype: torch.dtype


class CommonKind(NamedTuple):
    """The kind of a constant: true if the context gave the constant, and the dtype."""

    is_given: bool
    dtype: torch.dtype


# `None` for a value that is passed on as it is; a tuple of kinds for a tuple or list.
Kind: TypeAlias = RowsKind | CommonKind | tuple[Any, ...] | None

_DRAWS = {"dropout", "alpha_dropout"}
# The handlers of these operations do the same to rows as the expert's own call.
_SAME_ON_ALL_ROWS = {
    *ELEMENTWISE.split(),
    *("transpose", "swapaxes", "swapdims", "t", "T", "mT", "permute", "movedim", "moveaxis", "unsqueeze", "squeeze"),
    *("chunk", "split", "split_with_sizes", "unbind", "narrow", "select", "__getitem__", "cat", "concat", "stack"),
    *("flatten", "unflatten", "softmax", "log_softmax", "glu", "cumsum", "normalize", "scaled_dot_product_attention"),
    *("sum", "mean", "amax", "amin", "var", "std", "logsumexp", "argmax", "argmin", "zeros_like", "ones_like"),
    *_DRAWS,
} - {"data", "detach"}


def kind_of(value: Any) -> Kind:
    """The kind of a value that a run by handlers gave."""
    if isinstance(value, Rows) and not isinstance(value, Repeated):
        return RowsKind(value.axis, value.factor, value.dim(), value.dtype)
    if isinstance(value, Common):
        return CommonKind(value.is_given, value.dtype)
    if isinstance(value, tuple | list):
        kinds = tuple(map(kind_of, value))
        return kinds if any(kind is not None for kind in kinds) else None
    return None


def plain_of(value: Any, kind: Kind) -> Any:
    """A value as bound calls pass it on."""
    if kind is None:
        return value
    if isinstance(kind, RowsKind | CommonKind):
        return value.plain
    return type(value)(plain_of(each, its) for each, its in zip(value, kind, strict=True))


def wrapped(value: Any, kind: Kind) -> Any:
    """A value as handlers take it."""
    if kind is None:
        return value
    if isinstance(kind, RowsKind):
        return rows(value, kind.axis, kind.factor)
    if isinstance(kind, CommonKind):
        return common(value, kind.is_given)
    return type(value)(wrapped(each, its) for each, its in zip(value, kind, strict=True))


# Calls that compute nothing for a member without rows, and give its parameters gradients of zero.
_TAKE_NO_ROWS = ("linear", "layer_norm")


class Calls(NamedTuple):
    """The resolved steps of a program.

    Attributes:
        steps: For each step its call, and the places that no later step reads.
        kinds: The kinds of all values, by place.
        takes_absent: True if members without rows compute nothing: only linear layers, norms and GRUs read the
            members' own tensors.
    """

    steps: tuple[tuple[Call, tuple[int, ...]], ...]
    kinds: tuple[Kind, ...]
    takes_absent: bool


def bind(steps: Sequence[Step], num_inputs: int, values: Sequence[Any], run: Run, are_cast: Sequence[bool]) -> Calls:
    """Resolve the calls of a program.

    Args:
        steps: The program's steps.
        num_inputs: Number of values that the program begins with.
        values: All values of a run by handlers, in order.
        run: The run that gave the values.
        are_cast: For each step, true if autocast was on.
    """
    kinds = tuple(map(kind_of, values))
    calls, takes_absent = [], True
    for place, (step, is_cast) in enumerate(zip(steps, are_cast, strict=True), num_inputs):
        found = _Finder(step, kinds, values, place, run).find(is_cast=is_cast)
        calls.append((found or _by_handler(step, kinds, place), step.last_uses))
        is_own = any(isinstance(values[each.number], Stack) for each in _places([step.args, step.kwargs]))
        takes_absent &= not is_own or step.name == "gru" or (found is not None and step.name in _TAKE_NO_ROWS)
    return Calls(tuple(calls), kinds, takes_absent)


def _by_handler(step: Step, kinds: Sequence[Kind], place: int) -> Call:
    def call(values: list[Any], run: Run) -> Any:
        known: dict[int, Any] = {}
        args, kwargs = _taken(step.args, values, kinds, known), _taken(step.kwargs, values, kinds, known)
        return plain_of(step.call(run, step.func, step.name, args, kwargs), kinds[place])

    return call


def _taken(value: Any, values: Sequence[Any], kinds: Sequence[Kind], known: dict[int, Any]) -> Any:
    """Arguments as a handler takes them; a value that is given twice stays one object."""
    kind = type(value)
    if kind is Place:
        if value.number not in known:
            known[value.number] = wrapped(values[value.number], kinds[value.number])
        return known[value.number]
    if kind is dict:
        return {key: _taken(each, values, kinds, known) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return kind(_taken(each, values, kinds, known) for each in value)
    if kind is slice:
        return slice(*(_taken(each, values, kinds, known) for each in (value.start, value.stop, value.step)))
    return value


class _Finder:
    """Finds a call on plain tensors that replaces the handler of one step.

    Args:
        step: The step.
        kinds: The kinds of all values, by place.
        values: All values, as handlers gave them.
        place: The place of the step's own value.
        run: The run that gave the values.
    """

    def __init__(self, step: Step, kinds: Sequence[Kind], values: Sequence[Any], place: int, run: Run) -> None:
        self._step = step
        self._kinds = kinds
        self._values = values
        self._place = place
        self._run = run

    def find(self, *, is_cast: bool) -> Call | None:
        """The call; ``None`` if the step must always go by its handler."""
        step, given = self._step, self._kinds[self._place]
        # A tensor may be a view for some members and a copy for others: only handlers know if a write shows in it.
        if self._run.writes or not (isinstance(given, RowsKind) or _are_rows(given)):
            return None
        if step.name == "linear" and not is_cast:
            return self._linear()
        if step.name == "layer_norm" and not is_cast:
            return self._layer_norm()
        if step.name in ("view", "reshape"):
            return self._reshape()
        if step.name == "__getitem__" and _are_rows(self._kind(step.args[0])):
            (whole, index) = step.args
            return (lambda values, _run: values[whole.number][index]) if type(index) is int else None
        if step.name in _SAME_ON_ALL_ROWS and not _writes(step):
            return self._same()
        return None

    def _kind(self, value: Any) -> Any:
        return self._kinds[value.number] if type(value) is Place else None

    def _same(self) -> Call | None:
        """The expert's own call, on the rows of all members."""
        step = self._step
        kinds = [self._kind(each) for each in _places([step.args, step.kwargs])]
        if not kinds or not all(isinstance(kind, RowsKind) for kind in kinds):
            return None
        if len(set(kinds)) > 1:
            return None
        func, args, kwargs = step.func, step.args, step.kwargs
        if _draws(step):
            by_handler = _by_handler(step, self._kinds, self._place)
            return lambda values, run: (
                by_handler(values, run) if run.is_rehearsal else func(*_filled(args, values), **_filled(kwargs, values))
            )
        match args:
            case (Place(first),) if not kwargs:
                return lambda values, _run: func(values[first])
            case (Place(first), Place(second)) if not kwargs:
                return lambda values, _run: func(values[first], values[second])
        return lambda values, _run: func(*_filled(args, values), **_filled(kwargs, values))

    def _linear(self) -> Call | None:
        value, weight, bias = arguments(("input", "weight", "bias"), self._step.args, self._step.kwargs, (None,))
        kind = self._kind(value)
        if not isinstance(kind, RowsKind) or kind.axis != 0 or kind.num_axes < 2:
            return None
        if not self._is_own(weight, 2) or not (bias is None or self._is_own(bias, 1)):
            return None
        x, w, b = value.number, weight.number, None if bias is None else bias.number

        def call(values: list[Any], run: Run) -> Any:
            given = values[x]
            flat = given.reshape(-1, given.shape[-1])
            factor = len(flat) // run.segments.num_rows
            if values[w].members is None:
                bias_PN = None if b is None else values[b].plain
                out = linear(flat, values[w].plain, bias_PN, run.segments, factor)
            else:
                biases = () if b is None else values[b].members
                out = linear_of_members(flat, values[w].members, biases, run.segments, factor)
            return out if given.dim() == 2 else out.view(*given.shape[:-1], out.shape[-1])

        return call

    def _layer_norm(self) -> Call | None:
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        value, shape, weight, bias, eps = arguments(names, self._step.args, self._step.kwargs, (None, None, 1e-5))
        kind = self._kind(value)
        if not isinstance(kind, RowsKind) or kind.axis != 0 or kind.num_axes < 2 or kind.dtype.itemsize < 4:
            return None
        if not self._is_own(weight, 1) or not self._is_own(bias, 1) or _places(shape):
            return None
        sample: torch.Tensor = self._values[value.number].plain
        if is_directml(sample.device) or backend_of(self._run.segments, sample.reshape(-1, sample.shape[-1])) != "runs":
            return None
        if any(self._values[each.number].dtype != kind.dtype for each in (weight, bias)):
            return None
        x, w, b = value.number, weight.number, bias.number

        def call(values: list[Any], run: Run) -> Any:
            normed = F.layer_norm(values[x], shape, eps=eps)
            flat = normed.view(-1, normed.shape[-1])
            factor = len(flat) // run.segments.num_rows
            if values[w].members is None:
                return affine_of_stack(flat, values[w].plain, values[b].plain, run.segments, factor).view_as(normed)
            return affine_of_members(flat, values[w].members, values[b].members, run.segments, factor).view_as(normed)

        return call

    def _is_own(self, value: Any, num_axes: int) -> bool:
        """True if a value is the members' own parameters or buffers, with ``num_axes`` axes each."""
        found = self._values[value.number] if type(value) is Place else None
        return isinstance(found, Stack) and found.members is not None and found.dim() == num_axes

    def _reshape(self) -> Call | None:
        """The call of a reshape whose sizes are known, but for the number of rows."""
        step = self._step
        if step.kwargs or not isinstance(self._kind(step.args[0]), RowsKind):
            return None
        sizes = step.args[1:]
        sizes = tuple(sizes[0]) if len(sizes) == 1 and type(sizes[0]) in (tuple, list) else sizes
        seen = [self._values[each.number] if type(each) is Place else each for each in sizes]
        # Any other value may differ in the next run.
        if any(type(each) is Place and not isinstance(size, RowCount) for each, size in zip(sizes, seen, strict=True)):
            return None
        func, x = step.func, step.args[0].number
        factors = [size.factor if isinstance(size, RowCount) else None for size in seen]

        def call(values: list[Any], run: Run) -> Any:
            rows = run.segments.num_rows
            wanted = [size if factor is None else rows * factor for size, factor in zip(seen, factors, strict=True)]
            return func(values[x], *wanted)

        return call


def _are_rows(kind: Any) -> bool:
    return type(kind) is tuple and all(isinstance(each, RowsKind) for each in kind)


def _writes(step: Step) -> bool:
    place = place_of_inplace(step.func)
    return bool(step.kwargs.get("inplace")) or (place is not None and place < len(step.args) and bool(step.args[place]))


def _draws(step: Step) -> bool:
    if step.name == "scaled_dot_product_attention":
        return bool(step.args[4] if len(step.args) > 4 else step.kwargs.get("dropout_p"))
    return step.name in _DRAWS


def _places(value: Any) -> list[Place]:
    """The places among arguments."""
    if type(value) is Place:
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif isinstance(value, slice):
        value = [value.start, value.stop, value.step]
    return [place for each in value for place in _places(each)] if isinstance(value, tuple | list) else []


def _filled(value: Any, values: Sequence[Any]) -> Any:
    kind = type(value)
    if kind is Place:
        return values[value.number]
    if kind is tuple or kind is list:
        return kind([_filled(each, values) for each in value])
    if kind is dict:
        return {key: _filled(each, values) for key, each in value.items()}
    return value
