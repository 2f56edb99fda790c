"""Linear algebra on parameters alone, one member after another: it is little beside what is done to rows."""

from __future__ import annotations

from typing import Any

from .operations import Run, loop, operands, operation, refuse_row_counts
from .ragged import CannotGroupError, Common, Rows, common

_NAMES = """
    outer ger dot inner vdot kron trace diag diag_embed inverse pinverse det logdet slogdet cholesky qr matrix_exp
    matrix_power inv pinv eigh eigvalsh svdvals solve
"""


@operation(*_NAMES.split())
def of_parameters(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """By member."""
    refuse_row_counts(name, [*args, *kwargs.values()])
    tensors = operands([*args, *kwargs.values()])
    if any(isinstance(each, Rows) for each in tensors):
        raise CannotGroupError(f"called {name} on their rows")
    if any(not isinstance(each, Common) for each in tensors):
        return loop(run, func, name, args, kwargs, None)
    made = func(
        *(each.plain if isinstance(each, Common) else each for each in args),
        **{key: each.plain if isinstance(each, Common) else each for key, each in kwargs.items()},
    )
    return type(made)(map(common, made)) if isinstance(made, tuple) else common(made)
