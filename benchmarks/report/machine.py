"""The machine and the versions of a run, for those who read its numbers later."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import celmoe
from benchmarks.harness.setting import processor_name

PACKAGES = ("torch", "numpy", "pytest-benchmark", "transformers", "peft", "torch-directml")
_ASKING_SECONDS = 60
_QUESTIONS = {
    "cuda": "import torch; print(torch.cuda.get_device_name())",
    "directml": "import torch_directml; print(torch_directml.device_name(torch_directml.default_device()))",
}


def machine_facts(devices: Sequence[str], command: Sequence[str]) -> dict[str, Any]:
    """Date, command, machine, devices and versions; a package that is not there is ``None``."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "devices": {device: _device_name(device) for device in devices},
        "versions": {
            "python": platform.python_version(),
            "celmoe": celmoe.__version__,
            **{package: _version(package) for package in PACKAGES},
        },
    }


def _device_name(device: str) -> str:
    """The driver's name for the device; asked in a process of its own, which a broken driver may end."""
    if device not in _QUESTIONS:
        return processor_name()
    command = [sys.executable, "-c", _QUESTIONS[device]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASKING_SECONDS, check=True)
    except (subprocess.SubprocessError, OSError):
        return "a device that does not tell its name"
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
