"""From which batch size on a device wins against the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.report.reading import Suite
from benchmarks.suite.record import Record
from benchmarks.suite.stages import INFERENCE, WHOLE_STEP


@dataclass(frozen=True)
class Crossover:
    """One device against the CPU, at one number of experts: the CPU's median seconds by the device's, by batch size.

    The record is one of the device's: stage, kind of experts, H, E and routes are those of all.
    """

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

    Devices are timed one after another: these are ratios of medians, not medians of ratios. Nobody chooses a device by
    planning and moving alone.
    """
    records = [each for stage in (WHOLE_STEP, INFERENCE) for each in suite.of(stage)]
    on_cpu = {(each.stage, each.workload): each for each in records if each.device == "cpu"}
    lines: dict[tuple[object, ...], Crossover] = {}
    for record in sorted(records, key=lambda each: each.workload.batch_size):
        beside = on_cpu.get((record.stage, record.workload))
        name = record.contender
        if record.device == "cpu" or beside is None:
            continue
        if name in record.timings.seconds and name in beside.timings.seconds:
            line = record.device, record.stage, replace(record.workload, batch_size=0)
            ratio = beside.timings.median(name) / record.timings.median(name)
            lines.setdefault(line, Crossover(record, {})).ratios[record.workload.batch_size] = ratio
    return list(lines.values())
