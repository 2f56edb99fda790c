"""The comparison can fail: known wrong libraries are each caught, and for their own reason.

Each mutant is caught twice: on a case made for it, and by the property tests' own strategy within a few hundred
examples. Only a `ParityError` that names the right quantity counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from tests.parity import ParityError, assert_parity
from tests.strategies import Case, Expert, Level, Routes, pool

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


class _DoubledGradient(torch.autograd.Function):
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


@dataclass(frozen=True)
class Mutant:
    """A wrong library, the message of the comparison, a case made for it, and a test for other cases that may show
    it."""

    apply: Callable[[Patch], None]
    message: str
    case: Case = CASE
    visible: Callable[[Case], bool] = lambda case: True


EMPTY = replace(CASE, batch_size=0)


def is_empty(case: Case) -> bool:
    return case.batch_size == 0


ONE_EXPERT = {"family": Routes((0,) * 14), "language": Routes((0,) * 14)}


def has(*kinds: str, levels: int = 1, training: bool = False) -> Callable[[Case], bool]:
    """Cases with such experts, in so many levels."""

    def visible(case: Case) -> bool:
        found = sum(any(expert.kind in kinds for expert in level.experts) for level in case.enabled)
        return found >= levels and case.batch_size > 1 and (case.training or not training)

    return visible


IN_PLACE = of_kind("in_place_discarded", hidden_grad=False, routing=ONE_EXPERT)
IN_PLACE_FIRST = replace(IN_PLACE, levels=(IN_PLACE.levels[0], of_kind("scale").levels[1]))
SURROUNDINGS = of_kind(
    "in_place_surroundings",
    mask="float",
    context="dict",
    # Families and languages in one running order.
    routing={
        "family": CASE.routing["family"],
        "language": Routes(tuple({0: 0, 1: 3, 2: 1}[each] for each in CASE.routing["family"].ids)),
    },
)
ALL_DETACHED = replace(
    CASE,
    levels=tuple(
        replace(level, experts=tuple(replace(expert, stop=True, scale=None) for expert in level.experts))
        for level in CASE.levels
    ),
)
FLAG_AND_SCALE = replace(
    CASE,
    levels=tuple(
        replace(level, experts=tuple(replace(expert, stop=True, scale=0.5) for expert in level.experts))
        for level in CASE.levels
    ),
)
INFERRED = replace(
    CASE,
    levels=(replace(CASE.levels[0], fallback="absent"), CASE.levels[1]),
    routing={"language": CASE.routing["language"]},
)

SAME_ORDER = replace(CASE, routing=SURROUNDINGS.routing)


def has_levels_of_one_order(case: Case) -> bool:
    """True if a level's rows come from the level above without a gather, and gradients flow."""
    plan = celmoe.RoutingCompiler(case.config())(case.inputs(0).routing, case.batch_size)
    return case.training and any(level.follows_previous and not level.is_sorted for level in plan.levels.values())


MASK = has("reads_mask", "in_place_surroundings", "transformer")
CONTEXT = has("reads_context", "in_place_surroundings", "context_view", "embedding")


def reads_shared(case: Case) -> bool:
    """`Shared` values that experts read."""
    return case.context == "shared" and has("reads_context")(case)


def works_in_place(case: Case) -> bool:
    """In-place work that autograd would not refuse first."""
    return not case.hidden_grad and has("in_place_discarded", "in_place", "in_place_relu")(case)


MUTANTS = {
    "rows of two experts swapped": Mutant(change_results(swap_rows_of_two_experts), RESULT),
    "neighbouring rows swapped": Mutant(change_rows(lambda rows: rows.roll(1, 0)), RESULT),
    "an expert's rows reversed": Mutant(change_rows(lambda rows: rows.flip(0)), RESULT),
    "an expert skipped": Mutant(change_results(skip_an_expert), RESULT),
    "rows doubled": Mutant(change_rows(lambda rows: rows * 2), RESULT),
    "rows off by one part in ten thousand": Mutant(change_rows(lambda rows: rows * 1.0001), RESULT),
    "gradient doubled": Mutant(change_rows(_DoubledGradient.apply), GRADIENT),
    "gradient lost": Mutant(change_batches(detach_the_rows), r"gradient of 'hidden': (is None|values differ)"),
    "zeros for absent experts": Mutant(
        change_output(give_absent_experts_zeros), r"gradient of 'level_modules.*': is a tensor, should be None"
    ),
    "mask lost": Mutant(change_batches(lose_the_mask), RESULT, of_kind("reads_mask", mask="float"), MASK),
    "mask misaligned": Mutant(change_batches(roll_the_mask), RESULT, of_kind("reads_mask", mask="bool"), MASK),
    "mask's gradient lost": Mutant(
        change_batches(detach_the_mask), r"gradient of 'mask': is None", of_kind("reads_mask", mask="grad"), MASK
    ),
    "context misaligned": Mutant(
        change_blocks(lambda blocks: [block.roll(1, 0) for block in blocks]),
        RESULT,
        of_kind("reads_context", context="nested"),
        CONTEXT,
    ),
    "context's gradient lost": Mutant(
        change_blocks(lambda blocks: [block.detach() for block in blocks]),
        r"gradient of 'context.*': is None",
        of_kind("reads_context", context="dict"),
        CONTEXT,
    ),
    "shared context cut": Mutant(cut_what_is_shared, RESULT, of_kind("reads_context", context="shared"), reads_shared),
    "a loss lost": Mutant(change_results(lose_a_loss), r"levels\[.*\]\.losses: is ", visible=has("losses")),
    "losses doubled": Mutant(
        change_results(sum_losses_twice), r"levels\[.*\]\.losses\[.*\]: values differ", visible=has("losses")
    ),
    "loss weight ignored": Mutant(
        change_output(ignore_loss_weights), r"levels\[.*\]\.loss_weights: is ", visible=has("losses")
    ),
    "losses shared alike": Mutant(
        change_output(share_losses_alike), r"levels\[.*\]\.loss_shares: is ", visible=has("losses")
    ),
    "aux lost": Mutant(change_results(lose_aux), r"levels\[.*\]\.aux: is ", visible=has("aux")),
    "state of another expert": Mutant(
        change_batches(name_another_expert), RESULT, of_kind("reads_state"), has("reads_state")
    ),
    "gradient scale ignored": Mutant(round_gradient_scales, GRADIENT),
    "detachment ignored": Mutant(
        pass_all_gradients, r"gradient of 'hidden': is a tensor, should be None", ALL_DETACHED
    ),
    "flag over gradient scale": Mutant(
        let_the_flag_decide, r"gradient of 'hidden': is None", FLAG_AND_SCALE, lambda case: case.hidden_grad
    ),
    "dispatch goes back by order": Mutant(dispatch_back_by_order, r"gradient of 'hidden': values differ"),
    "combine goes back by inverse": Mutant(combine_back_by_inverse, GRADIENT),
    "combine by order": Mutant(combine_by(lambda plan: plan.order), RESULT),
    "combine left out": Mutant(combine_by(lambda plan: torch.arange(len(plan.order))), RESULT),
    "level's memory transposed": Mutant(transpose_in_memory, r"levels\[.*\]\.hidden\.is_contiguous\(\): is False"),
    "routes reversed": Mutant(reverse_routes, r"levels\[.*\]\.routes: is "),
    "parents ignored": Mutant(
        ignore_parents, r"levels\[.*\]\.routes: is ", INFERRED, lambda case: len(case.routing) < len(case.enabled)
    ),
    "caller's routes reversed": Mutant(reverse_the_callers_routes, r"caller's routing: is "),
    "dtype dropped": Mutant(
        change_rows(drop_the_dtype), r"levels\[.*\]\.hidden\.dtype: is torch.float32", of_kind("scale", fusion="mean")
    ),
    "in-place work reaches the caller": Mutant(
        leak_to_the_caller, r"caller's hidden: changed", IN_PLACE_FIRST, works_in_place
    ),
    "in-place work reaches the level above": Mutant(leak_to_the_caller, RESULT, IN_PLACE, works_in_place),
    "in-place work reaches the next level": Mutant(
        leak_to_the_next_level, RESULT, SURROUNDINGS, has("in_place_surroundings", levels=2)
    ),
    "a level's output left out of the graph": Mutant(
        leave_the_levels_output_out,
        r"gradient of levels\[.*\]\.hidden: (is None|values differ)",
        SAME_ORDER,
        has_levels_of_one_order,
    ),
    "experts run backwards": Mutant(run_experts_backwards, RESULT, of_kind("dropout"), has("dropout", training=True)),
    "experts run twice": Mutant(run_experts_twice, r"buffer '.*': values differ", of_kind("counts"), has("counts")),
    "a random number too many": Mutant(change_results(draw_a_number_more), r"random stream: another number of draws"),
    "no samples cut off": Mutant(
        without_samples(cut_no_samples_off),
        r"levels\[.*\]\.hidden\.requires_grad: is False, should be True",
        EMPTY,
        is_empty,
    ),
    "no rows cut off": Mutant(
        without_samples(cut_no_rows_off), r"gradient of 'hidden': is None, should be a tensor", EMPTY, is_empty
    ),
    "mask of no samples cut off": Mutant(
        without_samples(cut_no_mask_off),
        r"gradient of 'mask': is None, should be a tensor",
        replace(EMPTY, mask="grad"),
        is_empty,
    ),
    "context of no samples cut off": Mutant(
        without_samples(cut_no_context_off),
        r"gradient of 'context.*': is None, should be a tensor",
        replace(EMPTY, context="shared"),
        is_empty,
    ),
    "no samples of trained experts cut off": Mutant(
        without_samples(forget_what_is_trained),
        r"levels\[.*\]\.hidden\.requires_grad: is False, should be True",
        replace(EMPTY, hidden_grad=False),
        is_empty,
    ),
    "no samples pass detached experts": Mutant(
        lambda patch: patch.setattr(celmoe.level.Level, "is_detached", False),
        r"gradient of 'hidden': is a tensor, should be None",
        replace(ALL_DETACHED, batch_size=0),
        is_empty,
    ),
    "an expert runs on no samples": Mutant(
        without_samples(run_an_expert_on_no_samples),
        r"gradient of 'level_modules.*': is a tensor, should be None",
        EMPTY,
        is_empty,
    ),
    "the oracle cuts no samples off": Mutant(
        lambda patch: patch.setattr(celmoe.reference, "_no_rows", lambda *args: torch.zeros_like(args[2])),
        r"levels\[.*\]\.hidden\.requires_grad: is True, should be False",
        EMPTY,
        is_empty,
    ),
    "the oracle instead of the engine": Mutant(let_the_oracle_run, r"engine: 'looped' ran 0 times"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught_on_a_case_made_for_it(name: str, monkeypatch: pytest.MonkeyPatch):
    mutant = MUTANTS[name]
    assert_parity(mutant.case.model("looped"), mutant.case.inputs)
    mutant.apply(monkeypatch)
    with pytest.raises(ParityError, match=f"^{mutant.message}"):
        assert_parity(mutant.case.model("looped"), mutant.case.inputs)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_property_tests_catch_a_mutant(name: str, monkeypatch: pytest.MonkeyPatch):
    mutant = MUTANTS[name]
    mutant.apply(monkeypatch)
    assert any(_catches(mutant, case) for case in pool() if mutant.visible(case))


def _catches(mutant: Mutant, case: Case) -> bool:
    try:
        assert_parity(case.model("looped"), case.inputs, objective=case.objective, optimizers=(), seed=case.seed)
    except ParityError as error:
        return re.match(mutant.message, str(error)) is not None
    except Exception:  # noqa: BLE001  # a mutant may crash as well, which proves nothing about the comparison
        return False
    return False


def test_a_stale_plan_is_caught_in_the_second_step(monkeypatch: pytest.MonkeyPatch):
    remember_the_first_plan(monkeypatch)
    first = CASE.inputs

    def same_size(step: int) -> Any:
        other = {level: Routes(routes.ids[step:] + routes.ids[:step]) for level, routes in CASE.routing.items()}
        return replace(CASE, routing=other).inputs(0) if step else first(0)

    with pytest.raises(ParityError, match=r"levels\['family'\]\.routes: is "):
        assert_parity(CASE.model("looped"), same_size)


def test_nothing_to_compare_is_no_agreement(monkeypatch: pytest.MonkeyPatch):
    # All gradients thrown away on both sides, by a backward that does nothing.
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    with pytest.raises(ParityError, match="gradients: none to compare"):
        assert_parity(CASE.model("looped"), CASE.inputs, optimizers=())


def test_an_oracle_that_runs_the_engine_is_caught(monkeypatch: pytest.MonkeyPatch):
    def cheat(model: HierarchicalCELMoE, *args: Any, per_sample: bool) -> CELMoEOutput:
        return model(*args)

    monkeypatch.setattr("tests.parity.reference_forward", cheat)
    with pytest.raises(ParityError, match="engine: the oracle ran it"):
        assert_parity(CASE.model("looped"), CASE.inputs)


def test_values_that_are_not_finite_compare_with_nothing():
    case = of_kind("scale", fusion="mean")
    model = case.model("looped")
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    with pytest.raises(ParityError, match=r"levels\['family'\]\.hidden: the oracle's values are not finite"):
        assert_parity(model, case.inputs)


def scaled(factor: float, case: Case) -> None:
    """Compare an engine whose rows are off by this factor, with the oracle in float64 at hand."""
    wide = replace(case, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        change_rows(lambda rows: rows * factor)(patch)
        assert_parity(
            *(case.model("looped"), case.inputs), optimizers=(), in_float64=lambda: (wide.model("looped"), wide.inputs)
        )


def test_an_error_of_a_few_roundings_is_none_of_rounding():
    """Float64 at hand excuses nothing if the oracle is exact to a rounding."""
    case = replace(CASE, dtype=torch.float32)
    scaled(1 + 2e-6, case)
    with pytest.raises(ParityError, match=RESULT):
        scaled(1 + 3e-5, case)


def test_rounding_that_the_step_itself_magnifies_is_no_error():
    """Rows far from zero, then normalized: the oracle is itself off by more than the tolerance."""

    def far_from_zero(case: Case) -> Any:
        def make_inputs(step: int) -> Any:
            inputs = case.inputs(step)
            hidden = 1000 + inputs.hidden.detach()
            return replace(inputs, hidden=hidden, leaves={})

        return make_inputs

    case = replace(of_kind("identity"), fusion="position_aware", dtype=torch.float32)
    wide = replace(case, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        change_rows(lambda rows: rows * (1 + torch.finfo(rows.dtype).eps))(patch)
        with pytest.raises(ParityError, match=GRADIENT):
            assert_parity(case.model("looped"), far_from_zero(case), optimizers=())
        in_float64 = wide.model("looped"), far_from_zero(wide)
        assert_parity(case.model("looped"), far_from_zero(case), optimizers=(), in_float64=lambda: in_float64)


def test_an_optimizer_that_touches_absent_experts_is_caught(monkeypatch: pytest.MonkeyPatch):
    """An AdamW decays parameters without gradients, in both: only the look at untouched parameters can see it."""
    right = torch.optim.AdamW.step

    def wrong(self: torch.optim.AdamW, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.99)
        return right(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", wrong)
    with pytest.raises(ParityError, match=r"parameter 'level_modules.family.absent.*: changed, though it never had"):
        assert_parity(CASE.model("looped"), CASE.inputs)


def test_the_right_library_passes_with_evidence():
    evidence = assert_parity(CASE.model("looped"), CASE.inputs)
    # One comparison alone, and two training steps with either optimizer; the second step has half the rows.
    assert (evidence.steps, evidence.engine_calls, evidence.rows) == (4, 10, 2 * (14 + 2 * (14 + 7)))
    assert evidence.gradients > 100
    assert evidence.missing_gradients >= 2 * 5  # the absent expert's weight and bias
    assert evidence.losses > 0
