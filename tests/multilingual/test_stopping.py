"""Runs that stop before their end, and checkpoints that can't be used."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.multilingual import job
from benchmarks.multilingual.cli import main
from benchmarks.multilingual.learning.checkpoint import FORMAT
from tests.interrupting import interrupt_at
from tests.multilingual.runs import HERE, ROOT, SMALL


@pytest.mark.parametrize(("stop_at", "kept"), [(1, None), (5, 4)])
def test_a_second_interrupt_tells_the_truth_about_the_checkpoint(
    stop_at: int,
    kept: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt_at(monkeypatch, stop_at, times=2)
    # A validation, and with it a checkpoint, every second step.
    assert main([*SMALL, *HERE, "--steps", "20", "--report", str(tmp_path)]) == 130
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    if kept is None:
        assert said.startswith("stopped before the first checkpoint")
        assert list(tmp_path.iterdir()) == []
    else:
        assert said.startswith(f"stopped; the checkpoint of step {kept} is kept: python -m benchmarks.multilingual ")
        assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["step"] == kept


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Writes beyond so many bytes of a file fail."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# At the start, in the midst, in the last record.
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_full_disk_keeps_the_checkpoint_before(
    share: float,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (uninterrupted / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(before)
    save = job.save_checkpoint

    def save_on_full_disk(*args: Any) -> Path:
        with full_disk(int(share * len(before))):
            return save(*args)

    monkeypatch.setattr(job, "save_checkpoint", save_on_full_disk)
    assert main([*SMALL, *HERE, "--steps", "1", "--report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "a file or folder could not be used: [Errno 27] File too large\n"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_resuming_another_run_is_refused(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", "--seed", "6", "--report", str(uninterrupted)]) == 2
    assert capsys.readouterr().err == "'--seed' must be what the checkpoint was trained with, 5 (got 6)\n"
    assert main(["--resume", "--pairs", "9", "--report", str(uninterrupted)]) == 2
    assert capsys.readouterr().err == "'--pairs' must be what the checkpoint was trained with, 40000 (got 9)\n"
    assert main(["--resume", "--languages", "ms", "--report", str(uninterrupted)]) == 2
    assert capsys.readouterr().err == "'--languages' must be what the checkpoint was trained with, id,ms (got ms)\n"


def flip(path: Path) -> None:
    """One bit of a tensor, which PyTorch itself would load."""
    state = torch.load(path, weights_only=True)
    tensor = next(iter(state["contenders"]["experts"]["network"].values()))
    data = bytearray(path.read_bytes())
    data[data.index(tensor.numpy().tobytes())] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_bytes(b"not a checkpoint"),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "a bit": flip,
    "a tensor": lambda path: torch.save(torch.ones(2), path),
    "code": lambda path: torch.save(print, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(
    damage: str, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes((uninterrupted / "checkpoint.pt").read_bytes())
    DAMAGES[damage](tmp_path / "checkpoint.pt")
    assert main(["--resume", "--report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("'--resume' must find a whole checkpoint (got ")
    assert said.count("\n") == 1


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"format": FORMAT - 1}, tmp_path / "checkpoint.pt")
    assert main(["--resume", "--report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"'--resume' must find a checkpoint of format {FORMAT} (got format {FORMAT - 1} in ")
    assert said.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no interrupt to another process")
@pytest.mark.parametrize(
    ("steps", "awaited", "seconds"),
    [
        pytest.param(100_000, "training", 0, id="at once", marks=pytest.mark.slow),
        pytest.param(100_000, "training", 1, id="soon", marks=pytest.mark.slow),
        pytest.param(300, "step", 0, id="in the midst"),
    ],
)
def test_interrupting_the_process_saves_and_says_how_to_go_on(
    steps: int, awaited: str, seconds: float, tmp_path: Path
) -> None:
    # The looped engine traces nothing, so it prints no line about slow tracing.
    arguments = [*SMALL, "--engine", "looped", "--workers", "1", "--steps", str(steps), "--report", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.multilingual", *arguments],
        cwd=ROOT,
        # Threads that wait for one another take minutes over a few steps if another program uses the processors.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(awaited):
                break
        time.sleep(seconds)
        # Signals the process alone: a signal to its whole group would end its loader processes on its behalf.
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        # One that did not stop must not go on training behind the other tests.
        process.kill()
    assert process.returncode == 130, err
    assert "go on with: python -m benchmarks.multilingual --resume" in out
    assert err == ""
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["step"]
    assert f"stopped at step {saved} of {steps};" in out
