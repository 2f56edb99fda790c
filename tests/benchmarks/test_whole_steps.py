"""Whole steps: who is timed, and that all of them compute the same."""

import csv
import io

import pytest

import celmoe
from benchmarks import whole_steps
from benchmarks.equality import UnequalError
from benchmarks.whole_steps import BY_HAND, PEER, PLAIN, STACK, measure
from benchmarks.workloads import Workload
from tests.peer import FIRST, peer

SMALL = Workload("linear", 16, 24, 9)


def test_all_are_timed():
    row = measure(SMALL, peer(FIRST), 0.01)
    assert all(float(row[name]) > 0 for name in (PEER, PLAIN, STACK, BY_HAND))
    assert float(row["low"]) <= float(row["high"])


def test_one_that_computes_something_else_is_not_timed(monkeypatch):
    right = celmoe.stack_experts

    def wrong(model):
        right(model)
        next(iter(model.level_modules["language"].parameters())).data.mul_(2)

    monkeypatch.setattr(celmoe, "stack_experts", wrong)
    with pytest.raises(UnequalError, match="stacked and plain differ in the output"):
        measure(SMALL, peer(FIRST), 0.01)


def test_the_table_has_a_row_for_each_workload(monkeypatch, capsys):
    peer(FIRST)
    monkeypatch.setattr(whole_steps, "WORKLOADS", (SMALL, Workload("block", 16, 6, 4)))
    assert whole_steps.main(["--seconds", "0.01"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["workload"] for row in rows] == ["linear H=16 B=24 E=9 uniform", "block H=16 B=6 E=4 uniform"]
