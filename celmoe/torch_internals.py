"""The only file that may name an underscored PyTorch API. One function for each need, with the reason beside it."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import operator
import os
import re
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils._python_dispatch import _disable_current_modes

# Switches of the tracer for one capture. Experts that hold another number are another class: no number may become an
# input. All classes share code objects, so the tracer's limits on graphs by code object are lifted.
_STRICT: dict[str, Any] = {
    "allow_rnn": True,
    "automatic_dynamic_shapes": False,
    "accumulated_recompile_limit": 1 << 30,
    "error_on_recompile": False,
    "recompile_limit": 1 << 30,
    "side_effect_replay_policy": "error",
    "skip_nnmodule_hook_guards": False,
    "specialize_float": True,
    "specialize_int": True,
    "suppress_errors": False,
}
_NOISY = ("torch._guards", "torch._dynamo", "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


def tracer_missing() -> str | None:
    """Why this PyTorch can't capture experts, or ``None``."""
    if (lacks := _tracer_lacks()) is not None:
        return lacks
    if torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "PyTorch's tracer is switched off (TORCHDYNAMO_DISABLE)"
    return None


@functools.cache
def _tracer_lacks() -> str | None:
    try:
        from torch._dynamo import config
    except ImportError:
        return "PyTorch has no tracer here"
    missing = next((name for name in _STRICT if not hasattr(config, name)), None)
    return missing and f"the tracer of PyTorch {torch.__version__} has no setting {missing!r}"


class Guard:
    """Tells for which arguments of a captured function its graph holds.

    The tracer's own guards compare numbers by their values, to which zeros of either sign are equal. They know objects
    by their classes, whose methods may be replaced, and compare a tuple that holds a list with itself. All that is
    looked at here.

    Args:
        manager: The tracer's own guard manager.
        arguments: What the graph was traced with, by parameter name.
        silent: Loggers that said nothing while it was traced, though the code calls them.
    """

    def __init__(self, manager: Any, arguments: Mapping[str, Any], silent: _Silent) -> None:
        self._manager = manager
        self._silent = silent
        scope = {"L": arguments, "G": self.scope}
        parts = [part for part in manager.code_parts if isinstance(part, str)]
        zeros = [match[1] for part in parts if (match := _ZERO.fullmatch(part))]
        self._zeros = [(read, math.copysign(1.0, read(arguments))) for read in map(_reader, zeros)]
        compared = [part.split(" == ")[0] for part in parts if " == " in part]
        self._contents = [(source, copy.deepcopy(value)) for source, value in self._changeable(compared, scope)]
        found = [_evaluated(match[1], scope) for part in parts if (match := _TYPE.match(part))]
        classes = dict.fromkeys(base for each in found for base in type(each).__mro__ if base.__flags__ & _HEAP_TYPE)
        self._code = [_Methods(each) for each in classes]
        self._of_expert = _of_expert_alone(manager)

    @property
    def scope(self) -> Mapping[str, Any]:
        """What the tracer's expressions call ``G``: modules that the code reads."""
        scope: Mapping[str, Any] = self._manager.global_scope["G"]
        return scope

    def holds(self, arguments: dict[str, Any]) -> bool:
        """Whether the graph holds for arguments, by parameter name."""
        return bool(self._manager.check(arguments)) and self._holds_beside(arguments)

    def holds_for_all(self, arguments: dict[str, Any], experts: Iterable[nn.Module]) -> bool:
        """Whether the graph, which holds now for these arguments, does so with each of some experts."""
        check, is_plain = self._of_expert.check, not self._contents and not self._zeros
        for arguments["expert"] in experts:
            if not check(arguments) or not (is_plain or self._holds_beside(arguments)):
                return False
        return True

    def _holds_beside(self, arguments: dict[str, Any]) -> bool:
        """What the tracer's own guards don't tell."""
        if self._contents and any(self._read(source, arguments) != value for source, value in self._contents):
            return False
        return not self._zeros or all(math.copysign(1.0, read(arguments)) == sign for read, sign in self._zeros)

    @staticmethod
    def _changeable(compared: Iterable[str], scope: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """What the tracer's guards hold on to and compare with, though its contents may change: a list in a tuple."""
        for source in compared:
            value = _evaluated(source, scope)
            if isinstance(value, tuple):
                try:
                    hash(value)
                except TypeError:
                    yield source, value

    def _read(self, source: str, arguments: Mapping[str, Any]) -> Any:
        return _evaluated(source, {"L": arguments, "G": self.scope})

    def is_alive(self) -> bool:
        """Whether the graph is still to be asked for.

        The tracer lets go of one whose guards compare an object that is gone. So does this of one that was traced
        through code which has been replaced, or past a logger that says something by now.
        """
        is_kept = self._manager.cache_entry is not None and self._silent.are_as_before()
        return is_kept and all(each.are_as_before() for each in self._code)


_OTHERS = ("G", "L['hidden']", "L['mask']", "L['context']")


def _of_expert_alone(manager: Any) -> Any:
    """The guards that look at the expert, where each looks at nothing else; all of them where one does."""
    lines = str(manager).splitlines()
    mixed = (
        "ALIASING" in line or ("L['expert']" in line and any(other in line for other in _OTHERS[1:])) for line in lines
    )
    if any(mixed):
        return manager
    return manager.root.clone_manager(lambda node: not node.get_source().startswith(_OTHERS)) or manager


class _Silent(set[Any]):
    """The methods of loggers that say nothing as they are set now: for all who ask they are in here."""

    def __init__(self) -> None:
        super().__init__()
        self._met: dict[tuple[int, int], logging.Logger] = {}

    def __contains__(self, method: object) -> bool:
        logger = getattr(method, "__self__", None)
        level = _LEVELS.get(getattr(method, "__name__", ""))
        if type(logger) is not logging.Logger or level is None or logger.isEnabledFor(level):
            return False
        self._met[id(logger), level] = logger
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> set[Any]:
        # The tracer's settings are copied where its own times are logged.
        return set()

    def are_as_before(self) -> bool:
        """Whether those that were asked for say nothing still."""
        return not any(logger.isEnabledFor(level) for (_, level), logger in self._met.items())


_LEVELS = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")}


class _Methods:
    """The functions of a class, and their code, as they are when this is made; it keeps neither class nor functions.

    Classes that PyTorch makes for one module, as for weight norm, hold that module.
    """

    def __init__(self, kind: type) -> None:
        self._kind = weakref.ref(kind)
        attributes = vars(kind)
        self._number = len(attributes)
        found = {name: _function_of(each) for name, each in attributes.items()}
        functions = {name: each for name, each in found.items() if each is not None}
        self._functions = [(name, type(attributes[name]), weakref.ref(each)) for name, each in functions.items()]
        # Nobody rewrites PyTorch's own functions in place.
        own = {} if kind.__module__.startswith("torch.") else functions
        self._inner = [(weakref.ref(each), _INNER(each)) for each in own.values()]

    def are_as_before(self) -> bool:
        """Whether they are the same now."""
        kind = self._kind()
        if kind is None:
            return False
        attributes = vars(kind)
        if len(attributes) != self._number:
            return False
        for name, wrapper, function in self._functions:
            attribute = attributes.get(name)
            inner = attribute if wrapper is types.FunctionType else _function_of(attribute)
            if inner is None or inner is not function() or type(attribute) is not wrapper:
                return False
        return all(_INNER(function()) == inner for function, inner in self._inner)


def _function_of(attribute: Any) -> types.FunctionType | None:
    """What a class's attribute calls."""
    if type(attribute) is staticmethod or type(attribute) is classmethod:
        attribute = attribute.__func__
    elif type(attribute) is property:
        attribute = attribute.fget
    return attribute if type(attribute) is types.FunctionType else None


# What a guard says of a number that is zero, and of an object's class.
_ZERO = re.compile(r"(L\['expert'\].*) == -?0\.0")
_TYPE = re.compile(r"___check_type_id\((.*), \d+\)")
# Classes that Python code can change.
_HEAP_TYPE = 1 << 9
_INNER = operator.attrgetter("__code__", "__defaults__")


def _reader(source: str) -> Callable[[Mapping[str, Any]], Any]:
    read: Callable[[Mapping[str, Any]], Any] = eval(f"lambda L: {source}", {})
    return read


def _evaluated(source: str, scope: dict[str, Any]) -> Any:
    """What a source stands for; ``None`` for one that only the tracer can read."""
    try:
        return eval(source, scope)
    except Exception:  # noqa: BLE001  # the tracer's expressions may use names of its own
        return None


def _entries(function: types.FunctionType) -> list[Any]:
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    return list(_debug_get_cache_entry_list(function.__code__))


@contextlib.contextmanager
def _without_kernels_by_rows() -> Iterator[None]:
    """Convolutions choose among kernels by the number of rows, which would be a guard."""
    # Not `torch.backends.mkldnn.flags`, which warns.
    mkldnn, nnpack = torch._C._get_mkldnn_enabled(), torch._C._get_nnpack_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_nnpack_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(mkldnn)
        torch._C._set_nnpack_enabled(nnpack)


@contextlib.contextmanager
def _without_fused_layers() -> Iterator[None]:
    """Without gradients PyTorch's transformer layers are one call each, of which nothing is known.

    Whether they may be so is no question that `_asked` lets guards ask.
    """
    were_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(were_fused)


def _asked(guards: Sequence[Any]) -> list[bool]:
    """Which of the tracer's guards are to be asked; not for hooks on saved tensors, which are set aside by then."""
    return [
        each.guard_type != "AUTOGRAD_SAVED_TENSORS_HOOKS" and not each.name.endswith("._is_fastpath_enabled")
        for each in guards
    ]


@contextlib.contextmanager
def _without_timing_guards() -> Iterator[None]:
    """The tracer times each new guard for its log, and empties the processor's caches before: a tenth of a capture."""
    import torch._dynamo.guards

    guards: Any = torch._dynamo.guards
    timing = guards.profile_guard_manager
    guards.profile_guard_manager = lambda *_: 0.0
    try:
        yield
    finally:
        guards.profile_guard_manager = timing


@contextlib.contextmanager
def quiet_tracer() -> Iterator[None]:
    """Strict settings, and no log lines for what the caller reports itself."""
    from torch._dynamo import config

    loggers = [logging.getLogger(name) for name in _NOISY]
    before = [each.disabled for each in loggers]
    for each in loggers:
        each.disabled = True
    try:
        with (
            config.patch(**_STRICT),
            warnings.catch_warnings(),
            _without_kernels_by_rows(),
            _without_timing_guards(),
            _without_fused_layers(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, was in zip(loggers, before, strict=True):
            each.disabled = was


def trace(
    function: types.FunctionType, arguments: tuple[Any, ...], keep: Callable[..., Any]
) -> tuple[Any, Guard] | None:
    """Trace one call as one graph.

    Args:
        function: Its graphs are kept by its code object.
        arguments: Of the call.
        keep: The backend.

    Returns:
        The call's result, and the guard of its graph; ``None`` where a graph that was kept before served the call.
    """
    known = [entry.guard_manager for entry in _entries(function)]
    silent = _Silent()
    with _passing_by(silent), _unmarked():
        result = torch.compile(function, backend=keep, fullgraph=True, options={"guard_filter_fn": _asked})(*arguments)
    new = [each for each in _entries(function) if not any(each.guard_manager is some for some in known)]
    if len(new) != 1:
        return None
    names = function.__code__.co_varnames[: len(arguments)]
    return result, Guard(new[0].guard_manager, dict(zip(names, arguments, strict=True)), silent)


def _passing_by(silent: _Silent) -> contextlib.AbstractContextManager[Any]:
    """Have the tracer leave calls of silent loggers out."""
    from torch._dynamo import config

    setting: dict[str, Any] = {"ignore_logging_functions": silent}
    return config.patch(**setting) if hasattr(config, *setting) else contextlib.nullcontext()


@contextlib.contextmanager
def _unmarked() -> Iterator[None]:
    """Take off tensors the mark that the tracer puts on parameters and buffers: they would be saved with it."""
    from torch._dynamo import decorators

    mark, name = decorators.mark_static_address, "_dynamo_static_input_type"
    marked: list[Any] = []

    def marking(tensor: Any, guard: bool = False) -> None:
        if name not in vars(tensor):
            marked.append(tensor)
        mark(tensor, guard=guard)

    decorators.mark_static_address = marking
    try:
        yield
    finally:
        decorators.mark_static_address = mark
        for each in marked:
            vars(each).pop(name, None)


def facts_of(node: fx.Node) -> tuple[Any, ...]:
    """What a program may depend on of an input; sizes that are symbols by the names that the tracer gives them."""
    # One that no trace made is like no other.
    facts: tuple[Any, ...] = node.meta.get("facts", (id(node),))
    return facts


def needs_gradient(node: fx.Node) -> bool:
    """Whether an input wanted gradients when it was traced."""
    return node.meta.get("facts", (False,))[-1] is True


def _facts_in(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return type(value), id(node) if value is None else str(value)
    sizes = (*map(str, value.shape), *map(str, value.stride()))
    return type(value), sizes, value.dtype, value.device, value.requires_grad


def forget_classes(traced: fx.GraphModule) -> None:
    """Let go of the modules' classes that a graph was traced through; PyTorch makes classes that hold a module.

    What `facts_of` tells is kept.
    """
    graphs = [each.graph for each in traced.modules() if isinstance(each, fx.GraphModule)]
    # Nodes that were erased are still in the table of names.
    for each in [each for graph in graphs for each in (*graph.nodes, *graph._graph_namespace._obj_to_name)]:
        if isinstance(each, fx.Node):
            facts = each.meta.get("facts") or _facts_in(each)
            each.meta.clear()
            each.meta["facts"] = facts


def forget_failed(error: BaseException) -> None:
    """Let go of what a failed trace holds: guards that were being made stay for as long as the classes they know."""
    from torch._dynamo.guards import CheckFunctionManager

    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is None:
            continue
        pending += [each.__cause__, each.__context__]
        trace = each.__traceback__
        while trace is not None:
            guards = trace.tb_frame.f_locals.get("self")
            if isinstance(guards, CheckFunctionManager):
                guards._weakrefs.clear()
                guards.output_graph = None
            trace = trace.tb_next


@contextlib.contextmanager
def without_new_hooks(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Remove what hooks are put on tensors inside: the tracer puts them there, and its graph does not tell.

    Yields:
        A list, which holds the tensors concerned at the end.
    """
    stores = ("_backward_hooks", "_post_accumulate_grad_hooks")
    before = [[set(getattr(each, store) or ()) for store in stores] for each in tensors]
    hooked: list[torch.Tensor] = []
    try:
        yield hooked
    finally:
        for tensor, known in zip(tensors, before, strict=True):
            for store, keys in zip(stores, known, strict=True):
                hooks = getattr(tensor, store) or {}
                for key in [key for key in hooks if key not in keys]:
                    del hooks[key]
                    hooked.append(tensor)


def sources(graph: fx.Graph) -> Mapping[fx.Node, str]:
    """For each input of a traced graph, the Python expression of the function's arguments that gives it."""
    return {node: node._dynamo_source.name for node in graph.nodes if node.op == "placeholder"}


class _Named(NamedTuple):
    name: str


def name_source(node: fx.Node, source: str) -> None:
    """Have `sources` tell this of an input that no trace made."""
    node._dynamo_source = _Named(source)


def mark_rows(tensor: torch.Tensor, others: tuple[int, ...]) -> None:
    """Have the tracer take the first axis for any length from 2 on, and the other axes likewise where it can."""
    from torch._dynamo import mark_dynamic, maybe_mark_dynamic

    mark_dynamic(tensor, 0, min=2, max=1 << 31)
    for axis in others:
        maybe_mark_dynamic(tensor, axis)


def weight_norm() -> Any:
    """What `torch.nn.utils.parametrizations.weight_norm` calls."""
    return torch._weight_norm


def operator_of(function: Any) -> Any:
    """The operator that graphs show for a custom operator; ``None`` for a plain function."""
    if isinstance(function, torch._ops.OpOverload):
        return function
    return getattr(function, "_opoverload", None)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks watch, or change, what a module or one of its parts takes or gives."""
    return any(getattr(each, name) for each in module.modules() for name in _HOOKS)


def has_global_hooks() -> bool:
    """Whether hooks watch all modules of the process."""
    return any(getattr(torch.nn.modules.module, f"_global{name}", None) for name in _HOOKS)


def graph_break(message: str) -> None:
    """End a capture from within: nothing happens outside of one."""
    torch._dynamo.graph_break(msg=message)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """As `unwatched`, and without the caller's function modes: the tracer would follow those, too."""
    modes = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    try:
        with unwatched():
            yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)


# Since PyTorch 2.7; before that hooks on saved tensors can't be told.
_top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Keep what runs inside from the caller's dispatch modes and from hooks on saved tensors.

    Checkpoints are made of both, and count what they are shown.
    """
    with contextlib.ExitStack() as stack:
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        hooks = _top_hooks(True) if _top_hooks is not None else None
        if hooks is None:
            yield
            return
        torch._C._autograd._pop_saved_tensors_default_hooks()
        try:
            with unwatched():
                yield
        finally:
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
