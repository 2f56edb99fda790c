"""The devices that work here, and ways to get the others."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.harness.arguments import OptionError
from benchmarks.harness.devices import CPU, HOW_TO_GET
from celmoe.devices import DEVICES, FAILS, WORKS, report


@dataclass(frozen=True)
class Presence:
    """The result of looking for devices.

    Attributes:
        present: The devices that work, in the order asked for.
        absent: By name, the reason why each of the others doesn't work, and the cure.
    """

    present: tuple[str, ...]
    absent: dict[str, str]


def find_devices(asked: Sequence[str] | None) -> Presence:
    """Try devices, each in a process of its own.

    Args:
        asked: Which; ``None`` for all, of which the CPU needs no trying.

    Raises:
        OptionError: None of those asked for works.
    """
    wanted = DEVICES if asked is None else tuple(asked)
    tried = [device for device in wanted if device != CPU]
    with ThreadPoolExecutor() as threads:
        reports = list(threads.map(report, tried))
    absent = {each.device: _why(each.state, each.device, each.detail) for each in reports if each.state != WORKS}
    present = tuple(device for device in wanted if device not in absent)
    if not present:
        found = "; ".join(f"{device!r}: {why}" for device, why in absent.items())
        raise OptionError(f"'--device' must name a device that works here, as {CPU} does (got {found})")
    return Presence(present, absent)


def _why(state: str, device: str, detail: str) -> str:
    return f"{'is there and fails: ' if state == FAILS else ''}{detail} (to get it: {HOW_TO_GET[device]})"
