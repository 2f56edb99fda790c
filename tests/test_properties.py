"""Every engine against the oracle, on whatever hypothesis makes up.

The tests run over the registry of engines: a new one is tested by being there.
"""

from __future__ import annotations

import pytest
from hypothesis import given

from celmoe.engines import AUTO, ENGINES
from tests.parity import assert_parity
from tests.strategies import Case, cases, examples

pytestmark = pytest.mark.usefixtures("_as_few_and_as_many")

ENGINE_NAMES = [*ENGINES, AUTO]


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@examples(150)
@given(case=cases())
def test_values_and_gradients_equal_the_oracles(engine: str, case: Case):
    assert_parity(case.model(engine), case.inputs, objective=case.objective, optimizers=(), seed=case.seed)


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@examples(60)
@given(case=cases())
def test_training_steps_equal_the_oracles(engine: str, case: Case):
    assert_parity(case.model(engine), case.inputs, objective=case.objective, seed=case.seed)


@pytest.mark.parametrize("engine", ENGINE_NAMES)
@examples(60)
@given(case=cases(row_wise=True, stochastic=False))
def test_row_wise_experts_give_what_they_give_one_sample_at_a_time(engine: str, case: Case):
    assert_parity(
        case.model(engine), case.inputs, objective=case.objective, optimizers=(), per_sample=True, seed=case.seed
    )
