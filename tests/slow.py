"""The cases that the default run leaves out: by a table, or where a test lists its cases.

A default run has every test, with one case of each kind at least; another dtype, engine or mode of a kind that has run
is slow. ``pytest -m slow`` runs what is left out, ``pytest -m ""`` all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest

# By file and test, the cases that stay: those whose id has this pattern, or each n-th, the first or another one first.
STAY: dict[str, str | int | tuple[int, int]] = {
    # Other dtypes run the same graph with the same kernels.
    "test_grouped_reach::test_runs_grouped_and_like_the_loop": "float32",
    "test_grouped_reach::test_in_bfloat16": 8,
    "test_grouped_reach::test_under_autocast": 8,
    "test_grouped_reach::test_modules_of_other_packages": "float32",
    "test_grouped_reach::test_a_parametrized_expert_that_differs_runs_apart": 2,
    "test_zoo::test_runs_grouped_and_like_the_oracle": "float32",
    "test_zoo::test_in_bfloat16_grouped_is_as_near_to_float64_as_the_loop": 7,
    "test_zoo::test_grouped_compiles_without_a_break": "MLP",
    "test_zoo_arguments::test_dropout_in_training_alone_grouped_too": 4,
    "test_zoo::test_stacks_as_one_class_and_trains_like_ordinary_experts_in_grouped": 3,
    "test_zoo_attached::test_changes_nothing_before_it_is_trained": 3,
    "test_grouped_features::test_autocast": 2,
    # Every trap is in one of two tests: half of them come late, and half are there from the first call on.
    "test_grouped_traps_state::test_armed_after_a_grouped_call": (2, 0),
    "test_grouped_traps_state::test_grouped_refuses_and_says_why": (2, 1),
    "test_grouped_traps_rows::test_armed_after_a_grouped_call": (2, 0),
    "test_grouped_traps_rows::test_grouped_refuses_and_says_why": (2, 1),
    "test_grouped_traps_losses::test_armed_after_a_grouped_call": (2, 0),
    "test_grouped_traps_losses::test_grouped_is_exact_or_refuses": (2, 1),
    "test_grouped_traps_structure::test_armed_after_a_grouped_call": (2, 0),
    "test_grouped_traps_structure::test_grouped_refuses_or_is_right": (2, 1),
    "test_grouped_traps_changes::test_after_several_grouped_calls": 6,
    "test_grouped_traps_identity::test_who_is_asked_for_changes": "the first",
    "test_grouped_traps_structure::test_operations_on_parameters": 3,
    "test_grouped_traps_classes::test_layers_that_are_more_than_their_weights": "grouped",
    "test_grouped_traps_absence::test_a_name_that_appears_around_experts": "auto",
    "test_grouped_traps_absence::test_a_name_that_appears_in_experts": 3,
    "test_grouped_objects::test_one_experts_number_changes_between_calls": 3,
    "test_grouped_objects::test_an_expert_that_counts_up_its_number": 3,
    # Drawn cases find in one engine what they find in all; the looped one is compared with celmoe-vp besides.
    "test_properties::test_stacked_experts_equal_the_oracles": "few-grouped|many-auto",
    "test_properties::test_row_wise_experts_give_what_they_give_one_sample_at_a_time": "grouped|looped",
    "test_properties::test_training_steps_equal_the_oracles": "few-grouped|many-auto|looped",
    "test_properties::test_stacked_siblings_run_as_one_equal_the_oracle": "few",
    "test_meta::test_every_engine_gives_shapes": "grouped|auto-Block",
    "test_programs::test_random_programs_equal_the_loop": "16",
    "test_experts_lives::test_lives_beside_a_reference": 2,
    "test_freezing::test_frozen_experts_run_as_before_and_get_no_gradients": 4,
    "test_errors_results::test_every_engine_names_the_expert_that_returned_no_result": 3,
    "test_grouped_losses::test_of_each_experts_own_rows": 2,
    "test_upstream_parity::test_ten_steps_of_adamw_are_equal": "1.1.4",
    # Wrong engines and wrong lives: the telling ones stay.
    "test_experts_meta::test_lives_find": 3,
    "test_grouped_meta::test_the_property_tests_catch_a_mutant": "remembered|mask|zeros",
    "test_parity_meta::test_the_property_tests_catch_a_mutant": 2,
    # Ranks: what the layouts share is seen under the first of them.
    "distributed.test_data_parallel::test_ranks_train_as_one_process": 2,
    "distributed.test_expert_parallel::test_ranks_train_as_one_process": 2,
    "distributed.test_stacked::test_plain_ddp_does_not_search": 2,
    "distributed.test_stacked::test_prepared_ddp": 2,
    "distributed.test_stacked::test_experts_spread": 2,
    "distributed.test_stacked::test_levels_sharded": 2,
    "distributed.test_stacked::test_one_reduction_after_the_backward_passes": 2,
    "distributed.test_decisions::test_one_scale_and_equal_weights": 2,
    "distributed.test_stacked_checkpoints::test_from_each_layout_to_each": 2,
    # Processes and whole steps of the benchmarks.
    "benchmarks.test_memory::test_a_grouped_step_takes_little_more_than_a_looped_one": "mlp|gru-64",
    "benchmarks.test_memory::test_no_copy_of_the_weights_is_kept": "linear|gru",
    "benchmarks.test_suite::test_all_contenders_are_equal": 2,
    "directml.test_audit::test_every_kind_of_expert": 2,
    "directml.test_devices::test_what_a_plug_in_may_do": "crash|abort",
    "test_plan::test_dataloader_workers_compile_plans": "few",
    # A compiler's seconds: one recurrent layer, one way of stacking.
    "test_compiled::test_kinds_of_experts": "InPlace|Buffered|Convolving|Adapter",
    "test_compiled::test_graphs_do_not_grow_with_positions": "LSTM",
    "test_compiled::test_recurrent_experts": "GRU",
    "test_compiled::test_masks_and_contexts": "True",
    "test_compiled_changes::test_calls_of_calls_and_checkpoints": "True",
    "test_compiled_changes::test_absent_experts_stay_as_they_are": "AdamW",
    "test_compiled::test_without_gradients": "True",
    "test_compiled::test_autocast": "True",
    "test_compiled_changes::TestChanges::test_a_replaced_expert": "item",
    "test_exported::test_other_batches_and_positions": "True",
}


def mark_slow(items: Iterable[pytest.Item]) -> None:
    """Mark the cases that don't stay."""
    seen: dict[str, int] = {}
    for item in items:
        path, _, rest = item.nodeid.partition("::")
        test = f"{path.removeprefix('tests/').removesuffix('.py').replace('/', '.')}::{rest.partition('[')[0]}"
        stays = STAY.get(test)
        if stays is None:
            continue
        case = rest.partition("[")[2]
        seen[test] = seen.get(test, -1) + 1
        if not _stays(stays, case, seen[test]):
            item.add_marker(pytest.mark.slow)


def _stays(rule: str | int | tuple[int, int], case: str, place: int) -> bool:
    if isinstance(rule, str):
        return re.search(rule, case) is not None
    every, first = (rule, 0) if isinstance(rule, int) else rule
    return place % every == first


def slow_after(first: int, params: Sequence[Any]) -> list[Any]:
    """The cases, all but the first of them slow. A tuple is a case of several arguments."""
    return [*params[:first], *(_slow(each) for each in params[first:])]


def slow_but(kept: Collection[Any], params: Iterable[Any]) -> list[Any]:
    """The cases, all but those to keep slow.

    Raises:
        ValueError: A case to keep is none of the cases.
    """
    cases = list(params)
    if unknown := [each for each in kept if each not in cases]:
        raise ValueError(f"'kept' must be some of the cases (got {unknown})")
    return [each if each in kept else _slow(each) for each in cases]


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
