"""The measures, their targets, and the files of a run."""

import csv
import itertools

import pytest

from benchmarks.grouped.contest import INFERENCE, PEER, STACK, TRAINING, Compared
from benchmarks.grouped.figures import draw_grid, draw_marks
from benchmarks.grouped.marks import Goal, Mark, grid_marks, operation_marks
from benchmarks.grouped.operations import ACCELERATOR, CPU, OperationCount
from benchmarks.grouped.tables import write_compared, write_marks
from benchmarks.workloads.bodies import GROUPED_EXPERTS
from benchmarks.workloads.points import MOST_BYTES, full_grid, needed_bytes, short_grid
from benchmarks.workloads.workload import Workload


def compared(workload, ratio, against=PEER, measure=TRAINING):
    return Compared(workload, measure, against, 10.0, 10.0 * ratio, ratio, 0.9 * ratio, 1.1 * ratio, 5)


@pytest.mark.parametrize(
    ("measured", "is_count", "verdict"),
    [(0.9, False, "missed"), (1.1, False, "reached"), (2.0, False, "aim"), (0.9, True, "aim"), (2.1, True, "missed")],
)
def test_verdicts(measured, is_count, verdict):
    goal = Goal(2.0, 1.0) if is_count else Goal(1.0, 2.0)
    assert Mark("a", "b", measured, goal, is_count).verdict == verdict


def test_means_are_of_their_own_measure_and_rival():
    workload = Workload("linear", 64, 64, 4)
    found = [
        compared(workload, 2.0),
        compared(workload, 8.0),
        compared(workload, 3.0, measure=INFERENCE),
        compared(workload, 0.5, STACK),
    ]
    assert [mark.measured for mark in grid_marks(found)] == pytest.approx([4.0, 3.0, 0.5])
    assert [mark.verdict for mark in grid_marks(found)] == ["aim", "aim", "missed"]


def test_the_worst_of_operations_count():
    counts = [
        OperationCount("mlp", "uniform", ACCELERATOR, 10, 11, ()),
        OperationCount("gru", "uniform", ACCELERATOR, 10, 30, ()),
        OperationCount("gru", "uniform", CPU, 10, 90, ()),
    ]
    (mark,) = operation_marks(counts)
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


def test_what_a_run_leaves(tmp_path):
    grid = [compared(each, 1.5) for each in itertools.islice(short_grid(), 20)]
    draw_grid(tmp_path / "grid.png", grid)
    marks = grid_marks(grid)
    draw_marks(tmp_path / "marks.png", marks)
    write_compared(tmp_path / "grid.csv", grid)
    write_marks(tmp_path / "marks.csv", marks)
    assert {each.name for each in tmp_path.iterdir()} >= {"grid.png", "marks.png", "marks.csv"}
    with (tmp_path / "grid.csv").open() as file:
        first = next(csv.DictReader(file))
    assert (first["experts"], first["H"], first["routes"], first["ratio"]) == ("linear", "64", "uniform", "1.500")
