"""The loader's processes: how they end."""

import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest
import torch

from benchmarks.multilingual.learning.batches import TrainingSteps, training_batches


class Endless:
    """Sending it goes in and out of torch's C++, and never ends."""

    def __init__(self, begun: Path) -> None:
        self.begun = begun

    def __reduce__(self) -> NoReturn:
        self.begun.touch()
        while True:
            torch.zeros(1).share_memory_()


class EndlessFromTheSecond:
    def __init__(self, begun: Path) -> None:
        self.begun = begun
        self.calls = 0

    def __call__(self, rows: torch.Tensor) -> torch.Tensor | Endless:
        self.calls += 1
        return rows if self.calls == 1 else Endless(self.begun)


def test_a_worker_that_is_stopped_while_it_sends_ends_quietly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begun = tmp_path / "begun"
    others = active_children()
    collator = cast("Any", EndlessFromTheSecond(begun))
    batches = training_batches(TrainingSteps(8, 1, seed=0), collator, 0, 8, 1, torch.device("cpu"))
    next(batches)
    [worker] = [each for each in active_children() if each not in others]
    limit = time.monotonic() + 60
    while not begun.exists():
        assert time.monotonic() < limit
        time.sleep(0.01)
    batches.close()
    assert worker.exitcode == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("steps", [[0, 7, 1, 4, 0], [9, 0], [5, 4, 3, 2, 1, 0]])
def test_a_steps_words_follow_from_seed_and_step_alone(steps: list[int]) -> None:
    """A resumed run asks for an earlier epoch's steps after a later one's."""
    asked = TrainingSteps(12, 4, seed=3)
    assert asked.steps_per_epoch == 3
    for step in steps:
        assert torch.equal(asked[step], TrainingSteps(12, 4, seed=3)[step])


def test_an_epoch_has_every_word_once() -> None:
    steps = TrainingSteps(12, 4, seed=3)
    for epoch in (1, 0, 2):
        words = torch.cat([steps[epoch * 3 + place] for place in range(3)])
        assert words.sort().values.tolist() == list(range(12))
