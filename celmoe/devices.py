"""Find out which devices work, in child processes: a broken driver stack ends the process that asks it.

`open_device` serves programs that take a device's name; ``python -m celmoe`` prints each `report`. A new device is one
more name in `DEVICES`, and the way to open it in `_open`; the benchmarks have its title and how to get it in
``benchmarks/harness``.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .config import CELMoEConfig, ExpertConfig, HierarchyLevelConfig
from .engines.registry import GROUPED, LOOPED
from .errors import DeviceMissingError, UnknownDeviceError, listed, nearest
from .experts import ExpertBatch, ExpertModule, ExpertResult
from .grouped.capture import tracer_missing
from .hierarchy import HierarchicalCELMoE
from .reference import reference_forward

DEVICES = CPU, CUDA, DIRECTML = ("cpu", "cuda", "directml")
ENGINES_CHECKED = (LOOPED, GROUPED)
TIME_LIMIT_SECONDS = 120
# On a CPU, few rows take short cuts. The larger batch takes none of the short cuts, not even for one expert; the
# smaller batch takes all. Both batches are cheap on any device.
_BATCH_SIZES = _LARGE, _SMALL = (512, 24)
_WIDTH, _EXPERTS = 16, 5
# Relative to each tensor's largest value: devices sum in other orders, and some multiply with fewer bits.
_TOLERANCE = 1e-3


WORKS, FAILS, MISSING = "works", "fails", "not available"
# The exit codes of a child process that finished its check; any other code is a failure.
STATE_BY_EXIT_CODE = {0: WORKS, 1: FAILS, 3: MISSING}


@dataclass(frozen=True)
class EngineCheck:
    """One engine on one device, compared with the oracle on the CPU.

    Attributes:
        engine: The engine's name.
        largest_difference: The largest difference in the fused hidden states and all gradients of a large and a small
            batch, each relative to its tensor's largest value; ``None`` if the engine raised before.
        fault: The reason why the engine disagrees; empty if the engine agrees.
    """

    engine: str
    largest_difference: float | None = None
    fault: str = ""


@dataclass(frozen=True)
class DeviceReport:
    """The result of the self-check on one device.

    Attributes:
        device: The device's name.
        state: `WORKS` if a forward and backward pass of every engine agreed with the oracle on the CPU, `MISSING` if
            there is no such device, else `FAILS`.
        detail: The hardware's name if the device works, else the reason why not.
        checks: One check for each engine; empty if no engine was reached.
    """

    device: str
    state: str
    detail: str
    checks: tuple[EngineCheck, ...] = ()


def open_device(name: str) -> torch.device:
    """The device of a name, after a check of the device.

    A child process tries DirectML first, which takes some seconds: with broken drivers, even asking for DirectML can
    end a process.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"directml"``; or one of several: ``"cuda:1"``, ``"directml:1"``.

    Raises:
        UnknownDeviceError: No device has this name.
        DeviceMissingError: The device is not there, or gives wrong results.
    """
    kind, _ = _parsed(name)
    if kind == "directml" and (found := report(name)).state != WORKS:
        raise DeviceMissingError(f"'device' must be one that works (got {name!r}; {found.detail})")
    return _open(name)[0]


def report(device: str) -> DeviceReport:
    """Run `self_check` for a device in a child process with a time limit.

    Raises:
        UnknownDeviceError: No device has this name.
    """
    _parsed(device)
    command = [sys.executable, "-m", "celmoe", "--self-check", device]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=TIME_LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        stage = _last_line(error.stdout)
        return DeviceReport(device, FAILS, f"no answer within {TIME_LIMIT_SECONDS} s{stage and f' ({stage})'}")
    stage = _last_line(done.stdout)
    if done.returncode in STATE_BY_EXIT_CODE and stage.startswith("{"):
        found = json.loads(stage)
        checks = tuple(EngineCheck(**check) for check in found["checks"])
        return DeviceReport(device, STATE_BY_EXIT_CODE[done.returncode], found["detail"], checks)
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode:#x}"
    words = " while ".join(filter(None, (f"the process ended with {how}", stage)))
    return DeviceReport(device, FAILS, ": ".join(filter(None, (words, _last_line(done.stderr)))))


def _last_line(output: str | bytes | None) -> str:
    text = output.decode("utf-8", "replace") if isinstance(output, bytes) else output or ""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def self_check(device: str, tell: Callable[[str], object] = lambda _: None) -> DeviceReport:
    """Train one step with every engine on a device and compare it with the oracle on the CPU.

    The check runs in this process, which a broken driver stack may end.

    Args:
        device: The device's name.
        tell: Called with each next step, in words.

    Raises:
        UnknownDeviceError: No device has this name.
    """
    tell(f"opening {device}")
    try:
        opened, hardware = _open(device)
    except DeviceMissingError as missing:
        return DeviceReport(device, MISSING, str(missing))
    tell("running a linear layer")
    try:
        difference = _difference_of_a_layer(opened)
    except Exception as error:  # noqa: BLE001  # whatever a driver raises is the answer
        return DeviceReport(device, FAILS, f"a linear layer of PyTorch's own raises {_in_words(error)}")
    if not difference <= _TOLERANCE:
        return DeviceReport(device, FAILS, f"a linear layer of PyTorch's own is wrong by {difference:.1e}")
    checks = []
    without_tracer = tracer_missing()
    for engine in ENGINES_CHECKED:
        if engine == GROUPED and without_tracer is not None:
            continue
        tell(f"running the {engine} engine")
        checks.append(_checked(engine, opened))
    faults = [f"{check.engine} {check.fault}" for check in checks if check.fault]
    detail = "; ".join(filter(None, (hardware, without_tracer and f"looped only: {without_tracer}")))
    return DeviceReport(device, FAILS if faults else WORKS, "; ".join(faults) or detail, tuple(checks))


def as_json(found: DeviceReport) -> str:
    """A report as one line of JSON, for `report` to read."""
    return json.dumps({"detail": found.detail, "checks": [asdict(check) for check in found.checks]})


def _checked(engine: str, device: torch.device) -> EngineCheck:
    try:
        largest = _largest_difference(engine, device)
    except Exception as error:  # noqa: BLE001  # whatever a driver raises is the answer
        return EngineCheck(engine, fault=f"raises {_in_words(error)}")
    if largest <= _TOLERANCE:
        return EngineCheck(engine, largest)
    return EngineCheck(engine, largest, f"differs from the oracle by {largest:.1e} (at most {_TOLERANCE:.0e} allowed)")


def _in_words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"


def _difference_of_a_layer(device: torch.device) -> float:
    torch.manual_seed(0)
    layer = nn.Linear(_WIDTH, _WIDTH)
    given, weights = torch.randn(_LARGE, _WIDTH), torch.randn(_LARGE, _WIDTH)
    found = []
    for where in (torch.device("cpu"), device):
        moved = copy.deepcopy(layer).to(where)
        out = moved(given.to(where))
        (out * weights.to(where)).sum().backward()
        found.append([out.detach(), *(each.grad for each in moved.parameters())])
    return _largest(*found)


def _largest_difference(engine: str, device: torch.device) -> float:
    return max(_difference_of_a_step(engine, device, size) for size in _BATCH_SIZES)


def _difference_of_a_step(engine: str, device: torch.device, batch_size: int) -> float:
    torch.manual_seed(0)
    names = [f"expert{index}" for index in range(_EXPERTS)]
    config = CELMoEConfig(
        _WIDTH,
        [
            HierarchyLevelConfig("first", {"only": ExpertConfig("only")}),
            HierarchyLevelConfig("second", {name: ExpertConfig(name) for name in names}),
        ],
        fusion_dropout=0.0,
    )
    on_cpu = HierarchicalCELMoE(config, lambda *_: _Block(), engine=engine)
    on_device = copy.deepcopy(on_cpu).to(device)
    # The fusion ends in a norm, so a sum of squares would have no gradient; random weights give one.
    hidden, weights = torch.randn(batch_size, _WIDTH).requires_grad_(), torch.randn(batch_size, _WIDTH)
    # Squares modulo 7 are 0, 1, 2 and 4, with 0 less often than the others: expert 3 is left out.
    routing = {"second": [names[index * index % 7] for index in range(batch_size)]}

    expected = reference_forward(on_cpu, hidden, routing).fused_hidden
    (expected * weights).sum().backward()
    given = hidden.detach().to(device).requires_grad_()
    found = on_device(given, routing).fused_hidden
    (found * weights.to(device)).sum().backward()
    return _largest(
        [expected.detach(), hidden.grad, *(each.grad for each in on_cpu.parameters())],
        [found.detach(), given.grad, *(each.grad for each in on_device.parameters())],
    )


def _largest(expected: list[torch.Tensor | None], found: list[torch.Tensor | None]) -> float:
    """The largest relative difference; infinite if one is NaN, or if a tensor is on one side only."""
    largest = 0.0
    for theirs, mine in zip(expected, found, strict=True):
        if (theirs is None) != (mine is None):
            return float("inf")
        if theirs is not None and mine is not None:
            difference = (mine.cpu() - theirs).abs().max()
            relative = (difference / theirs.abs().max()).item() if difference else 0.0
            largest = max(largest, relative if relative == relative else float("inf"))
    return largest


class _Block(ExpertModule):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.up = nn.Linear(_WIDTH, 2 * _WIDTH)
        self.down = nn.Linear(2 * _WIDTH, _WIDTH)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(batch.hidden + self.down(torch.relu(self.up(self.norm(batch.hidden)))))


def require_known(name: str) -> None:
    """Refuse a name that no device has.

    Raises:
        UnknownDeviceError: No device has this name.
    """
    _parsed(name)


def _parsed(name: str) -> tuple[str, int | None]:
    """The kind of device, and its number or ``None``."""
    kind, colon, number = str(name).partition(":")
    if kind not in DEVICES or (colon and not number.isdecimal()) or (kind == "cpu" and colon):
        raise UnknownDeviceError(
            f"'device' must be one of {listed(DEVICES)}, with ':' and a number for one of several (got {name!r}; "
            f"{nearest(kind, DEVICES)})"
        )
    return kind, int(number) if colon else None


def _open(name: str) -> tuple[torch.device, str]:
    """The device, and the hardware's name."""
    kind, number = _parsed(name)
    if kind == "cpu":
        return torch.device("cpu"), ""
    if kind == "directml":
        return _open_directml(number or 0)
    if not torch.cuda.is_available():
        raise DeviceMissingError("no CUDA device, or a torch built without CUDA")
    if (number or 0) >= torch.cuda.device_count():
        raise DeviceMissingError(f"CUDA has {torch.cuda.device_count()} devices, counted from 0")
    device = torch.device("cuda") if number is None else torch.device("cuda", number)
    return device, torch.cuda.get_device_name(device)


def _open_directml(number: int) -> tuple[torch.device, str]:
    if importlib.util.find_spec("torch_directml") is None:
        raise DeviceMissingError('torch-directml is not installed: pip install -e ".[directml]"')
    try:
        # The import loads drivers, so no other place imports torch_directml.
        import torch_directml  # noqa: PLC0415  # never at import time
    except (ImportError, OSError) as error:
        # torch_directml raises OSError on Linux outside of WSL, and ImportError with another torch than its own.
        raise DeviceMissingError(f"torch-directml does not load here ({_in_words(error)})") from error
    # Without an adapter, device() still answers, and the first tensor moved there ends the process.
    count = torch_directml.device_count()
    if number >= count:
        why = f"DirectML has {count} adapters, counted from 0" if count else "torch-directml finds no adapter"
        raise DeviceMissingError(why)
    device: torch.device = torch_directml.device(number)
    named: Any = getattr(torch_directml, "device_name", lambda _: "")
    return device, str(named(number)).strip("\0 ")
