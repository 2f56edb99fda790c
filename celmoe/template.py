"""One module that stands for all members of a class, and its run over all their rows.

The template is a likeness of the first member: the same classes and attributes, copies of its containers, and in place
of each tensor the stack of all members'. Its forward pass is the user's own code, run anew at every call, with every
call into PyTorch taken by a mode that knows `OPERATIONS`. What can't be right for all is a `CannotGroupError`.
"""

from __future__ import annotations

import functools
import numbers
import types
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from . import (  # noqa: F401  # register
    operations_attention,
    operations_elementwise,
    operations_loss,
    operations_norm,
    operations_parameters,
    operations_product,
    operations_recurrent,
    operations_reduce,
    operations_shape,
)
from .errors import ResultError, ResultTypeError
from .experts import ExpertBatch, ExpertResult, is_aux
from .operations import OPERATIONS, Run
from .ragged import CannotGroupError, Ragged, Rows, Stack, common, registered, rows
from .segments import Segments
from .signature import BOOKKEEPING, CONTAINERS, DERIVED, Signature, copied
from .slots import held_in_slots
from .tally import Tally, leaving
from .trace import Trace


class Given:
    """What a class is given: rows of all members, and how an expert would see them.

    Attributes:
        hidden: ``[R, ...]``.
        mask: ``[R, ...]`` or ``None``.
        aligned: The context's batch-aligned tensors, ``[R, ...]`` each.
        build_context: Builds a context around values in place of those.
        shared: The context's other tensors by id.
    """

    __slots__ = ("aligned", "build_context", "hidden", "mask", "shared")

    def __init__(
        self,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        aligned: Sequence[torch.Tensor],
        build_context: Any,
        shared: Mapping[int, torch.Tensor],
    ) -> None:
        self.hidden = hidden
        self.mask = mask
        self.aligned = aligned
        self.build_context = build_context
        self.shared = shared


class Outcome:
    """What a run gave.

    Attributes:
        hidden: ``[R, ...]``.
        losses: By name, one for each member.
        operations: The program: the operations in order.
        looped: Those that were looped over the members, and how often.
        writes: Whether anything was written in place.
    """

    __slots__ = ("hidden", "looped", "losses", "operations", "writes")

    def __init__(self, hidden: torch.Tensor, losses: dict[str, list[torch.Tensor]], run: Run) -> None:
        self.hidden = hidden
        self.losses = losses
        self.operations = tuple(run.operations)
        self.looped = dict(run.looped)
        self.writes = run.writes


class StateProbe(dict[str, str]):
    """In place of an expert's ``state``: whatever reads it finds out which expert it is."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise CannotGroupError("read their state")

    __getitem__ = __iter__ = __len__ = __contains__ = __eq__ = __ne__ = __repr__ = __or__ = __ror__ = _refuse
    __setitem__ = __delitem__ = __reversed__ = __reduce_ex__ = __ior__ = __bool__ = _refuse
    get = items = keys = values = copy = pop = popitem = setdefault = update = clear = _refuse


class Template:
    """A likeness of an expert, with copies of all that it holds but functions: what happens to either is its own.

    Args:
        expert: The expert.
        signature: What was read from this very expert.
    """

    def __init__(self, expert: nn.Module, signature: Signature) -> None:
        self._modules: list[nn.Module] = []
        self._signature = signature
        self._objects = {id(each) for each in signature.objects}
        self._twins: dict[int, Any] = {}
        self._containers: list[Any] = []
        # Objects with slots among the copies.
        self._slotted: dict[int, Any] = {}
        self._expert = self._likeness(expert, {})

    def _likeness(self, module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
        if id(module) in made:
            return made[id(module)]
        twin = module.__class__.__new__(module.__class__)
        made[id(module)] = twin
        self._modules.append(twin)
        attributes = {
            name: copied(value) if name in BOOKKEEPING else self._held(value) for name, value in module.__dict__.items()
        }
        twin.__dict__.update(attributes)
        twin.__dict__["_modules"] = {
            name: None if child is None else self._likeness(child, made) for name, child in module._modules.items()
        }
        return twin

    def _held(self, value: Any) -> Any:
        """A copy of what a module or an object holds."""
        twin = copied(value, self._twin)
        if isinstance(twin, CONTAINERS):
            self._containers.append(twin)
        return twin

    def _twin(self, value: Any) -> Any:
        """A copy of an object; the same one wherever it is held."""
        if id(value) in self._twins:
            return self._twins[id(value)]
        if type(value) is functools.partial:
            args, keywords = (copied(each, self._twin) for each in (value.args, value.keywords))
            bound = self._twins[id(value)] = functools.partial(self._twin(value.func), *args, **keywords)
            self._containers += bound.args, bound.keywords
            return bound
        if id(value) not in self._objects:
            return value
        maker: Any = types.SimpleNamespace if isinstance(value, types.SimpleNamespace) else object
        twin = self._twins[id(value)] = maker.__new__(type(value))
        for slot, each in held_in_slots(value):
            slot.__set__(twin, self._held(each))
            self._slotted[id(twin)] = twin
        if hasattr(value, "__dict__"):
            vars(twin).update({name: self._held(each) for name, each in vars(value).items()})
        return twin

    def fill(self, values: Sequence[Any]) -> None:
        """Put values in place of the expert's tensors, one for each of the signature's leaves."""
        for value, leaves in zip(values, self._signature.leaves, strict=True):
            for number, name, is_buffer in leaves:
                module = self._modules[number]
                (module._buffers if is_buffer else module._parameters)[name] = value
                flat: list[Any] = module.__dict__.get("_flat_weights", [])
                flat_names: list[str] = module.__dict__.get("_flat_weights_names", [])
                if name in flat_names:
                    flat[flat_names.index(name)] = value

    def run(self, batch: ExpertBatch) -> Any:
        """The expert's forward pass; an attribute that it writes is a `CannotGroupError`."""
        watched = [part for module in self._modules for part in (module.__dict__, *_registries(module))]
        watched += [vars(each) for each in self._twins.values() if hasattr(each, "__dict__")]
        before = [*map(dict, watched), *map(copied, self._containers), *map(_in_slots, self._slotted.values())]
        result = self._expert(batch)
        after = [*watched, *self._containers, *map(_in_slots, self._slotted.values())]
        for part, was in zip(after, before, strict=True):
            if not _is_same(part, was):
                name = (
                    next((key for key in part if not _has_same(part, was, key)), "?") if isinstance(part, dict) else ""
                )
                raise CannotGroupError(f"wrote the attribute {name!r}" if name else "wrote into an attribute")
        return result


def _in_slots(value: Any) -> dict[str, Any]:
    return {slot.__name__: held for slot, held in held_in_slots(value)}


def _registries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module._modules


def _is_same(part: Any, was: Any) -> bool:
    if isinstance(part, dict) and isinstance(was, dict):
        return part.keys() == was.keys() and all(_has_same(part, was, key) for key in part if key not in DERIVED)
    if isinstance(part, list) and isinstance(was, list):
        return len(part) == len(was) and all(a is b or _is_plain_equal(a, b) for a, b in zip(part, was, strict=True))
    return _is_plain_equal(part, was)


def _has_same(part: dict[Any, Any], was: dict[Any, Any], key: Any) -> bool:
    if key not in was:
        return False
    return part[key] is was[key] or _is_plain_equal(part[key], was[key])


def _is_plain_equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is b
    if type(a) is not type(b):
        return False
    if isinstance(a, float | complex):
        # Two zeros are equal and differ.
        return repr(a) == repr(b)
    return _is_same(a, b) if isinstance(a, dict | list) else bool(a == b)


class _Interception(TorchFunctionMode):
    """Takes every call into PyTorch while a template runs."""

    def __init__(self, run: Run, shared: Mapping[int, torch.Tensor]) -> None:
        super().__init__()
        self._run = run
        self._shared = shared

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Reading an attribute calls a method of its descriptor, and another such object every time.
        known = OPERATIONS.get(func.__self__ if getattr(func, "__name__", "") == "__get__" else func)
        if known is None:
            return self._unknown(func, args, kwargs)
        name, handler = known
        self._run.operations.append(name)
        for value in args:
            if isinstance(value, torch.Tensor | list | tuple) and not isinstance(value, Ragged):
                args = tuple(map(self._registered, args))
                break
        if kwargs:
            kwargs = {key: self._registered(value) for key, value in kwargs.items()}
            if kwargs.get("out") is not None:
                raise CannotGroupError(f"called {name} with 'out'")
            kwargs.pop("out", None)
        trace = self._run.trace
        if trace is None:
            return handler(self._run, func, name, args, kwargs)
        taken = trace.take(name, [*args, *kwargs.values()])
        entered = dict(zip(kwargs, taken[len(args) :], strict=True))
        return handler(self._run, func, name, tuple(taken[: len(args)]), entered)

    def _registered(self, value: Any) -> Any:
        """Tensors that are not the run's own must be the context's."""
        if isinstance(value, Ragged):
            return value
        if isinstance(value, torch.Tensor):
            if id(value) not in self._shared:
                raise CannotGroupError(f"read a tensor that is not registered (of shape {tuple(value.shape)})")
            return common(value, is_given=True)
        if type(value) in (list, tuple):
            return type(value)(map(self._registered, value))
        return value

    def _unknown(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = _name_of(func)
        if not _has_ragged([*args, *kwargs.values()]):
            # Grad modes, autocast and the like: no tensor is in it.
            if name in _HARMLESS:
                return func(*args, **kwargs)
            if name in _OF_PLAIN and all(isinstance(each, torch.Tensor) and id(each) in self._shared for each in args):
                return func(*args, **kwargs)
        if name in _READS:
            raise CannotGroupError(f"read values ({name})")
        raise CannotGroupError(f"called {name}, which is not known to act on each row alone")


_HARMLESS = {
    *("set_grad_enabled", "is_grad_enabled", "_set_grad_enabled", "is_autocast_enabled", "get_default_dtype", "finfo"),
    *("is_tensor", "is_inference_mode_enabled", "promote_types", "result_type", "broadcast_shapes", "__set__"),
    *("get_autocast_dtype", "autocast_increment_nesting", "autocast_decrement_nesting", "set_autocast_enabled"),
    *("set_autocast_dtype", "set_autocast_cache_enabled", "is_autocast_cache_enabled", "clear_autocast_cache"),
    *("autocast", "_enter_autocast", "_exit_autocast", "get_autocast_cpu_dtype"),
}
_OF_PLAIN = {
    "shape",
    "size",
    "dim",
    "ndim",
    "dtype",
    "device",
    "is_floating_point",
    "requires_grad",
    "numel",
    "__len__",
}
_READS = {
    "__bool__",
    "item",
    "tolist",
    "numpy",
    "__array__",
    "__len__",
    "__float__",
    "__int__",
    "__index__",
    "__contains__",
}
_READS |= {
    "equal",
    "allclose",
    "nonzero",
    "unique",
    "data_ptr",
    "is_nonzero",
    "__repr__",
    "__format__",
    "__hash__",
    "__iter__",
}
_READS |= {"__complex__", "argwhere", "masked_select", "unique_consecutive", "bincount", "histc"}


def _name_of(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__", "__delete__"):
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return str(name)


def _has_ragged(values: Sequence[Any]) -> bool:
    return any(
        isinstance(value, Ragged) or (isinstance(value, list | tuple) and _has_ragged(value)) for value in values
    )


def run_template(
    template: Template,
    tensors: Sequence[Sequence[torch.Tensor]],
    given: Given,
    segments: Segments,
    *,
    is_rehearsal: bool = False,
    may_write: bool = True,
    tally: Tally | None = None,
) -> Outcome:
    """Run a class over all rows of its members.

    Args:
        template: A likeness of its members.
        tensors: For each of the signature's leaves, those of all members.
        given: The rows.
        segments: The rows of each member.
        is_rehearsal: Whether random operations are to do something that can be compared.
        may_write: Whether the rows are a copy that the experts may write into.
        tally: Where it counts which members the losses are of that are differentiated.

    Raises:
        CannotGroupError: It can't be right for all. Whatever the expert raises passes through.
    """
    trace = None if tally is None else Trace(tally, segments)
    run = Run(segments, is_rehearsal=is_rehearsal, may_write=may_write, trace=trace)
    stacks = [
        registered(values, not leaves[0].is_buffer)
        for values, leaves in zip(tensors, template._signature.leaves, strict=True)
    ]
    template.fill(stacks)
    try:
        batch = ExpertBatch(
            rows(given.hidden),
            given.build_context([rows(each) for each in given.aligned]),
            None if given.mask is None else rows(given.mask),
            StateProbe(),
        )
        with _Interception(run, given.shared):
            result = template.run(batch)
        hidden, losses = _checked(result, given.hidden)
        # Whatever the caller's grad mode: the expert may have enabled gradients itself.
        with torch.enable_grad():
            if trace is not None:
                losses = {name: trace.returned(loss) for name, loss in losses.items()}
            outcome = Outcome(hidden.plain, {name: _of_members(loss, segments) for name, loss in losses.items()}, run)
            if trace is not None and tally is not None:
                results: list[tuple[str | None, Ragged]] = [(None, hidden), *losses.items()]
                tally.reach = {name: trace.edges_behind(each) for name, each in results}
                _leave(outcome, tally)
    finally:
        # No copy of a weight outlives the call.
        template.fill([None] * len(tensors))
    return outcome


def _leave(outcome: Outcome, tally: Tally) -> None:
    """Have the tally told of what comes back to rows and losses."""
    outcome.hidden = leaving(outcome.hidden, tally, None)
    outcome.losses = {
        name: [leaving(value, tally, member, name) for member, value in enumerate(values)]
        for name, values in outcome.losses.items()
    }


def _checked(result: Any, given: torch.Tensor) -> tuple[Rows, dict[str, Ragged]]:
    _require_kinds(result)
    if type(result) is not ExpertResult:
        raise CannotGroupError(f"returned a {type(result).__name__}")
    if not isinstance(result.aux, dict) or result.aux:
        raise CannotGroupError("returned aux")
    hidden = result.hidden
    if isinstance(hidden, Rows) and hidden.axis == 0 and hidden.factor == 1 and hidden.plain.shape != given.shape:
        raise ResultError("returned rows of another shape")
    if not isinstance(hidden, Rows) or hidden.axis != 0 or hidden.factor != 1:
        raise CannotGroupError("returned something else than a row for each sample")
    if not (hidden.is_floating_point() or hidden.is_complex() or hidden.dtype == given.dtype):
        raise CannotGroupError(f"returned rows of {hidden.dtype}")
    if not isinstance(result.losses, dict):
        raise CannotGroupError("returned losses that are no dict")
    losses: dict[str, Ragged] = {}
    for name, loss in result.losses.items():
        if not isinstance(loss, Rows | Stack):
            raise CannotGroupError(f"returned the loss {name!r}, which depends on neither rows nor parameters")
        losses[name] = loss
    return hidden, losses


def _require_kinds(result: Any) -> None:
    """Refuse what no engine takes; the loop, which is asked next, says which expert returned it.

    Raises:
        ResultTypeError: It is no result that holds tensors.
    """
    if not isinstance(result, ExpertResult):
        raise ResultTypeError(f"returned a {type(result).__name__}")
    losses = result.losses
    if (
        not isinstance(result.hidden, torch.Tensor)
        or not isinstance(losses, Mapping)
        or not all(isinstance(loss, torch.Tensor | numbers.Real) for loss in losses.values())
        or not is_aux(result.aux)
    ):
        raise ResultTypeError("returned something else than tensors")


def _of_members(loss: Ragged, segments: Segments) -> list[torch.Tensor]:
    if isinstance(loss, Rows):
        return list(loss.plain.split([count * loss.factor for count in segments.counts], loss.axis))
    return list(loss.plain.unbind(0))
