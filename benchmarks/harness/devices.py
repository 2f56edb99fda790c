"""The devices that the suite runs on: their presence, and the wait for their work.

`celmoe.devices` tries a device in a child process, since a broken driver stack ends the process that asks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from benchmarks.harness.arguments import OptionError
from celmoe.devices import DEVICES, FAILS, WORKS, report

CPU, CUDA, DIRECTML = "cpu", "cuda", "directml"
HOW_TO_GET = {
    CUDA: "install a PyTorch build with CUDA, on a machine with an NVIDIA card and its driver",
    DIRECTML: 'on Windows or WSL with Python 3.11 or 3.12: pip install -e ".[directml]"',
}


@dataclass(frozen=True)
class Found:
    """A device by name: the device of tensors, or why it is absent and how to get it."""

    name: str
    device: torch.device | None
    why_absent: str = ""


@functools.cache
def find_device(name: str) -> Found:
    """The device, or why it is absent; looked for once a process."""
    _, absent = try_devices([name])
    if absent:
        return Found(name, None, f"device {name} is absent: {absent[name]}")
    return Found(name, _open_directml() if name == DIRECTML else torch.device(name))


def try_devices(asked: Sequence[str] | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """Try devices, each in a process of its own; ``None`` is all. The CPU needs no trying.

    Returns:
        Those that work, in the order asked for; by name, why each of the others does not, and the cure.
    """
    wanted = DEVICES if asked is None else tuple(asked)
    with ThreadPoolExecutor() as threads:
        reports = list(threads.map(report, [device for device in wanted if device != CPU]))
    absent = {
        each.device: f"{'is there and fails: ' * (each.state == FAILS)}{each.detail} "
        f"(to get it: {HOW_TO_GET[each.device]})"
        for each in reports
        if each.state != WORKS
    }
    return tuple(device for device in wanted if device not in absent), absent


def find_devices(asked: Sequence[str] | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """The result of `try_devices`.

    Raises:
        OptionError: None of those asked for works.
    """
    present, absent = try_devices(asked)
    if not present:
        found = "; ".join(f"{device!r}: {why}" for device, why in absent.items())
        raise OptionError(f"'--device' must name a device that works here, as {CPU} does (got {found})")
    return present, absent


def _open_directml() -> torch.device:
    import torch_directml  # noqa: PLC0415  # a child process has shown that this one will survive it

    device: torch.device = torch_directml.device()
    return device


def open_device(text: str) -> torch.device:
    """The value of ``--device``: a device that works here.

    Raises:
        OptionError: It does not.
    """
    directml: Any = None
    if text == DIRECTML:
        try:
            directml = import_module("torch_directml")
        except ImportError:
            raise OptionError(
                "'--device' must be cpu or cuda where torch-directml is missing (got 'directml')"
            ) from None
    try:
        device: torch.device = torch.device(text) if directml is None else directml.device()
        # A value has to come back: "meta" makes tensors too, but none that hold anything.
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OptionError(
            f"'--device' must be a device that works here, such as cpu, cuda or directml (got {text!r}: {reason})"
        ) from None
    return device


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was told."""
    if device.type == CUDA:
        torch.cuda.synchronize(device)
    elif device.type != CPU:
        # DirectML has no call to wait for it: reading back the last write waits.
        torch.zeros(1, device=device).cpu()
