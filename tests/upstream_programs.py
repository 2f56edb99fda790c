"""Programs written for celmoe-vp, run with both packages."""

import pytest

import celmoe
from tests import peer
from tests.peer import FIRST, THIRD, VERSIONS


def compare(program, version, *, tolerance=0.0):
    theirs = program(peer.peer(version))
    ours = program(celmoe)
    peer.assert_same(ours, theirs, tolerance=tolerance)
    return ours


both = pytest.mark.parametrize("version", [FIRST, THIRD])
every_version = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture(autouse=True)
def _looped(monkeypatch):
    """The programs are not changed: the environment alone asks for the engine that promises equal bits."""
    monkeypatch.setenv("CELMOE_ENGINE", "looped")
