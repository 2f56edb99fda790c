"""The suite's options and fixtures. ``pytest benchmarks/suite`` runs the suite in one process."""

from __future__ import annotations

import sys

from benchmarks.extras import missing_extra

if missing := missing_extra("bench"):
    sys.exit(missing)

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness.devices import CPU, DIRECTML, find_device
from benchmarks.suite.contest import Contest
from benchmarks.suite.sets import DEFAULT, FULL, GRID, GROUPED, SETS, workloads_of
from benchmarks.workloads.workload import Workload
from celmoe.devices import DEVICES

# Operators of other contenders may fall back to the CPU on DirectML; the suite times them all the same.
_MARKS = {DIRECTML: pytest.mark.filterwarnings("ignore:.*fall back to run on the CPU:UserWarning")}
# By set, seconds that a step of another contender may take.
_LONGEST = {DEFAULT: 2.0, FULL: 20.0, GRID: 20.0, GROUPED: 20.0}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options for devices, workloads and times."""
    group = parser.getgroup("celmoe", "the benchmarks of celmoe")
    group.addoption(
        "--device", action="append", choices=DEVICES, help="measure on this device (repeatable; default: cpu)"
    )
    group.addoption("--set", choices=SETS, default=DEFAULT, help="the workloads: a few (default), all, or a grid")
    group.addoption("--seconds", type=float, default=1.0, help="about how long each benchmark's rounds go on")
    group.addoption("--longest", type=float, help="leave out other contenders whose steps take more seconds")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """The tests' ``-n auto`` is no process but this one: contenders must not share the machine with each other."""
    return 0


def pytest_configure() -> None:
    """One thread, as all our figures are of."""
    torch.set_num_threads(1)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Print the setting and the devices, absent ones too, even in a quiet run."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    found = [find_device(name) for name in _devices(session.config)]
    present = ", ".join(each.name for each in found if each.device is not None)
    if terminal is not None:
        setting = (
            f"set {session.config.getoption('--set')}, {torch.get_num_threads()} thread, torch {torch.__version__}"
        )
        terminal.write_line(f"celmoe: {setting}, on {present or 'no device'}")
        for each in found:
            if each.device is None:
                terminal.write_line(each.why_absent)
    if all(each.device is None for each in found):
        raise pytest.UsageError(
            f"'--device' must name a device that is there (got {', '.join(_devices(session.config))})"
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A benchmark for each workload of the set, on each device that is there."""
    if "workload" not in metafunc.fixturenames:
        return
    workloads = workloads_of(metafunc.function.__name__.removeprefix("test_"), metafunc.config.getoption("--set"))
    devices = [name for name in _devices(metafunc.config) if find_device(name).device is not None]
    metafunc.parametrize("device_name", [pytest.param(name, marks=_MARKS.get(name, ())) for name in devices])
    metafunc.parametrize("workload", workloads, ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without the benchmarks of which the set has no workload: pytest makes a skipped one of each."""
    empty = [each for each in items if isinstance(each, pytest.Function) and not _has_workload(each)]
    config.hook.pytest_deselected(items=empty)
    items[:] = [each for each in items if each not in empty]


def _has_workload(item: pytest.Function) -> bool:
    return isinstance(item.callspec.params.get("workload"), Workload)


def _devices(config: pytest.Config) -> list[str]:
    return list(dict.fromkeys(config.getoption("--device") or [CPU]))


@pytest.fixture
def say(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print a line on the terminal past pytest's capture."""
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")

    def write(line: str) -> None:
        if terminal is not None and capture is not None:
            with capture.global_and_fixture_disabled():
                terminal.write_line(line)
                terminal.flush()  # a reader of a pipe should see the line now

    return write


@pytest.fixture
def contest(
    benchmark: BenchmarkFixture,
    workload: Workload,
    device_name: str,
    say: Callable[[str], None],
    pytestconfig: pytest.Config,
) -> Contest:
    """One workload on one device."""
    device = find_device(device_name).device
    assert device is not None
    longest = pytestconfig.getoption("--longest") or _LONGEST[pytestconfig.getoption("--set")]
    seconds, which = (pytestconfig.getoption(name) for name in ("--seconds", "--set"))
    return Contest(benchmark, workload, device_name, device, seconds, longest, which, say)
