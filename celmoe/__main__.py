"""``python -m celmoe``: the installed versions, the devices that work, and a self-check on each."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

import torch

from .devices import (
    CPU,
    DEVICES,
    FAILS,
    MISSING,
    STATE_BY_EXIT_CODE,
    WORKS,
    DeviceReport,
    as_json,
    report,
    require_known,
    self_check,
)
from .engines.registry import AUTO, ENGINES, resolve_engine
from .errors import EngineError, UnknownDeviceError
from .version import __version__


def main(arguments: list[str] | None = None) -> int:
    """Print the report.

    Returns:
        The exit code: 0 if all devices that were asked for work. If none was asked for, the CPU must work, and every
        other device must work or be absent.
    """
    parser = argparse.ArgumentParser(prog="python -m celmoe", description=__doc__)
    parser.add_argument("--device", nargs="+", metavar="NAME", help="report on these alone; each must work")
    parser.add_argument("--self-check", metavar="DEVICE", help="check one device in this process")
    options = parser.parse_args(arguments)
    try:
        if options.self_check:
            return _check_here(options.self_check)
        return _report(options.device)
    except UnknownDeviceError as error:
        parser.error(str(error))


def _report(asked: list[str] | None) -> int:
    for device in asked or ():
        # Refuse an unknown name before the first device takes its time.
        require_known(device)

    try:
        default = resolve_engine(AUTO)
    except EngineError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"celmoe         {__version__}")
    print(f"python         {platform.python_version()} on {platform.system()} {platform.machine()}")
    # torch's own version names the build; the metadata of its wheel may not.
    print(f"torch          {torch.__version__}")
    for package in ("numpy", "torch-directml"):
        print(f"{package:14} {_version(package)}")
    print(f"engines        {', '.join(ENGINES)} ('{AUTO}' means {default})")
    print()
    print("| device   | state         | engine  | largest difference | detail |")
    print("|----------|---------------|---------|--------------------|--------|")
    is_fine = True
    for device in asked or DEVICES:
        found = report(device)
        # Print each device at once: the next device may take its time.
        print("\n".join(_rows(found)), flush=True)
        may_be_absent = asked is None and device != CPU
        is_fine &= found.state == WORKS or (found.state == MISSING and may_be_absent)
    return 0 if is_fine else 1


def _rows(found: DeviceReport) -> list[str]:
    """A device's part of the table: a row for each engine, or one row if no engine was checked."""
    if not found.checks:
        return [_row(found.device, found.state, "", "", found.detail)]
    return [
        _row(
            found.device,
            FAILS if check.fault else WORKS,
            check.engine,
            "" if check.largest_difference is None else f"{check.largest_difference:.1e}",
            check.fault or " on ".join(filter(None, ("agrees", found.detail if found.state == WORKS else ""))),
        )
        for check in found.checks
    ]


def _row(device: str, state: str, engine: str, difference: str, detail: str) -> str:
    return f"| {device:8} | {state:13} | {engine:7} | {difference:18} | {detail.replace('|', '/')} |"


def _check_here(device: str) -> int:
    found = self_check(device, lambda doing: print(doing, flush=True))
    print(as_json(found), flush=True)
    return next(code for code, state in STATE_BY_EXIT_CODE.items() if state == found.state)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
