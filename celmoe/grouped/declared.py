"""Functions and custom operators that their author declares to act on each row alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar, overload

import torch

from celmoe.errors import InputTypeError
from celmoe.grouped.ops.table import OPERATIONS, Run, by_members, operands, refuse_row_counts
from celmoe.torch_internals import operator_of

from .values import CannotGroupError, Ragged, Rows, Stack, rows

__all__ = ["rowwise"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


@overload
def rowwise(function: _Function) -> _Function: ...


@overload
def rowwise(*, grouped: Callable[..., Any]) -> Callable[[_Function], _Function]: ...


def rowwise(function: Any = None, *, grouped: Callable[..., Any] | None = None) -> Any:
    """Declare that a function, or a custom operator, acts on each row alone.

    The grouped engine then treats the function as one operation: the rows of all experts of a class go through a single
    call. With parameters or buffers among the arguments, each expert gets a call, unless there is a grouped form.
    Experts that call the function are compared with the loop like all others: a function that mixes rows is refused.
    Experts that call the function and return losses are refused, too. Nothing changes for the looped engine.

    A tensor of rows has the rows along its first axis, ``[N, ...]``. The function returns one such tensor, or a tuple.
    The function must not write into its arguments, draw random numbers, or read values in Python: during a capture,
    tensors have no values. An operator of `torch.library.custom_op` may read values. Such an operator needs
    ``register_fake``, and ``register_autograd`` for gradients.

    Example:
        >>> @celmoe.rowwise
        ... def clipped(rows: torch.Tensor, largest: float) -> torch.Tensor:
        ...     return rows * (largest / rows.norm(dim=-1, keepdim=True)).clamp(max=1)

    Args:
        function: The function, or a result of `torch.library.custom_op`.
        grouped: The grouped form, which takes the same arguments for all experts at once, and ``members``. Rows are
            ``[R, ...]``, parameters and buffers ``[P, ...]`` for P experts. ``members`` gives each row's expert,
            ``[R]`` int64, in rising order. The grouped form returns ``[R, ...]``.

    Returns:
        The function itself.

    Raises:
        InputTypeError: ``function`` or ``grouped`` can't be called.
    """
    if grouped is not None and not callable(grouped):
        raise InputTypeError(f"'grouped' must be a function (got {grouped!r})")
    if function is None:
        return partial(rowwise, grouped=grouped)
    if not callable(function):
        raise InputTypeError(f"'function' must be a function or a custom operator (got {function!r})")
    name = str(getattr(function, "__name__", function))
    operator = operator_of(function)
    if operator is None:
        torch.compiler.allow_in_graph(function)
    OPERATIONS[operator or function] = name, partial(_call, grouped)
    return function


def is_declared(handler: Callable[..., Any]) -> bool:
    """True for the handler of a declared function."""
    return isinstance(handler, partial) and handler.func is _call


def _call(grouped: Callable[..., Any] | None, run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    given = [*args, *kwargs.values()]
    refuse_row_counts(name, given)
    of_rows = [each for each in operands(given) if isinstance(each, Rows)]
    of_members = [each for each in operands(given) if isinstance(each, Stack)]
    if not of_rows:
        raise CannotGroupError(f"called {name} on no rows")
    factor = of_rows[0].factor
    if any((each.axis, each.factor) != (0, factor) for each in of_rows):
        raise CannotGroupError(f"called {name} with another axis than the batch first")
    if any(each.is_reduced for each in of_members):
        raise CannotGroupError(f"mixed samples (what was reduced over the batch came back to rows in {name})")
    if of_members and grouped is None:
        run.looped[name] += 1
        each_args = by_members(run, list(args))
        each_kwargs = [dict(zip(kwargs, some, strict=True)) for some in by_members(run, list(kwargs.values()))]
        found = [func(*some, **named) for some, named in zip(each_args, each_kwargs, strict=True)]
        counts = [count * factor for count in run.segments.counts]
        parts = [_parts(name, each, count) for each, count in zip(found, counts, strict=True)]
        joined: Sequence[torch.Tensor] = [torch.cat(each) for each in zip(*parts, strict=True)]
    else:
        plain = [each.plain if isinstance(each, Ragged) else each for each in args]
        named = {key: each.plain if isinstance(each, Ragged) else each for key, each in kwargs.items()}
        if grouped is not None:
            func, named = grouped, named | {"members": run.segments.member_of_row(factor)}
        found = [func(*plain, **named)]
        joined = _parts(name, found[0], run.segments.num_rows * factor)
    made = [rows(each, 0, factor) for each in joined]
    return made[0] if isinstance(found[0], torch.Tensor) else type(found[0])(made)


def _parts(name: str, found: Any, num_rows: int) -> Sequence[torch.Tensor]:
    """The tensors that a function returned, all of them rows."""
    parts = [found] if isinstance(found, torch.Tensor) else found
    if not isinstance(parts, list | tuple) or not all(isinstance(each, torch.Tensor) for each in parts):
        raise CannotGroupError(f"called {name}, which returned something else than tensors")
    if any(each.dim() == 0 or len(each) != num_rows for each in parts):
        raise CannotGroupError(f"called {name}, which returned something else than a row for each row")
    return parts
