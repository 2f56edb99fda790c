"""Steps of a `Trainer`, compiled and not: what is in a batch, what is written."""

import csv

import pytest

from benchmarks.tables import trainer_compile
from benchmarks.tables.trainer_compile import (
    EAGER,
    FIXED,
    ORDINARY,
    SIZE,
    STACKED,
    VARIED,
    WITHOUT,
    Batches,
    data,
    main,
)

pytest.importorskip("transformers")


@pytest.mark.parametrize("experts", [WITHOUT, ORDINARY, STACKED])
def test_what_is_in_a_batch(experts):
    batches = Batches(experts, is_varied=True)
    found = [batches(data()[:SIZE]) for _ in range(4)]
    assert len({batch["input_ids"].shape for batch in found}) > 1
    assert all(("plan" in batch) == (experts != WITHOUT) for batch in found)
    assert all(batch["input_ids"].shape == batch["attention_mask"].shape for batch in found)


def test_the_command_writes_its_figures(tmp_path, monkeypatch, capsys):
    """Without a compiler, which is tried in the tests of bridges."""
    ways, run = [], trainer_compile.seconds_of

    def eagerly(experts, way, steps, *, is_varied):
        ways.append((experts, way))
        return run(experts, EAGER, steps, is_varied=is_varied)

    monkeypatch.setattr(trainer_compile, "seconds_of", eagerly)
    lines = [(WITHOUT, FIXED), (STACKED, VARIED)]
    monkeypatch.setattr(trainer_compile, "LINES", lines)
    assert main(["--steps", "4", "--report", str(tmp_path)]) == 0
    assert "after the first 10" in capsys.readouterr().out
    with (tmp_path / "trainer_compile.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["experts"], row["positions"]) for row in rows] == lines
    assert all(0 < float(row["ratio"]) < 5 for row in rows)
    assert [way for _, way in ways] == ["eager", "compiled", "eager"] * 2


@pytest.mark.parametrize("steps", ["0", "x"])
def test_a_refused_argument(steps, capsys):
    assert main(["--steps", steps]) == 2
    assert "'--steps' must be" in capsys.readouterr().err
