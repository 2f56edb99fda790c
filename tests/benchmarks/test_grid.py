"""The looped engine's grid: its contenders, its ratios, and the files of a run."""

import csv
import dataclasses

import pytest

import celmoe
from benchmarks.grid import measure
from benchmarks.grid.measure import (
    BARE,
    LOOK_UPS,
    OUR_ROUTING,
    OURS,
    PEER,
    PEER_ROUTING,
    PLAN,
    time_planning,
    time_step,
)
from benchmarks.grid.report import draw_steps, plan_line, summary, write_plans, write_steps
from benchmarks.harness.equality import UnequalError
from benchmarks.workloads.bodies import LOOPED_EXPERTS, UNTOUCHED
from benchmarks.workloads.hierarchies import EVEN
from benchmarks.workloads.workload import Workload
from tests.benchmarks.clockwork import HIGH, LOW, RATIO, Rounds, Spied
from tests.benchmarks.wrong import GRADIENTS, two_alike, with_another_input_gradient
from tests.peer import FIRST, peer

STEPS = {OURS: "one", PEER: "three", BARE: "half"}
PLANS = {PLAN: "one", LOOK_UPS: "half", OUR_ROUTING: "half", PEER_ROUTING: "three"}
PLANNED = Workload(UNTOUCHED, 1, 40, 6, hierarchy=EVEN)


@pytest.fixture
def rounds(monkeypatch):
    stand_in = Rounds(STEPS | PLANS)
    monkeypatch.setattr(measure, "interleave", stand_in)
    return stand_in


@pytest.mark.parametrize("expert", LOOPED_EXPERTS)
def test_a_step_is_timed_beside_the_peers_and_the_bare_one(expert, rounds):
    # Fewer samples than experts: some are absent.
    workload = Spied(expert, 8, 9, 12)
    rounds.watched = lambda: workload.built[:2]
    found = time_step(workload, peer(FIRST), "looped", 0.0)
    assert [type(model).__module__.split(".")[0] for model in workload.built[:2]] == ["celmoe", peer(FIRST).__name__]
    assert found == measure.StepTiming(workload, 1000.0, 5000.0, 500.0, RATIO, LOW, HIGH, 2 * RATIO, 5)
    # All weights move before each step.
    assert rounds.runs == [(OURS, True), (PEER, True), (BARE, True)]


@dataclasses.dataclass(frozen=True)
class WrongInOne(Spied):
    """Two experts of one package's model have wrong gradients."""

    package: object = None
    kind: str = ""

    def build(self, package, *args, **options):
        model = super().build(package, *args, **options)
        if package is self.package:
            weights = dict(model.named_parameters())
            names = sorted(name for name in weights if name.startswith("level_modules.language"))
            GRADIENTS[self.kind](weights, *two_alike(weights, names))
        return model


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("package", [celmoe, peer(FIRST)], ids=["ours", "the peer's"])
def test_a_wrong_gradient_is_refused_before_anything_is_timed(kind, package, rounds):
    workload = WrongInOne("mlp", 8, 24, 4, package=package, kind=kind)
    with pytest.raises(UnequalError, match="celmoe-vp is not equal to celmoe: the gradient of level_modules"):
        time_step(workload, peer(FIRST), "looped", 0.0)
    assert rounds.runs == []


def test_a_bare_step_that_does_less_is_refused(rounds, monkeypatch):
    right = measure._bare
    monkeypatch.setattr(measure, "_bare", lambda *arguments: with_another_input_gradient(right(*arguments)))
    with pytest.raises(UnequalError, match="bare loop is not equal to what it must compute: the gradient of the input"):
        time_step(Workload("linear", 8, 24, 4), peer(FIRST), "looped", 0.0)
    assert rounds.runs == []


def test_planning_is_divided_by_what_it_is_said_to_be(rounds):
    found = time_planning(PLANNED, peer(FIRST), 0.0)
    assert found == measure.PlanTiming((6, 6, 6), 1000.0, 500.0, 500.0, 5000.0, 2.0, RATIO, 2 * RATIO)
    assert [name for name, _ in rounds.runs] == [PLAN, LOOK_UPS, OUR_ROUTING, PEER_ROUTING]


def test_planning_that_routes_elsewhere_is_refused(rounds, monkeypatch):
    right = measure.look_ups

    def wrong(workload):
        task = right(workload)
        return dataclasses.replace(task, evidence=lambda: {name: ids.roll(1) for name, ids in task.evidence().items()})

    monkeypatch.setattr(measure, "look_ups", wrong)
    with pytest.raises(UnequalError, match="look-ups is not equal to plan"):
        time_planning(PLANNED, peer(FIRST), 0.0)
    assert rounds.runs == []


def timing(workload, ratio, low, high, bound):
    return measure.StepTiming(workload, 1.5, 1.5 * ratio, 1.0, ratio, low, high, bound, 7)


def test_what_a_run_leaves(tmp_path):
    steps = [
        timing(Workload("linear", 64, 16, 4), 0.8, 0.7, 1.1, 1.0),
        timing(Workload("gru", 256, 16, 32), 5.0, 4.5, 6.0, 9.0),
    ]
    write_steps(tmp_path / "steps.csv", steps)
    with (tmp_path / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {
        "experts": "gru",
        "H": "256",
        "B": "16",
        "E": "32",
        "celmoe_ms": "1.500",
        "celmoe_vp_ms": "7.500",
        "bare_loop_ms": "1.000",
        "ratio": "5.000",
        "first_quartile": "4.500",
        "third_quartile": "6.000",
        "bound": "9.000",
        "rounds": "7",
    }
    assert summary(steps) == (
        "2 workloads: 2.00 times as fast as celmoe-vp 1.1.4 in the geometric mean (a loop that routes and moves for "
        "nothing: 3.00); faster in 1, slower in 0, a tie in 1 (the middle half of their rounds holds 1); least 0.800 "
        "(linear H=64 B=16 E=4 uniform)"
    )
    plan = measure.PlanTiming((6, 6, 6), 10.0, 5.0, 20.0, 60.0, 2.0, 6.0, 3.0)
    write_plans(tmp_path / "plans.csv", [plan])
    with (tmp_path / "plans.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row == {
        "experts": "6/6/6",
        "B": "65536",
        "plan_ms": "10.00",
        "look_ups_ms": "5.00",
        "celmoe_pass_ms": "20.0",
        "celmoe_vp_ms": "60",
        "plan_by_look_ups": "2.00",
        "celmoe_vp_by_plan": "6",
        "celmoe_vp_by_pass": "3.0",
    }
    assert "10.0 ms, 2.00 times the bare look-ups" in plan_line(plan)
    assert "6 times as long, and 3.0 times as long as the same pass of ours" in plan_line(plan)
    draw_steps(tmp_path / "steps.png", steps)
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
