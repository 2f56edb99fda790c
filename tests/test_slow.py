"""The table of slow cases: it names tests that are there, and leaves none of them out altogether."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.slow import STAY, mark_slow, slow_after, slow_but

ROOT = Path(__file__).resolve().parent


def marked(*names):
    found = []
    items = [SimpleNamespace(nodeid=name, add_marker=lambda _mark, name=name: found.append(name)) for name in names]
    mark_slow(items)
    return found


def test_what_stays(monkeypatch):
    monkeypatch.setitem(STAY, "test_a::test_b", "one|two")
    monkeypatch.setitem(STAY, "distributed.test_a::TestC::test_b", 2)
    monkeypatch.setitem(STAY, "test_a::test_c", (2, 1))
    named = [f"tests/test_a.py::test_b[{case}]" for case in ("one", "three", "two-x")]
    numbered = [f"tests/distributed/test_a.py::TestC::test_b[{case}]" for case in "abc"]
    others = [f"tests/test_a.py::test_c[{case}]" for case in "abc"]
    assert marked(*named, *numbered, "tests/test_a.py::test_other[three]") == [named[1], numbered[1]]
    assert marked(*others) == [others[0], others[2]]


def test_every_test_in_it_has_cases_of_both_kinds():
    """By pytest's own names: a test that is renamed, or whose cases are, would run in full, or not at all."""
    files = sorted({test.partition("::")[0].replace(".", "/") for test in STAY})
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "--collect-only", "-q"]
    counts = []
    for chosen in ("slow", "not slow"):
        paths = [str(ROOT / f"{file}.py") for file in files]
        done = subprocess.run(
            [*command, "-m", chosen, *paths], cwd=ROOT.parent, capture_output=True, text=True, check=True
        )
        counts.append({line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line})
    for test in STAY:
        file, _, rest = test.partition("::")
        name = f"tests/{file.replace('.', '/')}.py::{rest}"
        assert [name in each for each in counts] == [True, True], test


def slow_ones(cases):
    return [case.values for case in cases if hasattr(case, "marks")]


def test_cases_that_are_marked_where_they_are_listed():
    assert slow_ones(slow_after(1, ["a", ("b", 2)])) == [("b", 2)]
    assert slow_ones(slow_but([("b", 2)], ["a", ("b", 2)])) == [("a",)]
    with pytest.raises(ValueError, match="'kept' must be some of the cases"):
        slow_but(["c"], ["a"])
