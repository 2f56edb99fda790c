"""One short run for all tests that only read what it left."""

from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks.harness import peers
from benchmarks.multilingual.cli import main
from benchmarks.multilingual.studies import compare
from tests.multilingual.runs import HERE, SMALL


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert main([*SMALL, *HERE, "--steps", "6", "--seed", "5", "--report", str(folder)]) == 0
    return folder


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """The modules that were to be compiled, and are not: it would take longer than all else."""
    found: list[torch.nn.Module] = []

    def note(module: torch.nn.Module) -> None:
        found.append(module)

    monkeypatch.setattr(torch.nn.Module, "compile", note)
    return found


@pytest.fixture
def no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the peer can't be installed."""

    def missing(version: str) -> None:
        raise peers.PeerUnavailableError(f"celmoe-vp=={version} could not be installed: no network")

    monkeypatch.setattr(compare, "load_peer", missing)


@pytest.fixture(autouse=True)
def unpainted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that a test's own runs don't paint, which takes half of a short run; those of shared runs are painted."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: path.write_bytes(b"\x89PNG"))
