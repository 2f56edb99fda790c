"""The naive oracle: a hierarchy's computation, written to be read.

Plain Python loops run over levels, experts and samples. The oracle shares no code with routing, plans, dispatch or
engines: it reads routes name by name, picks rows one by one and puts the rows back one by one. A result on which the
oracle and an engine agree was therefore computed in two ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .config import ExpertConfig
from .experts import ExpertBatch, ExpertContext, ExpertResult
from .hierarchy import HierarchicalCELMoE
from .level import Level
from .names import name_key
from .outputs import CELMoEOutput, LevelOutput
from .reference_context import context_of, pick, tensors_in
from .routing.layout import LevelLayout
from .routing.plan import RoutingPlan
from .routing.routes import Routing


def reference_forward(
    model: HierarchicalCELMoE,
    hidden: torch.Tensor,
    routing: Routing | RoutingPlan | None = None,
    context: ExpertContext = None,
    mask: torch.Tensor | None = None,
    *,
    per_sample: bool = False,
) -> CELMoEOutput:
    """The output that ``model(hidden, routing, context, mask)`` should give.

    Args:
        model: The model. Its config, experts and fusion are used; its engine is not.
        hidden: ``[B, ...]``.
        routing: Like the model's.
        context: Like the model's.
        mask: Like the model's.
        per_sample: If true, every sample runs alone, which shows for row-wise experts that rows never mix. Losses and
            aux stay empty, for an expert's loss over one sample is not its loss over its group.

    Raises:
        KeyError, ValueError: The routing does not fit the model, or `Rows` in the context do not fit the batch.
    """
    names = _routes(model, routing, hidden.shape[0])
    output = CELMoEOutput({}, hidden)
    for level in model._levels:
        level_output = _run_level(model, level, hidden, names[level.name], context, mask, per_sample)
        output.levels[level.name] = level_output
        output.losses.update(level_output.losses)
        output.loss_weights.update(level_output.loss_weights)
        output.loss_shares.update(level_output.loss_shares)
        hidden = level_output.hidden
    output.fused_hidden = model.fusion([level.hidden for level in output.levels.values()])
    return output


def _run_level(
    model: HierarchicalCELMoE,
    level: Level,
    hidden: torch.Tensor,
    shares: list[dict[str, float]],
    context: ExpertContext,
    mask: torch.Tensor | None,
    per_sample: bool,
) -> LevelOutput:
    batch_size = len(shares)
    output = LevelOutput(level.name, hidden, [_route_of(each) for each in shares])
    terms: list[list[torch.Tensor]] = [[] for _ in range(batch_size)]
    for name in sorted({name for each in shares for name in each}):
        samples = [sample for sample in range(batch_size) if name in shares[sample]]
        mean_weight = sum(shares[sample][name] for sample in samples) / len(samples)
        for group in [[sample] for sample in samples] if per_sample else [samples]:
            batch = ExpertBatch(
                hidden=pick(_input_of(level.flags(name), hidden), group),
                context=context_of(context, group, batch_size),
                mask=None if mask is None else pick(mask, group),
                state={"level": level.name, "expert": name},
            )
            result: ExpertResult = model.level_modules[level.name][name](batch)  # type: ignore[index]  # nested mappings
            for place, sample in enumerate(group):
                weight = shares[sample][name]
                terms[sample].append(result.hidden[place] if weight == 1.0 else weight * result.hidden[place])
            if not per_sample:
                _collect(output, level, name, result, mean_weight, len(group) / batch_size)
    if batch_size:
        output.hidden = _stack([_total(each) if each else hidden[sample] for sample, each in enumerate(terms)])
    else:
        output.hidden = _no_rows(model, level, hidden, context, mask)
    return output


def _no_rows(
    model: HierarchicalCELMoE,
    level: Level,
    hidden: torch.Tensor,
    context: ExpertContext,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """A level's output for no samples: no rows, with a graph to all tensors that its experts might have read."""
    parameters = list(model.level_modules[level.name].parameters())
    rows = sum((_input_of(expert, hidden) for expert in map(level.flags, level._built)), torch.zeros_like(hidden))
    if not hidden.dtype.is_floating_point and not hidden.dtype.is_complex:
        looked_up = [parameter.dtype for parameter in parameters if parameter.dtype.is_floating_point]
        rows = rows.to(looked_up[0]) if looked_up else rows
    for tensor in tensors_in([mask, context]):
        if tensor.requires_grad:
            rows = rows + tensor.sum().real.to(rows)
    if any(parameter.requires_grad for parameter in parameters):
        rows = rows + torch.zeros((), dtype=rows.dtype, device=rows.device, requires_grad=True)
    return rows


def _collect(
    output: LevelOutput, level: Level, name: str, result: ExpertResult, mean_weight: float, share: float
) -> None:
    for loss, value in result.losses.items():
        key = f"{name_key(level.name)}.{name_key(name)}.{loss}"
        output.losses[key] = value
        output.loss_weights[key] = level.flags(name).loss_weight * mean_weight
        output.loss_shares[key] = share
    if result.aux:
        output.aux[name] = result.aux


def _route_of(shares: dict[str, float]) -> Any:
    """A sample's route as the user would write it."""
    if not shares:
        return None
    return next(iter(shares)) if [*shares.values()] == [1.0] else shares


def _total(terms: list[torch.Tensor]) -> torch.Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _stack(rows: list[torch.Tensor]) -> torch.Tensor:
    dtype = rows[0].dtype
    for row in rows:
        dtype = torch.promote_types(dtype, row.dtype)
    return torch.stack([row.to(dtype) for row in rows])


def _input_of(expert: ExpertConfig, hidden: torch.Tensor) -> torch.Tensor:
    """The expert's view of the level's input: the same values, with the gradient that its config asks for."""
    scale = expert.gradient_scale
    if scale is None:
        scale = 0.0 if expert.stop_gradient_from_parent else 1.0
    if scale <= 0.0:
        return hidden.detach()
    if scale >= 1.0 or not hidden.requires_grad:
        return hidden
    factor = scale
    scaled = hidden.clone()
    if scaled.requires_grad:
        scaled.register_hook(lambda grad: grad * factor)
    return scaled


def _routes(
    model: HierarchicalCELMoE, routing: Routing | RoutingPlan | None, batch_size: int
) -> dict[str, list[dict[str, float]]]:
    """For every sample at every enabled level its experts, with their weights."""
    levels = model.layout.levels
    given: dict[str, list[dict[str, float]]] = {}
    if isinstance(routing, RoutingPlan):
        if routing.layout.levels != levels:
            raise ValueError(f"the plan is for {routing.layout}, the model has {model.layout}")
    elif unknown := set(routing or ()) - {level.name for level in levels} - {each.name for each in model.config.levels}:
        raise KeyError(f"{sorted(unknown)} are no levels")
    for level in levels:
        if isinstance(routing, RoutingPlan):
            given[level.name] = _shares(routing.routes(level.name), level, batch_size)
        elif routing is not None and level.name in routing:
            given[level.name] = _shares(routing[level.name], level, batch_size)
    shares: dict[str, list[dict[str, float]]] = {}
    below: LevelLayout | None = None
    for level in reversed(levels):
        if level.name in given:
            shares[level.name] = given[level.name]
        else:
            under = None if below is None else shares[below.name]
            shares[level.name] = [
                _inferred(level, below, None if under is None else under[sample], sample)
                for sample in range(batch_size)
            ]
        below = level
        if len(shares[level.name]) != batch_size:
            raise ValueError(f"{len(shares[level.name])} routes for {batch_size} samples at level {level.name!r}")
    return shares


def _shares(routes: Any, level: LevelLayout, batch_size: int) -> list[dict[str, float]]:
    if routes is None or isinstance(routes, str | Mapping):
        routes = [routes] * batch_size
    found = []
    for route in routes.tolist() if hasattr(routes, "tolist") else routes:
        several = {} if route is None else route if isinstance(route, Mapping) else {route: 1.0}
        named = {_name(each, level): weight for each, weight in several.items() if weight >= 2.0**-64}
        if several and not named:
            raise ValueError(f"{route!r} has no weight that counts at level {level.name!r}")
        found.append({name: named[name] for name in sorted(named)})
    return found


def _name(expert: Any, level: LevelLayout) -> str:
    if isinstance(expert, str):
        if expert not in level.experts:
            raise KeyError(f"{expert!r} is no expert of level {level.name!r}")
        return str(expert)
    if isinstance(expert, bool) or not 0 <= expert < len(level.experts):
        raise ValueError(f"{expert!r} is no position among {len(level.experts)} experts")
    return str(level.experts[expert])


def _inferred(
    level: LevelLayout, below: LevelLayout | None, under: dict[str, float] | None, sample: int
) -> dict[str, float]:
    """The parents of the sample's experts in the level below, by their share; else the only expert or the fallback."""
    if below is None or under is None:
        return {_default(level, sample): 1.0}
    if len(level.experts) == 1:
        return {level.experts[0]: 1.0}
    if not under:
        return {} if level.fallback is None else {level.fallback: 1.0}
    shares: dict[str, float] = {}
    for name, weight in under.items():
        parent = below.parents[below.experts.index(name)]
        parent = _default(level, sample) if parent is None else parent
        shares[parent] = shares.get(parent, 0.0) + weight / sum(under.values())
    # A sum of rounded parts is a whole one.
    return {name: round(shares[name], 9) if round(shares[name], 9) == 1.0 else shares[name] for name in sorted(shares)}


def _default(level: LevelLayout, sample: int) -> str:
    if len(level.experts) == 1:
        return level.experts[0]
    if level.fallback is not None:
        return level.fallback
    raise KeyError(f"no route for sample {sample} at level {level.name!r}")
