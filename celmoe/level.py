"""One level of the hierarchy: dispatch its rows, run its experts, combine what they gave."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from itertools import accumulate
from operator import is_
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.autograd import forward_ad

from .arrangement import Arrangement, arrange
from .capture import WrongResult
from .classes import Layout, LevelClasses, LevelInputLike, Unit
from .config import ExpertConfig, HierarchyLevelConfig
from .context import ContextRows, select
from .cost import estimate, never_pays
from .dispatch import Blocks, combine, dispatch, relay
from .engines import AUTO, ENGINES, LOOPED
from .errors import ConfigTypeError, UnknownExpertError, UnknownLevelError, listed, nearest
from .experts import ExpertBatch, ExpertResult
from .explain import ClassExplanation, LevelExplanation, explain_level, parameter_bytes, spread_of
from .grouped import Extras, UnitBatch, UnitResult, passing_refusal, refusal
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
    except KeyError:
        gone = [name for name in plan.levels if name not in level_modules]
        raise UnknownLevelError(
            f"'level_modules' must hold the model's levels (got no {listed(gone)}; {nearest(gone, level_modules)})"
        ) from None
    for modules, planned in zip(registries, plan.levels.values(), strict=True):
        named = cast(nn.ModuleDict, modules)
        try:
            found.append(modules_named(named, planned.present))
        except KeyError:
            gone = [name for name in planned.present if name not in named]
            raise UnknownExpertError(
                f'"level_modules[{planned.name!r}]" must hold the experts routed to (got no {listed(gone)}; '
                f"{nearest(gone, named)})"
            ) from None
    return found


class Level:
    """One level of a model: its config, and what is known of its experts' classes.

    Name and experts are those of the config at construction; the experts' flags are read from it at every call.

    Attributes:
        config: The level's config.
        name: The level's name.
        classes: Its experts by structure.
    """

    def __init__(self, config: HierarchyLevelConfig) -> None:
        self.config = config
        self.name = config.name
        self.classes = LevelClasses()
        self._built = dict(config.experts)

    def flags(self, expert: str) -> ExpertConfig:
        """The config that holds an expert's flags: the one under its name, else the one that it was built with.

        Raises:
            ConfigTypeError: Something else stands under its name, or it was never built.
        """
        found = self.config.experts.get(expert, self._built.get(expert))
        if not isinstance(found, ExpertConfig):
            where = f"levels[{self.name!r}].experts[{expert!r}]"
            raise ConfigTypeError(f'"{where}" must be an ExpertConfig (got {found!r})')
        return found

    def scales(self, experts: Collection[str]) -> list[float]:
        """The `input_gradient_scale` of each expert.

        Raises:
            ConfigTypeError: As for `flags`.
        """
        configs = self.config.experts
        try:
            return [configs[expert].input_gradient_scale for expert in experts]
        except (KeyError, AttributeError):
            return [self.flags(expert).input_gradient_scale for expert in experts]

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
            experts: The modules of the experts present; without samples, of all that might have been present.
            engine: The name of what runs them.
            given: What the level is given.
            plan: The level's plan.
            host_plan: The plan of all levels, where the caller has it: reading the routes of a batch that was routed by
                names asks no device.

        Returns:
            Its output, and the same rows as its experts gave them, in the plan's order; without the rows where they
            came in another one.
        """
        if not plan.present:
            empty = self._of_no_samples(experts, given)
            return LevelOutput.with_deferred_routes(self.name, empty, host_plan.routes), None
        scales = self.scales(plan.present)
        arranged = self._arranged(experts, engine, scales, plan, given)
        if arranged is None:
            results = ENGINES[engine](experts, _expert_batches(given, plan, scales, host_plan))
            blocks: list[torch.Tensor] = [result.hidden for result in results]
            extras: dict[int, Extras] = {place: (result.losses, result.aux) for place, result in enumerate(results)}
        else:
            results = ENGINES[engine](arranged.units, _unit_batches(given, arranged))
            blocks, extras = _by_expert(arranged, results)
        promoted = _promoted(blocks)
        order = plan if arranged is None else arranged.plan._replace(counts=tuple(map(len, blocks)))
        output = LevelOutput.with_deferred_routes(self.name, combine(promoted, order), host_plan.routes)
        for place in sorted(extras):
            expert, (losses, aux) = plan.present[place], extras[place]
            if losses:
                _add_losses(output, expert, losses, self.flags(expert).loss_weight)
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
            classes = self._explained(engine, names, experts, self.scales(names), plan)
        return explain_level(self.name, modules, engine, experts, plan, classes)

    @property
    def is_detached(self) -> bool:
        """Whether no expert lets gradients into the level's input."""
        return not any(self.scales(self._built))

    def _of_no_samples(self, experts: Sequence[nn.Module], given: LevelInput) -> torch.Tensor:
        """The level's output for a batch without samples, ``[0, ...]``.

        Its gradient reaches, as zeros, all that the rows of some expert might have reached: a module before the model
        gets the gradient that other ranks may wait for. Parameters of experts get none, for no expert has run.
        """
        rows = given.hidden.detach() if self.is_detached else given.hidden
        rows = rows.clone(memory_format=torch.contiguous_format)
        parameters = [parameter for expert in experts for parameter in expert.parameters()]
        if not _takes_gradients(rows):
            # Experts that look integers up give their parameters' dtype.
            rows = rows.to(next((each.dtype for each in parameters if each.is_floating_point()), rows.dtype))
        if not torch.is_grad_enabled() or not _takes_gradients(rows):
            return rows
        for tensor in (given.mask, *given.context.aligned, *given.context.shared.values()):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                rows = rows + tensor.sum().real.to(rows)
        # A backward pass may start from here as from an expert's rows, though it reaches nothing. (The compiler takes
        # no leaf that a graph makes.)
        is_trained = any(parameter.requires_grad for parameter in parameters)
        if is_trained and not rows.requires_grad and not torch.compiler.is_compiling():
            rows = rows + torch.zeros((), dtype=rows.dtype, device=rows.device, requires_grad=True)
        return rows

    def _arranged(
        self, experts: Sequence[nn.Module], engine: str, scales: Sequence[float], plan: LevelPlan, given: LevelInput
    ) -> Arrangement | None:
        """The experts by units; ``None`` where they run one after another, in the plan's order.

        Args:
            experts: The modules of the experts present.
            engine: The name of what runs them.
            scales: What the gradient into each one's input is multiplied by.
            plan: The level's plan.
            given: What the level is given.

        Raises:
            EngineRefusedError: Experts that are alike can't run as one, and ``engine="grouped"`` was asked for.
        """
        if engine == LOOPED or len(experts) == 1 or (engine == AUTO and torch.compiler.is_dynamo_compiling()):
            return None
        # Without values, or without elements, there is nothing that could be verified.
        if plan.order.is_meta or not given.hidden.numel():
            return None
        names = plan.present
        if engine == AUTO and all(map(is_, map(self.classes.looped_anyway.get, names), experts)):
            return None
        if (why_not := _refusal_of_all(experts, given)) is not None:
            if engine == AUTO:
                return None
            for places in self._alike(names, experts, scales).values():
                if len(places) > 1:
                    raise refusal(self.name, [names[place] for place in places], experts[places[0]], why_not)
            return None
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
        if all(unit.is_alone for unit in units) and (engine == AUTO or not any(map(_is_refused, units))):
            return None
        if engine != AUTO:
            self._require_grouped(names, units)
        return arrange(sorted(units, key=lambda unit: unit.positions[0]), plan)

    def _require_grouped(self, names: Sequence[str], units: Sequence[Unit]) -> None:
        """Refuse what runs looped, before anything runs.

        Raises:
            EngineRefusedError: Experts that are alike can't run as one.
        """
        for unit in units:
            if _is_refused(unit) and not isinstance(unit.fault, WrongResult):
                present = [names[place] for place in unit.positions]
                raise refusal(self.name, present, unit.modules[0], str(unit.fault))

    def _alike(
        self, names: Sequence[str], experts: Sequence[nn.Module], scales: Sequence[float]
    ) -> dict[tuple[Layout, bool], list[int]]:
        """The places of the experts by all that is known of them without a capture."""
        found: dict[tuple[Layout, bool], list[int]] = {}
        for place, layout in enumerate(self.classes.layouts(names, experts)):
            found.setdefault((layout, scales[place] == 0.0), []).append(place)
        return found

    def _worth_grouping(
        self, names: Sequence[str], experts: Sequence[nn.Module], scales: Sequence[float], plan: LevelPlan
    ) -> list[int]:
        """The places of the experts for whose kind a loop is estimated to cost more."""
        found = []
        on_cpu = plan.order.is_cpu
        for (layout, _), places in self._alike(names, experts, scales).items():
            if never_pays(layout, len(self._built), on_cpu=on_cpu):
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
            why_not = self.classes.refusal(name, expert) if record is None else record.fault_of(expert)[1]
            key = id(record) if record is not None and why_not is None else (layouts[place], why_not)
            groups.setdefault((key, scales[place]), []).append(place)
        shares_module = len(set(map(id, experts))) < len(experts)
        found = []
        for places in groups.values():
            expert, layout = experts[places[0]], layouts[places[0]]
            record = self.classes.known(names[places[0]], expert)
            why_not = self.classes.refusal(names[places[0]], expert) if record is None else record.fault
            if record is not None and why_not is None:
                why_not = record.fault_of(expert)[1]
            counts = None if plan is None else [plan.counts[place] for place in places]
            cost = estimate(
                layout, len(places), sum(counts or ()), on_cpu=_is_on_cpu(expert), has_backward=expert.training
            )
            how, looped = LOOPED, {}
            if shares_module:
                why_not = "share a module"
            if len(places) == 1:
                reason = "the only one of its kind"
            elif why_not is not None:
                reason = f"for its experts {why_not}"
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


def _refusal_of_all(experts: Sequence[nn.Module], given: LevelInput) -> str | None:
    """Why no experts can run as one, whatever they are."""
    if (passing := passing_refusal()) is not None:
        return passing
    if len(set(map(id, experts))) < len(experts):
        # One loop knows of it.
        return "share a module"
    if given.context.irregular is not None:
        # A list has no rows that could stand for those of several experts.
        return f"are given {given.context.irregular}, batch-aligned and no dense tensor"
    return None


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


def _blocks(
    given: LevelInput, plan: LevelPlan, scales: Sequence[float], positions: Sequence[Sequence[int]] = ()
) -> tuple[Blocks, Blocks | None, list[Any]]:
    """Hidden states, mask and the context's batch-aligned values, cut as the plan says.

    Args:
        given: What the level is given.
        plan: Says how.
        scales: What the gradient into each block is multiplied by.
        positions: Of each block's samples in the batch, for a context that is irregular.
    """
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
    if context.irregular is not None:
        return hidden_blocks, mask_blocks, [_selected(value, plan, positions) for value in context.aligned]
    return hidden_blocks, mask_blocks, [dispatch(tensor, plan) for tensor in context.aligned] if context.aligned else []


def _selected(value: Any, plan: LevelPlan, positions: Sequence[Sequence[int]]) -> Any:
    if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested:
        return dispatch(value, plan)
    return [select(value, each) for each in positions]


def _expert_batches(
    given: LevelInput, plan: LevelPlan, scales: Sequence[float], host_plan: RoutingPlan
) -> list[ExpertBatch]:
    """The batch of each expert present, in order."""
    context = given.context
    positions: list[list[int]] = []
    if context.irregular is not None:
        # From the host's plan: no device is asked.
        order, ends = host_plan.levels[plan.name].order.tolist(), list(accumulate(plan.counts))
        positions = [order[end - count : end] for end, count in zip(ends, plan.counts, strict=True)]
    blocks, mask_blocks, aligned_blocks = _blocks(given, plan, scales, positions)
    return [
        ExpertBatch(
            blocks[index] if scale == 1.0 else _scaled(blocks[index], scale),
            context.whole if context.is_whole else context.build([aligned[index] for aligned in aligned_blocks]),
            None if mask_blocks is None else mask_blocks[index],
            {"level": plan.name, "expert": name},
        )
        for index, (name, scale) in enumerate(zip(plan.present, scales, strict=True))
    ]


def _takes_gradients(rows: torch.Tensor) -> bool:
    return rows.is_floating_point() or rows.is_complex()


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
