"""An expert as a graph: PyTorch's own tracer follows one call, and tells for which other calls the graph holds.

The user's code sees nothing of the engine but the batch, and reading the batch's ``state`` ends a capture. Calls that
the tracer can't follow, and calls with a side effect, are refused. Calls that depend on values or on the number of rows
are refused, too. The `Refusal` gives the tracer's reason and the line of the user's code.
"""

from __future__ import annotations

import numbers
import re
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from celmoe.based import base_tensors
from celmoe.experts import ExpertBatch, ExpertResult, is_aux
from celmoe.rows.context import ContextRows
from celmoe.torch_internals import (
    apart,
    forget_classes,
    forget_failed,
    graph_break,
    has_hooks,
    mark_rows,
    name_source,
    quiet_tracer,
    sources,
    trace,
    tracer_missing,
    without_new_hooks,
)

from .guard import Guard, SilentLoggers
from .inline import inline_checkpoints

__all__ = ["Captured", "Refusal", "Sample", "WrongResult", "capture", "path_of", "sample_of", "tracer_missing"]

_PACKAGE = Path(__file__).parents[1]
# One capture at a time: all threads of the process share the tracer's settings.
_LOCK = RLock()


class Refusal(NamedTuple):
    """The reason that an expert can't be captured, in words that follow "its experts"; see `WrongResult`."""

    reason: str


class WrongResult(str):
    """A reason after which the loop runs first: the loop's own error names the expert."""

    __slots__ = ()


class UnreadState(dict[str, str]):
    """Stands in for an expert's ``state``: a read ends the capture, because the answer differs by expert."""

    def _refuse(self, *_: object, **__: object) -> Any:
        graph_break("read 'batch.state'")

    __getitem__ = __iter__ = __len__ = __contains__ = __eq__ = __ne__ = __repr__ = __or__ = __ror__ = _refuse
    __setitem__ = __delitem__ = __reversed__ = __ior__ = __bool__ = __str__ = _refuse
    get = items = keys = values = copy = pop = popitem = setdefault = update = clear = _refuse
    __hash__ = None  # like every dict


class Sample(NamedTuple):
    """The input that an expert gets during a capture, and that guards are evaluated on.

    Attributes:
        hidden: The hidden states, ``[N, ...]``.
        mask: The mask, ``[N, ...]``, or ``None``.
        context: The context around its batch-aligned tensors' N rows.
        aligned: The batch-aligned tensors, ``[N, ...]`` each.
        shared: The context's other tensors, by id.
    """

    hidden: torch.Tensor
    mask: torch.Tensor | None
    context: Any
    aligned: Sequence[torch.Tensor] = ()
    shared: Mapping[int, torch.Tensor] = types.MappingProxyType({})

    def row_ids(self) -> set[int]:
        """The ids of the tensors that are batch-aligned."""
        return {id(each) for each in (self.hidden, self.mask, *self.aligned) if each is not None}

    def arguments(self, expert: nn.Module | None = None) -> dict[str, Any]:
        """The captured function's arguments, by name."""
        return {
            "expert": expert,
            "hidden": self.hidden,
            "mask": self.mask,
            "context": self.context,
        }


def _call(expert: nn.Module, hidden: torch.Tensor, mask: torch.Tensor | None, context: Any) -> Any:
    return expert(ExpertBatch(hidden, context, mask, UnreadState()))


@dataclass(frozen=True, eq=False)
class Captured:
    """One expert's forward pass as a graph.

    Attributes:
        kind: A weak reference to the expert's Python class.
        graph: The graph, in PyTorch-level calls. Its outputs are tensors, the result's hidden first.
        module: Runs the graph for one expert, with the graph's inputs in order.
        guard: Tells for which arguments the graph holds.
        own: Reads an expert's own tensors among the graph's inputs, in order.
        bases: Reads an expert's bases' tensors among the graph's inputs, in order.
        inputs: For each of the graph's inputs its kind: ``"own"``, ``"rows"``, ``"count"`` (the number of rows),
            ``"size"``, ``"shared"`` or ``"base"``; and a function that reads the input from the call's arguments.
        outputs: For each of the result's tensors an output's position, or an input's if an input is given back.
        losses: Names of the losses, in the order of ``outputs`` behind the hidden states.
        names: The paths of the own tensors.
    """

    kind: weakref.ref[type]
    graph: fx.Graph
    module: fx.GraphModule
    guard: Guard
    own: Callable[[nn.Module], list[torch.Tensor]]
    bases: Callable[[nn.Module], list[torch.Tensor]]
    inputs: tuple[tuple[str, Callable[[Mapping[str, Any]], Any]], ...]
    outputs: tuple[tuple[str, int], ...]
    losses: tuple[str, ...]
    names: tuple[str, ...]

    @cached_property
    def has_bases(self) -> bool:
        """True if the graph reads tensors of bases."""
        return any(kind == "base" for kind, _ in self.inputs)

    def fits(self, sample: Sample) -> bool:
        """True if the same inputs are batch-aligned; the guard must hold for the arguments."""
        arguments, rows = sample.arguments(), sample.row_ids()
        return all((id(read(arguments)) in rows) == (kind == "rows") for kind, read in self.inputs if kind in _GIVEN)


_GIVEN = ("rows", "shared")
# A function for each class of experts: the tracer keeps the class's graphs by the function's code object. Look-ups for
# one class don't pass the graphs of others, and function and graphs go with the class.
_FUNCTIONS: weakref.WeakKeyDictionary[type, types.FunctionType] = weakref.WeakKeyDictionary()


def _function_for(kind: type) -> types.FunctionType:
    if kind not in _FUNCTIONS:
        code = _call.__code__
        # A copy of the globals, because the tracer adds the user's modules to a function's globals.
        _FUNCTIONS[kind] = types.FunctionType(code.replace(co_name=code.co_name), dict(_call.__globals__))
    return _FUNCTIONS[kind]


def sample_of(hidden: torch.Tensor, mask: torch.Tensor | None, context: ContextRows) -> Sample:
    """A few rows of zeros, of the kind that a level is given.

    Args:
        hidden: The hidden states, ``[B, ...]``.
        mask: The mask, ``[B, ...]``, or ``None``.
        context: The batch's context.
    """
    tensors = [hidden, *([] if mask is None else [mask]), *context.aligned]
    taken = {size for tensor in tensors for size in tensor.shape[1:]}
    # No other axis has this length: the tracer would take two axes of one length for the same.
    rows = next(number for number in range(5, 1 << 20) if number not in taken)
    few = [_few(place, tensor, rows) for place, tensor in enumerate(tensors)]
    mask_rows = None if mask is None else few[1]
    aligned = few[1 + (mask is not None) :]
    return Sample(few[0], mask_rows, context.build(aligned), aligned, context.shared)


def _few(place: int, tensor: torch.Tensor, rows: int) -> torch.Tensor:
    requires_grad = tensor.requires_grad and torch.is_grad_enabled()
    return _made_few(place, (rows, *tensor.shape[1:]), tensor.dtype, tensor.device, requires_grad)


@lru_cache(maxsize=64)
def _made_few(
    _place: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, requires_grad: bool
) -> torch.Tensor:
    # One tensor for each place: guards tell a tensor that is given twice from two equal ones.
    with torch.inference_mode(False), torch.set_grad_enabled(requires_grad):
        made = torch.zeros(shape, dtype=dtype, device=device)
        # Rows must not be leaves, because experts may write into rows.
        made = made.requires_grad_(requires_grad).clone()
    mark_rows(made, tuple(range(1, made.dim() - 1)))
    return made


def is_being_traced() -> bool:
    """True if the caller is traced. A capture in another thread does not count, and is waited for."""
    if torch.compiler.is_dynamo_compiling():
        return True
    if not torch.compiler.is_compiling():
        return False
    with _LOCK:
        return torch.compiler.is_compiling()


def capture(expert: nn.Module, sample: Sample) -> Captured | Refusal:
    """Capture one call of an expert, which has no lasting effect."""
    kept: list[tuple[fx.GraphModule, list[Any], list[torch.Tensor]]] = []
    seen: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(module)

        def run(*inputs: Any) -> list[torch.Tensor]:
            marks = [torch.empty(0) for _ in next(reversed(module.graph.nodes)).args[0]]
            kept.append((module, list(inputs), marks))
            return marks

        return run

    arguments, silent = sample.arguments(expert), SilentLoggers()
    if has_hooks(expert):
        return Refusal("have hooks")
    rows = [each for each in (sample.hidden, sample.mask, *sample.aligned) if each is not None]
    tensors = [*rows, *sample.shared.values(), *expert.parameters(), *expert.buffers(), *base_tensors(expert)]
    try:
        with (
            _LOCK,
            apart(),
            quiet_tracer(),
            torch.random.fork_rng(devices=[]),
            without_new_hooks(tensors) as hooked,
        ):
            traced = trace(_function_for(type(expert)), tuple(arguments.values()), keep, silent)
            if traced is None:
                # The tracer ran an old graph, which is unknown here or fits other batch-aligned tensors.
                kept.clear()
                del _FUNCTIONS[type(expert)]
                traced = trace(_function_for(type(expert)), tuple(arguments.values()), keep, silent)
        # A call without any operation has no graph.
        module, inputs, marks = kept[0] if kept else (_identity(), [sample.hidden], [])
    except Exception as error:  # noqa: BLE001  # the tracer's own reason, whatever its kind
        forget_failed(error)
        return Refusal(_reason(error))
    finally:
        # The tracer's own cache keeps `keep`, and with `keep` the lists' contents.
        kept.clear()
        for each in seen:
            forget_classes(each)
        seen.clear()
    if hooked:
        return Refusal("put hooks on tensors")
    if traced is None:
        return Refusal("can't be followed by PyTorch's tracer (it kept no graph)")
    result, manager, aliases = traced
    guard = Guard(manager, aliases, arguments, silent, set(sources(module.graph).values()))
    if guard.foreign is not None:
        return Refusal(guard.foreign)
    return _described(expert, sample, guard, module, inputs, marks, result)


def _identity() -> fx.GraphModule:
    """The graph of an expert that returns its rows unchanged."""
    graph = fx.Graph()
    name_source(graph.placeholder("hidden"), "L['hidden']")
    graph.output(())
    return fx.GraphModule(nn.Module(), graph)


def _described(
    expert: nn.Module,
    sample: Sample,
    guard: Guard,
    module: fx.GraphModule,
    inputs: Sequence[Any],
    marks: Sequence[torch.Tensor],
    result: Any,
) -> Captured | Refusal:
    if (fault := _fault(result)) is not None:
        return Refusal(fault)
    inline_checkpoints(module)
    own_ids = {id(each) for each in (*expert.parameters(), *expert.buffers())}
    for value in result.losses.values():
        if id(value) in own_ids and not any(value is each for each in inputs):
            # The expert returns its own tensor unchanged, and the tracer made no input for this tensor.
            _add_input(module, _source_of(expert, value))
            inputs = [*inputs, value]
    rows = sample.row_ids()
    described: list[tuple[str, Callable[[Mapping[str, Any]], Any]]] = []
    base_ids = {id(each) for each in base_tensors(expert) if not each.requires_grad}
    own: list[str] = []
    bases: list[str] = []
    for (_, source), value in zip(sources(module.graph).items(), inputs, strict=True):
        read = _reader(source, guard.scope)
        if not isinstance(value, torch.Tensor):
            is_count = re.fullmatch(r".*\.size\(\)\[0\]", source) and value == len(sample.hidden)
            described.append(("count" if is_count else "size", read))
        elif id(value) in own_ids:
            own.append(source)
            described.append(("own", read))
        elif id(value) in rows:
            described.append(("rows", read))
        elif id(value) in sample.shared or (source.startswith("G[") and "L[" not in source):
            # A tensor of the context, or of a Python module, is the same for all experts.
            described.append(("shared", read))
        elif id(value) in base_ids:
            bases.append(source)
            described.append(("base", read))
        else:
            return Refusal(f"read a tensor that is not their own ({path_of(source)})")
    outputs = []
    for name, value in [("hidden", result.hidden), *result.losses.items()]:
        found = _place(value, marks, inputs)
        if found is None:
            return Refusal(f"returned {name!r}, which depends on neither rows nor parameters")
        outputs.append(found)
    return Captured(
        weakref.ref(type(expert)),
        module.graph,
        module,
        guard,
        _gatherer(own),
        _gatherer(bases),
        tuple(described),
        tuple(outputs),
        tuple(result.losses),
        tuple(map(path_of, own)),
    )


def _source_of(expert: nn.Module, tensor: torch.Tensor) -> str:
    """The tracer's expression for one of an expert's own tensors."""
    for path, module in expert.named_modules():
        for store in ("_parameters", "_buffers"):
            for name, each in getattr(module, store).items():
                if each is tensor:
                    parts = "".join(f"._modules[{part!r}]" for part in path.split(".") if part)
                    return f"L['expert']{parts}.{store}[{name!r}]"
    raise LookupError(tensor.shape)


def _add_input(module: fx.GraphModule, source: str) -> None:
    """Give a graph one more input, behind the existing ones."""
    graph = module.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    with graph.inserting_after(last[0]) if last else graph.inserting_before(next(iter(graph.nodes))):
        name_source(graph.placeholder(f"given_{len(graph.nodes)}"), source)
    module.recompile()


def _fault(result: Any) -> str | None:
    """The reason that a result can't be given for all members at once, or ``None``."""
    if not isinstance(result, ExpertResult):
        return WrongResult(f"returned a {type(result).__name__}")
    if not isinstance(result.hidden, torch.Tensor):
        return WrongResult(f"returned rows that are no tensor but a {type(result.hidden).__name__}")
    if not isinstance(result.losses, Mapping):
        return WrongResult("returned losses that are no mapping")
    if not all(isinstance(loss, torch.Tensor | numbers.Real) for loss in result.losses.values()):
        return WrongResult("returned losses that are no tensors")
    if not is_aux(result.aux):
        return WrongResult("returned aux that is no mapping")
    if type(result) is not ExpertResult:
        return f"returned a {type(result).__name__}"
    if type(result.losses) is not dict:
        return "returned losses that are no dict"
    return "returned aux" if result.aux else None


def _place(value: Any, marks: Sequence[torch.Tensor], inputs: Sequence[Any]) -> tuple[str, int] | None:
    for kind, values in (("output", marks), ("input", inputs)):
        for place, each in enumerate(values):
            if value is each:
                return kind, place
    return None


def _reader(source: str, scope: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """A function that reads a source, an expression of the tracer's, from the arguments or from a scope."""
    read: Callable[[Mapping[str, Any]], Any] = eval(f"lambda L: {source}", {"G": scope})
    return read


def _gatherer(own: Sequence[str]) -> Callable[[nn.Module], list[torch.Tensor]]:
    items = ", ".join(source.replace("L['expert']", "expert", 1) for source in own)
    gather: Callable[[nn.Module], list[torch.Tensor]] = eval(f"lambda expert: [{items}]", {})
    return gather


def path_of(source: str) -> str:
    """A source as the user writes it."""
    plain = source.removeprefix("L['expert']").removeprefix("L")
    plain = re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", plain)
    plain = re.sub(r"G\['(?:__import_)?([^']*)'\]", lambda match: match[1].replace("_dot_", "."), plain)
    return plain.removeprefix(".")


def _reason(error: BaseException) -> str:
    """The tracer's reason in one sentence, with the user's line."""
    said = _said(error)
    # Errors of these types or words are the expert's own, met by the tracer.
    return (
        WrongResult(said)
        if type(error).__name__ in ("TorchRuntimeError", "ObservedException") or "bserved exception" in said
        else said
    )


def _said(error: BaseException) -> str:
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    detail = next((line for line in lines if line.startswith("Explanation:")), "").removeprefix("Explanation: ")
    context = next((line for line in lines if line.startswith("Developer debug context:")), "")
    context = context.removeprefix("Developer debug context:").strip()
    if "Constraints violated" in text:
        guard = re.search(r"satisfy the generated guard (.*)$", text, re.MULTILINE)
        return f"read the number of their rows{f' ({guard[1]})' if guard else ''}{_where(error)}"
    if "side effects" in text:
        found = re.findall(r"\"(L\[.*?)\"", first)
        return f"wrote into what outlives the call ({', '.join(map(path_of, found)) or first}){_where(error)}"
    if (own := re.match(r"User-inserted graph break\. Message: (read .*)", detail)) is not None:
        return f"{own[1]}{_where(error)}"
    said = f"{first}. {detail}" if detail else first
    return f"can't be followed by PyTorch's tracer ({said}{f': {context}' if context else ''}){_where(error)}"


def _where(error: BaseException) -> str:
    stack = getattr(error, "real_stack", None) or []
    frames = [frame for frame in stack if not Path(frame.filename).is_relative_to(_PACKAGE)]
    if not frames:
        return ""
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}"
