"""Which devices work here, found out in child processes: a broken driver stack ends the process that asks it."""

from __future__ import annotations

import copy
import importlib.metadata
import subprocess
import sys
from dataclasses import dataclass

import torch
from torch import nn

from .config import CELMoEConfig, ExpertConfig, HierarchyLevelConfig
from .experts import ExpertBatch, ExpertModule, ExpertResult
from .hierarchy import HierarchicalCELMoE
from .reference import reference_forward

DEVICES = ("cpu", "cuda", "directml")
TIME_LIMIT_SECONDS = 120
# Above the batches that take short cuts on a CPU, short enough to be nothing on any device.
_BATCH_SIZE, _WIDTH = 192, 16
_TOLERANCE = 1e-4


WORKS, FAILS, MISSING = "works", "fails", "not available"
# The exit codes of a child process that looked: any other is a failure.
STATE_BY_EXIT_CODE = {0: WORKS, 3: MISSING}


@dataclass(frozen=True)
class DeviceReport:
    """What became of the self-check on one device.

    Attributes:
        device: One of `DEVICES`.
        state: `WORKS` where a forward and backward pass agreed with the oracle on the CPU, `MISSING` where there is no
            such device, else `FAILS`.
        detail: The largest difference, or why there is none.
    """

    device: str
    state: str
    detail: str


class DeviceMissingError(RuntimeError):
    """The device is not there, for the reason given."""


def report(device: str) -> DeviceReport:
    """Run `self_check` for a device in a child process with a time limit."""
    command = [sys.executable, "-m", "celmoe", "--self-check", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return DeviceReport(device, FAILS, f"no answer within {TIME_LIMIT_SECONDS} s")
    if done.returncode < 0:
        return DeviceReport(device, FAILS, f"the driver ended the process (signal {-done.returncode})")
    words = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip().splitlines()
    state = STATE_BY_EXIT_CODE.get(done.returncode, FAILS)
    return DeviceReport(device, state, words[-1] if words else "no answer")


def self_check(name: str) -> str:
    """Train one step on a device and compare it with the oracle on the CPU.

    Returns:
        The largest difference, in words.

    Raises:
        DeviceMissingError: The device is not there.
        ArithmeticError: The results differ.
    """
    device = _open(name)
    torch.manual_seed(0)
    names = [f"expert{index}" for index in range(4)]
    config = CELMoEConfig(
        _WIDTH,
        [
            HierarchyLevelConfig("first", {"only": ExpertConfig("only")}),
            HierarchyLevelConfig("second", {name: ExpertConfig(name) for name in names}),
        ],
        fusion_dropout=0.0,
    )
    on_cpu = HierarchicalCELMoE(config, lambda *_: _Linear())
    on_device = copy.deepcopy(on_cpu).to(device)
    hidden = torch.randn(_BATCH_SIZE, _WIDTH)
    routing = {"second": [names[(index * index) % len(names)] for index in range(_BATCH_SIZE)]}

    expected = reference_forward(on_cpu, hidden, routing).fused_hidden
    expected.pow(2).mean().backward()
    found = on_device(hidden.to(device), routing).fused_hidden
    found.pow(2).mean().backward()

    differences = [(found.detach().cpu() - expected.detach()).abs().max().item()]
    for mine, oracles in zip(on_device.parameters(), on_cpu.parameters(), strict=True):
        if (mine.grad is None) != (oracles.grad is None):
            raise ArithmeticError("a gradient is missing on one side")
        if mine.grad is not None and oracles.grad is not None:
            differences.append((mine.grad.cpu() - oracles.grad).abs().max().item())
    largest = max(differences)
    if not largest <= _TOLERANCE:
        raise ArithmeticError(f"differs from the oracle by {largest:.1e} (at most {_TOLERANCE:.0e} allowed)")
    return f"agrees with the oracle to {largest:.1e}"


class _Linear(ExpertModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(self.linear(batch.hidden))


def _open(name: str) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda":
        if not torch.cuda.is_available():
            raise DeviceMissingError("no CUDA device, or a torch built without CUDA")
        return torch.device("cuda")
    if name != "directml":
        raise DeviceMissingError(f"'device' must be one of {', '.join(DEVICES)} (got {name!r})")
    try:
        importlib.metadata.version("torch-directml")
    except importlib.metadata.PackageNotFoundError:
        raise DeviceMissingError("torch-directml is not installed: pip install celmoe[directml]") from None
    import torch_directml  # noqa: PLC0415  # importing it loads drivers, so only this child process does

    # Without an adapter, device() still answers, and the first tensor moved there ends the process.
    if torch_directml.device_count() == 0:
        raise DeviceMissingError("torch-directml finds no adapter")
    device: torch.device = torch_directml.device()
    return device
