"""``python -m celmoe``: what is installed, which devices work, and a self-check on each."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

import torch

from .devices import DEVICES, FAILS, MISSING, STATE_BY_EXIT_CODE, WORKS, DeviceMissingError, report, self_check
from .engines import AUTO, ENGINES, resolve_engine
from .errors import EngineError
from .version import __version__


def main(arguments: list[str] | None = None) -> int:
    """Print the report; the exit code is 0 if the CPU works."""
    parser = argparse.ArgumentParser(prog="python -m celmoe", description=__doc__)
    parser.add_argument("--self-check", choices=DEVICES, metavar="DEVICE", help="check one device in this process")
    options = parser.parse_args(arguments)
    if options.self_check:
        return _check_here(options.self_check)

    try:
        default = resolve_engine(AUTO)
    except EngineError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"celmoe   {__version__}")
    print(f"python   {platform.python_version()} on {platform.system()} {platform.machine()}")
    # In its own words, which name the build where the metadata of its wheel do not.
    print(f"torch    {torch.__version__}")
    for package in ("numpy", "torch-directml"):
        print(f"{package:8} {_version(package)}")
    print(f"engines  {', '.join(ENGINES)} ('{AUTO}' means {default})")
    print()
    reports = [report(device) for device in DEVICES]
    for each in reports:
        print(f"{each.device:9} {each.state:14} {each.detail}")
    return 0 if reports[0].state == WORKS else 1


def _check_here(device: str) -> int:
    try:
        print(self_check(device))
    except (DeviceMissingError, ArithmeticError) as error:
        print(error, file=sys.stderr)
        state = MISSING if isinstance(error, DeviceMissingError) else FAILS
    else:
        state = WORKS
    return next((code for code, meant in STATE_BY_EXIT_CODE.items() if meant == state), 1)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
