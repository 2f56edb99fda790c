"""``python -m celmoe``: what is installed, which devices work, and a self-check on each."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import celmoe
from celmoe import __main__ as command
from celmoe import devices

ROOT = Path(__file__).resolve().parent.parent


def celmoe_command():
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:celmoe", "-m", "celmoe"],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=ROOT,
        check=False,
    )


def test_the_report():
    start = time.monotonic()
    done = celmoe_command()
    assert time.monotonic() - start < 120
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines() if line]
    first_words = {words[0]: words[1:] for words in lines}
    assert first_words["celmoe"] == [celmoe.__version__]
    assert first_words["torch"] == [torch.__version__]
    assert first_words["numpy"] == [np.__version__]
    assert "looped" in " ".join(first_words["engines"])
    assert first_words["cpu"][:5] == ["works", "agrees", "with", "the", "oracle"]
    if not torch.cuda.is_available():
        assert first_words["cuda"][:2] == ["not", "available"]
    assert set(first_words) >= {"python", "cpu", "cuda", "directml"}


def test_one_device_in_this_process(capsys):
    assert command.main(["--self-check", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("agrees with the oracle to ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_missing(capsys):
    assert command.main(["--self-check", "cuda"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "no CUDA device, or a torch built without CUDA\n"


def test_unknown_devices_and_options(capsys):
    for arguments in (["--self-check", "abacus"], ["--nonsense"], ["extra"]):
        with pytest.raises(SystemExit) as caught:
            command.main(arguments)
        assert caught.value.code == 2
    assert "abacus" in capsys.readouterr().err


def test_a_wrong_engine_in_the_environment_is_told_without_a_traceback(monkeypatch, capsys):
    monkeypatch.setenv("CELMOE_ENGINE", "warp")
    assert command.main([]) == 2
    assert "'CELMOE_ENGINE' must be one of" in capsys.readouterr().err


def pretend(monkeypatch, **outcome):
    """A child process that ends as told."""

    def run(arguments, **options):
        if "error" in outcome:
            raise outcome["error"]
        return subprocess.CompletedProcess(arguments, **{"returncode": 0, "stdout": "", "stderr": "", **outcome})

    monkeypatch.setattr(devices.subprocess, "run", run)


@pytest.mark.parametrize(
    ("outcome", "state", "detail"),
    [
        ({"stdout": "noise\nagrees with the oracle to 0.0e+00\n"}, "works", "agrees with the oracle to 0.0e+00"),
        ({"returncode": 3, "stderr": "no CUDA device\n"}, "not available", "no CUDA device"),
        (
            {"returncode": 1, "stderr": "differs from the oracle by 3.1e-01\n"},
            "fails",
            "differs from the oracle by 3.1e-01",
        ),
        ({"returncode": 1, "stderr": "Traceback\nRuntimeError: no driver\n"}, "fails", "RuntimeError: no driver"),
        ({"returncode": 1}, "fails", "no answer"),
        ({"returncode": -11}, "fails", "the driver ended the process (signal 11)"),
        ({"error": subprocess.TimeoutExpired("celmoe", 120)}, "fails", "no answer within 120 s"),
    ],
)
def test_what_a_child_process_may_do(monkeypatch, outcome, state, detail):
    pretend(monkeypatch, **outcome)
    found = devices.report("cuda")
    assert (found.device, found.state, found.detail) == ("cuda", state, detail)


def test_the_exit_code_is_the_cpu_s(monkeypatch, capsys):
    for state in ("works", "fails", "not available"):
        monkeypatch.setattr(command, "report", lambda device, state=state: devices.DeviceReport(device, state, "x"))
        assert command.main([]) == (0 if state == "works" else 1)
    assert capsys.readouterr().out.count("cpu ") == 3


def test_the_self_check_can_fail(monkeypatch):
    right = devices.reference_forward

    def wrong(*arguments, **options):
        output = right(*arguments, **options)
        output.fused_hidden = output.fused_hidden + 0.01
        return output

    monkeypatch.setattr(devices, "reference_forward", wrong)
    with pytest.raises(ArithmeticError, match=r"^differs from the oracle by 1\.0e-02 \(at most 1e-04 allowed\)$"):
        devices.self_check("cpu")
