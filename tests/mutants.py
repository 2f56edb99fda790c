"""Wrong libraries: each does one thing wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import celmoe.level
import celmoe.reference
import celmoe.rows.dispatch
from celmoe import CELMoEOutput, ExpertBatch, ExpertConfig, ExpertResult, HierarchicalCELMoE, LevelPlan, RoutingPlan
from celmoe.engines.registry import ENGINES
from celmoe.level import LevelInput
from celmoe.reference import reference_forward
from celmoe.rows.context import NO_CONTEXT, ContextRows
from tests.strategies import Case, Expert, Level, Routes

Patch = pytest.MonkeyPatch
RESULT = r"(levels\[.*\]\.hidden|fused_hidden): values differ"
GRADIENT = r"gradient of '.*': values differ"

CASE = Case(
    levels=(
        Level(
            "family",
            (
                Expert("slavic", "linear", scale=0.5),
                Expert("romance", "scale"),
                Expert("baltic", "losses", loss_weight=0.5),
                Expert("absent", "linear"),
            ),
        ),
        Level(
            "language",
            (
                Expert("ru", "mlp", parent="slavic"),
                Expert("fr", "linear", parent="romance"),
                Expert("it", "scale", parent="romance", stop=True),
                Expert("lt", "aux", parent="baltic"),
                Expert("lv", "losses", parent="baltic", loss_weight=3.0),
            ),
        ),
    ),
    batch_size=14,
    routing={
        "family": Routes((0, 1, 2, 1, 0, 2, 2, 1, 0, 0, 2, 1, 1, 2)),
        "language": Routes((4, 0, 3, 1, 2, 2, 0, 1, 4, 3, 3, 0, 2, 1)),
    },
    trailing=(2,),
    dtype=torch.float64,
    fusion="learned",
    seed=1,
)


def of_kind(kind: str, **changes: Any) -> Case:
    """`CASE` with every expert of one kind."""
    levels = tuple(
        replace(level, experts=tuple(replace(expert, kind=kind) for expert in level.experts)) for level in CASE.levels
    )
    return replace(CASE, levels=levels, **changes)


def change_results(change: Callable[[list[ExpertResult]], None]) -> Callable[[Patch], None]:
    """A mutant whose engine changes the results of its experts."""

    def apply(patch: Patch) -> None:
        right = ENGINES["looped"]

        def wrong(experts: Sequence[nn.Module], batches: Iterator[ExpertBatch]) -> list[ExpertResult]:
            # Copied: an expert may be shared, or have kept its result.
            results = [ExpertResult(each.hidden, dict(each.losses), dict(each.aux)) for each in right(experts, batches)]
            change(results)
            return results

        patch.setitem(ENGINES, "looped", wrong)

    return apply


def change_rows(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Patch], None]:
    """A mutant whose engine changes each expert's rows."""

    def change_all(results: list[ExpertResult]) -> None:
        for result in results:
            result.hidden = change(result.hidden)

    return change_results(change_all)


def change_batches(change: Callable[[ExpertBatch], None]) -> Callable[[Patch], None]:
    """A mutant whose engine changes its experts' batches."""

    def apply(patch: Patch) -> None:
        right = ENGINES["looped"]

        def wrong(experts: Sequence[nn.Module], batches: Iterator[ExpertBatch]) -> list[ExpertResult]:
            def changed() -> Iterator[ExpertBatch]:
                for batch in batches:
                    change(batch)
                    yield batch

            return right(experts, changed())

        patch.setitem(ENGINES, "looped", wrong)

    return apply


def swap_rows_of_two_experts(results: list[ExpertResult]) -> None:
    if len(results) > 1:
        first, second = results[0].hidden, results[1].hidden
        results[0].hidden = torch.cat([first[:-1], second[:1].to(first.dtype)])
        results[1].hidden = torch.cat([first[-1:].to(second.dtype), second[1:]])


def skip_an_expert(results: list[ExpertResult]) -> None:
    results[-1].hidden = torch.zeros_like(results[-1].hidden)


def lose_a_loss(results: list[ExpertResult]) -> None:
    for result in results:
        if result.losses:
            result.losses.popitem()


def sum_losses_twice(results: list[ExpertResult]) -> None:
    for result in results:
        result.losses = {name: value * 2 for name, value in result.losses.items()}


def lose_aux(results: list[ExpertResult]) -> None:
    for result in results:
        result.aux = {}


class DoubledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


def lose_the_mask(batch: ExpertBatch) -> None:
    batch.mask = None


def roll_the_mask(batch: ExpertBatch) -> None:
    batch.mask = None if batch.mask is None else batch.mask.roll(1, 0)


def detach_the_mask(batch: ExpertBatch) -> None:
    batch.mask = None if batch.mask is None else batch.mask.detach()


def detach_the_rows(batch: ExpertBatch) -> None:
    batch.hidden = batch.hidden.detach()


def drop_the_dtype(rows: torch.Tensor) -> torch.Tensor:
    return rows.float()


def name_another_expert(batch: ExpertBatch) -> None:
    batch.state["expert"] += "?"


def change_blocks(change: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> Callable[[Patch], None]:
    """A mutant whose experts see other context rows."""

    def apply(patch: Patch) -> None:
        right = ContextRows.build
        patch.setattr(ContextRows, "build", lambda self, blocks: right(self, change(list(blocks))))

    return apply


def cut_what_is_shared(patch: Patch) -> None:
    """`Shared` is unwrapped too early, so that its tensors are cut like any other."""
    right = ContextRows._child

    def wrong(self: ContextRows, value: object, path: Any) -> Any:
        return right(self, value.value if isinstance(value, celmoe.Shared) else value, path)

    patch.setattr(ContextRows, "_child", wrong)


def change_output(change: Callable[[HierarchicalCELMoE, CELMoEOutput], None]) -> Callable[[Patch], None]:
    """A mutant whose model changes its output at the end."""

    def apply(patch: Patch) -> None:
        right = HierarchicalCELMoE.forward

        def wrong(self: HierarchicalCELMoE, *args: Any, **options: Any) -> CELMoEOutput:
            output = right(self, *args, **options)
            change(self, output)
            return output

        patch.setattr(HierarchicalCELMoE, "forward", wrong)

    return apply


def ignore_loss_weights(model: HierarchicalCELMoE, output: CELMoEOutput) -> None:
    for each in (output, *output.levels.values()):
        each.loss_weights = dict.fromkeys(each.loss_weights, 1.0)


def share_losses_alike(model: HierarchicalCELMoE, output: CELMoEOutput) -> None:
    for each in (output, *output.levels.values()):
        each.loss_shares = dict.fromkeys(each.loss_shares, 1 / max(len(each.loss_shares), 1))


def give_absent_experts_zeros(model: HierarchicalCELMoE, output: CELMoEOutput) -> None:
    """A stack of all experts' weights gives zeros to those that no sample came to."""
    nothing = sum(0 * parameter.sum() for parameter in model.level_modules.parameters() if parameter.requires_grad)
    for level in output.levels.values():
        level.hidden = level.hidden + nothing
    output.fused_hidden = output.fused_hidden + nothing


def pass_all_gradients(patch: Patch) -> None:
    patch.setattr(ExpertConfig, "input_gradient_scale", property(lambda self: 1.0))


def round_gradient_scales(patch: Patch) -> None:
    right = ExpertConfig.input_gradient_scale.fget
    patch.setattr(ExpertConfig, "input_gradient_scale", property(lambda self: float(right(self) > 0)))


def let_the_flag_decide(patch: Patch) -> None:
    right = ExpertConfig.input_gradient_scale.fget
    patch.setattr(
        ExpertConfig,
        "input_gradient_scale",
        property(lambda self: 0.0 if self.stop_gradient_from_parent else right(self)),
    )


def dispatch_back_by_order(patch: Patch) -> None:
    patch.setattr(celmoe.rows.dispatch, "FEW_ROWS", 0)
    right = celmoe.rows.dispatch._Dispatch.backward

    def wrong(ctx: Any, *grads: Any) -> Any:
        ctx.order, ctx.inverse = ctx.inverse, ctx.order
        return right(ctx, *grads)

    patch.setattr(celmoe.rows.dispatch._Dispatch, "backward", staticmethod(wrong))


def combine_back_by_inverse(patch: Patch) -> None:
    patch.setattr(celmoe.rows.dispatch, "FEW_ROWS", 0)
    right = celmoe.rows.dispatch._Combine.backward

    def wrong(ctx: Any, *grads: Any) -> Any:
        ctx.order, ctx.inverse = ctx.inverse, ctx.order
        return right(ctx, *grads)

    patch.setattr(celmoe.rows.dispatch._Combine, "backward", staticmethod(wrong))


def combine_by(index: Callable[[LevelPlan], torch.Tensor]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        patch.setattr(
            celmoe.level, "combine", lambda blocks, plan: torch.cat(tuple(blocks)).index_select(0, index(plan))
        )

    return apply


def transpose_in_memory(patch: Patch) -> None:
    right = celmoe.level.combine
    patch.setattr(
        celmoe.level,
        "combine",
        lambda rows, plan: right(rows, plan).transpose(0, -1).contiguous().transpose(0, -1),
    )


def reverse_routes(patch: Patch) -> None:
    right = RoutingPlan.routes
    patch.setattr(RoutingPlan, "routes", lambda self, level: right(self, level)[::-1])


def ignore_parents(patch: Patch) -> None:
    right = celmoe.RoutingCompiler.__init__

    def wrong(self: Any, config: Any) -> None:
        right(self, config)
        for parents in self._parents:
            parents.fill(-1)

    patch.setattr(celmoe.RoutingCompiler, "__init__", wrong)


def reverse_the_callers_routes(patch: Patch) -> None:
    right = celmoe.RoutingCompiler.compile

    def wrong(self: Any, routing: Any, *args: Any, **options: Any) -> Any:
        plan = right(self, routing, *args, **options)
        for routes in routing.values() if isinstance(routing, dict) else []:
            if isinstance(routes, list):
                routes.reverse()
        return plan

    patch.setattr(celmoe.RoutingCompiler, "compile", wrong)


def leak_to_the_caller(patch: Patch) -> None:
    """Views instead of private rows, if the batch is in expert order."""
    right = celmoe.level.dispatch

    def wrong(rows: torch.Tensor, plan: LevelPlan, **options: Any) -> Any:
        return (
            rows.split(list(plan.counts)) if plan.is_sorted and not rows.requires_grad else right(rows, plan, **options)
        )

    patch.setattr(celmoe.level, "dispatch", wrong)


def leak_to_the_next_level(patch: Patch) -> None:
    """Mask and context rows are kept from level to level of one order, with the experts' writes in them."""
    right = celmoe.level.dispatch
    kept: dict[Any, Any] = {}

    def wrong(rows: torch.Tensor, plan: LevelPlan, **options: Any) -> Any:
        if options or not plan.follows_previous:
            kept[id(rows), plan.counts] = (rows, right(rows, plan, **options))
        if (id(rows), plan.counts) not in kept:
            return right(rows, plan)
        return kept[id(rows), plan.counts][1]

    patch.setattr(celmoe.level, "dispatch", wrong)


def leave_the_levels_output_out(patch: Patch) -> None:
    """The right rows and gradients, but past the output of the level above."""
    patch.setattr(
        celmoe.level,
        "relay",
        lambda rows, blocks, plan: [block.clone() for block in torch.cat(tuple(blocks)).split(list(plan.counts))],
    )


def run_experts_backwards(patch: Patch) -> None:
    """The right rows, but another stream of random numbers for each expert."""
    right = ENGINES["looped"]

    def wrong(experts: Sequence[nn.Module], batches: Iterator[ExpertBatch]) -> list[ExpertResult]:
        given = list(batches)
        results = [right([expert], iter([batch])) for expert, batch in zip(experts[::-1], given[::-1], strict=True)]
        return [result for (result,) in results[::-1]]

    patch.setitem(ENGINES, "looped", wrong)


def run_experts_twice(patch: Patch) -> None:
    right = ENGINES["looped"]

    def wrong(experts: Sequence[nn.Module], batches: Iterator[ExpertBatch]) -> list[ExpertResult]:
        given = list(batches)
        state = torch.get_rng_state()
        results = right(experts, iter(given))
        for expert, batch in zip(experts, given, strict=True):
            if any(True for _ in expert.buffers()):
                expert(ExpertBatch(batch.hidden.detach().clone(), None, None, dict(batch.state)))
        torch.set_rng_state(state if not any(m.training for m in experts) else torch.get_rng_state())
        return results

    patch.setitem(ENGINES, "looped", wrong)


def draw_a_number_more(results: list[ExpertResult]) -> None:
    torch.rand(())


def let_the_oracle_run(patch: Patch) -> None:
    def wrong(self: HierarchicalCELMoE, *args: Any) -> CELMoEOutput:
        return reference_forward(self, *args)

    patch.setattr(HierarchicalCELMoE, "forward", wrong)


def remember_the_first_plan(patch: Patch) -> None:
    """A cache by the batch's size, as if the routes of one batch were those of the next."""
    right = celmoe.RoutingCompiler.compile

    def wrong(self: Any, *args: Any, **options: Any) -> Any:
        return self.__dict__.setdefault("_remembered", right(self, *args, **options))

    patch.setattr(celmoe.RoutingCompiler, "compile", wrong)


def without_samples(change: Callable[[Any, list[nn.Module], LevelInput], torch.Tensor]) -> Callable[[Patch], None]:
    """A mutant whose levels give something else of no samples: ``change`` is given the level, its experts and input."""
    return lambda patch: patch.setattr(celmoe.level.Level, "_of_no_samples", change)


NO_SAMPLES = celmoe.level.Level._of_no_samples


def cut_no_samples_off(level: Any, experts: list[nn.Module], given: LevelInput) -> torch.Tensor:
    return torch.zeros_like(given.hidden)


def cut_no_rows_off(level: Any, experts: list[nn.Module], given: LevelInput) -> torch.Tensor:
    return NO_SAMPLES(level, experts, given._replace(hidden=given.hidden.detach()))


def cut_no_mask_off(level: Any, experts: list[nn.Module], given: LevelInput) -> torch.Tensor:
    return NO_SAMPLES(level, experts, given._replace(mask=None))


def cut_no_context_off(level: Any, experts: list[nn.Module], given: LevelInput) -> torch.Tensor:
    return NO_SAMPLES(level, experts, given._replace(context=NO_CONTEXT))


def forget_what_is_trained(level: Any, experts: list[nn.Module], given: LevelInput) -> torch.Tensor:
    return NO_SAMPLES(level, [], given)


def run_an_expert_on_no_samples(level: Any, experts: list[nn.Module], given: LevelInput) -> torch.Tensor:
    """Run an expert on no samples, so that its parameters get zeros."""
    return NO_SAMPLES(level, experts, given) + sum(parameter.sum() for parameter in experts[0].parameters())
