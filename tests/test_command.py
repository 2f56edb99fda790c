"""``python -m celmoe``: the installed versions, the devices that work, and a self-check on each."""

from __future__ import annotations

import json
import os
import platform
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
from celmoe.engines.arrangement import FEW_ROWS_PER_EXPERT
from celmoe.engines.registry import ENGINES
from celmoe.routing.planner import FEW_SAMPLES
from celmoe.rows.dispatch import FEW_ROWS

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
    assert first_words["python"][0] == platform.python_version()
    assert {"torch-directml"} <= first_words.keys()
    default = os.environ.get("CELMOE_ENGINE", "auto")
    assert " ".join(first_words["engines"]) == f"auto, looped, grouped ('auto' means {default})"
    # A table, as it can be pasted into an issue.
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    assert table[0] == ["device", "state", "engine", "largest difference", "detail"]
    assert {len(row) for row in table} == {5}
    for row, engine in zip(table[2:4], ["looped", "grouped"], strict=True):
        assert (row[:3], row[4]) == (["cpu", "works", engine], "agrees")
        assert float(row[3]) < 1e-5
    assert list(dict.fromkeys(row[0] for row in table[2:])) == ["cpu", "cuda", "directml"]
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


@pytest.mark.parametrize(
    ("asked", "states", "code"),
    [
        ([], ["works", "works", "works"], 0),
        ([], ["works", "not available", "not available"], 0),
        ([], ["fails", "works", "works"], 1),
        ([], ["not available", "works", "works"], 1),
        # An accelerator that is there and fails is no success, be it the first or the last.
        ([], ["works", "fails", "works"], 1),
        ([], ["works", "not available", "fails"], 1),
        (["cuda"], ["fails", "works", "fails"], 0),
        (["cuda"], ["works", "fails", "works"], 1),
        (["cuda"], ["works", "not available", "works"], 1),
        (["directml", "cpu"], ["works", "fails", "works"], 0),
        (["cpu", "directml"], ["works", "works", "fails"], 1),
        (["cpu", "directml"], ["fails", "works", "works"], 1),
    ],
)
def test_the_exit_code_is_of_what_was_asked_for(asked, states, code, monkeypatch, capsys):
    state_of = dict(zip(devices.DEVICES, states, strict=True))
    monkeypatch.setattr(command, "report", lambda device: devices.DeviceReport(device, state_of[device], "a|b"))
    assert command.main(["--device", *asked] if asked else []) == code
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if "a/b" in line]
    expected = asked or list(devices.DEVICES)
    assert [[cell.strip() for cell in row] for row in rows] == [[device, state_of[device]] for device in expected]


def test_an_unknown_device_is_refused_before_any_is_tried(monkeypatch, capsys):
    monkeypatch.setattr(command, "report", pytest.fail)
    with pytest.raises(SystemExit) as caught:
        command.main(["--device", "cpu", "cudo"])
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "(got 'cudo'; nearest: 'cuda'" in said.err


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


class _Skewed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def input_gradient(forward, model, hidden, routing):
    """The fused hidden states are right, and so is every parameter's gradient."""
    return forward(model, _Skewed.apply(hidden, 1.01), routing)


def one_expert_s_gradient(forward, model, hidden, routing):
    output = forward(model, hidden, routing)
    weight = model.level_modules["second"]["expert4"].up.weight
    # Once the backward pass has come to it.
    weight.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", 1.01 * each.grad))
    return output


def swapped_experts_gradients(forward, model, hidden, routing):
    output = forward(model, hidden, routing)
    experts = model.level_modules["second"]
    one, other = (experts[name].down.bias for name in ("expert1", "expert2"))
    seen = set()

    def exchange(each):
        seen.add(each)
        if len(seen) == 2:
            one.grad, other.grad = other.grad, one.grad

    for each in (one, other):
        each.register_post_accumulate_grad_hook(exchange)
    return output


def no_gradient_of_an_expert(forward, model, hidden, routing):
    model.level_modules["second"]["expert1"].norm.weight.requires_grad_(False)
    return forward(model, hidden, routing)


def a_gradient_for_an_absent_expert(forward, model, hidden, routing):
    for each in model.level_modules["second"]["expert3"].parameters():
        each.grad = torch.zeros_like(each)
    return forward(model, hidden, routing)


def fused_hidden(forward, model, hidden, routing):
    """Every gradient is right."""
    output = forward(model, hidden, routing)
    output.fused_hidden = output.fused_hidden + 0.1 * (torch.arange(output.fused_hidden.shape[1]) == 5)
    return output


SPOILT = [
    input_gradient,
    one_expert_s_gradient,
    swapped_experts_gradients,
    no_gradient_of_an_expert,
    a_gradient_for_an_absent_expert,
    fused_hidden,
]


@pytest.mark.parametrize("engine", ["looped", "grouped"])
@pytest.mark.parametrize("sizes", ["small", "large"])
@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_the_self_check_sees_what_one_engine_does_wrong(spoil, sizes, engine, monkeypatch):
    """In one size of batch alone: in those that take short cuts on a CPU, or in those that take none."""
    right = devices.HierarchicalCELMoE.forward
    batches = []

    class Spoilt(devices.HierarchicalCELMoE):
        def forward(self, hidden, routing):
            batches.append((self.engine, len(hidden)))
            is_small = len(hidden) <= FEW_SAMPLES
            if self.engine == engine and is_small == (sizes == "small"):
                return spoil(right, self, hidden, routing)
            return right(self, hidden, routing)

    monkeypatch.setattr(devices, "HierarchicalCELMoE", Spoilt)
    found = {check.engine: bool(check.fault) for check in devices.self_check("cpu").checks}
    assert found == {"looped": engine == "looped", "grouped": engine == "grouped"}
    # Both engines, with batches on each side of every short cut.
    for name in ("looped", "grouped"):
        few, many = sorted(size for each, size in batches if each == name)
        assert few <= min(FEW_ROWS, FEW_SAMPLES)
        assert many > max(FEW_ROWS, FEW_SAMPLES, FEW_ROWS_PER_EXPERT * 4)


@pytest.mark.parametrize("engine", ["looped", "grouped"])
def test_each_engine_s_row_is_of_that_engine(engine, monkeypatch):
    """A fault of one engine's own is one in its row alone."""
    right = ENGINES[engine]

    def wrong(*arguments, **options):
        results = right(*arguments, **options)
        results[-1].hidden = 1.1 * results[-1].hidden
        return results

    monkeypatch.setitem(ENGINES, engine, wrong)
    found = {check.engine: bool(check.fault) for check in devices.self_check("cpu").checks}
    assert found == {"looped": engine == "looped", "grouped": engine == "grouped"}
