"""The message about a device that is absent."""

import pytest
import torch

from benchmarks.harness import devices
from benchmarks.harness.devices import CPU, CUDA, DIRECTML, find_device, finish
from celmoe.devices import FAILS, MISSING, DeviceReport


@pytest.fixture(autouse=True)
def _looked_for_anew():
    find_device.cache_clear()
    yield
    find_device.cache_clear()


def test_the_cpu_is_there_without_looking(monkeypatch):
    monkeypatch.setattr(devices, "report", pytest.fail)
    found = find_device(CPU)
    assert found.device == torch.device("cpu")
    finish(found.device)


@pytest.mark.parametrize("name", [CUDA, DIRECTML])
@pytest.mark.parametrize("state", [MISSING, FAILS])
def test_an_absent_device_says_how_to_get_it(name, state, monkeypatch):
    asked = []

    def report(device):
        asked.append(device)
        return DeviceReport(device, state, "nobody home")

    monkeypatch.setattr(devices, "report", report)
    for _ in range(2):
        found = find_device(name)
        assert found.device is None
        failing = "is there and fails: " * (state == FAILS)
        assert found.why_absent.startswith(f"device {name} is absent: {failing}nobody home (to get it: ")
    assert asked == [name]
