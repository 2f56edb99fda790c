from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import pytest
import torch

import celmoe
from benchmarks.multilingual.learning import training
from benchmarks.multilingual.learning.batches import Batch
from benchmarks.multilingual.learning.schedule import (
    LEARNING_RATE,
    MOST_EPOCHS,
    Deadline,
    learning_rate,
    plan_pairs,
    plan_steps,
)
from benchmarks.multilingual.learning.training import (
    REVISION_INTERVAL,
    Contender,
    Progress,
    StepResult,
    Watchers,
    train,
)
from benchmarks.multilingual.words.corpus import FORMS_PER_LANGUAGE


@pytest.mark.parametrize("total", [1, 2, 7, 50, 500])
def test_the_learning_rate_rises_then_falls_to_its_end(total: int) -> None:
    rates = [learning_rate(step, total) for step in range(total)]
    top = rates.index(max(rates))
    assert all(before < after for before, after in pairwise(rates[: top + 1]))
    assert all(before >= after for before, after in pairwise(rates[top:]))
    assert max(rates) == pytest.approx(LEARNING_RATE)


def test_a_deadline_counts_the_steps_that_fit() -> None:
    now = 100.0
    deadline = Deadline(110.0, clock=lambda: now)
    assert deadline.steps_that_fit(3.0) == 3
    assert not deadline.passed()
    now = 111.0
    assert deadline.passed()
    assert deadline.steps_that_fit(3.0) == 0


def test_steps_are_planned_in_words() -> None:
    many = 10**6
    # The job's default is 150 steps a minute.
    for minutes in (0.05, 1, 7.3, 11.7):
        assert plan_steps(minutes, 4_096, many) == max(1, round(150 * minutes))
    assert plan_steps(7.3, 256, many) == 16 * plan_steps(7.3, 4_096, many)
    assert plan_steps(7.3, 65_536, many) == round(1_095 / 16)
    assert plan_steps(7.3, 4_096, 3) == 3 * MOST_EPOCHS
    assert plan_steps(0.001, 4_096, many) == 1


def test_longer_runs_read_more_pairs() -> None:
    found = [plan_pairs(minutes) for minutes in (0.1, 7.3, 29, 30, 45, 60, 600)]
    assert found == [FORMS_PER_LANGUAGE * times for times in (1, 1, 1, 2, 3, 4, 4)]


@pytest.fixture
def batch() -> Batch:
    level = celmoe.HierarchyLevelConfig(name="language", experts={"id": celmoe.ExpertConfig(name="id")})
    compiler = celmoe.RoutingCompiler(celmoe.CELMoEConfig(hidden_size=4, levels=[level]))
    return Batch(
        characters=torch.zeros(4, 20, dtype=torch.int32),
        targets=torch.zeros(4, dtype=torch.int64),
        proposals=torch.zeros(4, 0, dtype=torch.int64),
        counts=torch.zeros(4, 0, 0, dtype=torch.uint8),
        totals=torch.zeros(4, 0, dtype=torch.uint8),
        languages=["id"] * 4,
        plan=compiler({"language": ["id"] * 4}),
    )


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The events in their order, with a training step that trains nothing."""
    events: list[str] = []

    def step(contender: Contender, batch: Batch, rate: float, *, done: float, read: bool) -> StepResult:
        events.append(contender.name)
        return StepResult(1.0, {"global.rule": 1.0}, 0.5)

    monkeypatch.setattr(training, "train_step", step)
    monkeypatch.setattr(training, "finish", lambda device: events.append("wait"))
    return events


def contender(name: str) -> Contender:
    # A step is stood in for, so that neither losses nor an optimizer are asked.
    return Contender(name, cast("Any", torch.nn.Identity()), cast("Any", None), cast("Any", None))


def watchers(log: list[str]) -> Watchers:
    return Watchers(
        on_step=lambda step, results, speeds: log.append(f"step {step}"),
        validate=lambda contender: 0.5,
        on_validated=lambda point: log.append(f"validated {point.contender}"),
        on_milestone=lambda: log.append("milestone"),
        stop_requested=lambda: False,
    )


def test_each_step_is_timed_from_an_idle_device_to_an_idle_device(batch: Batch, log: list[str]) -> None:
    progress = Progress(planned_steps=1, total_steps=1)
    assert train([contender("a"), contender("b")], iter([batch]), progress, None, watchers(log))
    assert log[:6] == ["wait", "a", "wait", "wait", "b", "wait"]


def test_a_contender_with_a_stride_takes_one_step_in_so_many(batch: Batch, log: list[str]) -> None:
    progress = Progress(planned_steps=7, total_steps=7)
    every, third = contender("a"), replace(contender("b"), stride=3)
    assert train([every, third], iter([batch] * 7), progress, None, watchers(log), validations=2)
    told = [event for event in log if event != "wait"]
    # Steps 1, 4 and 7; a validation in between is of the latest one.
    assert [event for event in told if event in {"b", "validated b"}] == [
        "b", "validated b", "b", "validated b", "b", "validated b"
    ]  # fmt: skip
    assert (every.words, third.words) == (28, 12)
    assert [point.step for point in progress.curve if point.contender == "b"] == [1, 3, 4, 6, 7]


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_words_per_second_are_those_of_all_ranks(batch: Batch, log: list[str], num_ranks: int) -> None:
    joined = celmoe.RoutingPlan.join([batch.plan] * num_ranks) if num_ranks > 1 else None
    told: list[float] = []
    watching = replace(watchers(log), on_step=lambda step, results, speeds: told.append(speeds["a"]))
    progress, trained = Progress(planned_steps=1, total_steps=1), contender("a")
    assert train([trained], iter([replace(batch, joined=joined)]), progress, None, watching)
    assert [*told, progress.curve[0].words_per_second] == [pytest.approx(4 * num_ranks / trained.seconds)] * 2


def test_a_milestone_follows_every_validation_but_the_last(batch: Batch, log: list[str]) -> None:
    progress = Progress(planned_steps=4, total_steps=4)
    assert train([contender("a")], iter([batch] * 4), progress, None, watchers(log), validations=2)
    told = [event for event in log if event not in {"wait", "a"}]
    assert told == [
        "step 1", "validated a", "step 2", "milestone", "step 3", "validated a", "step 4"
    ]  # fmt: skip


def test_a_run_that_the_clock_ended_is_finished(batch: Batch, log: list[str]) -> None:
    progress = Progress(planned_steps=4, total_steps=4)
    assert train([contender("a")], iter([batch] * 4), progress, Deadline(0.0), watchers(log))
    assert (progress.step, progress.finished) == (1, True)


@pytest.mark.parametrize(("fitting", "more"), [(0, 0), (2, 2), (9, 9), (1000, 9)])
def test_the_clock_shortens_the_plan_and_never_lengthens_it(
    batch: Batch, log: list[str], monkeypatch: pytest.MonkeyPatch, fitting: int, more: int
) -> None:
    monkeypatch.setattr(Deadline, "steps_that_fit", lambda deadline, seconds_per_step: fitting)
    planned = REVISION_INTERVAL + 9
    progress = Progress(planned_steps=planned, total_steps=planned)
    deadline = Deadline(1.0, clock=lambda: 0.0)
    assert train([contender("a")], iter([batch] * (2 * planned)), progress, deadline, watchers(log))
    assert progress.step == progress.total_steps == REVISION_INTERVAL + more
