"""Element-wise operations with broadcasting, in place or not, and random ones."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from celmoe.grouped.values import CannotGroupError, Common, Ragged, Rows, Stack, like, owned

from .table import Run, align, operands, operation, refuse_row_counts

# Functions of one or more tensors that agree on their axes; other arguments are numbers and options.
ELEMENTWISE = """
    abs absolute neg negative positive sign sgn sqrt rsqrt square exp exp2 expm1 log log2 log10 log1p sin cos tan
    asin acos atan atan2 sinh cosh tanh asinh acosh atanh sigmoid logit erf erfc erfinv lgamma digamma reciprocal
    round floor ceil trunc frac relu relu6 gelu silu mish elu selu celu leaky_relu hardtanh hardsigmoid hardswish
    softplus softsign tanhshrink softshrink hardshrink logsigmoid threshold add sub subtract rsub mul multiply div
    divide true_divide floor_divide remainder fmod pow float_power maximum minimum fmax fmin clamp clip clamp_min
    clamp_max where masked_fill lerp addcmul addcdiv eq ne lt le gt ge not_equal less less_equal greater
    greater_equal isnan isinf isfinite isclose logical_and logical_or logical_xor logical_not bitwise_and bitwise_or
    bitwise_xor bitwise_not nan_to_num copysign hypot xlogy sinc logaddexp logaddexp2 heaviside __and__ __or__
    __xor__ __invert__ __rand__ __ror__ __rxor__ __pow__ __rpow__ __rsub__ __rdiv__ __rtruediv__ __rmul__ __radd__
    __floordiv__ __rfloordiv__ __mod__ __rmod__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __add__ __sub__ __mul__
    __truediv__ __div__ __neg__ __abs__ __pos__ clone contiguous float
    double half bfloat16 long int bool to type_as detach data
"""
# The same operations, writing into their first argument.
IN_PLACE = """
    add_ sub_ mul_ div_ pow_ neg_ exp_ sqrt_ rsqrt_ tanh_ sigmoid_ relu_ abs_ clamp_ clamp_min_ clamp_max_ fill_
    zero_ masked_fill_ lerp_ addcmul_ addcdiv_ copy_ floor_ ceil_ round_ square_ reciprocal_ log_ log1p_ sin_ cos_
    leaky_relu_ elu_ selu_ celu_ hardtanh_ threshold_ __iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ipow__
    __iand__ __ior__ __ixor__
"""


# These operations may return the very tensor that they were given.
_MAY_BE_THE_SAME = {
    *("contiguous", "float", "double", "half", "bfloat16", "long", "int", "bool", "to", "type_as", "detach", "data"),
    *("positive", "__pos__"),
}


@cache
def place_of_inplace(func: Any) -> int | None:
    """The place of the argument ``inplace``, or ``None`` if there is none."""
    try:
        names = list(inspect.signature(func).parameters)
    except ValueError:
        # Built-in functions take no ``inplace``.
        return None
    return names.index("inplace") if "inplace" in names else None


@operation(*ELEMENTWISE.split())
def elementwise(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run any of `ELEMENTWISE`."""
    place = place_of_inplace(func)
    if kwargs.get("inplace") or (place is not None and place < len(args) and args[place]):
        return in_place(run, func, name, args, kwargs)
    named = list(kwargs)
    plain, wrap = align(run, name, [*args, *kwargs.values()])
    positional, options = plain[: len(args)], dict(zip(named, plain[len(args) :], strict=True))
    result = wrap(func(*positional, **options))
    if name not in _MAY_BE_THE_SAME:
        return owned(result)
    if name == "contiguous":
        run.note_copy(args[0], result.plain, lambda some: bool(some.is_contiguous()))
    if isinstance(result, Common):
        # The result may be the context's own tensor, which must not be written into.
        result.is_given = isinstance(args[0], Common) and args[0].is_given
    return result


def writable(run: Run, name: str, target: Ragged, others: Sequence[Ragged]) -> Ragged:
    """The value that an operation may write into.

    Args:
        run: The pass.
        name: The operation.
        target: The value.
        others: The operation's other tensors.

    Raises:
        CannotGroupError: The value must not be written into, or can't hold the result.
    """
    if isinstance(target, Rows) and run.is_ambiguous(target.plain):
        raise CannotGroupError(f"wrote into what their number of rows makes a copy or a view ({name})")
    # Only a number a member, say a loss: reshaping a larger entry may copy for a member but not for the stack.
    if isinstance(target, Stack) and (not target.is_own or target.dim() or run.expands):
        raise CannotGroupError(f"wrote into a parameter or buffer, or what was made of one ({name})")
    if not isinstance(target, Rows) and any(isinstance(other, Rows) for other in others):
        raise CannotGroupError(f"wrote their rows into a tensor of fixed size ({name})")
    if isinstance(target, Common) and (target.is_given or not all(isinstance(other, Common) for other in others)):
        raise CannotGroupError(f"wrote into a tensor that is shared, or of fixed size ({name})")
    if any(other.dim() > target.dim() for other in others):
        raise CannotGroupError(f"wrote more axes than there are ({name})")
    if isinstance(target, Rows):
        run.writes = True
        if not run.may_write:
            raise CannotGroupError("write into rows that are not theirs alone this time")
    return target


@operation(*IN_PLACE.split())
def in_place(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run any of `IN_PLACE`: rows own their memory, and a view of that memory is a view for the expert, too."""
    others = operands([*args[1:], *kwargs.values()])
    target = writable(run, name, args[0], others)
    named = list(kwargs)
    plain, _ = align(run, name, [*args, *kwargs.values()])
    positional, options = plain[: len(args)], dict(zip(named, plain[len(args) :], strict=True))
    func(target.plain, *positional[1:], **options)
    if isinstance(target, Stack):
        target.is_reduced |= any(isinstance(other, Stack) and other.is_reduced for other in others)
    return target


@operation("dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d", namespaces=(F,))
def dropout(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run on rows only: each row draws its own numbers, as it would alone."""
    value, *options = args
    refuse_row_counts(name, [*options, *kwargs.values()])
    options_by_name = dict(zip(("p", "training", "inplace"), options, strict=False)) | kwargs
    p, training = options_by_name.get("p", 0.5), options_by_name.get("training", "alpha" not in name)
    if not training or p == 0.0:
        return like(value, value.plain)
    if not isinstance(value, Rows) or (name not in ("dropout", "alpha_dropout") and value.axis != 0):
        raise CannotGroupError(f"drew random numbers that are not for rows ({name})")
    if run.is_rehearsal:
        return like(value, value.plain * (1.0 - 0.5 * float(p)))
    if options_by_name.get("inplace"):
        return in_place(run, func, name, (value, p, True, True), {})
    return like(value, func(value.plain, p, True))


@operation("is_floating_point", "is_complex", "numel", namespaces=(torch,))
def fact(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A fact about a tensor that the expert may know."""
    return getattr(args[0], name)()


@operation("rand_like", "randn_like")
def random_like(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Run on rows only: for any other value, every member would draw its own numbers."""
    value = args[0]
    if not isinstance(value, Rows):
        raise CannotGroupError(f"drew random numbers that are not for rows ({name})")
    return like(value, torch.full_like(value.plain, 0.5, **kwargs) if run.is_rehearsal else func(value.plain, **kwargs))


@operation("zeros_like", "ones_like", "full_like")
def constant_like(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Make a constant like another value."""
    refuse_row_counts(name, [*args[1:], *kwargs.values()])
    if operands([*args[1:], *kwargs.values()]):
        raise CannotGroupError(f"filled a tensor with another ({name})")
    return like(args[0], func(args[0].plain, *args[1:], **kwargs))
