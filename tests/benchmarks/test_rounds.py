"""Rounds: the order of contenders, the weights that move between two steps, and the ratios."""

from types import SimpleNamespace

import pytest
import torch

import celmoe
from benchmarks.contenders.contender import AUTO, DENSE, GROUPED, LOOPED, ORACLE, STACK, STACKED, VMAP, Task
from benchmarks.harness.interleaved import MOST_ROUNDS, Timings, interleave
from benchmarks.harness.steps import ROUTINGS, nudge
from benchmarks.report.ratios import headline
from benchmarks.report.reading import read_suite
from benchmarks.report.tables import speed_table
from benchmarks.suite import parts
from benchmarks.suite.parts import BACKWARD, EXPERTS_RUN, FUSION, MOVING, OPTIMIZER, PLANNING, time_parts
from benchmarks.suite.record import memory_line, timing_line
from benchmarks.suite.rounds import Gathered, gather, hold
from benchmarks.suite.stages import EXPERTS, INFERENCE, PLAN, WHOLE_STEP, tasks_of
from benchmarks.workloads.bodies import PRODUCT, UNTOUCHED
from benchmarks.workloads.hierarchies import ONE_LEVEL
from benchmarks.workloads.workload import Workload
from tests.benchmarks.clockwork import HIGH, LOW, RATIO, SECONDS
from tests.benchmarks.made_up import entry, write
from tests.features import needs_grouped_mm

CPU = torch.device("cpu")


def test_a_ratio_is_the_slowers_by_the_fasters_within_a_round():
    timings = Timings({"ours": SECONDS["one"], "theirs": SECONDS["three"]})
    assert timings.ratio("theirs", "ours") == RATIO
    assert timings.quartiles("theirs", "ours") == (LOW, HIGH)
    # Upside down they are others, not the same ones turned round: 1/3, 1/4, 1/4, 1/3, 1/5.
    assert timings.ratio("ours", "theirs") == 1 / 4
    assert timings.quartiles("ours", "theirs") == pytest.approx((0.225, 1 / 3))
    assert (timings.median("theirs"), timings.rounds) == (5.0, 5)


def test_every_contender_runs_once_a_round_after_what_moves_the_weights():
    ran = []
    found = interleave(
        {name: lambda name=name: ran.append(name) for name in "abc"}, 0.0, between=lambda: ran.append("moved")
    )
    warm_up, rest = ran[:3], ran[3:]
    assert warm_up == ["a", "b", "c"]
    assert rest[::2] == ["moved"] * 15
    by_round = [rest[1::2][place : place + 3] for place in range(0, 15, 3)]
    assert [sorted(each) for each in by_round] == [["a", "b", "c"]] * 5
    assert len({tuple(each) for each in by_round}) > 1
    assert {name: len(seconds) for name, seconds in found.seconds.items()} == {"a": 5, "b": 5, "c": 5}


def test_rounds_end_by_the_clock_or_by_their_number(monkeypatch):
    assert interleave({"a": lambda: None}, 60.0).rounds == MOST_ROUNDS
    clock = iter(range(1_000_000))
    monkeypatch.setattr("benchmarks.harness.interleaved.time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    # A step takes one second, and a round three once there are five.
    assert interleave({"a": lambda: None}, 29.0).rounds == 12


class Machine:
    """Stands in for `time`: a step takes as many seconds as it is told to, on four threads."""

    def __init__(self):
        self.passed = self.worked = 0.0

    def spend(self, seconds):
        self.passed += seconds
        self.worked += 4 * seconds

    def perf_counter(self):
        return self.passed

    def process_time(self):
        return self.worked


def test_no_clock_sees_what_moves_the_weights(monkeypatch):
    machine = Machine()
    monkeypatch.setattr("benchmarks.harness.interleaved.time", machine)
    steps = {"a": lambda: machine.spend(2.0), "b": lambda: machine.spend(3.0)}
    found = interleave(steps, 0.0, between=lambda: machine.spend(100.0))
    assert found.seconds == {"a": [2.0] * 5, "b": [3.0] * 5}


def test_others_are_timed_by_the_clock_on_the_wall_as_ours_are(monkeypatch):
    machine = Machine()
    monkeypatch.setattr("benchmarks.suite.rounds.time", machine)
    task = Task(dict, step=lambda: machine.spend(3.0), between=lambda: machine.spend(100.0))
    found = hold(Clock(), Gathered({AUTO: task, STACK: task}, {}, 1.0), 6.0)
    assert found.seconds == {AUTO: [7.0] * 6, STACK: [3.0] * 6}


class Clock:
    """pytest-benchmark's fixture, as `hold` uses it: ours takes 7 s in every round."""

    stats = None

    def pedantic(self, target, setup, rounds, iterations):
        assert iterations == 1
        for _ in range(rounds):
            setup()
            target()
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[7.0] * rounds))


def test_a_round_moves_the_weights_before_every_step():
    ran = []

    def task(name):
        return Task(dict, step=lambda: ran.append(name), between=lambda: ran.append(f"move {name}"))

    tasks = {name: task(name) for name in (AUTO, STACK, DENSE)}
    found = hold(Clock(), Gathered(tasks, {}, 1.0), 6.0)
    assert len(ran) == 6 * 6
    for place in range(0, len(ran), 6):
        moves, steps = ran[place : place + 6 : 2], ran[place + 1 : place + 6 : 2]
        assert moves == [f"move {name}" for name in steps]
        # Ours comes last: pytest-benchmark calls it.
        assert steps[2] == AUTO
        assert sorted(steps[:2]) == sorted((STACK, DENSE))
    assert found.seconds[AUTO] == [7.0] * 6
    assert [len(found.seconds[name]) for name in (STACK, DENSE)] == [6, 6]
    assert all(0 < each < 1 for each in found.seconds[STACK])


def test_a_nudge_moves_all_weights_and_the_next_one_moves_them_back():
    models = [torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)]
    parameters = [each for model in models for each in model.parameters()]
    before = [each.detach().clone() for each in parameters]
    versions = [each._version for each in parameters]
    move = nudge(models)
    move()
    assert not any(torch.equal(*pair) for pair in zip(parameters, before, strict=True))
    assert all(each._version > version for each, version in zip(parameters, versions, strict=True))
    move()
    torch.testing.assert_close([each.detach() for each in parameters], before, rtol=1e-6, atol=0)


@needs_grouped_mm
@pytest.mark.parametrize(
    ("stage", "workload"),
    [
        (WHOLE_STEP, Workload("linear", 8, 12, 3)),
        (INFERENCE, Workload("mlp", 8, 12, 3)),
        (EXPERTS, Workload(PRODUCT, 8, 12, 3, hierarchy=ONE_LEVEL)),
    ],
)
def test_a_contender_computes_something_else_once_its_weights_have_moved(stage, workload):
    """A contender whose results stay the same has kept values computed from its old weights."""
    gathered = gather(tasks_of(stage, workload, CPU), 60.0)
    assert gathered.tasks.keys() >= {AUTO, LOOPED, DENSE, STACK, VMAP}
    for name, task in gathered.tasks.items():
        quantity = "output in inference" if stage == INFERENCE else "output"
        found = [task.evidence()[quantity].clone() for _ in range(4)]
        task.between()
        again = [task.evidence()[quantity] for _ in range(4)]
        assert not any(torch.equal(*pair) for pair in zip(found, again, strict=True)), name
        torch.testing.assert_close(again, found, rtol=0.05, atol=0.05)


def weights_of(workload):
    return sum(each.nbytes for each in workload.build(celmoe).parameters())


@needs_grouped_mm
def test_a_contenders_weights_are_all_it_holds():
    workload = Workload("mlp", 8, 12, 3)
    tasks = gather(tasks_of(WHOLE_STEP, workload, CPU), 60.0).tasks
    whole = weights_of(workload)
    one_a_level = weights_of(Workload("mlp", 8, 12, 1))
    for name in (AUTO, STACKED, GROUPED, LOOPED, ORACLE, STACK, VMAP):
        assert tasks[name].weight_bytes == whole, name
    assert tasks[DENSE].weight_bytes == one_a_level


def test_lines_say_how_many_times_as_long_the_others_take():
    timings = Timings({AUTO: SECONDS["one"], STACK: SECONDS["half"], DENSE: SECONDS["three"]})
    assert timing_line(timings) == f"{AUTO} 1e+03 ms, 5 rounds; times as long: {STACK} 0.50, {DENSE} 4.00"
    assert timing_line(Timings({AUTO: SECONDS["half"]})) == f"{AUTO} 500 ms, 5 rounds"
    line = memory_line({LOOPED: 4_000_000, GROUPED: 5_000_000}, LOOPED, GROUPED)
    assert line == f"peak MB: {LOOPED} 4.0, {GROUPED} 5.0; grouped by looped 1.25 (at most 1.2 is allowed)"


def test_parts_add_up_to_the_step(monkeypatch):
    seconds = {"step": 0.015, "passes": 0.010, "forward": 0.006, PLANNING: 0.001, MOVING: 0.0005, FUSION: 0.0005}
    ran = []

    def stand_in(steps, _seconds, between):
        between()
        for name, step in steps.items():
            ran.append(name)
            step()
        return Timings({name: [seconds[name]] * 3 for name in steps})

    monkeypatch.setattr(parts, "interleave", stand_in)
    found = time_parts(Workload("linear", 8, 20, 3), "looped", 0.0)
    assert sorted(ran) == sorted(seconds)
    forward = {PLANNING: 1.0, MOVING: 0.5, EXPERTS_RUN: 4.0, FUSION: 0.5}
    assert found == pytest.approx({**forward, BACKWARD: 4.0, OPTIMIZER: 5.0})


def test_planning_times_its_own_step():
    """Everything that is timed is run: a step that forgets a level would be fast."""
    workload = Workload(UNTOUCHED, 1, 30, 4)
    for name, make in tasks_of(PLAN, workload, CPU).items():
        step = make().step
        for turn in range(ROUTINGS + 1):
            found = step()
            if isinstance(found, celmoe.RoutingPlan):
                found = {level: each.expert_ids.tolist() for level, each in found.levels.items()}
            names = {level: [workload.levels()[level][each] for each in ids] for level, ids in found.items()}
            assert names == workload.routing(turn % ROUTINGS), (name, turn)


def test_the_pages_table_and_headline_are_of_the_same_ratios(tmp_path):
    small, large = Workload("linear", 64, 64, 4), Workload("linear", 64, 512, 4)
    entries = [
        entry(small, {AUTO: SECONDS["one"], STACK: SECONDS["half"], DENSE: SECONDS["three"]}),
        entry(large, {AUTO: SECONDS["half"], STACK: SECONDS["one"], DENSE: SECONDS["one"]}),
    ]
    records = read_suite(write(tmp_path / "benchmarks.json", entries)).records
    table = speed_table(records)
    assert table.headings[-3:] == [AUTO, STACK, DENSE]
    assert [[cell.text for cell in row[-3:]] for row in table.rows] == [
        ["1,000 ms", "0.50", "4.00"],
        ["500 ms", "2.00", "2.00"],
    ]
    assert [(cell.small, cell.style) for cell in table.rows[0][-2:]] == [
        ("0.50\N{EN DASH}0.50", "slower"),
        ("3.00\N{EN DASH}4.50", "floor"),
    ]
    assert [cell.text for cell in table.total[-2:]] == ["1.00", "2.83"]
    mean, least, greatest, count = headline(records, DENSE, AUTO)
    assert (round(mean, 2), least.ratio, greatest.ratio, count) == (2.83, 2.0, 4.0, 2)
    assert (least.workload, greatest.workload) == (large, small)
    assert headline(records, ORACLE, AUTO) is None
    # The other way round: dense by the stack is 8 and 1 in the most rounds.
    assert [round(each.ratio, 2) for each in headline(records, DENSE, STACK)[1:3]] == [1.0, 8.0]
