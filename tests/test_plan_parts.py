"""Parts of plans, and plans end to end: as if their routes had been compiled."""

from __future__ import annotations

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from celmoe import (
    CELMoEConfig,
    ExpertConfig,
    HierarchyLevelConfig,
    PlanError,
    RouteTypeError,
    RoutingCompiler,
    RoutingPlan,
)
from tests.refusals import GOOD, assert_error, build, rows, two_levels
from tests.strategies import cases, examples
from tests.test_plan import names_of, same

pytestmark = pytest.mark.usefixtures("_as_few_and_as_many")


def compiled(case, names, samples):
    """The plan that a case's compiler makes of some samples' names."""
    routes = {level: [routes[sample] for sample in samples] for level, routes in names.items()}
    return RoutingCompiler(case.config())(routes, len(samples))


@examples(100)
@given(case=cases(), data=st.data())
def test_a_slice_is_what_its_routes_are_compiled_to(case, data):
    names = names_of(case)
    plan = compiled(case, names, range(case.batch_size))
    start = data.draw(st.integers(0, case.batch_size), "start")
    stop = data.draw(st.integers(start, case.batch_size), "stop")
    part = plan.slice(start, stop)
    same(part, compiled(case, names, range(start, stop)))
    assert part.nbytes == compiled(case, names, range(start, stop)).nbytes
    assert all(part.routes(level) == names[level][start:stop] for level in names)
    same(plan, compiled(case, names, range(case.batch_size)))


@examples(100)
@given(case=cases(), data=st.data())
def test_joined_plans_are_what_their_routes_are_compiled_to(case, data):
    names = names_of(case)
    samples = st.lists(st.integers(0, case.batch_size - 1), max_size=6) if case.batch_size else st.just([])
    parts = data.draw(st.lists(samples, min_size=1, max_size=4), "parts")
    joined = RoutingPlan.join(compiled(case, names, part) for part in parts)
    same(joined, compiled(case, names, [sample for part in parts for sample in part]))


@examples(100)
@given(case=cases(), repeats=st.integers(1, 4))
def test_a_repeated_plan_is_what_the_repeated_routes_are_compiled_to(case, repeats):
    names = names_of(case)
    repeated = compiled(case, names, range(case.batch_size)).repeat_interleave(repeats)
    same(repeated, compiled(case, names, [sample for sample in range(case.batch_size) for _ in range(repeats)]))


@pytest.mark.parametrize(
    ("wrong", "error", "builtin", "message"),
    [
        (0, PlanError, ValueError, "'repeats' must be at least 1 (got 0)"),
        (2.0, RouteTypeError, TypeError, "'repeats' must be an integer (got 2.0)"),
        (True, RouteTypeError, TypeError, "'repeats' must be an integer (got True)"),
    ],
)
def test_plans_are_repeated_a_whole_number_of_times(wrong, error, builtin, message):
    with pytest.raises(error) as caught:
        RoutingCompiler(two_levels())(GOOD).repeat_interleave(wrong)
    assert_error(caught.value, error, builtin, message)


@pytest.mark.parametrize("num_samples", [64, 65, 1000])
def test_large_plans_fall_apart_and_come_together(num_samples):
    rng = random.Random(num_samples)
    config = CELMoEConfig(
        4,
        [
            HierarchyLevelConfig("top", {"only": ExpertConfig("only")}),
            HierarchyLevelConfig("low", {f"e{number}": ExpertConfig("e") for number in range(300)}),
        ],
    )
    plan = RoutingCompiler(config)({"low": [rng.randrange(300) for _ in range(num_samples)]})
    cuts = [0, *sorted(rng.randrange(num_samples) for _ in range(5)), num_samples]
    parts = [plan.slice(start, stop) for start, stop in itertools.pairwise(cuts)]
    same(RoutingPlan.join(parts), plan)
    same(plan.slice(0, num_samples), plan)


def test_a_model_takes_slices():
    model = build().eval()
    hidden = rows()
    plan = model.compile_routing(GOOD)
    whole = model(hidden, plan).fused_hidden
    parts = [model(hidden[start:stop], plan.slice(start, stop)).fused_hidden for start, stop in ((0, 1), (1, 3))]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert model(hidden[:0], plan.slice(2, 2)).fused_hidden.shape == (0, 4)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 4), (2, 1), (4, 4), (-3, -1)])
def test_slices_out_of_range(start, stop):
    plan = build().compile_routing(GOOD)
    with pytest.raises(PlanError) as caught:
        plan.slice(start, stop)
    message = f"'start' and 'stop' must be in order, from 0 to the plan's 3 samples (got {start} and {stop})"
    assert_error(caught.value, PlanError, ValueError, message)


@pytest.mark.parametrize("wrong", [None, 1.0, True, "1", slice(0, 1)])
def test_positions_of_the_wrong_kind(wrong):
    plan = build().compile_routing(GOOD)
    for name, arguments in (("start", (wrong, 3)), ("stop", (0, wrong))):
        with pytest.raises(RouteTypeError) as caught:
            plan.slice(*arguments)
        assert_error(caught.value, RouteTypeError, TypeError, f"{name!r} must be an integer (got {wrong!r})")
    same(plan.slice(np.int64(1), np.int32(3)), plan.slice(1, 3))


def test_what_can_not_be_joined():
    model = build()
    plan = model.compile_routing(GOOD)
    other = two_levels()
    other.levels[1].fallback_expert = "fr"
    for plans, message in (
        ([], "'plans' must hold at least one plan (got none)"),
        (
            [plan, plan, RoutingCompiler(other)(GOOD)],
            (
                "'plans[2]' must be a plan of a config with fallback_expert None in level 'language' (got one with "
                "'fr'); compile the routing again"
            ),
        ),
        ([plan, plan.to("meta")], "'plans[1]' must lie where its ids can be read (got a plan on meta)"),
        ([plan.to("meta")], "'plans[0]' must lie where its ids can be read (got a plan on meta)"),
    ):
        with pytest.raises(PlanError) as caught:
            RoutingPlan.join(plans)
        assert_error(caught.value, PlanError, ValueError, message)
    with pytest.raises(RouteTypeError) as caught:
        RoutingPlan.join([plan, GOOD])
    assert_error(caught.value, RouteTypeError, TypeError, "'plans[1]' must be a RoutingPlan (got dict)")


def test_ids_on_meta_can_not_be_read():
    plan = build().compile_routing(GOOD).to("meta")
    model = build()
    for call in (
        lambda: plan.slice(0, 2),
        lambda: plan.routes("language"),
        lambda: plan.to("cpu"),
        lambda: model(rows(), plan),
    ):
        with pytest.raises(PlanError) as caught:
            call()
        message = "'plan' must lie where its ids can be read (got a plan on meta)"
        assert_error(caught.value, PlanError, ValueError, message)


def test_parts_made_in_inference_mode_work_in_training():
    model = build().eval()
    plan = model.compile_routing(GOOD)
    with torch.inference_mode():
        parts = [plan.slice(0, 2), plan.slice(2, 3)]
        joined = RoutingPlan.join(copy.deepcopy(parts))
    for each in (*parts, joined):
        hidden = rows(each.batch_size).requires_grad_()
        model(hidden, each).fused_hidden.sum().backward()
        assert hidden.grad is not None
    same(joined, plan)
