"""One level of the hierarchy: dispatch its rows, run its experts, combine their results."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from .config import ExpertConfig, HierarchyLevelConfig
from .engines.arrangement import Arrangement, arrange
from .engines.choice import LOOPED, Decision, LevelChoice, Present
from .engines.grouped import Extras, UnitBatch, UnitResult
from .engines.registry import ENGINES
from .errors import ConfigTypeError, UnknownExpertError, UnknownLevelError, listed, nearest
from .experts import ExpertBatch, ExpertResult
from .explain import ClassExplanation, LevelExplanation, explain_level, parameter_bytes, spread_of
from .grouped.classes import LevelInputLike, Unit
from .names import NamedModules, modules_named, name_key
from .outputs import LevelOutput
from .routing.plan import LevelPlan, RoutingPlan
from .rows.blocks import Blocks
from .rows.context import ContextRows, select
from .rows.dispatch import combine, dispatch, relay
from .stacked.presence import watch
from .stacked.stack import looping, slots_of
from .torch_internals import is_forward_differentiated, transforms_are_active


class LevelInput(NamedTuple):
    """A level's input.

    Attributes:
        hidden: ``[B, ...]`` in batch order: the caller's rows, or the level above's.
        blocks: The same rows in blocks, from the experts of the level above; ``None`` for the first level, and if the
            blocks came in another order than that level's plan has.
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
    """The modules of each level's present experts, looked up now, since any may have been replaced.

    Raises:
        UnknownLevelError, UnknownExpertError: A level or expert has been removed since the model was built.
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
    """One level of a model: its config, and the knowledge of its experts' classes.

    Construction fixes the name and the experts; every call reads the experts' flags from the config.

    Attributes:
        config: The level's config.
        name: The level's name.
        choice: Decides how the level's experts run.
        anchor: An empty leaf, by which a graph that holds the level as one operator finds its way back into it.
    """

    def __init__(self, config: HierarchyLevelConfig) -> None:
        self.config = config
        self.name = config.name
        self._built = dict(config.experts)
        self.choice = LevelChoice(self.name, len(self._built))
        self.anchor = torch.zeros(0, requires_grad=True)

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of the experts that the level was built with, in the config's order."""
        return tuple(self._built)

    def flags(self, expert: str) -> ExpertConfig:
        """The config with an expert's flags: the one under the expert's name, else the one from construction.

        Raises:
            ConfigTypeError: Something else stands under the expert's name, or the expert was never built.
        """
        found = self.config.experts.get(expert, self._built.get(expert))
        if not isinstance(found, ExpertConfig):
            where = f"levels[{self.name!r}].experts[{expert!r}]"
            raise ConfigTypeError(f'"{where}" must be an ExpertConfig (got {found!r})')
        return found

    def scales(self, experts: Collection[str]) -> list[float]:
        """The `input_gradient_scale` of each expert.

        Raises:
            ConfigTypeError: See `flags`.
        """
        configs = self.config.experts
        try:
            # Every call asks for every expert, most of which have no flag set.
            return [
                1.0
                if type(each) is ExpertConfig and each.gradient_scale is None and not each.stop_gradient_from_parent
                else each.input_gradient_scale
                for each in [configs[expert] for expert in experts]
            ]
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
            experts: The modules of the present experts; for a batch without samples, of all experts.
            engine: The engine's name.
            given: The level's input.
            plan: The level's plan.
            host_plan: The plan of all levels as the caller holds it. If the batch was routed by names, reading its
                routes asks no device.

        Returns:
            The level's output, and the same rows in the experts' blocks; ``None`` for blocks in another order than the
            plan's.
        """
        if not plan.present:
            rows = self._of_no_samples(experts, given) if plan.mixture is None else _passed(experts, given)
            return LevelOutput.with_deferred_routes(self.name, rows, host_plan.routes), None
        scales = self.scales(plan.present)
        present = Present(plan.present, experts, scales, plan)
        decisions = self.choice.decide(engine, present, LevelInputLike(given.hidden, given.mask, given.context))
        arranged = arrange([decision.unit for decision in decisions], plan) if decisions else None
        if arranged is None:
            batches, passed = _expert_batches(given, plan, scales, host_plan)
            with looping():
                results = ENGINES[engine](experts, batches)
            _watch_experts(experts, results)
            blocks: list[torch.Tensor] = [result.hidden for result in results]
            extras: dict[int, Extras] = {place: (result.losses, result.aux) for place, result in enumerate(results)}
        else:
            batches, passed = _unit_batches(given, arranged)
            with looping():
                results = ENGINES[engine](arranged.units, batches)
            for unit, result in zip(arranged.units, results, strict=True):
                _watch_unit(unit, result)
            blocks, extras = _by_expert(arranged, results)
        order = plan if arranged is None else arranged.plan._replace(counts=tuple(map(len, blocks)))
        promoted = promoted_blocks([*blocks, *passed])
        output = LevelOutput.with_deferred_routes(self.name, combine(promoted, order), host_plan.routes)
        if promoted[0].dtype is not given.hidden.dtype:
            names = [(name,) for name in plan.present] if arranged is None else arranged.names
            output.__dict__["_recast"] = _recast(self.name, given.hidden.dtype, names, results)
        for place in sorted(extras):
            expert, (losses, aux) = plan.present[place], extras[place]
            if losses:
                count, num_samples, weight = plan.counts[place], given.hidden.shape[0], self.flags(expert).loss_weight
                if plan.weights is not None:
                    weight *= plan.weights[place] / count
                # While a tracer follows, the quotient of a level's only expert would be a symbol.
                share = 1.0 if count == num_samples else count / num_samples
                _add_losses(output, expert, losses, weight, share)
            if aux:
                output.aux[expert] = dict(aux)
        return output, promoted if order.order is plan.order and plan.mixture is None else None

    def explain(
        self, modules: NamedModules, engine: str, experts: Sequence[nn.Module], plan: LevelPlan | None
    ) -> LevelExplanation:
        """Explain how the level would run.

        Args:
            modules: All the level's experts.
            engine: The engine's name.
            experts: The modules of the experts in the plan; without a plan, of all experts.
            plan: The level's plan.
        """
        names = tuple(modules) if plan is None else plan.present
        classes: list[ClassExplanation] = []
        if engine != LOOPED and experts:
            present = Present(names, experts, self.scales(names), plan)
            classes = [_explained(decision, present) for decision in self.choice.foresee(engine, present)]
        return explain_level(self.name, modules, engine, experts, plan, classes)

    @property
    def is_detached(self) -> bool:
        """True if no expert lets gradients into the level's input."""
        return not any(self.scales(self._built))

    def _of_no_samples(self, experts: Sequence[nn.Module], given: LevelInput) -> torch.Tensor:
        """The level's output for a batch without samples, ``[0, ...]``.

        Its backward pass gives zeros to all tensors that an expert's rows might have reached: a module before the model
        gets the gradient that other ranks may wait for. Experts' parameters get no gradient, for no expert has run.
        """
        rows = given.hidden.detach() if self.is_detached else given.hidden
        rows = rows.clone(memory_format=torch.contiguous_format)
        parameters = [parameter for expert in experts for parameter in expert.parameters()]
        if not _takes_gradients(rows):
            # Experts that look up integers return their parameters' dtype.
            rows = rows.to(next((each.dtype for each in parameters if each.is_floating_point()), rows.dtype))
        if not torch.is_grad_enabled() or not _takes_gradients(rows):
            return rows
        for tensor in (given.mask, *given.context.aligned, *given.context.shared.values()):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                rows = rows + tensor.sum().real.to(rows)
        return rows if rows.requires_grad else _with_leaf(rows, experts)


def _with_leaf(rows: torch.Tensor, experts: Sequence[nn.Module]) -> torch.Tensor:
    """The rows of experts that have not run, as those of experts with parameters to train.

    A leaf lets a backward pass start here, as from an expert's rows, and reach nothing. (The compiler takes no leaf
    that a graph makes.)
    """
    is_trained = any(parameter.requires_grad for expert in experts for parameter in expert.parameters())
    if is_trained and not torch.compiler.is_compiling():
        return rows + torch.zeros((), dtype=rows.dtype, device=rows.device, requires_grad=True)
    return rows


def _watch_experts(experts: Sequence[nn.Module], results: Sequence[ExpertResult]) -> None:
    """Let backward passes note the stacked experts among these, each with a result of its own."""
    slots = slots_of(experts)
    if not any(slots) or not torch.is_grad_enabled() or transforms_are_active():
        return
    for slot, result in zip(slots, results, strict=True):
        if slot is not None:
            losses = [each for each in result.losses.values() if isinstance(each, torch.Tensor)]
            watch([result.hidden, *losses], slot.stack, [slot.member])


def _watch_unit(unit: Unit, result: ExpertResult) -> None:
    """Let backward passes note the members of a stack among a unit's experts."""
    if not isinstance(result, UnitResult):
        _watch_experts(unit.modules, [result])
    elif unit.stack is not None and torch.is_grad_enabled():
        is_whole = len(result.blocks) == 1
        for place, member in enumerate(unit.members if result.by_expert or not is_whole else ()):
            losses = result.by_expert[place][0].values() if result.by_expert else ()
            own = [each for each in losses if isinstance(each, torch.Tensor)]
            if own or not is_whole:
                watch([*own, *([] if is_whole else [result.blocks[place]])], unit.stack, [member])
        if is_whole:
            watch(result.blocks, unit.stack, unit.members)


def _explained(decision: Decision, present: Present) -> ClassExplanation:
    unit, plan = decision.unit, present.plan
    counts = None if plan is None else [plan.counts[place] for place in unit.positions]
    return ClassExplanation(
        architecture=type(unit.modules[0]).__name__,
        experts=tuple(present.names[place] for place in unit.positions),
        engine=decision.engine,
        reason=decision.reason,
        operations_looped={} if unit.is_alone or unit.record is None else unit.record.operations_looped,
        rows_per_expert=None if not counts else spread_of(counts),
        parameter_bytes=parameter_bytes(unit.modules),
    )


def _passed(experts: Sequence[nn.Module], given: LevelInput) -> torch.Tensor:
    """A level's output for samples that all pass through."""
    rows = given.hidden.clone(memory_format=torch.contiguous_format)
    if torch.is_grad_enabled() and _takes_gradients(rows) and not rows.requires_grad:
        # As from an expert's rows, a backward pass can start here.
        return _with_leaf(rows, experts)
    return rows


def _unit_batches(given: LevelInput, arranged: Arrangement) -> tuple[list[ExpertBatch], Blocks]:
    """The batch of each unit, in order; and the rows of samples without an expert, if there are some."""
    plan, units = arranged.plan, arranged.units
    names = arranged.names
    hidden_blocks, mask_blocks, aligned_blocks = _blocks(given, plan, [unit.scale for unit in units])
    context = given.context
    batches: list[ExpertBatch] = []
    for index, unit in enumerate(units):
        hidden = scaled(hidden_blocks[index], unit.scale)
        mask = None if mask_blocks is None else mask_blocks[index]
        aligned = [blocks[index] for blocks in aligned_blocks]
        if len(unit.modules) == 1:
            own = context.whole if context.is_whole else context.build(aligned)
            batches.append(ExpertBatch(hidden, own, mask, {"level": plan.name, "expert": names[index][0]}))
        else:
            counts = arranged.counts[index]
            batches.append(UnitBatch(hidden, None, mask, {}, plan.name, names[index], counts, aligned, context))
    return batches, hidden_blocks[len(units) :]


def _by_expert(arranged: Arrangement, results: Sequence[ExpertResult]) -> tuple[list[torch.Tensor], dict[int, Extras]]:
    """The rows of all units, and losses and aux by expert place, for the experts that may have some."""
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
    """Hidden states, mask and the context's batch-aligned values, cut by the plan.

    Args:
        given: The level's input.
        plan: The level's plan.
        scales: The factor on the gradient into each block.
        positions: The batch positions of each block's samples, for an irregular context.
    """
    hidden, blocks, context, mask = given
    # If all experts are detached, the level's input gets no gradient rather than zeros.
    is_detached = not any(scales) and (plan.mixture is None or not plan.mixture.num_passed)
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
) -> tuple[list[ExpertBatch], Blocks]:
    """The batch of each expert present, in order; and the rows of samples without an expert, if there are some."""
    context = given.context
    positions: list[list[int]] = []
    if context.irregular is not None:
        # Reading the host's plan asks no device.
        order, ends = host_plan.levels[plan.name].order.tolist(), list(accumulate(plan.counts))
        positions = [order[end - count : end] for end, count in zip(ends, plan.counts, strict=True)]
    blocks, mask_blocks, aligned_blocks = _blocks(given, plan, scales, positions)
    batches = [
        ExpertBatch(
            blocks[index] if scale == 1.0 else scaled(blocks[index], scale),
            context.whole if context.is_whole else context.build([aligned[index] for aligned in aligned_blocks]),
            None if mask_blocks is None else mask_blocks[index],
            {"level": plan.name, "expert": name},
        )
        for index, (name, scale) in enumerate(zip(plan.present, scales, strict=True))
    ]
    return batches, blocks[len(batches) :]


def _takes_gradients(rows: torch.Tensor) -> bool:
    return rows.is_floating_point() or rows.is_complex()


def scaled(rows: torch.Tensor, scale: float) -> torch.Tensor:
    """The rows, with the gradient into them scaled."""
    if scale == 1.0:
        return rows
    if scale == 0.0:
        return rows.detach()
    if (rows.requires_grad and torch.is_grad_enabled()) or is_forward_differentiated() or transforms_are_active():
        return cast(torch.Tensor, _ScaleGradient.apply(rows, scale))
    return rows


def promoted_blocks(blocks: Blocks) -> Blocks:
    """The blocks, in the dtype that their dtypes promote to."""
    first = blocks[0].dtype
    for block in blocks:
        if block.dtype is not first:
            dtype = reduce(torch.promote_types, {each.dtype for each in blocks})
            return [each.to(dtype) for each in blocks]
    return blocks


def _recast(level: str, dtype: torch.dtype, names: Sequence[Sequence[str]], results: Sequence[ExpertResult]) -> str:
    """A sentence on the experts that changed the dtype of their rows.

    Args:
        level: The level's name.
        dtype: The dtype of the experts' input rows.
        names: The experts behind each result.
        results: The experts' results.
    """
    found: dict[torch.dtype, list[str]] = {}
    for group, result in zip(names, results, strict=True):
        if result.hidden.dtype is not dtype:
            found.setdefault(result.hidden.dtype, []).extend(group)
    given = "; ".join(f"{each} by {listed(group)}" for each, group in found.items())
    return f"celmoe: level {level!r} was given rows of {dtype}, and its experts gave {given}"


def _add_losses(
    output: LevelOutput, expert: str, losses: Mapping[str, torch.Tensor], weight: float, share: float
) -> None:
    for loss, value in losses.items():
        key = f"{name_key(output.name)}.{name_key(expert)}.{loss}"
        output.losses[key] = value
        output.loss_weights[key] = weight
        output.loss_shares[key] = share
