"""The loader's processes: how they end."""

import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest
import torch

from benchmarks.multilingual.batches import TrainingSteps, training_batches


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
