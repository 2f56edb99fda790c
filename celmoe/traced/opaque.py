"""A level as one operator, which runs it as ever: with the guards, the engine and the routes of the call.

The backward pass of the operator runs the level's own, which adds up the parameters' gradients itself: experts without
samples keep ``None``.

Axes: B samples in batch order.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from celmoe.config import FLAGS
from celmoe.errors import ChangedError, GraphError
from celmoe.level import Level, LevelInput
from celmoe.names import NamedModules, modules_named
from celmoe.routing.plan import LevelPlan, RoutingPlan
from celmoe.rows.context import NO_CONTEXT, ContextRows
from celmoe.torch_internals import ON_THE_HOST, tree_flatten, tree_unflatten

from .decision import Way
from .modes import Modes, as_called
from .registered import MODELS


def run_level(
    level: Level,
    modules: NamedModules,
    engine: str,
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    context: Any,
    indices: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Run a level as ever, with values at hand.

    Args:
        level: The level.
        modules: Its experts.
        engine: The engine's name.
        hidden: ``[B, ...]``.
        mask: ``[B, ...]`` or ``None``.
        context: The context as passed.
        indices: The plan's order, its inverse, and the expert ids, ``[B]`` int64 each.

    Returns:
        ``[B, ...]``: the experts' rows in batch order.
    """
    order, inverse, ids = indices
    counts = torch.bincount(ids.cpu(), minlength=len(level.experts)).tolist()
    count_of = {name: count for name, count in sorted(zip(level.experts, counts, strict=True)) if count}
    ends = torch.tensor([*itertools.accumulate(count_of.values())], device=ids.device)
    plan = LevelPlan(level.name, tuple(count_of), tuple(count_of.values()), False, False, order, inverse, ids, ends)
    rows = NO_CONTEXT if context is None else ContextRows(context, hidden.shape[0], hidden.device)
    experts = modules_named(modules, count_of)
    output, _ = level.run(experts, engine, LevelInput(hidden, None, rows, mask), plan, _NO_ROUTES)
    if output.losses or output.aux:
        raise GraphError(
            f"'model' must have experts without losses and aux to be one operator (got some from level {level.name!r}; "
            f"wrap the call of the model in torch.compiler.disable)"
        )
    return output.hidden


class _NoRoutes:
    def routes(self, level: str) -> list[str]:
        raise NotImplementedError(level)


# Nobody reads the routes of an operator's output.
_NO_ROUTES = cast(RoutingPlan, _NoRoutes())


@dataclass(frozen=True)
class _Call:
    """What an operator's call in a graph is beside its tensors.

    Attributes:
        key: The model's key.
        index: The level's place.
        leaves: The leaves of context and mask, with `_TENSOR` for tensors.
        spec: How the leaves make context and mask.
        dtype: The dtype of the results.
        require_grad: For the hidden states and each tensor among the leaves, true if gradients flow into it.
        modes: The modes of the trace.
    """

    key: str
    index: int
    leaves: tuple[Any, ...]
    spec: Any
    dtype: torch.dtype
    require_grad: tuple[bool, ...]
    modes: Modes


_TENSOR = object()
_CALLS: dict[str, _Call] = {}
_NUMBERS = itertools.count()


def run_opaque(
    place: tuple[str, int],
    hidden: torch.Tensor,
    packed: Any,
    indices: Sequence[torch.Tensor],
    anchor: torch.Tensor,
    way: Way,
) -> torch.Tensor:
    """Run a level as one operator.

    Args:
        place: The model's key, and the level's place in it.
        hidden: ``[B, ...]``, symbolic.
        packed: The context as passed, and the mask.
        indices: As for `run_level`.
        anchor: The level's `Level.anchor`.
        way: The decision for the level.

    Returns:
        As `run_level`.
    """
    leaves, spec = tree_flatten(packed)
    tensors = [each for each in leaves if isinstance(each, torch.Tensor)]
    name = str(next(_NUMBERS))
    _CALLS[name] = _Call(
        *place,
        tuple(_TENSOR if isinstance(each, torch.Tensor) else each for each in leaves),
        spec,
        way.dtype,
        tuple(way.modes.is_grad_enabled and each.requires_grad for each in (hidden, *tensors)),
        way.modes,
    )
    if not way.is_trained:
        anchor = anchor.detach()
    result: torch.Tensor = torch.ops.celmoe.level(hidden, tensors, list(indices), anchor, name)[0]
    return result


@dataclass(frozen=True)
class _Run:
    """A run whose backward pass may come.

    Attributes:
        result: The level's result, with its graph.
        given: The hidden states and the tensors among the leaves, apart from their own graphs.
    """

    result: torch.Tensor
    given: Sequence[torch.Tensor]


_RUNS: dict[int, _Run] = {}


@torch.library.custom_op("celmoe::level", mutates_args=(), **ON_THE_HOST)
def run_operator(
    hidden: torch.Tensor,
    tensors: list[torch.Tensor],
    indices: list[torch.Tensor],
    anchor: torch.Tensor,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a level; the second result, a number, is for the backward pass."""
    call = _CALLS[name]
    model: Any = MODELS[call.key]
    level = model._levels[call.index]
    number = torch.tensor(next(_NUMBERS))
    with as_called(call.modes):
        pairs = zip((hidden, *tensors), call.require_grad, strict=True)
        # The level's graph may keep them, whose memory the compiled graph uses again.
        given = [each.detach().clone().requires_grad_(requires_grad) for each, requires_grad in pairs]
        rest = iter(given[1:])
        leaves = [next(rest) if each is _TENSOR else each for each in call.leaves]
        context, mask = tree_unflatten(leaves, call.spec)
        modules = model.level_modules[level.name]
        result = run_level(level, modules, model.engine, given[0], mask, context, indices)
    if result.dtype is not call.dtype:
        raise GraphError(
            f"'model' must have experts that return {call.dtype} at level {level.name!r}, as at the time of compiling "
            f"(got {result.dtype})"
        )
    if result.requires_grad and not anchor.requires_grad and not any(call.require_grad):
        FLAGS.changed()
        raise ChangedError(
            f"'model' must have no trained experts at level {level.name!r}, as when it was compiled (got some that are "
            f"trained now; the next call compiles the model anew)"
        )
    if result.requires_grad:
        key = int(number)
        _RUNS[key] = _Run(result, given)
        weakref.finalize(number, _RUNS.pop, key, None)
    return result.detach(), number


@run_operator.register_fake
def _(hidden: torch.Tensor, _tensors: Any, _indices: Any, _anchor: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden.new_empty(hidden.shape, dtype=_CALLS[name].dtype), torch.empty((), dtype=torch.int64)


@torch.library.custom_op("celmoe::level_backward", mutates_args=(), **ON_THE_HOST)
def run_backward(
    grad: torch.Tensor,
    number: torch.Tensor,
    hidden: torch.Tensor,  # noqa: ARG001  # tells the gradients' shapes, as the next
    tensors: list[torch.Tensor],  # noqa: ARG001  # inputs of the graph
    name: str,
) -> list[torch.Tensor]:
    """Run a level's backward pass.

    Returns:
        The gradient of the anchor, and of those of hidden states and other tensors that require gradients.
    """
    run, call = _RUNS.pop(int(number), None), _CALLS[name]
    if run is None:
        raise GraphError("'backward' must be called once on a compiled level (got a second call)")
    with as_called(call.modes):
        torch.autograd.backward(run.result, grad)
    wanted = [each for each, requires_grad in zip(run.given, call.require_grad, strict=True) if requires_grad]
    grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in wanted]
    return [torch.zeros(0), *grads]


@run_backward.register_fake
def _(
    _grad: torch.Tensor, _number: torch.Tensor, hidden: torch.Tensor, tensors: list[torch.Tensor], name: str
) -> list[torch.Tensor]:
    pairs = zip((hidden, *tensors), _CALLS[name].require_grad, strict=True)
    return [torch.empty(0), *(torch.empty_like(each) for each, requires_grad in pairs if requires_grad)]


def _set_up(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, tensors, indices, _, ctx.name = inputs
    ctx.save_for_backward(output[1], hidden, *tensors)
    ctx.num_indices = len(indices)


def _backward(ctx: Any, grad: torch.Tensor, _number: Any) -> Any:
    number, hidden, *tensors = ctx.saved_tensors
    found = iter(torch.ops.celmoe.level_backward(grad.contiguous(), number, hidden, tensors, ctx.name))
    of_anchor = next(found)
    of_hidden, *of_tensors = [next(found) if each else None for each in _CALLS[ctx.name].require_grad]
    return of_hidden, of_tensors, [None] * ctx.num_indices, of_anchor, None


run_operator.register_autograd(_backward, setup_context=_set_up)
