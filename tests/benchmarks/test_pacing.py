"""The order of benchmarks, and those left out when the time is up."""

from types import SimpleNamespace

import pytest

from benchmarks.report import pacing
from benchmarks.report.pacing import Pace
from benchmarks.workloads.workload import Workload


def item(stage, batch_size, device="cpu"):
    workload = Workload("linear", 64, batch_size, 4)
    parameters = {"device_name": device, "workload": workload}
    return SimpleNamespace(nodeid=f"{stage}[{device}-{workload}]", callspec=SimpleNamespace(params=parameters))


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(monotonic=lambda: now.seconds, seconds=0.0)
    monkeypatch.setattr(pacing, "time", now)
    return now


def test_kinds_take_turns_from_the_smallest_on():
    small_plan, large_plan = item("plan", 16), item("plan", 4096)
    on_device = item("plan", 512, "cuda")
    steps = [item("step", size) for size in (16, 64, 512)]
    items = [large_plan, small_plan, on_device, *steps[::-1]]
    Pace(None).order(items)
    assert items == [small_plan, steps[0], on_device, steps[1], large_plan, steps[2]]


def test_what_may_not_end_in_time_is_not_begun(clock):
    pace = Pace(100.0)
    first, second = item("step", 16), item("step", 64)
    assert pace.fits(first)
    pace.begin(first)
    clock.seconds += 20.0
    pace.end()
    # Four times as large may take 80 s, and 80 are left.
    assert not pace.fits(second)
    assert pace.fits(item("step", 48))
    # The only known time of another kind is 20 s.
    assert pace.fits(item("plan", 4096))
    # A benchmark that was left out gives no estimate for the next.
    pace.end()
    assert not pace.fits(second)
    clock.seconds += 61.0
    assert not pace.fits(item("plan", 16))


def test_without_a_limit_everything_fits(clock):
    pace = Pace(None)
    clock.seconds += 1e6
    assert pace.fits(item("step", 65_536))
