"""From pytest-benchmark's JSON to records: one for each benchmark, checked here and nowhere after."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.contenders.contender import (
    AUTO,
    BARE,
    DENSE,
    GROUPED,
    LATER_PEER,
    LOOK_UPS,
    LOOPED,
    ORACLE,
    PEER,
    PEFT,
    STACK,
    STACKED,
    TRANSFORMERS,
    VMAP,
)
from benchmarks.harness.interleaved import Timings
from benchmarks.suite.stages import STAGES
from benchmarks.workloads.hierarchies import HIERARCHIES
from benchmarks.workloads.workload import Workload

# Fewer rounds have no quartiles.
FEWEST_ROUNDS = 2

# In the order of tables and panels: libraries users come from, code they could write, bounds, our engines.
CONTENDERS = (
    *(PEER, LATER_PEER, ORACLE, TRANSFORMERS, PEFT, STACK, VMAP, DENSE, BARE, LOOK_UPS),
    *(GROUPED, LOOPED, STACKED, AUTO),
)

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "stage": str,
    "workload": str,
    "expert": str,
    "hidden_size": int,
    "batch_size": int,
    "num_experts": int,
    "routes": str,
    "device": str,
    "threads": int,
    "dtype": str,
    "contender": str,
    "seconds": dict,
}


class ReadError(ValueError):
    """A file lacks the content that this command's runs leave; the message names the file and the reason."""


@dataclass(frozen=True)
class Record:
    """One benchmark: all contenders on one workload, one stage and one device.

    Attributes:
        name: The name that pytest gives it.
        stage: One of `STAGES`.
        workload: The workload that was run.
        label: The workload in words.
        positions: S, or ``None``.
        device: ``"cpu"``, ``"cuda"`` or ``"directml"``.
        threads: Of the CPU.
        dtype: The dtype of hidden states and parameters.
        contender: The one that pytest-benchmark timed.
        timings: Seconds of each contender in each round; empty if only memory was measured.
        bytes: Peak memory of each contender, if measured.
        absent: By contender, the reason why it is missing, and the cure.
        parts_ms: Milliseconds of the parts of a step, if they were timed.
    """

    name: str
    stage: str
    workload: Workload
    label: str
    positions: int | None
    device: str
    threads: int
    dtype: str
    contender: str
    timings: Timings
    bytes: Mapping[str, int] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    parts_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[object, ...]:
        """The facts that two runs must share to be compared; not the machine, since ratios allow for its speed."""
        return (self.stage, self.label, self.workload, self.positions, self.device, self.threads, self.dtype)

    @property
    def contenders(self) -> list[str]:
        """The contenders that were timed, in the order of tables."""
        return in_order(self.timings.seconds)


@dataclass(frozen=True)
class Suite:
    """All that a run left.

    Attributes:
        records: In the order in which they ran.
        date: When, as pytest-benchmark wrote it.
        processor: On what.
    """

    records: Sequence[Record]
    date: str
    processor: str

    def of(self, stage: str, device: str | None = None) -> list[Record]:
        """The records of a stage, and of one device if given."""
        return [each for each in self.records if each.stage == stage and device in (None, each.device)]

    @property
    def devices(self) -> list[str]:
        """On which something was measured, the CPU first."""
        return sorted({each.device for each in self.records}, key=lambda device: (device != "cpu", device))


def in_order(contenders: Mapping[str, object] | set[str]) -> list[str]:
    """Contenders in the order of tables; ones that nobody knows come last."""
    known = [name for name in CONTENDERS if name in contenders]
    return known + sorted(set(contenders) - set(known))


def read_suite(path: Path) -> Suite:
    """Read the content of a ``benchmarks.json``.

    Raises:
        ReadError: It can't be read, or is not of this command.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReadError(f"{str(path)!r}: {error.strerror or type(error).__name__}") from None
    except ValueError:
        raise ReadError(f"{str(path)!r}: not JSON") from None
    if not isinstance(content, dict) or not isinstance(content.get("benchmarks"), list):
        raise ReadError(f"{str(path)!r}: no list of 'benchmarks'")
    try:
        records = [_record(entry) for entry in content["benchmarks"]]
    except ReadError as error:
        raise ReadError(f"{str(path)!r}: {error}") from None
    processor = content.get("machine_info", {}).get("cpu", {}).get("brand_raw", "an unknown processor")
    return Suite(records, str(content.get("datetime", "at an unknown time")), str(processor))


def _workload(info: Mapping[str, Any]) -> Workload:
    """Its hierarchy is told by its name alone."""
    sizes = (info["expert"], info["hidden_size"], info["batch_size"], info["num_experts"], info["routes"])
    named = (Workload(*sizes, hierarchy) for hierarchy in HIERARCHIES)
    return next((each for each in named if str(each) == info["workload"]), Workload(*sizes))


def _record(entry: Mapping[str, Any]) -> Record:
    name = entry.get("fullname", entry.get("name"))
    info = entry.get("extra_info", {})
    for key, kind in _FIELDS.items():
        if not isinstance(info.get(key), kind):
            raise ReadError(f"benchmark {name!r} has no usable {key!r} (got {info.get(key)!r})")
    if info["stage"] not in STAGES:
        raise ReadError(f"benchmark {name!r} is of no known stage (got {info['stage']!r})")
    seconds: dict[str, list[float]] = info["seconds"]
    lengths = {contender: len(each) for contender, each in seconds.items()}
    if len(set(lengths.values())) > 1 or any(length < FEWEST_ROUNDS for length in lengths.values()):
        raise ReadError(f"benchmark {name!r} has other than two or more rounds of every contender (got {lengths})")
    return Record(
        str(name),
        info["stage"],
        _workload(info),
        info["workload"],
        info.get("positions"),
        info["device"],
        info["threads"],
        info["dtype"],
        info["contender"],
        Timings(seconds),
        info.get("bytes", {}),
        info.get("absent", {}),
        info.get("parts_ms", {}),
    )
