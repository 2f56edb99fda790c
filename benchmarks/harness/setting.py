"""The setting of a timing suite: its console, its folder, and the machine it measures on."""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.harness.arguments import OptionError

# Columns outside a terminal: the default of 80 would cut lines.
_COLUMNS = 150


def processor_name() -> str:
    """The processor's product name if the system tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, named), platform.processor() or platform.machine())


@dataclass(frozen=True)
class Setting:
    """The facts that a figure must be quoted with.

    The commit has seven digits, and is ``"unknown"`` outside of a clone. A changed clone has what is in no commit.
    """

    hardware: str
    threads: int
    commit: str
    is_changed: bool

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.hardware}, {threads}, float32, torch {torch.__version__}"


def read_setting(device: torch.device, threads: int) -> Setting:
    """Read the hardware, the number of threads and the commit."""
    accelerator = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    commit, changes = (
        _git(*words) for words in (("rev-parse", "--short=7", "HEAD"), ("status", "--porcelain", "-uno"))
    )
    return Setting(f"{accelerator}{processor_name()}", threads, commit or "unknown", bool(changes))


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def make_console() -> Console:
    """Make the console that a suite prints to."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _COLUMNS)


def prepare_folder(folder: Path) -> None:
    """Make the folder and try it, so that a fault shows before the training and not after.

    Raises:
        OptionError: It can't be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OptionError(
            f"'--report' must be a folder that can be written to (got {str(folder)!r}: {reason})"
        ) from None
