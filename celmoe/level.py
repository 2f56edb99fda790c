"""One level of the hierarchy: dispatch its rows, run its experts, combine what they gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.autograd import forward_ad

from .config import HierarchyLevelConfig
from .context import ContextRows
from .dispatch import Blocks, combine, dispatch, relay
from .engines import Engine
from .errors import UnknownExpertError, UnknownLevelError, nearest
from .experts import ExpertBatch
from .names import modules_named, name_key
from .outputs import LevelOutput
from .plan import LevelPlan, RoutingPlan


class LevelInput(NamedTuple):
    """What a level is given.

    Attributes:
        hidden: ``[B, ...]`` in batch order: the caller's rows, or the level above's.
        blocks: The same rows as the experts of the level above gave them; ``None`` for the first level.
        context: The batch's context.
        mask: ``[B, ...]`` or ``None``.
    """

    hidden: torch.Tensor
    blocks: Blocks | None
    context: ContextRows
    mask: torch.Tensor | None


class _ScaleGradient(torch.autograd.Function):
    """The identity, with its gradient multiplied by ``scale``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: torch.Tensor, _scale: float) -> torch.Tensor:
        # Not `view_as`: autograd refuses in-place work on a view made inside a Function.
        return rows.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, float], _output: torch.Tensor) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.scale, None

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, tangents[0] * ctx.scale)


def present_experts(level_modules: nn.ModuleDict, plan: RoutingPlan) -> list[list[nn.Module]]:
    """For each level the modules of the experts present, as they are now: any may have been replaced.

    Raises:
        UnknownLevelError, UnknownExpertError: One has been removed since the model was built.
    """
    found = []
    try:
        registries = modules_named(level_modules, plan.levels)
    except KeyError as error:
        level = str(error.args[0])
        raise UnknownLevelError(
            f"'level_modules' must hold the model's levels (got no {level!r}; {nearest(level, level_modules)})"
        ) from None
    for modules, planned in zip(registries, plan.levels.values(), strict=True):
        try:
            found.append(modules_named(modules, planned.experts))  # type: ignore[arg-type]  # a level's are a mapping
        except KeyError as error:
            name = str(error.args[0])
            raise UnknownExpertError(
                f'"level_modules[{planned.name!r}]" must hold the experts routed to (got no {name!r}; '
                f"{nearest(name, modules)})"  # type: ignore[arg-type]  # as above
            ) from None
    return found


def run_level(
    config: HierarchyLevelConfig,
    experts: Sequence[nn.Module],
    engine: Engine,
    given: LevelInput,
    plan: LevelPlan,
    make_routes: Callable[[str], list[str]],
) -> tuple[LevelOutput, Blocks]:
    """Run one level.

    Args:
        config: The level's config.
        experts: The modules of the experts present.
        engine: What runs them.
        given: What the level is given.
        plan: The level's plan.
        make_routes: Given a level's name, the expert's name for each sample.

    Returns:
        Its output, and the same rows as its experts gave them.
    """
    if not experts:
        empty = torch.zeros_like(given.hidden, memory_format=torch.contiguous_format)
        return LevelOutput.with_deferred_routes(config.name, empty, make_routes), ()
    scales = [config.experts[name].input_gradient_scale for name in plan.experts]
    results = engine(experts, _expert_batches(given, plan, scales))
    blocks: Blocks = _promoted([result.hidden for result in results])
    output = LevelOutput.with_deferred_routes(config.name, combine(blocks, plan), make_routes)
    for name, result in zip(plan.experts, results, strict=True):
        if result.losses:
            _add_losses(output, name, result.losses, config.experts[name].loss_weight)
        if result.aux:
            output.aux[name] = result.aux
    return output, blocks


def _expert_batches(given: LevelInput, plan: LevelPlan, scales: Sequence[float]) -> list[ExpertBatch]:
    """The batch of each expert present, in order."""
    hidden, blocks, context, mask = given
    # Where all experts are detached, the level's input gets no gradient at all, rather than one of zeros.
    is_detached = not any(scales)
    if is_detached:
        hidden = hidden.detach()
    if blocks is not None and plan.follows_previous and not plan.is_sorted:
        blocks = relay(hidden, [block.detach() for block in blocks] if is_detached else blocks, plan)
    else:
        blocks = dispatch(hidden, plan)
    mask_blocks = None if mask is None else dispatch(mask, plan)
    aligned_blocks = [dispatch(tensor, plan) for tensor in context.aligned] if context.aligned else []
    return [
        ExpertBatch(
            blocks[index] if scale == 1.0 else _with_gradient_scaled(blocks[index], scale),
            context.whole if context.is_whole else context.build([aligned[index] for aligned in aligned_blocks]),
            None if mask_blocks is None else mask_blocks[index],
            {"level": plan.name, "expert": name},
        )
        for index, (name, scale) in enumerate(zip(plan.experts, scales, strict=True))
    ]


def _with_gradient_scaled(rows: torch.Tensor, scale: float) -> torch.Tensor:
    if scale == 0.0:
        return rows.detach()
    if (
        (rows.requires_grad and torch.is_grad_enabled())
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    ):
        return cast(torch.Tensor, _ScaleGradient.apply(rows, scale))
    return rows


def _promoted(blocks: Blocks) -> Blocks:
    """The blocks in the dtype that all of theirs promote to."""
    first = blocks[0].dtype
    for block in blocks:
        if block.dtype is not first:
            dtype = reduce(torch.promote_types, {each.dtype for each in blocks})
            return [each.to(dtype) for each in blocks]
    return blocks


def _add_losses(output: LevelOutput, expert: str, losses: Mapping[str, torch.Tensor], weight: float) -> None:
    for loss, value in losses.items():
        key = f"{name_key(output.name)}.{name_key(expert)}.{loss}"
        output.losses[key] = value
        output.loss_weights[key] = weight
