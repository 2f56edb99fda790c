"""The naive oracle: a hierarchy's computation, written to be read.

Plain Python loops run over levels, experts and samples. The oracle shares no code with routing, plans, dispatch or
engines: it reads routes name by name, picks rows one by one and puts the rows back one by one. A result on which the
oracle and an engine agree was therefore computed in two ways.
"""

from __future__ import annotations

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
    names: list[str],
    context: ExpertContext,
    mask: torch.Tensor | None,
    per_sample: bool,
) -> LevelOutput:
    batch_size = len(names)
    output = LevelOutput(level.name, hidden, names)
    rows: list[torch.Tensor | None] = [None] * batch_size
    for name in sorted(set(names)):
        samples = [sample for sample in range(batch_size) if names[sample] == name]
        for group in [[sample] for sample in samples] if per_sample else [samples]:
            batch = ExpertBatch(
                hidden=pick(_input_of(level.flags(name), hidden), group),
                context=context_of(context, group, batch_size),
                mask=None if mask is None else pick(mask, group),
                state={"level": level.name, "expert": name},
            )
            result: ExpertResult = model.level_modules[level.name][name](batch)  # type: ignore[index]  # nested mappings
            for place, sample in enumerate(group):
                rows[sample] = result.hidden[place]
            if not per_sample:
                _collect(output, level, name, result, len(group) / batch_size)
    if batch_size:
        output.hidden = _stack([row for row in rows if row is not None])
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


def _collect(output: LevelOutput, level: Level, name: str, result: ExpertResult, share: float) -> None:
    for loss, value in result.losses.items():
        key = f"{name_key(level.name)}.{name_key(name)}.{loss}"
        output.losses[key] = value
        output.loss_weights[key] = level.flags(name).loss_weight
        output.loss_shares[key] = share
    if result.aux:
        output.aux[name] = result.aux


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


def _routes(model: HierarchicalCELMoE, routing: Routing | RoutingPlan | None, batch_size: int) -> dict[str, list[str]]:
    """One expert's name for every sample at every enabled level."""
    levels = model.layout.levels
    given: dict[str, list[str]] = {}
    if isinstance(routing, RoutingPlan):
        if routing.layout.levels != levels:
            raise ValueError(f"the plan is for {routing.layout}, the model has {model.layout}")
    elif unknown := set(routing or ()) - {level.name for level in levels} - {each.name for each in model.config.levels}:
        raise KeyError(f"{sorted(unknown)} are no levels")
    for level in levels:
        if isinstance(routing, RoutingPlan):
            ids = routing.levels[level.name].expert_ids.tolist()
            given[level.name] = [level.experts[each] for each in ids]
        elif routing is not None and level.name in routing:
            given[level.name] = _names(routing[level.name], list(level.experts), batch_size)
    names: dict[str, list[str]] = {}
    below: LevelLayout | None = None
    for level in reversed(levels):
        if level.name in given:
            names[level.name] = given[level.name]
        else:
            names[level.name] = [_inferred(level, below, names, sample) for sample in range(batch_size)]
        below = level
        for name in names[level.name]:
            if name not in level.experts:
                raise KeyError(f"{name!r} is no expert of level {level.name!r}")
        if len(names[level.name]) != batch_size:
            raise ValueError(f"{len(names[level.name])} routes for {batch_size} samples at level {level.name!r}")
    return names


def _names(routes: Any, experts: list[str], batch_size: int) -> list[str]:
    if isinstance(routes, str):
        return [routes] * batch_size
    routes = routes.tolist() if hasattr(routes, "tolist") else routes
    for route in routes:
        if not isinstance(route, str) and (isinstance(route, bool) or not 0 <= route < len(experts)):
            raise ValueError(f"{route!r} is no position among {len(experts)} experts")
    return [route if isinstance(route, str) else experts[route] for route in routes]


def _inferred(level: LevelLayout, below: LevelLayout | None, names: dict[str, list[str]], sample: int) -> str:
    """The parent of the sample's expert in the level below, else the only expert, else the fallback."""
    if below is not None:
        parent = below.parents[below.experts.index(names[below.name][sample])]
        if parent is not None:
            return parent
    if len(level.experts) == 1:
        return level.experts[0]
    if level.fallback is not None:
        return level.fallback
    raise KeyError(f"no route for sample {sample} at level {level.name!r}")
