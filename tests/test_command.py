"""``python -m celmoe``: what is installed, which devices work, and a self-check on each."""

from __future__ import annotations

import json
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
    first_words = {words[0]: words[1:] for words in lines if words[0] != "|"}
    assert first_words["celmoe"] == [celmoe.__version__]
    assert first_words["torch"] == [torch.__version__]
    assert first_words["numpy"] == [np.__version__]
    assert set(first_words) >= {"python", "torch-directml"}
    assert "looped" in " ".join(first_words["engines"])
    # A table, as it can be pasted into an issue.
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    assert table[0] == ["device", "state", "engine", "largest difference", "detail"]
    assert {len(row) for row in table} == {5}
    for row, engine in zip(table[2:4], ["looped", "grouped"], strict=True):
        assert (row[:3], row[4]) == (["cpu", "works", engine], "agrees")
        assert float(row[3]) < 1e-5
    assert {row[0] for row in table[2:]} == {"cpu", "cuda", "directml"}
    if not torch.cuda.is_available():
        assert next(row for row in table if row[0] == "cuda")[1:3] == ["not available", ""]


def test_one_device_in_this_process(capsys):
    assert command.main(["--self-check", "cpu"]) == 0
    *stages, found = capsys.readouterr().out.splitlines()
    assert stages == [
        "opening cpu",
        "running a linear layer",
        "running the looped engine",
        "running the grouped engine",
    ]
    assert [check["engine"] for check in json.loads(found)["checks"]] == ["looped", "grouped"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_missing(capsys):
    assert command.main(["--self-check", "cuda"]) == 3
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last) == {"detail": "no CUDA device, or a torch built without CUDA", "checks": []}


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


_ANSWER = json.dumps({"detail": "Adapter", "checks": [{"engine": "looped", "largest_difference": 0.0, "fault": ""}]})


@pytest.mark.parametrize(
    ("outcome", "state", "detail"),
    [
        ({"stdout": f"noise\n{_ANSWER}\n"}, "works", "Adapter"),
        ({"returncode": 3, "stdout": '{"detail": "no CUDA device", "checks": []}'}, "not available", "no CUDA device"),
        ({"returncode": 1, "stdout": _ANSWER}, "fails", "Adapter"),
        (
            {"returncode": 1, "stdout": "opening cuda\n", "stderr": "Traceback\nRuntimeError: no driver\n"},
            "fails",
            "the process ended with exit code 0x1 while opening cuda: RuntimeError: no driver",
        ),
        ({"returncode": 1}, "fails", "the process ended with exit code 0x1"),
        ({"returncode": 0xC0000005}, "fails", "the process ended with exit code 0xc0000005"),
        ({"returncode": -11}, "fails", "the process ended with signal 11"),
        ({"error": subprocess.TimeoutExpired("celmoe", 120)}, "fails", "no answer within 120 s"),
        (
            {"error": subprocess.TimeoutExpired("celmoe", 120, output=b"opening cuda\n")},
            "fails",
            "no answer within 120 s (opening cuda)",
        ),
    ],
)
def test_what_a_child_process_may_do(monkeypatch, outcome, state, detail):
    pretend(monkeypatch, **outcome)
    found = devices.report("cuda")
    assert (found.device, found.state, found.detail) == ("cuda", state, detail)


def test_the_exit_code_is_the_cpu_s(monkeypatch, capsys):
    for state in ("works", "fails", "not available"):
        monkeypatch.setattr(command, "report", lambda device, state=state: devices.DeviceReport(device, state, "a|b"))
        assert command.main([]) == (0 if state == "works" else 1)
    assert capsys.readouterr().out.count("| cpu ") == 3


def test_a_fault_stands_in_its_engine_s_row(monkeypatch, capsys):
    checks = (devices.EngineCheck("looped", 1e-7), devices.EngineCheck("grouped", 0.5, "differs"))
    monkeypatch.setattr(command, "report", lambda device: devices.DeviceReport(device, "fails", "x", checks))
    assert command.main([]) == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| cuda ")]
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in rows] == [
        ["cuda", "works", "looped", "1.0e-07", "agrees"],
        ["cuda", "fails", "grouped", "5.0e-01", "differs"],
    ]


def test_the_self_check_can_fail(monkeypatch):
    right = devices.reference_forward

    def wrong(*arguments, **options):
        output = right(*arguments, **options)
        output.fused_hidden = output.fused_hidden * 1.01
        return output

    monkeypatch.setattr(devices, "reference_forward", wrong)
    found = devices.self_check("cpu")
    assert found.state == "fails"
    for check in found.checks:
        assert check.fault == "differs from the oracle by 9.9e-03 (at most 1e-03 allowed)"


def test_the_self_check_sees_gradients(monkeypatch):
    """The fused hidden states may be right, and what is learned wrong."""
    right = devices._largest

    def without_the_last(expected, found):
        return right(expected, [*found[:-1], torch.zeros_like(found[-1])])

    monkeypatch.setattr(devices, "_largest", without_the_last)
    assert devices.self_check("cpu").state == "fails"
