"""The comparison can fail: known wrong libraries are each caught, and for their own reason.

Each mutant is caught twice: on a case made for it, and by the property tests' own strategy within a few hundred
examples. Only a `ParityError` that names the right quantity counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import celmoe.level
import celmoe.reference
import celmoe.rows.dispatch
from celmoe import CELMoEOutput, HierarchicalCELMoE
from tests.mutants import (
    CASE,
    GRADIENT,
    RESULT,
    DoubledGradient,
    Patch,
    change_batches,
    change_blocks,
    change_output,
    change_results,
    change_rows,
    combine_back_by_inverse,
    combine_by,
    cut_no_context_off,
    cut_no_mask_off,
    cut_no_rows_off,
    cut_no_samples_off,
    cut_what_is_shared,
    detach_the_mask,
    detach_the_rows,
    dispatch_back_by_order,
    draw_a_number_more,
    drop_the_dtype,
    forget_what_is_trained,
    give_absent_experts_zeros,
    ignore_loss_weights,
    ignore_parents,
    leak_to_the_caller,
    leak_to_the_next_level,
    leave_the_levels_output_out,
    let_the_flag_decide,
    let_the_oracle_run,
    lose_a_loss,
    lose_aux,
    lose_the_mask,
    name_another_expert,
    of_kind,
    pass_all_gradients,
    remember_the_first_plan,
    reverse_routes,
    reverse_the_callers_routes,
    roll_the_mask,
    round_gradient_scales,
    run_an_expert_on_no_samples,
    run_experts_backwards,
    run_experts_twice,
    share_losses_alike,
    skip_an_expert,
    sum_losses_twice,
    swap_rows_of_two_experts,
    transpose_in_memory,
    without_samples,
)
from tests.parity import ParityError, assert_parity
from tests.strategies import Case, Routes, pool


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
    "gradient doubled": Mutant(change_rows(DoubledGradient.apply), GRADIENT),
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
