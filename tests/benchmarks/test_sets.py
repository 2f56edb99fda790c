"""The suite's sets hold the workloads that their descriptions promise."""

import pytest

import celmoe
from benchmarks.harness.steps import string_routed
from benchmarks.suite.sets import DEFAULT, DEFAULTS, FULL, workloads_of
from benchmarks.workloads.bodies import EXPERTS, LOW_RANK, PRODUCT, UNTOUCHED
from benchmarks.workloads.hierarchies import EVEN, HIERARCHIES, JOB, ONE_LEVEL, TREE, levels_of, routing_of
from benchmarks.workloads.languages import FAMILY_OF
from benchmarks.workloads.points import BATCHES, NAMED, PLANNED, ROUTES, WORST, full_grid, looped_grid
from benchmarks.workloads.workload import Workload


@pytest.mark.parametrize("benchmark_name", DEFAULTS)
def test_the_default_set_is_some_of_the_full_one(benchmark_name):
    default, full = (workloads_of(benchmark_name, name) for name in (DEFAULT, FULL))
    assert default
    for workloads in (default, full):
        assert len({str(each) for each in workloads}) == len(workloads)
    assert set(default) < set(full)


def test_the_figures_of_the_other_commands_are_in_the_full_set():
    steps = set(workloads_of("whole_step", FULL))
    assert steps >= {*NAMED, *WORST, *full_grid(), *looped_grid()}
    assert set(workloads_of("plan", DEFAULT)) >= set(PLANNED)
    assert set(workloads_of("inference", FULL)) == steps


def test_every_kind_of_expert_and_hierarchy_is_in_a_set():
    every = [each for name in DEFAULTS for each in workloads_of(name, FULL)]
    assert {each.expert for each in every} == set(EXPERTS)
    assert {each.hierarchy for each in every} == set(HIERARCHIES)
    assert {each.expert for each in workloads_of("whole_step", FULL)} == set(EXPERTS) - {PRODUCT, UNTOUCHED}


def test_the_full_set_meets_each_kind_at_each_batch_under_both_routes():
    """The job's hierarchy, low ranks and the grids: none of them under uniform routes alone."""
    steps = workloads_of("whole_step", FULL)
    for kept in (lambda each: each.hierarchy == JOB, lambda each: each.expert == LOW_RANK):
        met = {(each.batch_size, each.routes) for each in steps if kept(each)}
        assert met >= {(batch, routes) for batch in BATCHES for routes in ROUTES}
    for name in ("dispatch", "grouped_product"):
        met = {(each.batch_size, each.routes) for each in workloads_of(name, FULL)}
        assert met >= {(batch, routes) for batch in BATCHES for routes in ROUTES}


def test_the_jobs_hierarchy_is_the_jobs():
    levels = levels_of(JOB, 54)
    assert [len(names) for names in levels.values()] == [1, 17, 54]
    routing = routing_of(JOB, 54, "uniform", 500, 0)
    assert routing["family"] == [FAMILY_OF[language] for language in routing["language"]]
    assert set(routing["family"]) == set(levels["family"])


@pytest.mark.parametrize("hierarchy", HIERARCHIES)
def test_experts_stand_in_order(hierarchy):
    for names in levels_of(hierarchy, 54).values():
        assert names == sorted(names)
        assert len(names) == len(set(names))


def test_hierarchies_without_a_tree():
    assert {len(names) for names in levels_of(EVEN, 7).values()} == {7}
    routing = routing_of(EVEN, 7, "uniform", 50, 0)
    assert len({tuple(name.split("-")[1] for name in names) for names in routing.values()}) == 3
    alone, tree = (routing_of(each, 9, "zipf", 50, 3) for each in (ONE_LEVEL, TREE))
    assert alone == {"language": tree["language"]}
    workload = Workload("linear", 8, 30, 5, hierarchy=ONE_LEVEL)
    model = workload.build(celmoe)
    output = model(workload.hidden(), workload.routing())
    assert output.fused_hidden is output.levels["language"].hidden
    assert string_routed(model, workload)(workload.hidden()).equal(output.fused_hidden)


@pytest.mark.parametrize(
    ("hierarchy", "experts", "words"),
    [("flat", 4, "'hierarchy' must be one of tree, job, even, one level (got 'flat')"), (JOB, 4, "must be 54 in")],
)
def test_what_is_no_hierarchy_is_refused(hierarchy, experts, words):
    with pytest.raises(ValueError) as caught:
        levels_of(hierarchy, experts)
    assert words in str(caught.value)


def test_names_of_hierarchies_show():
    assert str(Workload("mlp", 8, 3, 54, hierarchy=JOB)) == "mlp H=8 B=3 E=54 uniform, job"
