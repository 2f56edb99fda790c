"""Finding DirectML that may not work, with stand-ins that repeat the plug-in's observed faults."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import celmoe.devices
from celmoe import CELMoEError, DeviceMissingError, UnknownDeviceError, devices
from celmoe.devices import ENGINES_CHECKED, DeviceReport, open_device, report

ROOT = Path(__file__).resolve().parents[2]

_ADAPTER = """
import torch
device_count = lambda: 1
device = lambda index: torch.device("cpu")
device_name = lambda index: "Adapter\\0"
print("noise")
"""
_ABORT = """
import os, sys
def end(*_):
    sys.stderr.write("Invalid data type\\n")
    sys.stderr.flush()
    os.abort()
torch.nn.Module.to = end
"""
# The source of the plug-in, which runs at import or later, and the parts of the report.
PLUG_INS = {
    "plain Linux": (
        "raise OSError('libd3d12.so: cannot open shared object file')",
        "not available",
        "torch-directml does not load here (OSError: libd3d12.so: cannot open shared object file)",
    ),
    "a crash": (
        "import os, signal\ndevice_count = lambda: os.kill(os.getpid(), signal.SIGSEGV)",
        "fails",
        "the process ended with signal 11 while opening directml",
    ),
    "an abort at a tensor": (
        _ADAPTER + _ABORT,
        "fails",
        "the process ended with signal 6 while running a linear layer: Invalid data type",
    ),
    "an adapter": (_ADAPTER, "works", "Adapter"),
}


def _raises(*_: object) -> NoReturn:
    raise RuntimeError("no memory\nand more")


def asked_with(source: str, place: Path, limit: float | None = None) -> DeviceReport:
    """The report about DirectML with this source as its plug-in."""
    (place / "torch_directml.py").write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(place), str(ROOT)]))
        patch.setattr(devices, "TIME_LIMIT_SECONDS", limit or devices.TIME_LIMIT_SECONDS)
        return report("directml")


@pytest.mark.parametrize("way", PLUG_INS)
def test_what_a_plug_in_may_do(way: str, tmp_path: Path):
    source, state, detail = PLUG_INS[way]
    found = asked_with(source, tmp_path)
    assert (found.device, found.state) == ("directml", state)
    assert found.detail == detail
    assert [check.engine for check in found.checks] == (["looped", "grouped"] if found.state == "works" else [])


def test_a_plug_in_that_hangs(tmp_path: Path):
    found = asked_with("import time; time.sleep(60)", tmp_path, 5)
    assert found.state == "fails"
    assert found.detail.startswith("no answer within 5 s")


def test_a_plug_in_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda _: None)
    found = devices.self_check("directml")
    assert found.state == "not available"
    assert found.detail == 'torch-directml is not installed: pip install -e ".[directml]"'


@pytest.mark.parametrize(
    ("source", "detail"),
    [
        (
            "raise ImportError('undefined symbol: _ZN3c10\\nand more')",
            "torch-directml does not load here (ImportError: undefined symbol: _ZN3c10)",
        ),
        ("device_count = lambda: 0", "torch-directml finds no adapter"),
    ],
    ids=["another torch", "no adapter"],
)
def test_a_plug_in_without_a_device(source: str, detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "torch_directml.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_directml", raising=False)
    assert devices.self_check("directml") == DeviceReport("directml", "not available", detail)
    sys.modules.pop("torch_directml", None)


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A plug-in for this process, whose adapters are the CPU."""
    module = types.ModuleType("torch_directml")
    module.__spec__ = importlib.machinery.ModuleSpec("torch_directml", None)
    module.device_count = lambda: 2
    module.device = lambda index: torch.device("cpu", index)
    module.device_name = lambda index: f"Adapter {index}"
    monkeypatch.setitem(sys.modules, "torch_directml", module)
    return module


def test_one_engine_may_fail_alone(plug_in: types.ModuleType, monkeypatch: pytest.MonkeyPatch):
    right = devices._largest_difference
    monkeypatch.setattr(
        devices, "_largest_difference", lambda engine, device: right(engine, device) + (engine == "grouped")
    )
    stages: list[str] = []
    found = devices.self_check("directml", stages.append)
    assert stages == [
        "opening directml",
        "running a linear layer",
        *(f"running the {e} engine" for e in ENGINES_CHECKED),
    ]
    assert found.state == "fails"
    assert found.detail == "grouped differs from the oracle by 1.0e+00 (at most 1e-03 allowed)"
    looped, grouped = found.checks
    assert looped.fault == ""
    assert grouped.fault == "differs from the oracle by 1.0e+00 (at most 1e-03 allowed)"


@pytest.mark.parametrize(
    ("broken", "detail"),
    [
        (lambda _: float("inf"), "a linear layer of PyTorch's own is wrong by inf"),
        (_raises, "a linear layer of PyTorch's own raises RuntimeError: no memory"),
    ],
)
def test_pytorch_itself_may_fail(plug_in: types.ModuleType, monkeypatch: pytest.MonkeyPatch, broken: Any, detail: str):
    monkeypatch.setattr(devices, "_difference_of_a_layer", broken)
    assert devices.self_check("directml") == DeviceReport("directml", "fails", detail)


def test_an_engine_that_raises(plug_in: types.ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "_largest_difference", _raises)
    found = devices.self_check("directml")
    assert found.detail == "looped raises RuntimeError: no memory; grouped raises RuntimeError: no memory"
    assert [check.largest_difference for check in found.checks] == [None, None]


def test_differences_are_relative_and_see_missing_numbers():
    tensor = torch.tensor([2e-6, 1e-6])
    assert devices._largest([tensor], [tensor * 1.5]) == pytest.approx(0.5)
    for wrong in (None, tensor * float("nan"), tensor * float("inf")):
        assert devices._largest([tensor, None], [wrong, None]) == float("inf")


def test_zeros_differ_from_all_but_zeros():
    zeros = torch.zeros(2)
    assert devices._largest([zeros], [zeros]) == devices._largest([zeros], [-zeros]) == 0.0
    for wrong in (1e-30, float("nan"), float("inf")):
        assert devices._largest([zeros], [zeros + wrong]) == float("inf")


def test_opening_devices(plug_in: types.ModuleType, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def works(name: str) -> DeviceReport:
        asked.append(name)
        return DeviceReport(name, "works", "")

    monkeypatch.setattr(devices, "report", works)
    assert open_device("cpu") == torch.device("cpu")
    assert open_device("directml:1") == torch.device("cpu", 1)
    assert asked == ["directml:1"]
    with pytest.raises(DeviceMissingError, match=r"^DirectML has 2 adapters, counted from 0$"):
        open_device("directml:2")
    monkeypatch.setattr(devices, "report", lambda name: DeviceReport(name, "fails", "it crashed"))
    with pytest.raises(DeviceMissingError, match=r"^'device' must be one that works \(got 'directml'; it crashed\)$"):
        open_device("directml")
    assert issubclass(DeviceMissingError, CELMoEError)
    assert issubclass(DeviceMissingError, RuntimeError)


@pytest.mark.parametrize("name", ["abacus", "cpu:0", "directml:", "cuda:x", "cuda:-1", "", "CPU", 0])
def test_unknown_devices(name: Any):
    for ask in (open_device, report, devices.self_check):
        with pytest.raises(
            UnknownDeviceError, match=r"^'device' must be one of 'cpu', 'cuda', 'directml', with "
        ) as caught:
            ask(name)
        assert repr(name) in str(caught.value)
        assert isinstance(caught.value, CELMoEError | ValueError)


def test_without_a_tracer_the_loop_alone_is_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(celmoe.devices, "tracer_missing", lambda: "PyTorch has no tracer here")
    found = celmoe.devices.self_check("cpu")
    assert (found.state, found.detail) == ("works", "looped only: PyTorch has no tracer here")
    assert [check.engine for check in found.checks] == ["looped"]
