"""From which batch size on a device wins against the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.report.reading import Record, Suite
from benchmarks.suite.stages import INFERENCE, WHOLE_STEP

# Nobody chooses a device by planning and moving alone.
_STAGES = (WHOLE_STEP, INFERENCE)


@dataclass(frozen=True)
class Crossover:
    """One device against the CPU, at one number of experts.

    Attributes:
        device: The other device.
        record: One of its records: stage, kind of experts, H, E and routes are those of all.
        ratios: The CPU's median seconds by the device's, by batch size, ascending.
    """

    device: str
    record: Record
    ratios: dict[int, float]

    @property
    def batch_size(self) -> int | None:
        """The least one from which on the device wins at every measured size; ``None`` if it loses at the last."""
        found = None
        for size, ratio in sorted(self.ratios.items(), reverse=True):
            if ratio <= 1:
                break
            found = size
        return found

    def __str__(self) -> str:
        if self.batch_size is None:
            return f"not up to {max(self.ratios):,}"
        if self.batch_size == min(self.ratios):
            return f"from {self.batch_size:,} or fewer on"
        return f"from {self.batch_size:,} on"


def crossovers(suite: Suite) -> list[Crossover]:
    """For each other device, stage, kind of experts, H, E and routes, over the batch sizes that both were timed at.

    Devices are timed one after another: these are ratios of medians, not medians of ratios.
    """
    on_cpu = {_point(record): record for record in suite.records if record.device == "cpu"}
    lines: dict[tuple[object, ...], list[Record]] = {}
    for record in suite.records:
        beside = on_cpu.get(_point(record))
        if record.device == "cpu" or record.stage not in _STAGES or beside is None:
            continue
        if record.contender in record.timings.seconds and record.contender in beside.timings.seconds:
            lines.setdefault((record.device, *_line(record)), []).append(record)
    return [_crossover(records, on_cpu) for records in lines.values()]


def _crossover(records: Sequence[Record], on_cpu: dict[tuple[object, ...], Record]) -> Crossover:
    by_size = {}
    for record in sorted(records, key=lambda each: each.workload.batch_size):
        name = record.contender
        by_size[record.workload.batch_size] = on_cpu[_point(record)].timings.median(name) / record.timings.median(name)
    return Crossover(records[0].device, records[0], by_size)


def _point(record: Record) -> tuple[object, ...]:
    return (record.stage, record.workload, record.positions, record.dtype)


def _line(record: Record) -> tuple[object, ...]:
    return (record.stage, replace(record.workload, batch_size=0), record.positions, record.dtype)
