"""The library on a device with DirectML's operators and traits, which a process gets for good: so in others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.directml.standin_backend import why_not
from tests.slow import slow_after

HERE = Path(__file__).parent
TIME_LIMIT_SECONDS = 240

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.mark.parametrize(
    ("part", "chosen"),
    slow_after(2, [("standin_traits", "not slow"), ("standin_parity", "not slow"), ("standin_parity", "slow")]),
)
def test_in_a_process_of_its_own(part: str, chosen: str):
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-q", "-m", chosen]
    command.append(str(HERE / f"{part}.py"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def test_this_process_has_no_such_device():
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.out", "PrivateUse1")
