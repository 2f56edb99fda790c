"""Steps with mixed routes: the drawing and the CSV file."""

import csv

import pytest

from benchmarks.tables import mixed_routes
from benchmarks.tables.mixed_routes import main, mixed
from benchmarks.workloads.workload import Workload

SMALL = Workload("linear", 8, 60, 9)


def test_what_is_mixed():
    routing = SMALL.routing()
    found = mixed(routing, 0.5, 0)
    assert found["universal"] == routing["universal"]
    kinds = [type(route) for route in found["language"]]
    assert kinds.count(type(None)) == 10
    assert 10 < kinds.count(dict) <= 20
    assert all(sum(route.values()) == 1.0 for route in found["language"] if isinstance(route, dict))
    same = [a == b for a, b in zip(found["language"], routing["language"], strict=True)]
    assert same.count(True) >= 30
    assert [route is None for route in found["family"]] == [route is None for route in found["language"]]


def test_the_command_writes_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mixed_routes, "WORKLOADS", (SMALL,))
    assert main(["--seconds", "0.01", "--report", str(tmp_path)]) == 0
    assert "5% of the samples mixed" in capsys.readouterr().out
    with (tmp_path / "mixed_routes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["experts_are"] for row in rows] == ["plain", "stacked"]
    assert all(float(row["ratio"]) > 0 for row in rows)


@pytest.mark.parametrize("seconds", ["0", "x"])
def test_a_refused_argument(seconds, capsys):
    assert main(["--seconds", seconds]) == 2
    assert "'--seconds' must be" in capsys.readouterr().err
