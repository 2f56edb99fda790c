"""One level of the hierarchy: dispatch its rows, run its experts, combine what they gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import is_
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.autograd import forward_ad

from .arrangement import Arrangement, arrange
from .classes import Layout, LevelClasses, LevelInputLike, Unit
from .config import HierarchyLevelConfig
from .context import ContextRows
from .cost import estimate, never_pays
from .dispatch import Blocks, combine, dispatch, relay
from .engines import AUTO, ENGINES, LOOPED
from .errors import UnknownExpertError, UnknownLevelError, nearest
from .experts import ExpertBatch, ExpertResult
from .explain import ClassExplanation, LevelExplanation, explain_level, parameter_bytes, spread_of
from .grouped import Extras, UnitBatch, UnitResult, passing_refusal
from .names import NamedModules, modules_named, name_key
from .outputs import LevelOutput
from .plan import LevelPlan, RoutingPlan


class LevelInput(NamedTuple):
    """What a level is given.

    Attributes:
        hidden: ``[B, ...]`` in batch order: the caller's rows, or the level above's.
        blocks: The same rows as the experts of the level above gave them; ``None`` for the first level, and where
            they came in another order than its plan's.
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
            found.append(modules_named(modules, planned.present))  # type: ignore[arg-type]  # a level's are a mapping
        except KeyError as error:
            name = str(error.args[0])
            raise UnknownExpertError(
                f'"level_modules[{planned.name!r}]" must hold the experts routed to (got no {name!r}; '
                f"{nearest(name, modules)})"  # type: ignore[arg-type]  # as above
            ) from None
    return found


class Level:
    """One level of a model: its config, and what is known of its experts' classes.

    Attributes:
        config: The level's config.
        classes: Its experts by structure.
    """

    def __init__(self, config: HierarchyLevelConfig) -> None:
        self.config = config
        self.classes = LevelClasses()

    def run(
        self,
        experts: Sequence[nn.Module],
        engine: str,
        given: LevelInput,
        plan: LevelPlan,
        host_plan: RoutingPlan,
    ) -> tuple[LevelOutput, Blocks | None]:
        """Run the level.

        Args:
            experts: The modules of the experts present.
            engine: The name of what runs them.
            given: What the level is given.
            plan: The level's plan.
            host_plan: The plan of all levels, where the caller has it: reading the routes of a batch that was routed by
                names asks no device.

        Returns:
            Its output, and the same rows as its experts gave them, in the plan's order; without the rows where they
            came in another one.
        """
        name = self.config.name
        if not experts:
            empty = torch.zeros_like(given.hidden, memory_format=torch.contiguous_format)
            return LevelOutput.with_deferred_routes(name, empty, host_plan.routes), None
        scales = [self.config.experts[expert].input_gradient_scale for expert in plan.present]
        arranged = self._arranged(experts, engine, scales, plan, given)
        if arranged is None:
            results = ENGINES[engine](experts, _expert_batches(given, plan, scales))
            blocks: list[torch.Tensor] = [result.hidden for result in results]
            extras: dict[int, Extras] = {place: (result.losses, result.aux) for place, result in enumerate(results)}
        else:
            results = ENGINES[engine](arranged.units, _unit_batches(given, arranged))
            blocks, extras = _by_expert(arranged, results)
        promoted = _promoted(blocks)
        order = plan if arranged is None else arranged.plan._replace(counts=tuple(map(len, blocks)))
        output = LevelOutput.with_deferred_routes(name, combine(promoted, order), host_plan.routes)
        for place in sorted(extras):
            expert, (losses, aux) = plan.present[place], extras[place]
            if losses:
                _add_losses(output, expert, losses, self.config.experts[expert].loss_weight)
            if aux:
                output.aux[expert] = dict(aux)
        return output, promoted if order.order is plan.order else None

    def explain(
        self, modules: NamedModules, engine: str, experts: Sequence[nn.Module], plan: LevelPlan | None
    ) -> LevelExplanation:
        """How the level would run.

        Args:
            modules: All its experts.
            engine: The name of what runs them.
            experts: The modules of the experts in the plan; of all experts without one.
            plan: The level's plan.
        """
        names = tuple(modules) if plan is None else plan.present
        classes: list[ClassExplanation] = []
        if engine != LOOPED and experts:
            scales = [self.config.experts[name].input_gradient_scale for name in names]
            classes = self._explained(engine, names, experts, scales, plan)
        return explain_level(self.config.name, modules, engine, experts, plan, classes)

    def _arranged(
        self, experts: Sequence[nn.Module], engine: str, scales: Sequence[float], plan: LevelPlan, given: LevelInput
    ) -> Arrangement | None:
        """The experts by units; ``None`` where they run one after another, in the plan's order."""
        if engine == LOOPED or len(experts) == 1 or (engine == AUTO and torch.compiler.is_compiling()):
            return None
        names = plan.present
        if engine == AUTO and all(map(is_, map(self.classes.looped_anyway.get, names), experts)):
            return None
        if (passing := passing_refusal()) is not None:
            if engine == AUTO:
                return None
            return arrange([Unit(tuple(range(len(experts))), tuple(experts), None, 1.0, passing)], plan)
        if len(set(map(id, experts))) < len(experts):
            # Experts that share a module must run in one loop, which knows of it.
            if engine == AUTO:
                return None
            return arrange([Unit(tuple(range(len(experts))), tuple(experts), None, 1.0, "share a module")], plan)
        wanted = [*range(len(experts))]
        if engine == AUTO:
            wanted = self._worth_grouping(names, experts, scales, plan)
            if not wanted:
                return None
        units = self.classes.units(
            [names[place] for place in wanted],
            [experts[place] for place in wanted],
            [scales[place] for place in wanted],
            LevelInputLike(given.hidden, given.mask, given.context),
            retries=engine != AUTO,
        )
        units = [unit._replace(positions=tuple(wanted[place] for place in unit.positions)) for unit in units]
        chosen = set(wanted)
        units += [
            Unit((place,), (expert,), None, scales[place], None)
            for place, expert in enumerate(experts)
            if place not in chosen
        ]
        if all(unit.is_alone for unit in units) and (engine == AUTO or not any(_is_refused(unit) for unit in units)):
            return None
        return arrange(sorted(units, key=lambda unit: unit.positions[0]), plan)

    def _worth_grouping(
        self, names: Sequence[str], experts: Sequence[nn.Module], scales: Sequence[float], plan: LevelPlan
    ) -> list[int]:
        """The places of the experts for whose kind a loop is estimated to cost more."""
        by_layout: dict[tuple[Layout, bool], list[int]] = {}
        for place, layout in enumerate(self.classes.layouts(names, experts)):
            by_layout.setdefault((layout, scales[place] == 0.0), []).append(place)
        found = []
        on_cpu = plan.order.is_cpu
        for (layout, _), places in by_layout.items():
            if never_pays(layout, len(self.config.experts), on_cpu=on_cpu):
                self.classes.looped_anyway.update((names[place], experts[place]) for place in places)
            rows = sum(plan.counts[place] for place in places)
            # Not whether gradients are recorded: a checkpoint computes once with and once without.
            has_backward = experts[places[0]].training
            if len(places) > 1 and estimate(layout, len(places), rows, on_cpu=on_cpu, has_backward=has_backward).pays:
                found += places
        return sorted(found)

    def _explained(
        self,
        engine: str,
        names: Sequence[str],
        experts: Sequence[nn.Module],
        scales: Sequence[float],
        plan: LevelPlan | None,
    ) -> list[ClassExplanation]:
        """The experts by what was last found of them, else by their layout."""
        groups: dict[Any, list[int]] = {}
        layouts = self.classes.layouts(names, experts)
        for place, (name, expert) in enumerate(zip(names, experts, strict=True)):
            record = self.classes.known(name, expert)
            refusal = self.classes.refusal(name, expert) if record is None else record.fault_of(expert)[1]
            key = id(record) if record is not None and refusal is None else (layouts[place], refusal)
            groups.setdefault((key, scales[place]), []).append(place)
        shares_module = len(set(map(id, experts))) < len(experts)
        found = []
        for places in groups.values():
            expert, layout = experts[places[0]], layouts[places[0]]
            record = self.classes.known(names[places[0]], expert)
            refusal = self.classes.refusal(names[places[0]], expert) if record is None else record.fault
            if record is not None and refusal is None:
                refusal = record.fault_of(expert)[1]
            counts = None if plan is None else [plan.counts[place] for place in places]
            cost = estimate(
                layout, len(places), sum(counts or ()), on_cpu=_is_on_cpu(expert), has_backward=expert.training
            )
            how, looped = LOOPED, {}
            if shares_module:
                refusal = "share a module"
            if len(places) == 1:
                reason = "the only one of its kind"
            elif refusal is not None:
                reason = f"for its experts {refusal}"
            elif engine == AUTO and not cost.pays:
                reason = f"for its experts are few or large ({cost})"
            elif record is None:
                how, reason = "grouped", f"once captured at the first call ({cost})"
            else:
                how, reason, looped = "grouped", f"run as one ({cost})", record.operations_looped
            found.append(
                ClassExplanation(
                    architecture=type(expert).__name__,
                    experts=tuple(names[place] for place in places),
                    engine=how,
                    reason=reason,
                    operations_looped=looped,
                    rows_per_expert=None if not counts else spread_of(counts),
                    parameter_bytes=parameter_bytes(experts[place] for place in places),
                )
            )
        return found


def _is_refused(unit: Unit) -> bool:
    return unit.fault is not None and len(unit.modules) > 1


def _is_on_cpu(expert: nn.Module) -> bool:
    return all(tensor.is_cpu for tensor in expert.parameters())


def _unit_batches(given: LevelInput, arranged: Arrangement) -> list[ExpertBatch]:
    """The batch of each unit, in order."""
    plan, units = arranged.plan, arranged.units
    names = arranged.names
    hidden_blocks, mask_blocks, aligned_blocks = _blocks(given, plan, [unit.scale for unit in units])
    context = given.context
    batches: list[ExpertBatch] = []
    for index, unit in enumerate(units):
        hidden = _scaled(hidden_blocks[index], unit.scale)
        mask = None if mask_blocks is None else mask_blocks[index]
        aligned = [blocks[index] for blocks in aligned_blocks]
        if len(unit.modules) == 1:
            own = context.whole if context.is_whole else context.build(aligned)
            batches.append(ExpertBatch(hidden, own, mask, {"level": plan.name, "expert": names[index][0]}))
        else:
            counts = arranged.counts[index]
            batches.append(UnitBatch(hidden, None, mask, {}, plan.name, names[index], counts, aligned, context))
    return batches


def _by_expert(arranged: Arrangement, results: Sequence[ExpertResult]) -> tuple[list[torch.Tensor], dict[int, Extras]]:
    """The rows of all units, and losses and aux by the places of the experts that may have some."""
    blocks: list[torch.Tensor] = []
    found: dict[int, Extras] = {}
    for unit, result in zip(arranged.units, results, strict=True):
        if isinstance(result, UnitResult):
            blocks += result.blocks
            found.update(zip(unit.positions, result.by_expert, strict=False))
        else:
            blocks.append(result.hidden)
            found[unit.positions[0]] = (result.losses, result.aux)
    return blocks, found


def _blocks(given: LevelInput, plan: LevelPlan, scales: Sequence[float]) -> tuple[Blocks, Blocks | None, list[Blocks]]:
    """Hidden states, mask and the context's batch-aligned tensors, cut as the plan says."""
    hidden, blocks, context, mask = given
    # Where all experts are detached, the level's input gets no gradient at all, rather than one of zeros.
    is_detached = not any(scales)
    if is_detached:
        hidden = hidden.detach()
    if blocks is not None and plan.follows_previous and not plan.is_sorted:
        hidden_blocks = relay(hidden, [block.detach() for block in blocks] if is_detached else blocks, plan)
    else:
        hidden_blocks = dispatch(hidden, plan)
    mask_blocks = None if mask is None else dispatch(mask, plan)
    return hidden_blocks, mask_blocks, [dispatch(tensor, plan) for tensor in context.aligned] if context.aligned else []


def _expert_batches(given: LevelInput, plan: LevelPlan, scales: Sequence[float]) -> list[ExpertBatch]:
    """The batch of each expert present, in order."""
    context = given.context
    blocks, mask_blocks, aligned_blocks = _blocks(given, plan, scales)
    return [
        ExpertBatch(
            blocks[index] if scale == 1.0 else _scaled(blocks[index], scale),
            context.whole if context.is_whole else context.build([aligned[index] for aligned in aligned_blocks]),
            None if mask_blocks is None else mask_blocks[index],
            {"level": plan.name, "expert": name},
        )
        for index, (name, scale) in enumerate(zip(plan.present, scales, strict=True))
    ]


def _scaled(rows: torch.Tensor, scale: float) -> torch.Tensor:
    """The rows, with the gradient into them scaled."""
    if scale == 1.0:
        return rows
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
