"""What a timing suite sets up before it measures."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console

from benchmarks.peers import PeerUnavailableError, load_peer

# Outside a terminal, where lines must not be cut to eighty columns.
_COLUMNS = 150


def make_console() -> Console:
    """Where a suite's lines go."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _COLUMNS)


def prepare(report: Path, console: Console) -> ModuleType | None:
    """Set one thread, say what is measured on, and make the report's folder.

    Returns:
        The peer, or ``None`` where it can't be had, which has been said then.
    """
    torch.set_num_threads(1)
    try:
        peer = load_peer("1.1.4")
    except PeerUnavailableError as error:
        console.print(f"the peer is not there to compare with: {error}", markup=False)
        return None
    console.print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, one thread", markup=False)
    report.mkdir(parents=True, exist_ok=True)
    return peer
