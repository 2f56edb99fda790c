"""TensorBoard: the loads of a run, written and read back."""

from __future__ import annotations

from pathlib import Path

import pytest

import celmoe
from tests.bridges.hosts import config, routes

pytest.importorskip("tensorboard")


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:tensorboard")
def test_loads_are_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    tracker, compiler = celmoe.LoadTracker(), celmoe.RoutingCompiler(config())
    wanted: dict[str, list[tuple[int, float]]] = {}
    with SummaryWriter(tmp_path) as writer:
        for step in range(3):
            tracker.update(compiler({"language": routes(10, step)}))
            for key, value in tracker.scalars().items():
                writer.add_scalar(key, value, step)
                wanted.setdefault(key, []).append((step, value))
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert set(found.Tags()["scalars"]) == set(wanted)
    for key, values in wanted.items():
        assert [(each.step, each.value) for each in found.Scalars(key)] == [
            (step, pytest.approx(value)) for step, value in values
        ]
