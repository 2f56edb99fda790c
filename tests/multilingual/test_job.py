"""The whole job on two small languages, for a few steps."""

import csv
import html
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import celmoe
from benchmarks.multilingual import job
from benchmarks.multilingual.cli import main
from benchmarks.multilingual.learning.schedule import Deadline
from tests.interrupting import interrupt_at
from tests.multilingual.runs import HERE, ROOT, SMALL, check_facts, parameters
from tests.slow import slow_after

FIGURES = ["accuracy_by_language", "expert_load", "samples_by_language", "training_curves"]


def test_the_report_is_whole(uninterrupted: Path) -> None:
    for name in FIGURES:
        assert (uninterrupted / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert len((uninterrupted / f"{name}.csv").read_text().splitlines()) > 1
    table = json.loads((uninterrupted / "accuracy.json").read_text())
    assert table["run"]["steps"] == 6
    assert table["run"]["words_trained"]["experts"] == 6 * 256
    check_facts(table["run"])
    assert table["run"]["languages"] == ["id", "ms"]
    with (uninterrupted / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["language"] for row in rows] == ["id", "ms"]
    for row, score in zip(rows, table["languages"], strict=True):
        for system in ("experts", "universal", "wide", "table", "identity"):
            assert float(row[system]) == pytest.approx(score["accuracy"][system], abs=1e-4)
    with (uninterrupted / "costs.csv").open() as file:
        costs = {row["system"]: row for row in csv.DictReader(file)}
    assert list(costs) == ["experts", "universal", "wide", "table", "identity"]
    for system, mean in table["macro_mean"].items():
        assert float(costs[system]["mean"]) == pytest.approx(mean)
        assert costs[system]["parameters"] == str(table["run"]["parameters"].get(system, ""))
    for name in ("examples", "errors"):
        with (uninterrupted / f"{name}.csv").open() as file:
            examples = list(csv.DictReader(file))
        assert [row["language"] for row in examples[:: len(examples) // 2]] == ["id", "ms"]
    assert all(row["experts"] != row["true_lemma"] for row in examples)


def test_the_page_shows_every_figure_and_table(uninterrupted: Path) -> None:
    page = (uninterrupted / "index.html").read_text(encoding="utf-8")
    for name in FIGURES:
        assert f'src="{name}.png"' in page
    run = json.loads((uninterrupted / "accuracy.json").read_text())
    for system, mean in run["macro_mean"].items():
        assert f"<td class=text>{system}</td><td>{mean:.1%}</td>" in page
    for language in ("Indonesian", "Malay"):
        assert language in page
    with (uninterrupted / "errors.csv").open() as file:
        for row in csv.DictReader(file):
            assert f"<td class=text>{html.escape(row['form'])}</td>" in page
    # It is whole: every element that opens closes.
    for element in ("table", "tr", "td", "th", "h2", "h3", "a", "span"):
        assert len(re.findall(f"<{element}[ >]", page)) == page.count(f"</{element}>"), element


def test_the_load_counts_every_word_once_a_level(uninterrupted: Path) -> None:
    with (uninterrupted / "expert_load.csv").open() as file:
        rows = list(csv.DictReader(file))
    for level in ("universal", "family", "language"):
        assert sum(float(row["words_per_step"]) for row in rows if row["level"] == level) == pytest.approx(256)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_parameters_with_loader_processes_too(uninterrupted: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, "--workers", "1", "--steps", "6", "--seed", "5", "--report", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.multilingual", *arguments],
        cwd=ROOT,
        # The child takes this process's number of threads: another number sums in another order.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "mean over 2 languages" in done.stdout
    ours, theirs = parameters(uninterrupted), parameters(tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_equals_an_uninterrupted_one(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert main([*SMALL, *HERE, "--steps", "6", "--seed", "5", "--report", str(tmp_path)]) == 130
    said = capsys.readouterr().out
    assert "training 6 steps of 256 words, 1,536 words in all" in said
    command = f"python -m benchmarks.multilingual --resume --report {shlex.quote(str(tmp_path))}"
    assert f"stopped at step 3 of 6; go on with: {command}\n" in said
    assert not (tmp_path / "accuracy.csv").exists()
    # State that a resumed run does not inherit from the process must come from the checkpoint.
    torch.manual_seed(12345)
    assert main(["--resume", *HERE, "--report", str(tmp_path)]) == 0
    ours, theirs = parameters(uninterrupted), parameters(tmp_path)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (tmp_path / "accuracy.csv").read_text() == (uninterrupted / "accuracy.csv").read_text()


@pytest.mark.slow
def test_grouped_and_looped_runs_train_to_like_parameters_and_a_grouped_one_can_be_resumed(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grouped = [*HERE, "--engine", "grouped"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*SMALL, *grouped, "--steps", "6", "--seed", "5", "--report", str(whole)]) == 0
    assert "levels by engine grouped: universal looped, family looped, language grouped" in capsys.readouterr().out
    engines = {"universal": "looped", "family": "looped", "language": "grouped"}
    assert json.loads((whole / "accuracy.json").read_text())["run"]["engines"] == engines
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert main([*SMALL, *grouped, "--steps", "6", "--seed", "5", "--report", str(parts)]) == 130
    assert "--engine grouped" in capsys.readouterr().out
    assert main(["--resume", *grouped, "--report", str(parts)]) == 0
    ours, resumed, looped = parameters(whole), parameters(parts), parameters(uninterrupted)
    assert all(torch.equal(ours[name], resumed[name]) for name in ours)
    for name in ours:
        torch.testing.assert_close(ours[name], looped[name], rtol=0, atol=1e-4, msg=name)


def test_a_compiled_run_tells_what_compiling_took(
    uninterrupted: Path, tmp_path: Path, compiled: list[torch.nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *HERE, "--compile", "--steps", "6", "--seed", "5", "--report", str(tmp_path)]) == 0
    (hierarchy,) = compiled
    assert isinstance(hierarchy, celmoe.HierarchicalCELMoE)
    said = capsys.readouterr().out
    assert "engine auto, stacked, compiled, device cpu" in said
    assert re.search(r"^compiled in \d+\.\d s, with a step that trains nothing$", said, re.MULTILINE)
    facts = json.loads((tmp_path / "accuracy.json").read_text())["run"]
    assert (facts["stacked"], facts["compiled"]) == (True, True)
    assert facts["compile_seconds"] > 0
    # Compiling trains nothing.
    ours, theirs = parameters(uninterrupted), parameters(tmp_path)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("first", "then"), slow_after(1, [([], ["--no-stacked"]), (["--no-stacked"], ["--stacked"])]))
def test_a_run_goes_on_stacked_or_not(
    first: list[str], then: list[str], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert main([*SMALL, *HERE, *first, "--steps", "6", "--seed", "5", "--report", str(tmp_path)]) == 130
    assert main(["--resume", *HERE, *then, "--report", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "accuracy.json").read_text())["run"]["stacked"] == (then == ["--stacked"])
    ours, theirs = parameters(tmp_path), parameters(uninterrupted)
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4, msg=name)
    for contender in ("experts", "universal"):
        states = [torch.load(folder / "checkpoint.pt")["contenders"][contender] for folder in (tmp_path, uninterrupted)]
        one, other = (state["optimizer"] for state in states)
        for group, wanted in zip(one["param_groups"], other["param_groups"], strict=True):
            assert group["params"] == wanted["params"]
        assert one["state"].keys() == other["state"].keys()
        torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=1e-4)


def test_resuming_a_finished_run_says_so_and_writes_nothing(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> dict[str, tuple[int, bytes]]:
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in uninterrupted.iterdir()}

    before = state()
    assert main(["--resume", *HERE, "--report", str(uninterrupted)]) == 0
    said = capsys.readouterr().out
    assert said == f"the run in {uninterrupted} is finished and its report is written: nothing is left to train\n"
    assert state() == before


def test_a_run_that_was_stopped_before_its_report_is_reported_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "predict", interrupt)
        assert main([*SMALL, *HERE, "--steps", "2", "--report", str(tmp_path)]) == 130
    assert capsys.readouterr().err.startswith("stopped; the checkpoint of step 2 is kept: python -m ")
    before = parameters(tmp_path)
    assert main(["--resume", *HERE, "--report", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "accuracy.json").read_text())["run"]["steps"] == 2
    assert all(torch.equal(value, before[name]) for name, value in parameters(tmp_path).items())


@pytest.mark.slow
def test_a_bounded_run_ends_with_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = time.monotonic()
    assert main(["--languages", "ms", "--minutes", "0.05", *HERE, "--report", str(tmp_path)]) == 0
    assert time.monotonic() - begun < 30
    assert "mean over 1 languages" in capsys.readouterr().out


@pytest.mark.parametrize(("read_for", "is_little"), slow_after(2, [(10, False), (600, True), (400, True)]))
def test_a_run_that_read_for_long_still_ends_in_time(
    read_for: float,
    is_little: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The rest of the eight minutes is for training and report, if reading took many of them or few."""
    begun = time.monotonic() - read_for
    reads = [begun]
    monkeypatch.setattr(job, "time", SimpleNamespace(monotonic=lambda: reads.pop() if reads else time.monotonic()))
    ends = []

    class Passed(Deadline):
        """One that has passed by now, so that nobody waits for it."""

        def __init__(self, ends_at: float, **options: Any) -> None:
            ends.append(ends_at)
            super().__init__(0.0, **options)

    monkeypatch.setattr(job, "Deadline", Passed)
    assert main([*SMALL, *HERE, "--minutes", "8", "--report", str(tmp_path)]) == 0
    assert ends == [begun + 480 - job.report_seconds(2)]
    # An untrained network has no figures: one step is always taken.
    assert json.loads((tmp_path / "accuracy.json").read_text())["run"]["steps"] == 1
    said = capsys.readouterr().out
    assert ("s of 480 are over before the training, which has " in said) == is_little
    assert "mean over 2 languages" in said
