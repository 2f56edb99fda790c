"""The sets with targets: their marks, their verdicts, and what a run of them leaves."""

import csv
import itertools

import pytest

from benchmarks.contenders.contender import AUTO, BARE, LOOK_UPS, LOOPED, PEER, STACK
from benchmarks.report.page import Findings, write_page
from benchmarks.report.panels import draw_panels
from benchmarks.report.reading import read_suite
from benchmarks.report.targets import Goal, Mark, find_marks, plan_rows
from benchmarks.suite.operations import ACCELERATOR, CPU, OperationCount
from benchmarks.suite.sets import DEFAULT, GRID, GROUPED
from benchmarks.workloads.bodies import GROUPED_EXPERTS
from benchmarks.workloads.points import MOST_BYTES, PLANNED, full_grid, needed_bytes, short_grid
from benchmarks.workloads.workload import Workload
from tests.benchmarks.made_up import MACHINE, entry, write
from tests.figures import FIGURES


def suite_of(tmp_path, *entries):
    return read_suite(write(tmp_path / "benchmarks.json", entries))


def columns_of(name):
    """The columns of a file that the notes quote."""
    with (FIGURES / name).open() as file:
        return set(next(csv.reader(file)))


def timed(workload, stage="whole_step", **seconds):
    names = {"auto": AUTO, "looped": LOOPED, "peer": PEER, "stack": STACK, "bare": BARE, "look_ups": LOOK_UPS}
    return entry(workload, {names[name]: [each] * 3 for name, each in seconds.items()}, stage)


@pytest.mark.parametrize(
    ("measured", "less_is_better", "verdict"),
    [(0.9, False, "missed"), (1.1, False, "reached"), (2.0, False, "aim"), (0.9, True, "aim"), (2.1, True, "missed")],
)
def test_verdicts(measured, less_is_better, verdict):
    goal = Goal(2.0, 1.0) if less_is_better else Goal(1.0, 2.0)
    assert Mark("a", "b", measured, goal, less_is_better).verdict == verdict


def test_means_are_of_their_own_stage_and_rival(tmp_path):
    first, second = Workload("linear", 64, 64, 4), Workload("linear", 64, 512, 4)
    suite = suite_of(
        tmp_path,
        timed(first, auto=1.0, peer=2.0, stack=0.5),
        timed(second, auto=1.0, peer=8.0),
        timed(first, "inference", auto=1.0, peer=3.0),
        timed(first, "forward", auto=1.0, peer=99.0),
    )
    marks = find_marks(GROUPED, suite)
    assert [mark.measured for mark in marks] == pytest.approx([4.0, 3.0, 0.5])
    assert [mark.verdict for mark in marks] == ["aim", "aim", "missed"]
    assert find_marks(DEFAULT, suite) == []


def test_planning_is_held_to_look_ups_and_to_the_peers_pass(tmp_path):
    even, tree = PLANNED
    suite = suite_of(
        tmp_path,
        timed(even, "plan", auto=2.0, look_ups=1.0),
        timed(even, "routing", auto=3.0, peer=100.0),
        timed(tree, "plan", auto=9.0, look_ups=1.0),
    )
    by_look_ups, by_peer = find_marks(GRID, suite)
    assert (by_look_ups.measured, by_look_ups.verdict) == (2.0, "aim")
    assert (by_peer.measured, by_peer.verdict) == (50.0, "missed")
    first, second = plan_rows(suite)
    assert first.keys() > columns_of("plans.csv")
    assert (first["experts"], first["celmoe_vp_by_plan"], first["plan_by_look_ups"]) == ("256/256/256", "50", "2")
    assert (second["experts"], second["celmoe_vp_by_plan"], second["plan_by_look_ups"]) == ("1/16/256", "", "9")


def test_the_worst_of_operations_count(tmp_path):
    counts = [
        OperationCount("mlp", "uniform", ACCELERATOR, 10, 11, ()),
        OperationCount("gru", "uniform", ACCELERATOR, 10, 30, ()),
        OperationCount("gru", "uniform", CPU, 10, 90, ()),
    ]
    (mark,) = find_marks(GROUPED, suite_of(tmp_path), counts)
    assert mark.measured == 3.0
    assert "gru" in mark.line


def test_the_grid_holds_every_value():
    whole = full_grid()
    assert len(set(whole)) == len(whole) == 228
    # Four bytes of: weights and gradients of two models with 7 experts of 64 by 65; 64 rows of 64 numbers, a tensor for
    # each of three levels and sixteen around them.
    assert needed_bytes(Workload("linear", 64, 64, 4)) == 4 * (4 * 7 * 64 * 65 + 64 * 64 * (3 + 16))
    assert max(map(needed_bytes, whole)) <= MOST_BYTES < 2 * max(map(needed_bytes, whole))
    half = short_grid()
    assert set(half) < set(whole)
    for name in ("expert", "num_experts", "routes"):
        values = [getattr(each, name) for each in half]
        fair = len(values) / len(set(values))
        assert all(0.7 * fair < values.count(value) < 1.6 * fair for value in set(values)), name
    assert {each.expert for each in half} == set(GROUPED_EXPERTS)


def test_what_a_run_of_a_grid_leaves(tmp_path):
    workloads = [each for each in itertools.islice(short_grid(), 20) if each.expert == "linear"]
    entries = [timed(each, auto=2.0, looped=1.5, peer=3.0, bare=1.0) for each in workloads]
    suite = suite_of(tmp_path, *entries)
    counts = [OperationCount("gru", "uniform", ACCELERATOR, 10, 30, [("mm", 20)])]
    marks = find_marks(GROUPED, suite, counts)
    page = write_page(tmp_path, Findings(suite, MACHINE, marks=marks, counts=counts)).read_text()
    assert 'id="targets"' in page
    assert "mm +20" in page
    left = {each.name for each in tmp_path.iterdir()}
    assert left >= {"marks.png", "marks.csv", "ratios.csv", "operations.csv", "grid_whole_step_cpu.png"}
    with (tmp_path / "ratios.csv").open() as file:
        found = {row["contender"]: row for row in csv.DictReader(file) if row["B"] == str(workloads[0].batch_size)}
    assert (found[PEER]["ratio"], found[PEER]["celmoe_ms"], found[PEER]["ms"]) == ("1.500", "2000.0000", "3000.0000")
    # Where the bare loop took part, the looped engine is drawn, and the loop's bound.
    with (tmp_path / "grid_whole_step_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() > columns_of("steps.csv")
    assert {(row["ratio"], row["bound"], row["bare_loop_ms"]) for row in rows} == {("2.000", "3.000", "1000.000")}


def test_no_grid_is_drawn_of_scattered_workloads(tmp_path):
    some = [Workload("linear", 64, 64, 4), Workload("mlp", 64, 512, 32), Workload("gru", 256, 4096, 4)]
    assert draw_panels(suite_of(tmp_path, *(timed(each, auto=1.0, peer=2.0) for each in some)).records) is None
