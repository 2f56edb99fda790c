"""Every engine against the oracle, on hypothesis's cases.

The tests run over the registry of engines: a new one is tested by being there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given

import celmoe
from celmoe import EngineRefusedError, HierarchicalCELMoE
from celmoe.engines.registry import ENGINES
from tests.experts import KINDS
from tests.parity import assert_parity
from tests.strategies import IRREGULAR, Case, cases, examples, of_siblings

pytestmark = pytest.mark.usefixtures("_as_few_and_as_many")

ENGINE_NAMES = list(ENGINES)


def assert_equal(engine: str, case: Case, *, is_stacked: bool = False, **options: Any) -> None:
    """The engine agrees with the oracle, or refuses experts that are known to be refused."""

    def made(case: Case) -> HierarchicalCELMoE:
        model = case.model(engine)
        if is_stacked:
            celmoe.stack_experts(model)
        return model

    if engine != "looped" and any(KINDS[kind].stochastic for kind in case.kinds):
        # Run as one they draw other numbers.
        case = replace(case, training=False)

    def in_float64() -> Any:
        wide = replace(case, dtype=torch.float64)
        return made(wide), wide.inputs

    try:
        assert_parity(
            *(made(case), case.inputs),
            seed=case.seed,
            in_float64=in_float64 if case.dtype == torch.float32 else None,
            **options,
        )
    except EngineRefusedError:
        assert engine == "grouped"
        assert any(KINDS[kind].is_refused for kind in case.kinds) or case.context in IRREGULAR


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@examples(40)
@given(case=cases(mixed=True))
def test_values_and_gradients_equal_the_oracles(engine: str, case: Case):
    assert_equal(engine, case, objective=case.objective, optimizers=())


@examples(28)
@given(case=cases(mixed=True).map(of_siblings))
def test_siblings_run_as_one_equal_the_oracle(case: Case):
    """Left to chance, few classes have more than one member: experts seldom agree in kind, flag and scale."""
    assert_equal("grouped", case, objective=case.objective, optimizers=())


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@examples(14)
@given(case=cases(mixed=True))
def test_training_steps_equal_the_oracles(engine: str, case: Case):
    assert_equal(engine, case, objective=case.objective)


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@examples(14)
@given(case=cases(row_wise=True, stochastic=False, mixed=True))
def test_row_wise_experts_give_what_they_give_one_sample_at_a_time(engine: str, case: Case):
    assert_equal(engine, case, objective=case.objective, optimizers=(), per_sample=True)


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@examples(10)
@given(case=cases(mixed=True))
def test_stacked_experts_equal_the_oracles(engine: str, case: Case):
    assert_equal(engine, case, is_stacked=True, objective=case.objective)


@examples(12)
@given(case=cases(mixed=True).map(of_siblings))
def test_stacked_siblings_run_as_one_equal_the_oracle(case: Case):
    assert_equal("grouped", case, is_stacked=True, objective=case.objective)
