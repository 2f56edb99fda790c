"""Operations on parameters alone, most of them one member after another: they cost little beside those on rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from celmoe.grouped.values import CannotGroupError, Common, Ragged, Rows, Stack, common, stack
from celmoe.torch_internals import weight_norm

from .table import Run, arguments, loop, operands, operation, refuse_row_counts

_NAMES = """
    outer ger dot inner vdot kron trace diag diag_embed inverse pinverse det logdet slogdet cholesky qr matrix_exp
    matrix_power inv pinv eigh eigvalsh svdvals solve householder_product
"""


@operation(*_NAMES.split())
def of_parameters(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run one member after another, constants once."""
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


@operation("weight_norm", namespaces=(SimpleNamespace(weight_norm=weight_norm()),))
def scaled_to_norm(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Compute ``v * g / |v|``, the norm taken over all axes but one, or over all."""
    v, g, dim = arguments(("v", "g", "dim"), args, kwargs, (0,))
    if not all(isinstance(each, Stack) for each in (v, g)):
        raise CannotGroupError(f"called {name} on other tensors than parameters")
    kept = 0 if dim == -1 else dim % v.dim() + 1
    axes = [axis for axis in range(1, v.dim() + 1) if axis != kept]
    if not axes:
        raise CannotGroupError(f"called {name} on vectors")
    scale = g.plain.view(len(g.plain), *(1,) * (v.dim() - g.dim()), *g.shape)
    scale = scale / torch.linalg.vector_norm(v.plain, dim=axes, keepdim=True)
    return stack(v.plain * scale, v.is_reduced or g.is_reduced)
