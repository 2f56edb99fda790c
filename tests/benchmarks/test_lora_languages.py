"""LoRA for many languages: the contenders compute the same, and the figures are written."""

import csv

import pytest
import torch

pytest.importorskip("peft", reason="an extra")

from benchmarks.tables import lora_languages
from benchmarks.tables.lora_languages import STACKED, SWITCHED, DifferentError, Size, contenders, difference, main

SMALL = Size(8, 1, 3, languages=3, rows=2)
# PEFT asks transformers by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_contenders_compute_the_same():
    steps = contenders(SMALL)
    assert difference(steps) < 1e-5
    for step in steps.values():
        step()
    assert difference(steps) < 1e-4


@pytest.mark.parametrize("name", [STACKED, SWITCHED])
def test_another_computation_is_found(name):
    steps = contenders(SMALL)
    with torch.no_grad():
        # Of the attention's values: its queries hardly matter at the start.
        steps[name].trained[-1].add_(0.1)
    with pytest.raises(DifferentError, match="must compute the same as"):
        difference(steps)


def test_the_command_writes_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lora_languages, "SIZES", (SMALL,))
    assert main(["--seconds", "0.01", "--report", str(tmp_path)]) == 0
    assert "3 languages, 2 rows each" in capsys.readouterr().out
    with (tmp_path / "lora_languages.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["experts_are"] for row in rows] == ["plain", "stacked"]
    assert all(float(row["ratio"]) > 0 for row in rows)


def test_a_refused_argument(capsys):
    assert main(["--seconds", "0"]) == 2
    assert "'--seconds' must be" in capsys.readouterr().err
