"""A captured graph lowered to a flat list of calls, which runs for all experts of a class at once.

Every value is per-row, per-expert or constant (`values`). Each call of the graph gets, once, a handler that does the
call for all experts (`ops`). A call that is not known to act on each row alone is a `CannotGroupError`.
"""

from __future__ import annotations

import builtins
import contextlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from celmoe.grouped.ops.table import OPERATIONS, Run
from celmoe.torch_internals import enter_autocast, exit_autocast, facts_of, needs_gradient, set_grad_mode, sources

from .binding import Calls, Place, Step, bind, plain_of, wrapped
from .canonical import canonical
from .capture import Captured, Sample, WrongResult
from .declared import is_declared
from .segments import Segments
from .values import CannotGroupError, Ragged, RowCount, Rows, Stack, common, registered, rows, stack


class Outcome(NamedTuple):
    """The results of a run.

    Attributes:
        hidden: The hidden states, ``[R, ...]``.
        losses: By name, one tensor for each member.
        operations_looped: Operations that ran member by member, and how often.
        writes: True if rows were written in place.
        draws: True if random numbers were drawn, or would have been outside a rehearsal.
    """

    hidden: torch.Tensor
    losses: dict[str, list[torch.Tensor]]
    operations_looped: dict[str, int]
    writes: bool
    draws: bool


@dataclass(frozen=True, eq=False)
class Program:
    """The lowered graph; ``str()`` prints it as code.

    Attributes:
        captured: The captured graph.
        steps: The calls, in order.
        num_inputs: Number of values that the program begins with.
        results: Places of the result's hidden states and losses.
        calls: The resolved steps; ``None`` before a rehearsal, which shows the kinds of the values.
    """

    captured: Captured
    steps: tuple[Step, ...]
    num_inputs: int
    results: tuple[int, ...]
    calls: Calls | None = None

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations' names, in order."""
        return tuple(step.name for step in self.steps if step.name)

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """The key that equal programs share: names and kinds of the inputs, calls, results."""
        captured = self.captured
        inputs = tuple(
            (kind, source, facts_of(node))
            for (kind, _), (node, source) in zip(captured.inputs, sources(captured.graph).items(), strict=True)
        )
        steps = tuple((step.name, step.func, canonical(step.args), canonical(step.kwargs)) for step in self.steps)
        return inputs, steps, self.results, captured.losses

    def __str__(self) -> str:
        lines = [f"v{place} = {kind}" for place, (kind, _) in enumerate(self.captured.inputs)]
        for place, step in enumerate(self.steps, start=self.num_inputs):
            given = [_printed(each) for each in step.args]
            given += [f"{key}={_printed(each)}" for key, each in step.kwargs.items()]
            lines.append(f"v{place} = {step.name or getattr(step.func, '__name__', step.func)}({', '.join(given)})")
        return "\n".join(lines)


def _printed(value: Any) -> str:
    if isinstance(value, Place):
        return f"v{value.number}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_printed, value))}]"
    return repr(value)


# Dynamo puts Python's operators into the graph; the table knows tensors' methods.
_DUNDERS = {
    **{getattr(operator, name): f"__{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")},
    **{getattr(operator, name): f"__{name}__" for name in ("neg", "pos", "abs", "eq", "ne", "lt", "le")},
    **{getattr(operator, name): f"__{name}__" for name in ("gt", "ge", "invert", "getitem", "setitem")},
    **{getattr(operator, name): f"__{name}__" for name in ("iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv")},
    **{getattr(operator, name): f"__{name}__" for name in ("iand", "ior", "ixor", "imod")},
    operator.and_: "__and__",
    operator.matmul: "matmul",
    operator.or_: "__or__",
    operator.xor: "__xor__",
}
_REFLECTED = {
    "__eq__": "__eq__",
    "__ne__": "__ne__",
    "__lt__": "__gt__",
    "__gt__": "__lt__",
    "__le__": "__ge__",
    "__ge__": "__le__",
}
# Methods that read only a tensor's shape, and methods that read its elements.
_ON_SHAPES = {"size", "dim", "numel"}
_READS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"}
# Calls that change the modes of later calls; the end of the run undoes the changes.
_MODES = {
    set_grad_mode,
    enter_autocast,
    exit_autocast,
}


def lower(captured: Captured) -> Program:
    """Give each call of a graph its handler.

    Raises:
        CannotGroupError: A call is not known to act on each row alone.
    """
    places: dict[fx.Node, int] = {}
    steps: list[tuple[fx.Node, Step]] = []
    for node in captured.graph.nodes:
        if node.op == "output":
            continue
        places[node] = len(places)
        if node.op == "placeholder":
            continue
        args, kwargs = _bound(node.args, places), _bound(dict(node.kwargs), places)
        steps.append((node, _lowered(node, args, kwargs)))
    _require_modes_kept([step for _, step in steps])
    if captured.losses:
        _require_members_apart(captured, [step for _, step in steps])
    given: Any = next(reversed(captured.graph.nodes)).args[0]
    results = tuple(places[given[place]] if kind == "output" else place for kind, place in captured.outputs)
    last = _last_uses([node for node, _ in steps], places, results)
    num_inputs = len(places) - len(steps)
    return Program(
        captured, tuple(step._replace(last_uses=last.get(node, ())) for node, step in steps), num_inputs, results
    )


def _require_modes_kept(steps: Sequence[Step]) -> None:
    """Refuse a graph that leaves the grad mode, or autocast, other than it was: the caller would see that of a loop.

    Raises:
        CannotGroupError: The graph does.
    """
    is_grad_enabled = torch.is_grad_enabled()
    num_entered = 0
    for step in steps:
        if step.func is set_grad_mode:
            is_grad_enabled = step.args[0]
        num_entered += (step.func is enter_autocast) - (step.func is exit_autocast)
    if is_grad_enabled != torch.is_grad_enabled() or num_entered:
        raise CannotGroupError("leave the grad mode or autocast other than it was")


def _require_members_apart(captured: Captured, steps: Sequence[Step]) -> None:
    """Require that a backward pass that leaves some losses out can leave their members out (`boundary`).

    Raises:
        CannotGroupError: The backward pass might reach members whose losses are left out.
    """
    for node, (kind, _) in zip(captured.graph.nodes, captured.inputs, strict=False):
        if kind == "shared" and needs_gradient(node):
            raise CannotGroupError("return losses, and give gradients to a tensor that is shared")
    for step in steps:
        if is_declared(step.call):
            # A declared function's own backward pass may turn missing gradients into zeros.
            raise CannotGroupError(f"return losses, and call {step.name}, which is not PyTorch's own")


def _bound(value: Any, places: Mapping[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return Place(places[value])
    if isinstance(value, list | tuple):
        # Plain lists and tuples: a graph's own can't be changed.
        return (list if isinstance(value, list) else tuple)(_bound(each, places) for each in value)
    if isinstance(value, slice):
        return slice(*(_bound(each, places) for each in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {key: _bound(each, places) for key, each in value.items()}
    return value


def _lowered(node: fx.Node, args: Any, kwargs: Any) -> Step:
    target: Any = node.target
    if node.op == "call_method":
        if target in _ON_SHAPES:
            return Step("", _shape, target, args, kwargs, ())
        if target in _READS:
            raise CannotGroupError(f"read values ({target})")
        method = getattr(torch.Tensor, str(target))
        if method in OPERATIONS:
            name, handler = OPERATIONS[method]
            return Step(name, handler, method, args, kwargs, ())
        raise CannotGroupError(f"called {target}, which is not known to act on each row alone")
    if node.op != "call_function":
        raise CannotGroupError(f"hold a constant tensor, or call what holds a graph of its own ({target})")
    if target is torch.ops.aten.sym_size.int:
        return Step("", _size, target, args, kwargs, ())
    if target in _MODES:
        return Step("", _mode, target, args, kwargs, ())
    if target is builtins.getattr:
        return Step("", _attribute, target, args, kwargs, ())
    if target in OPERATIONS:
        name, handler = OPERATIONS[target]
        return Step(name, handler, target, args, kwargs, ())
    if getattr(target, "__module__", None) in ("_operator", "builtins", "math") or target in _DUNDERS:
        return Step(_DUNDERS.get(target, ""), _python, target, args, kwargs, ())
    name = getattr(target, "__name__", str(target))
    if "_assert" in name:
        return Step("", _assertion, target, args, kwargs, ())
    raise CannotGroupError(f"called {name}, which is not known to act on each row alone")


def _last_uses(
    nodes: Sequence[fx.Node], places: Mapping[fx.Node, int], results: Sequence[int]
) -> dict[fx.Node, tuple[int, ...]]:
    """For each node, the places of the values that no later node reads."""
    seen = {node for node, place in places.items() if place in results}
    found: dict[fx.Node, tuple[int, ...]] = {}
    for node in reversed(nodes):
        last = [each for each in [*node.all_input_nodes, node] if each not in seen]
        seen.update(last)
        found[node] = tuple(places[each] for each in last)
    return found


def _mode(run: Run, func: Any, _name: str, args: Any, kwargs: Any) -> Any:
    result = func(*args, **kwargs)
    if func is enter_autocast:
        run.entered.append(result)
    elif func is exit_autocast:
        run.entered.remove(args[0])
    return result


def _size(_run: Run, func: Any, _name: str, args: Any, _kwargs: Any) -> Any:
    value, axis = args
    return value.shape[axis] if isinstance(value, Ragged) else func(value, axis)


def _assertion(_run: Run, _func: Any, _name: str, args: Any, _kwargs: Any) -> None:
    """Check the tracer's assertion beside a size that depends on values; a constant mask's sizes are known."""
    if args[0] is not True:
        raise CannotGroupError("indexed by values, or made tensors as long as values say")


def _shape(_run: Run, func: Any, _name: str, args: Any, kwargs: Any) -> Any:
    return getattr(args[0], func)(*args[1:], **kwargs)


def _attribute(run: Run, _func: Any, _name: str, args: Any, _kwargs: Any) -> Any:
    value, name = args
    if not isinstance(value, Ragged):
        return getattr(value, name)
    member = getattr(torch.Tensor, name, None)
    known = OPERATIONS.get(member)
    if known is None:
        raise CannotGroupError(f"read {name!r} of a tensor, which is not known to act on each row alone")
    run.operations.append(known[0])
    return known[1](run, member, known[0], (value,), {})


def _python(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Call an operator: the method's operation on tensors, Python's own operator on sizes and parts."""
    if not any(isinstance(each, Ragged) for each in args):
        return func(*args, **kwargs)
    if not name:
        raise CannotGroupError(f"called {getattr(func, '__name__', func)} on a tensor")
    if not isinstance(args[0], Ragged):
        args = args[::-1]
        name = _REFLECTED.get(name) or f"__r{name[2:]}"
    method = getattr(torch.Tensor, name)
    if method not in OPERATIONS:
        raise CannotGroupError(f"called {name}, which is not known to act on each row alone")
    operation, handler = OPERATIONS[method]
    return handler(run, method, operation, tuple(args), kwargs)


class Bound(NamedTuple):
    """The inputs of a program's run.

    Attributes:
        sample: Hidden states, mask and context with the rows of all members.
        tensors: For each own tensor of a member, in the graph's order, the tensors of all members, or a stack of them.
        member: One of the members, all of which have the same bases.
    """

    sample: Sample
    tensors: Sequence[Sequence[torch.Tensor] | torch.Tensor]
    member: nn.Module


def run_program(
    program: Program,
    bound: Bound,
    segments: Segments,
    *,
    is_rehearsal: bool = False,
    may_write: bool = True,
) -> Outcome:
    """Run a class over all rows of its members.

    Args:
        program: The class's program.
        bound: The rows, and the members' tensors.
        segments: The rows of each member.
        is_rehearsal: If true, random operations give results that can be compared.
        may_write: If true, the rows are a copy that may be written into.

    Raises:
        CannotGroupError: The run can't be right for all members. An operation's own error passes through.
    """
    captured = program.captured
    run = Run(segments, is_rehearsal=is_rehearsal, may_write=may_write)
    values = _inputs(captured, bound)
    with _modes_kept(run):
        if program.calls is not None:
            results = _called(program.calls, values, run, program.results)
        else:
            for step in program.steps:
                values.append(_stepped(run, step, values))
                for place in step.last_uses:
                    values[place] = None
            results = [values[place] for place in program.results]
    hidden = results[0]
    given = bound.sample.hidden
    if not isinstance(hidden, Rows) or hidden.axis != 0 or hidden.factor != 1:
        raise CannotGroupError("returned something else than a row for each sample")
    if hidden.plain.shape != given.shape:
        raise CannotGroupError(WrongResult("returned rows of another shape"))
    if not (hidden.is_floating_point() or hidden.is_complex() or hidden.dtype == given.dtype):
        raise CannotGroupError(WrongResult(f"returned rows of {hidden.dtype}"))
    losses: dict[str, Ragged] = dict(zip(captured.losses, results[1:], strict=True))
    for name, loss in losses.items():
        if not isinstance(loss, Rows | Stack):
            raise CannotGroupError(f"returned the loss {name!r}, which depends on neither rows nor parameters")
    # The caller's grad mode does not matter: the expert may have enabled gradients itself.
    with torch.enable_grad():
        by_member = {name: _of_members(loss, segments) for name, loss in losses.items()}
    return Outcome(hidden.plain, by_member, dict(run.looped), run.writes, run.draws)


def bound_to_kinds(program: Program, bound: Bound, segments: Segments) -> Program:
    """The program with its calls resolved by the kinds of values that a rehearsal gives.

    Raises:
        CannotGroupError: As for `run_program`.
    """
    run = Run(segments, is_rehearsal=True)
    values = _inputs(program.captured, bound)
    are_cast = []
    with _modes_kept(run):
        for step in program.steps:
            are_cast.append(torch.is_autocast_enabled(segments.device.type))
            values.append(_stepped(run, step, values))
    return replace(program, calls=bind(program.steps, program.num_inputs, values, run, are_cast))


def _called(calls: Calls, values: list[Any], run: Run, results: Sequence[int]) -> list[Any]:
    """Run resolved calls, and give the results as handlers take them."""
    values = [plain_of(value, kind) for value, kind in zip(values, calls.kinds, strict=False)]
    for call, last_uses in calls.steps:
        values.append(call(values, run))
        for place in last_uses:
            values[place] = None
    return [wrapped(values[place], calls.kinds[place]) for place in results]


@contextlib.contextmanager
def _modes_kept(run: Run) -> Iterator[None]:
    """Restore the caller's grad and autocast modes at the end, after an error too."""
    grad_mode = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad_mode)
        for entered in reversed(run.entered):
            exit_autocast(entered)


def _inputs(captured: Captured, bound: Bound) -> list[Any]:
    arguments = bound.sample.arguments(bound.member)
    own = iter(bound.tensors)
    values: list[Any] = []
    for kind, read in captured.inputs:
        if kind == "own":
            members = next(own)
            values.append(stack(members) if isinstance(members, torch.Tensor) else registered(members))
        elif kind == "count":
            values.append(RowCount())
        elif kind == "rows":
            values.append(rows(read(arguments)))
        elif kind in ("shared", "base"):
            values.append(common(read(arguments), is_given=True))
        else:
            values.append(read(arguments))
    return values


def _stepped(run: Run, step: Step, values: list[Any]) -> Any:
    args, kwargs = _filled(step.args, values), _filled(step.kwargs, values)
    if step.name:
        run.operations.append(step.name)
        if kwargs.get("out") is not None:
            raise CannotGroupError(f"called {step.name} with 'out'")
        kwargs.pop("out", None)
    return step.call(run, step.func, step.name, args, kwargs)


def _filled(value: Any, values: Sequence[Any]) -> Any:
    if type(value) is Place:
        return values[value.number]
    if type(value) is tuple or type(value) is list:
        return type(value)([_filled(each, values) for each in value])
    if type(value) is dict:
        return {key: _filled(each, values) for key, each in value.items()}
    if type(value) is slice:
        return slice(*(_filled(each, values) for each in (value.start, value.stop, value.step)))
    if isinstance(value, tuple | list):
        return type(value)(_filled(each, values) for each in value)
    return value


def _of_members(loss: Ragged, segments: Segments) -> list[torch.Tensor]:
    if isinstance(loss, Rows):
        return list(loss.plain.split([count * loss.factor for count in segments.counts], loss.axis))
    return list(loss.plain.unbind(0))
