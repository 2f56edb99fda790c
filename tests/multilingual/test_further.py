"""A finished run goes on: by a schedule of its own, on the words that it has."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.multilingual import further, job
from benchmarks.multilingual.cli import main
from benchmarks.multilingual.learning import training
from benchmarks.multilingual.learning.batches import TrainingSteps
from benchmarks.multilingual.learning.checkpoint import RunIdentity
from benchmarks.multilingual.learning.schedule import (
    FURTHER_PEAK,
    LEARNING_RATE,
    MOST_EPOCHS,
    WARM_UP_STEPS,
    learning_rate,
)
from benchmarks.multilingual.learning.training import Progress
from benchmarks.multilingual.options import Options, parse_options
from tests.interrupting import interrupt_at

SMALL = ["--languages", "id,ms", "--batch-size", "256", "--seed", "5"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert main([*SMALL, "--steps", "4", "--report", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def saved(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return state


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_plan_begins_where_the_last_one_ended() -> None:
    progress = Progress(planned_steps=100, total_steps=100)
    first = []
    for progress.step in range(100):
        first.append(progress.learning_rate)
    progress.step = 100
    assert progress.finished
    progress.go_on(300, clocked=False)
    assert (progress.begun, progress.planned_steps, progress.total_steps, progress.finished) == (100, 400, 400, False)
    second = []
    for progress.step in range(100, 400):
        second.append(progress.learning_rate)
        assert progress.done == 1.0
    assert first == [learning_rate(step, 100) for step in range(100)]
    assert max(first) == LEARNING_RATE
    assert max(second) == second[WARM_UP_STEPS - 1] == FURTHER_PEAK * LEARNING_RATE
    assert second[0] < first[20] / 10
    assert second[-1] == pytest.approx(first[-1] * FURTHER_PEAK, rel=0.1)
    again = Progress.from_state(progress.state_dict())
    assert again == progress


def test_a_checkpoint_that_never_went_on_has_one_plan() -> None:
    state = Progress(planned_steps=3, total_steps=3).state_dict()
    del state["ended"]
    assert Progress.from_state(state).begun == 0


def options(*arguments: str) -> Options:
    return parse_options(["--resume", *arguments])


@pytest.mark.parametrize(
    ("step", "arguments", "planned"),
    [
        (100, ["--minutes", "0.01"], 6),
        (100, ["--minutes", "60"], MOST_EPOCHS * 39 - 100),
        (MOST_EPOCHS * 39, ["--minutes", "60"], 0),
        (MOST_EPOCHS * 39 + 5, ["--minutes", "60"], 0),
        (MOST_EPOCHS * 39, ["--steps", "7"], 7),
    ],
)
def test_minutes_plan_no_rounds_beyond_those_worthwhile(step: int, arguments: list[str], planned: int) -> None:
    progress = Progress(planned_steps=step, total_steps=step, step=step)
    assert further.plan_further(progress, options(*arguments), TrainingSteps(39 * 1024, 1024, 0)) == planned


def test_a_finished_run_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = saved(folder)
    rates = []
    step = training.train_step

    def noted(contender: Any, batch: Any, rate: float, **more: Any) -> Any:
        rates.append((contender.name, rate, more["done"]))
        return step(contender, batch, rate, **more)

    monkeypatch.setattr(training, "train_step", noted)
    assert main(["--resume", "--steps", "20", "--report", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "the run goes on from step 4 with a schedule of its own; its steps so far have met its words" in said
    assert "training 20 steps of 256 words" in said
    found = [(rate, done) for name, rate, done in rates if name == "experts"]
    assert found == [(learning_rate(each, 20, FURTHER_PEAK * LEARNING_RATE), 1.0) for each in range(20)]
    after = saved(folder)
    progress = after["progress"]
    assert (progress["step"], progress["ended"], progress["total_steps"]) == (24, [4], 24)
    assert after["identity"] == before["identity"]
    # The curve goes on.
    old = before["progress"]["curve"]
    assert progress["curve"][: len(old)] == old
    checked = [point["step"] for point in progress["curve"] if point["validation_accuracy"] is not None]
    assert sorted(set(checked))[-10:] == list(range(6, 25, 2))
    with (folder / "training_curves.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["validation_accuracy"]]
    assert max(steps) == 24
    assert 4 in steps
    facts = json.loads((folder / "accuracy.json").read_text())["run"]
    assert (facts["steps"], facts["ended"]) == (24, [4])
    assert "went on at step 4" in (folder / "index.html").read_text()
    # Now that is finished, too.
    assert main(["--resume", "--report", str(folder)]) == 0
    assert "nothing is left to train" in capsys.readouterr().out


def test_a_plan_in_its_midst_is_resumed_as_it_is(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(folder, whole, dirs_exist_ok=True)
    assert main(["--resume", "--steps", "6", "--report", str(whole)]) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        assert main(["--resume", "--steps", "6", "--report", str(folder)]) == 130
    assert saved(folder)["progress"]["step"] == 7
    # The minutes bound the rest of the plan; they make no new one.
    assert main(["--resume", "--minutes", "5", "--report", str(folder)]) == 0
    ours, theirs = (saved(each)["contenders"]["experts"]["network"] for each in (folder, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert saved(folder)["progress"]["ended"] == [4]


def test_minutes_without_words_left_train_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    monkeypatch.setattr(further, "MOST_EPOCHS", 0)
    assert main(["--resume", "--minutes", "10", "--report", str(folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("its steps have met its words 0.0 times, and more rounds make unseen words worse")
    assert said[-1].endswith("nothing is left to train")
    assert contents(folder) == before


def test_a_longer_run_reads_more_words_and_keeps_what_it_knows(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tmp_path_factory.mktemp("few")
    small = ["--languages", "id,ms", "--batch-size", "256", "--pairs", "3000", "--steps", "2"]
    assert main([*small, "--report", str(few)]) == 0
    before = saved(few)
    taken = []
    step = training.train_step

    def noted(contender: Any, batch: Any, rate: float, **more: Any) -> Any:
        if not taken:
            taken.append({key: value.clone() for key, value in contender.network.state_dict().items()})
        return step(contender, batch, rate, **more)

    monkeypatch.setattr(training, "train_step", noted)
    assert main(["--resume", "--steps", "1", "--pairs", "40000", "--report", str(few)]) == 0
    after = saved(few)
    assert after["identity"] == {**before["identity"], "pairs": 40_000}
    assert after["vocabulary"] == {**saved(folder)["vocabulary"]}
    old, new = before["contenders"]["experts"]["network"], taken[0]
    for key, value in old.items():
        if key.startswith(("hierarchy", "encoder.mix", "encoder.known", "encoder.languages")):
            assert torch.equal(new[key], value), key
    rules = before["vocabulary"]["rules"]
    assert rules != after["vocabulary"]["rules"][: len(rules)]
    for place, rule in enumerate(rules):
        row = new["head.rules.weight"][after["vocabulary"]["rules"].index(rule)]
        assert torch.equal(row, old["head.rules.weight"][place])
    # It is a run like any other from then on.
    assert main(["--resume", "--steps", "1", "--report", str(few)]) == 0
    assert saved(few)["progress"]["ended"] == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "pairs"),
    [
        (["--minutes", "8"], 40_000),
        (["--minutes", "60"], 160_000),
        (["--minutes", "60", "--pairs", "50000"], 50_000),
        (["--steps", "9"], 40_000),
        (["--steps", "9", "--pairs", "50000"], 50_000),
    ],
)
def test_minutes_say_how_many_words_are_read(arguments: list[str], pairs: int) -> None:
    identity = RunIdentity(languages=("id",), pairs=40_000, batch_size=256, seed=0)
    assert further.reading_more(identity, options(*arguments)) == replace(identity, pairs=pairs)
    more = replace(identity, pairs=200_000)
    if "--pairs" not in arguments:
        assert further.reading_more(more, options(*arguments)) == more


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "9", "--pairs", "9"], "no fewer than the checkpoint was trained with, 40000 (got 9)"),
        (["--pairs", "90000"], "what the checkpoint was trained with, 40000 (got 90000)"),
    ],
)
def test_other_pairs_are_refused(
    arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    assert main(["--resume", *arguments, "--report", str(folder)]) == 2
    assert capsys.readouterr().err == f"'--pairs' must be {words}\n"
    assert contents(folder) == before


def test_a_run_without_its_report_is_reported_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "accuracy.json").unlink()
    assert main(["--resume", "--minutes", "60", "--report", str(folder)]) == 0
    assert "has no report yet, which comes first; call again to train further" in capsys.readouterr().out
    assert saved(folder)["progress"]["step"] == 4
    assert json.loads((folder / "accuracy.json").read_text())["run"]["steps"] == 4


def test_an_unfinished_run_knows_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert main([*SMALL, "--steps", "6", "--report", str(tmp_path)]) == 130
    before = contents(tmp_path)
    capsys.readouterr()
    assert main(["--resume", "--steps", "9", "--report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "'--steps' must stand without '--resume' until the run is finished (got a run at step 3 of 6, which knows its "
        "steps)\n"
    )
    assert contents(tmp_path) == before


def test_a_clock_that_is_over_still_takes_a_step_of_a_new_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Passed(job.Deadline):
        def __init__(self, ends_at: float, **more: Any) -> None:
            super().__init__(-math.inf, **more)

        def steps_that_fit(self, seconds_per_step: float) -> int:
            return 0

    monkeypatch.setattr(job, "Deadline", Passed)
    assert main(["--resume", "--minutes", "1", "--report", str(folder)]) == 0
    assert saved(folder)["progress"]["step"] == 5
