"""The only file that may name an underscored PyTorch API. One function for each need, with the reason beside it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
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
    if not hasattr(torch, "_dynamo") and not _imports_tracer():
        return "PyTorch has no tracer here"
    from torch._dynamo import config

    missing = [name for name in _STRICT if not hasattr(config, name)]
    if missing:
        return f"the tracer of PyTorch {torch.__version__} has no setting {missing[0]!r}"
    if config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "PyTorch's tracer is switched off (TORCHDYNAMO_DISABLE)"
    return None


def _imports_tracer() -> bool:
    try:
        import torch._dynamo  # noqa: F401
    except ImportError:
        return False
    return True


class Guard:
    """Tells for which arguments of a captured function its graph holds.

    The tracer's own guards compare numbers by their values, to which zeros of either sign are equal. They know objects
    by their classes, whose methods may be replaced. Both are looked at here.

    Args:
        function: The function.
        manager: The tracer's own guard manager.
        arguments: What the graph was traced with, by parameter name.
    """

    def __init__(self, function: types.FunctionType, manager: Any, arguments: Mapping[str, Any]) -> None:
        self._function = function
        self._manager = manager
        scope = {"L": arguments, "G": manager.global_scope}
        parts = [part for part in manager.code_parts if isinstance(part, str)]
        zeros = [match[1] for part in parts if (match := _ZERO.fullmatch(part))]
        self._zeros = [(read, math.copysign(1.0, read(arguments))) for read in map(_reader, zeros)]
        found = [_evaluated(match[1], scope) for part in parts if (match := _TYPE.match(part))]
        classes = dict.fromkeys(base for each in found for base in type(each).__mro__ if base.__flags__ & _HEAP_TYPE)
        self._code = [(each, len(vars(each)), _methods(each)) for each in classes]

    def holds(self, arguments: dict[str, Any]) -> bool:
        """Whether the graph holds for arguments, by parameter name."""
        return self._manager.check(arguments) and all(
            math.copysign(1.0, read(arguments)) == sign for read, sign in self._zeros
        )

    def is_alive(self) -> bool:
        """Whether the graph is still to be asked for.

        The tracer lets go of one whose guards compare an object that is gone. So does this of one that was traced
        through code which has been replaced.
        """
        return any(entry.guard_manager is self._manager for entry in _entries(self._function)) and all(
            len(vars(each)) == number and _methods(each) == methods for each, number, methods in self._code
        )


# What a guard says of a number that is zero, and of an object's class.
_ZERO = re.compile(r"(L\['expert'\].*) == -?0\.0")
_TYPE = re.compile(r"___check_type_id\((.*), \d+\)")
# Classes that Python code can change.
_HEAP_TYPE = 1 << 9


def _reader(source: str) -> Callable[[Mapping[str, Any]], Any]:
    read: Callable[[Mapping[str, Any]], Any] = eval(f"lambda L: {source}", {})
    return read


def _evaluated(source: str, scope: dict[str, Any]) -> Any:
    """What a source stands for; ``None`` for one that only the tracer can read."""
    try:
        return eval(source, scope)
    except Exception:  # noqa: BLE001  # the tracer's expressions may use names of its own
        return None


def _methods(kind: type) -> list[Any]:
    """The functions of a class, and their code."""
    functions = [each for each in vars(kind).values() if type(each) is types.FunctionType]
    return [*functions, *(each.__code__ for each in functions), *(each.__defaults__ for each in functions)]


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
    result = torch.compile(function, backend=keep, fullgraph=True)(*arguments)
    new = [each for each in _entries(function) if not any(each.guard_manager is some for some in known)]
    if len(new) != 1:
        return None
    names = function.__code__.co_varnames[: len(arguments)]
    return result, Guard(function, new[0].guard_manager, dict(zip(names, arguments, strict=True)))


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
