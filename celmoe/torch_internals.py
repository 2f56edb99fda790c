"""The only file that may name an underscored PyTorch API. Each need has one function, with the reason beside it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

# The tracer's settings for one capture. Experts that hold different numbers are different classes, so no number may
# become an input. All classes share code objects, so the tracer's limits on graphs by code object are lifted.
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
    """The reason why this PyTorch can't capture experts, or ``None``."""
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


def _entries(function: types.FunctionType) -> list[Any]:
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    return list(_debug_get_cache_entry_list(function.__code__))


@contextlib.contextmanager
def _without_kernels_by_rows() -> Iterator[None]:
    """Keep convolutions from choosing kernels by the number of rows, which would be a guard."""
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
    """Keep PyTorch's transformer layers from being one opaque call each, as they are without gradients.

    `_asked` drops the guards on this setting.
    """
    were_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(were_fused)


def _asked(guards: Sequence[Any]) -> list[bool]:
    """True for each guard that the tracer keeps; hooks on saved tensors are set aside before guards run."""
    return [
        each.guard_type != "AUTOGRAD_SAVED_TENSORS_HOOKS" and not each.name.endswith("._is_fastpath_enabled")
        for each in guards
    ]


@contextlib.contextmanager
def _without_timing_guards() -> Iterator[None]:
    """Keep the tracer from timing each new guard, for which it empties the processor's caches: a tenth of a capture."""
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
    """Apply the strict settings, and silence log lines on faults that the caller reports itself."""
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
    function: types.FunctionType, arguments: tuple[Any, ...], keep: Callable[..., Any], silent: AbstractSet[Any]
) -> tuple[Any, Any, list[str]] | None:
    """Trace one call as one graph.

    Args:
        function: The function; its graphs are kept by its code object.
        arguments: The call's arguments.
        keep: The backend.
        silent: Functions whose calls the tracer leaves out.

    Returns:
        The call's result, the manager of its graph's guards, and the sources of objects that have another source, too,
        without a guard; ``None`` if an earlier graph served the call.
    """
    known = [entry.guard_manager for entry in _entries(function)]
    with _passing_by(silent), _unmarked(), _not_exporting(), _unguarded_aliases() as aliases:
        result = torch.compile(function, backend=keep, fullgraph=True, options={"guard_filter_fn": _asked})(*arguments)
    new = [each for each in _entries(function) if not any(each.guard_manager is some for some in known)]
    if len(new) != 1:
        return None
    return result, new[0].guard_manager, aliases


def _passing_by(silent: AbstractSet[Any]) -> contextlib.AbstractContextManager[Any]:
    """Have the tracer leave calls of some functions out."""
    from torch._dynamo import config

    setting: dict[str, Any] = {"ignore_logging_functions": silent}
    return config.patch(**setting) if hasattr(config, *setting) else contextlib.nullcontext()


@contextlib.contextmanager
def _not_exporting() -> Iterator[None]:
    """Let `torch.compile` compile during an export, which otherwise ignores it."""
    was_exporting = torch.compiler._is_exporting_flag
    torch.compiler._is_exporting_flag = False
    try:
        yield
    finally:
        torch.compiler._is_exporting_flag = was_exporting


@contextlib.contextmanager
def _unguarded_aliases() -> Iterator[list[str]]:
    """Note the sources that the tracer drops, because it met their objects before.

    It has no guard for that where one source is global and the other is not.
    """
    from torch._dynamo.variables import builder as module

    # It does not export what it imports.
    builder: Any = module
    right, found = builder.make_dupe_guard, list[str]()

    def make(source: Any, known: Any) -> Any:
        guard = right(source, known)
        if guard is None and known is not None and known != source:
            found.append(source.name)
        return guard

    builder.make_dupe_guard = make
    try:
        yield found
    finally:
        builder.make_dupe_guard = right


@contextlib.contextmanager
def _unmarked() -> Iterator[None]:
    """Remove the mark that the tracer puts on parameters and buffers: the tensors would be saved with the mark."""
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


#: True if a tracer can take a level into its graph; before, the tracer follows a loop over the experts.
TRACES_LEVELS: bool = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"
#: Options of operators that read tensors on the host, which no recorded CUDA graph does.
ON_THE_HOST: dict[str, Any] = {"tags": [torch.Tag.cudagraph_unsafe]} if TRACES_LEVELS else {}


def unfollowed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that the tracer calls with symbolic tensors, and takes for one call; compilers follow it later."""
    from torch._dynamo import nonstrict_trace

    return nonstrict_trace(function)


def follows(module: nn.Module) -> bool:
    """True if the tracer follows a module by its present settings, as far as the module's classes tell."""
    from torch._dynamo import config

    return config.allow_rnn or not any(isinstance(each, nn.RNNBase) for each in module.modules())


def is_functional(tensor: torch.Tensor) -> bool:
    """True for a tensor of a compiler's pass behind the tracer."""
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(tensor, FunctionalTensor)


def is_symbolic_tensor(tensor: torch.Tensor) -> bool:
    """True for a tensor without values, of a tracer or compiler."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or is_functional(tensor)


def is_traced(tensor: torch.Tensor) -> bool:
    """True if a tracer follows the call that holds the tensor, and not another thread's."""
    return torch.compiler.is_dynamo_compiling() or (torch.compiler.is_exporting() and is_symbolic_tensor(tensor))


def example_of(size: Any) -> int:
    """A size as a number; of a symbolic one, the number of the call that is traced."""
    return size if isinstance(size, int) else int(size.node.hint or 2)


def facts_of(node: fx.Node) -> tuple[Any, ...]:
    """The facts of an input that a program may depend on; symbolic sizes have the tracer's names."""
    # An input that no trace made equals no other.
    facts: tuple[Any, ...] = node.meta.get("facts", (id(node),))
    return facts


def needs_gradient(node: fx.Node) -> bool:
    """True if an input required gradients at tracing."""
    return node.meta.get("facts", (False,))[-1] is True


def _facts_in(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor):
        return type(value), id(node) if value is None else str(value)
    sizes = (*map(str, value.shape), *map(str, value.stride()))
    return type(value), sizes, value.dtype, value.device, value.requires_grad


def forget_classes(traced: fx.GraphModule) -> None:
    """Drop a traced graph's references to its modules' classes; PyTorch makes classes that hold a module.

    The facts of `facts_of` are kept.
    """
    graphs = [each.graph for each in traced.modules() if isinstance(each, fx.GraphModule)]
    # Erased nodes are still in the table of names.
    for each in [each for graph in graphs for each in (*graph.nodes, *graph._graph_namespace._obj_to_name)]:
        if isinstance(each, fx.Node):
            facts = each.meta.get("facts") or _facts_in(each)
            each.meta.clear()
            each.meta["facts"] = facts


def forget_failed(error: BaseException) -> None:
    """Drop a failed trace's references: unfinished guards live as long as the classes that they know."""
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
    """Remove the hooks that the block puts on tensors: the tracer adds such hooks, and its graph does not show them.

    Yields:
        A list, which holds the tensors with removed hooks at the end.
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
    """The Python expression, in the function's arguments, of each input of a traced graph."""
    return {node: node._dynamo_source.name for node in graph.nodes if node.op == "placeholder"}


class _Named(NamedTuple):
    name: str


def name_source(node: fx.Node, source: str) -> None:
    """Have `sources` give this expression for an input that no trace made."""
    node._dynamo_source = _Named(source)


def mark_rows(tensor: torch.Tensor, others: tuple[int, ...]) -> None:
    """Have the tracer take the first axis for any length from 2 on, and the ``others`` too if it can."""
    from torch._dynamo import mark_dynamic, maybe_mark_dynamic

    mark_dynamic(tensor, 0, min=2, max=1 << 31)
    for axis in others:
        maybe_mark_dynamic(tensor, axis)


def weight_norm() -> Any:
    """The function that `torch.nn.utils.parametrizations.weight_norm` calls."""
    return torch._weight_norm


def operator_of(function: Any) -> Any:
    """The operator that graphs show for a custom operator; ``None`` for a plain function."""
    if isinstance(function, torch._ops.OpOverload):
        return function
    return getattr(function, "_opoverload", None)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """True if hooks watch or change the inputs or outputs of a module or one of its parts."""
    return any(getattr(each, name) for each in module.modules() for name in _HOOKS)


def has_global_hooks() -> bool:
    """True if hooks watch all modules of the process."""
    return any(getattr(torch.nn.modules.module, f"_global{name}", None) for name in _HOOKS)


def graph_break(message: str) -> None:
    """End a capture from within; outside of a capture, nothing happens."""
    torch._dynamo.graph_break(msg=message)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Like `unwatched`, and without the caller's function modes, which the tracer would follow, too."""
    modes = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    try:
        with unwatched():
            yield
    finally:
        for mode in reversed(modes):
            torch._C._push_on_torch_function_stack(mode)


# Since PyTorch 2.7; earlier versions don't show hooks on saved tensors.
_top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Hide the block from the caller's dispatch modes and from hooks on saved tensors.

    Checkpoints use both, and count all that they see.
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


@contextlib.contextmanager
def above_operators() -> Iterator[None]:
    """Within an operator, let operators record gradients and cast as where the operator was called."""
    keys = torch._C.DispatchKey
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included.add(keys.ADInplaceOrView), excluded):
        yield


# Tell if a transform of `torch.func` is active, and if a tensor is a batch of gradients (``is_grads_batched``).
transforms_are_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
is_batch_of_gradients: Callable[[torch.Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def is_forward_differentiated() -> bool:
    """True inside a level of forward-mode differentiation."""
    return forward_ad._current_level >= 0


def is_jit_traced() -> bool:
    """True if `torch.jit.trace` records."""
    return torch._C._get_tracing_state() is not None


def is_symbolic() -> bool:
    """True if a mode records operations, or runs them without values."""
    mode, key = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
    return mode(key.PROXY) is not None or mode(key.FAKE) is not None


def after_backward(callback: Callable[[], None]) -> None:
    """Call ``callback`` when the running backward pass is over."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def norms_as_clipped(values: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The norms of tensors from the kernel of `torch.nn.utils.clip_grad_norm_`, equal to the bit."""
    return torch._foreach_norm(values)


# A nested container's leaves, and the container made from leaves again.
tree_flatten: Callable[[Any], tuple[list[Any], Any]] = pytree.tree_flatten
tree_unflatten: Callable[[Any, Any], Any] = pytree.tree_unflatten
tree_map: Callable[[Callable[[Any], Any], Any], Any] = pytree.tree_map


def register_container(
    kind: type[Any],
    flatten: Callable[[Any], tuple[list[Any], Any]],
    unflatten: Callable[[Any, Any], Any],
    to_text: Callable[[Any], Any],
    from_text: Callable[[Any], Any],
) -> None:
    """Have PyTorch look into objects of a class for tensors, and save what else they are in exported programs.

    Args:
        kind: The class.
        flatten: Gives an object's parts, and the rest, which is compared.
        unflatten: Makes an object of parts and rest.
        to_text: Gives the rest as JSON takes it.
        from_text: Gives the rest again.
    """

    def with_keys(container: Any) -> tuple[list[tuple[Any, Any]], Any]:
        parts, rest = flatten(container)
        return [(pytree.SequenceKey(place), part) for place, part in enumerate(parts)], rest

    pytree.register_pytree_node(
        kind,
        flatten,
        unflatten,
        serialized_type_name=f"celmoe.{kind.__name__}",
        to_dumpable_context=to_text,
        from_dumpable_context=from_text,
        flatten_with_keys_fn=with_keys,
    )


# The namespaces of PyTorch's functions for experts: public ones, and two that public modules call.
NAMESPACES: tuple[Any, ...] = (torch, torch.Tensor, F, torch._C._nn, torch.special, torch._VF, torch.linalg)
VARIABLE_FUNCTIONS: Any = torch._VF

# Calls of a graph that change how later calls run.
set_grad_mode: Any = torch._C._set_grad_enabled
enter_autocast: Any = torch.amp.autocast_mode._enter_autocast
exit_autocast: Any = torch.amp.autocast_mode._exit_autocast


class PlainTensor(torch.Tensor):
    """A class of tensors of which every operation gives ordinary ones, like `torch.nn.Parameter`."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch does it


# Beside its parameters, a recurrent layer keeps a list of the weights that it computes with, and references to them.
RECURRENT_WEIGHTS = "_flat_weights"
_REFERENCES = "_flat_weight_refs"
RECURRENT = (RECURRENT_WEIGHTS, _REFERENCES)


def version_of(tensor: torch.Tensor) -> int:
    """The number of writes into a tensor's memory, by any view that shares the count."""
    return tensor._version


def is_hooked(tensor: torch.Tensor) -> bool:
    """True if someone registered a hook on the tensor's gradient."""
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def recurrent_weights(module: nn.RNNBase) -> list[Any]:
    """The weights that a recurrent layer computes with, in order."""
    return [getattr(module, name, None) for name in module._flat_weights_names]


def fill_recurrent(module: nn.Module) -> None:
    """Bring a recurrent layer's list of weights up to date; nothing for other modules."""
    if isinstance(module, nn.RNNBase):
        weights = module.__dict__[RECURRENT_WEIGHTS] = recurrent_weights(module)
        module.__dict__[_REFERENCES] = [None if each is None else weakref.ref(each) for each in weights]


def empty_recurrent(module: nn.Module) -> None:
    """Let a recurrent layer hold no weights, and look for no changes of them; nothing for other modules."""
    if isinstance(module, nn.RNNBase):
        del module.__dict__[RECURRENT_WEIGHTS]
        module.__dict__[_REFERENCES] = [None for _ in module._flat_weights_names]


def without_amp_scaling(optimizer: torch.optim.Optimizer) -> None:
    """Let `GradScaler` unscale gradients itself, and skip steps on the host, where the optimizer counts them."""
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # set by torch's own


def current_backward() -> int:
    """The number of the backward pass that runs in this thread."""
    return torch._C._current_graph_task_id()


def active_ddp() -> torch.nn.parallel.DistributedDataParallel | None:
    """The `DistributedDataParallel` whose forward pass runs."""
    return torch.nn.parallel.DistributedDataParallel._active_ddp_module


def is_joining(ddp: torch.nn.parallel.DistributedDataParallel) -> bool:
    """True within ``ddp.join()``, where ranks may end before others."""
    return bool(ddp._join_config.enable)


def node_number() -> int:
    """The number that autograd gives the node made here; numbers of one thread ascend."""
    with torch.inference_mode(False), torch.enable_grad():
        node: Any = torch.zeros((), requires_grad=True).view(()).grad_fn
        number: int = node._sequence_nr()
        return number


def number_in_backward() -> int | None:
    """The number of the node whose backward this thread runs now; ``None`` outside of backward passes."""
    node: Any = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def is_compiled(module: nn.Module) -> bool:
    """True for a module whose calls run compiled code."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
