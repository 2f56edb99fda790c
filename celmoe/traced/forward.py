"""The model's forward pass while a tracer follows it.

The tracer follows these functions but for those that are marked `unfollowed`. What it follows must not depend on the
routing, nor take a time that grows with the number of experts.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import nn

from celmoe.config import FLAGS
from celmoe.engines.choice import LOOPED
from celmoe.errors import GraphError, listed
from celmoe.grouped.values import CannotGroupError
from celmoe.level import Level, LevelInput
from celmoe.names import NamedModules
from celmoe.outputs import CELMoEOutput, LevelOutput
from celmoe.routing.plan import LevelPlan, RoutingPlan
from celmoe.rows.context import ContextRows
from celmoe.stacked.stack import Stack
from celmoe.torch_internals import apart, follows, is_functional, is_symbolic_tensor, tree_map, unfollowed

from .decision import APART, INSIDE, Way, way_of
from .inside import run_inside
from .opaque import run_level, run_opaque
from .registered import MODELS


def forward_traced(
    model: Any, hidden: torch.Tensor, routing: Any, context: Any, mask: torch.Tensor | None
) -> CELMoEOutput:
    """The forward pass of a batch with samples; the arguments as `HierarchicalCELMoE.forward` takes them.

    Raises:
        GraphError: Experts or routing can't be part of an exported graph.
        CELMoEError: As for an eager call.
    """
    if not isinstance(routing, RoutingPlan):
        if torch.compiler.is_exporting():
            raise GraphError(
                f"'routing' must be a RoutingPlan in an exported model (got {type(routing).__name__}; pass "
                f"model.compile_routing(routing), and a plan to the exported program, too)"
            )
        routing = _planned(model, routing, hidden.shape[0])
    plan: RoutingPlan = model._compiler.compile(routing, hidden.shape[0], told_by="'hidden'")
    if plan.is_mixed:
        # A graph knows one row a sample.
        if torch.compiler.is_exporting():
            raise GraphError(
                "'routing' must give each sample one expert a level in an exported model (got a plan with several, or "
                "none)"
            )
        mixed: CELMoEOutput = _mixed(model, hidden, routing, context, mask)
        return mixed
    if plan.device != hidden.device:
        plan = plan.to(hidden.device, non_blocking=hidden.device.type != "cpu")
    packed = _packed(context, mask)
    ways = _ways(model, hidden, packed)
    if ways is None:
        output: CELMoEOutput = _apart(model, hidden, routing, context, mask)
        return output
    outputs: dict[str, LevelOutput] = {}
    losses: dict[str, torch.Tensor] = {}
    loss_weights: dict[str, float] = {}
    loss_shares: dict[str, float] = {}
    for index, (level, indices) in enumerate(zip(model._levels, plan.indices, strict=True)):
        if not ways[index]:
            rows = _ContextOfAll(context, hidden.shape[0])
            order, inverse, ids = indices
            counts = (hidden.shape[0],)
            only = LevelPlan(level.name, level.experts, counts, True, False, order, inverse, ids, order)
            expert = model.level_modules[level.name][level.experts[0]]
            level_output, _ = level.run([expert], LOOPED, LevelInput(hidden, None, rows, mask), only, plan)
            hidden = level_output.hidden
            losses.update(level_output.losses)
            loss_weights.update(level_output.loss_weights)
            loss_shares.update(level_output.loss_shares)
        else:
            tensors = _tensors_of(model, level)
            marks = [stack.mark for stack in model._stacks.get(level.name, ())]
            marks += [FLAGS.mark]
            seen = _seen(model, level)
            given = [hidden, level.anchor, *indices]
            hidden = _level_run(model._key, index, ways[index], given, packed, tensors, seen, marks)
            level_output = LevelOutput.with_deferred_routes(level.name, hidden, plan.routes)
        outputs[level.name] = level_output
    fused = model.fusion([each.hidden for each in outputs.values()])
    # Made last: the tracer can't make objects again that were put into another one's dict.
    return CELMoEOutput(outputs, fused, losses, loss_weights=loss_weights, loss_shares=loss_shares)


@torch.compiler.disable(  # type: ignore[untyped-decorator]  # torch's own
    reason="celmoe: the host compiles names to indices; pass model.compile_routing(routing)"
)
def _planned(model: Any, routing: Any, batch_size: int) -> RoutingPlan:
    plan: RoutingPlan = model._compiler.compile(routing, batch_size, told_by="'hidden'")
    return plan


@torch.compiler.disable(  # type: ignore[untyped-decorator]  # torch's own
    reason="celmoe: an expert can't be part of a graph; see HierarchicalCELMoE.explain"
)
def _apart(model: Any, *arguments: Any) -> CELMoEOutput:
    """The forward pass outside of a graph."""
    output: CELMoEOutput = model.forward(*arguments)
    return output


@torch.compiler.disable(  # type: ignore[untyped-decorator]  # torch's own
    reason="celmoe: samples with several experts, or none, can't be part of a graph"
)
def _mixed(model: Any, *arguments: Any) -> CELMoEOutput:
    """The forward pass outside of a graph."""
    output: CELMoEOutput = model.forward(*arguments)
    return output


class _ContextOfAll(ContextRows):
    """The context of a level's only expert: a copy, for the expert may write into it."""

    def __init__(self, context: Any, batch_size: int) -> None:
        self.aligned = []
        self.irregular = None
        self.shared = {}
        self.whole = tree_map(lambda leaf: leaf.clone() if _is_aligned(leaf, batch_size) else leaf, context)
        self.is_whole = True


def _is_aligned(leaf: Any, batch_size: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch_size


def _ways(model: Any, hidden: torch.Tensor, packed: Any) -> list[int] | None:
    """By level the number of its way in `_WAYS`, 0 for one expert alone that the tracer follows.

    ``None`` if a level can't be in a graph.

    All levels are asked before an expert runs: else its side effects would come twice. What a level is given may turn
    out otherwise, and is then asked about again.
    """
    found = []
    for index, level in enumerate(model._levels):
        number = 0
        if len(level.experts) > 1 or not _is_followed(model._key, index):
            number = _asked(model._key, index, hidden, packed)
            if not number:
                return None
        found.append(number)
    return found


def _tensors_of(model: Any, level: Level) -> dict[str, torch.Tensor]:
    """By path in an expert, the members' tensors ``[M, ...]`` and those of their bases, if a graph takes them."""
    modules = model.level_modules[level.name]
    stacks: list[Stack] = model._stacks.get(level.name, [])
    if len(stacks) == 1 and len(stacks[0].names) == len(level.experts):
        stacked = {path: modules._parameters[name] for path, name in stacks[0].keys.items()}
        return {**stacked, **stacks[0].bases}
    if torch.compiler.is_exporting():
        experts = [modules[name] for name in sorted(level.experts)]
        named = [dict([*each.named_parameters(), *each.named_buffers()]) for each in experts]
        return {path: torch.stack([each[path] for each in named]) for path in named[0]}
    return {}


def _seen(model: Any, level: Level) -> list[torch.Tensor]:
    """The counts of a level's only stack, if gradients flow: see `Stack.seen`."""
    stacks: list[Stack] = model._stacks.get(level.name, [])
    if torch.compiler.is_exporting() or not torch.is_grad_enabled() or len(stacks) != 1:
        return []
    return [stacks[0].seen] if stacks[0].seen is not None else []


# For `None`, which the tracer takes for no argument of a function that it does not follow.
_NONE = "celmoe.none"


def _packed(context: Any, mask: torch.Tensor | None) -> Any:
    return tree_map(lambda leaf: _NONE if leaf is None else leaf, (context, mask))


def _unpacked(packed: Any) -> Any:
    return tree_map(_bare, packed)


def _bare(leaf: Any) -> Any:
    # A number that the tracer takes for any is what experts read: the graph is for this one.
    if isinstance(leaf, torch.SymInt):
        return int(leaf)
    if isinstance(leaf, torch.SymFloat):
        return float(leaf)
    return None if isinstance(leaf, str) and leaf == _NONE else leaf


# By model and number.
_WAYS: weakref.WeakKeyDictionary[nn.Module, dict[int, Way]] = weakref.WeakKeyDictionary()
# The numbers, by key of the model, index of the level, and what the level is given; and the latest number of a level.
_BY_FACTS: dict[Any, int] = {}
_LATEST: dict[tuple[str, int], int] = {}


@unfollowed
def _is_followed(key: str, index: int) -> bool:
    """True if the tracer follows a level's only expert."""
    level, modules, _ = _found(key, index)
    return torch.compiler.is_exporting() or follows(modules[level.experts[0]])


@unfollowed
def _asked(key: str, index: int, hidden: torch.Tensor, packed: Any) -> int:
    """The number of a level's way in `_WAYS`; 0 if its experts can't be part of a graph.

    Raises:
        GraphError: They can't be part of an exported graph.
    """
    if is_functional(hidden):
        # A later pass of the compiler.
        return _LATEST[key, index]
    requires_grad = torch.is_grad_enabled() and (hidden.requires_grad or _is_trained(MODELS[key], index))
    facts = key, index, hidden.dtype, hidden.dim(), requires_grad
    number = _LATEST[key, index] = _BY_FACTS.setdefault(facts, len(_BY_FACTS) + 1)
    return number if _decided(key, index, number, hidden, packed, requires_grad).way != APART else 0


def _is_trained(model: Any, num_levels: int) -> bool:
    """True if a model's first levels have parameters that require gradients."""
    registries = [model.level_modules[level.name] for level in model._levels[:num_levels]]
    return any(each.requires_grad for registry in registries for each in registry.parameters())


def _decided(key: str, index: int, number: int, hidden: torch.Tensor, packed: Any, requires_grad: bool) -> Way:
    """Decide for a level, and keep the way."""
    level, modules, model = _found(key, index)
    context, mask = _unpacked(packed)
    is_exported = torch.compiler.is_exporting()
    way = way_of(level, modules, hidden, mask, context, requires_grad=requires_grad, is_exported=is_exported)
    if is_exported and way.way != INSIDE:
        raise _not_exported(level, way.reason)
    _WAYS.setdefault(model, {})[number] = way
    stack = None if way.way != INSIDE or way.unit is None else way.unit.stack
    if stack is not None and way.unit is not None:
        with apart(), torch.inference_mode(False):
            stack.take_bases(way.unit.modules[0])
    if stack is not None and not is_exported and (stack.seen is None or stack.seen.device != hidden.device):
        with apart(), torch.inference_mode(False):
            stack.seen = torch.zeros(len(stack.names), dtype=torch.int64, device=hidden.device)
    return way


def _not_exported(level: Level, reason: str) -> GraphError:
    return GraphError(
        f"'model' must have experts of one class at level {level.name!r} to be exported (got {listed(level.experts)}, "
        f"which {reason})"
    )


@unfollowed
def _level_run(
    key: str,
    index: int,
    number: int,
    given: list[torch.Tensor],
    packed: Any,
    tensors: dict[str, torch.Tensor],
    seen: list[torch.Tensor],
    _marks: list[str],
) -> torch.Tensor:
    """Run a level on its hidden states, its anchor and its plan's indices.

    The marks are of what the tracer must not take for the same.
    """
    hidden, anchor, *indices = given
    level, modules, model = _found(key, index)
    context, mask = _unpacked(packed)
    if not is_symbolic_tensor(hidden):
        # A backend runs the graph as it is, or PyTorch runs what it has given up to compile.
        engine: str = cast(Any, model).engine
        return run_level(level, modules, engine, hidden, mask, context, indices)
    way = _WAYS[model][number]
    requires_grad = hidden.requires_grad and torch.is_grad_enabled()
    # The compiler's later passes are the same call, with other marks on its tensors.
    if not is_functional(hidden) and not way.fits(hidden, requires_grad=requires_grad):
        way = _decided(key, index, number, hidden, packed, requires_grad)
    if way.way == INSIDE:
        try:
            return run_inside(level, way, hidden, mask, context, indices, tensors, seen[0] if seen else None)
        except CannotGroupError as fault:
            if torch.compiler.is_exporting():
                raise _not_exported(level, fault.args[0]) from None
    return run_opaque((key, index), hidden, (context, mask), indices, anchor, way)


def _found(key: str, index: int) -> tuple[Level, NamedModules, nn.Module]:
    model: Any = MODELS[key]
    level = model._levels[index]
    return level, cast(NamedModules, model.level_modules[level.name]), model
