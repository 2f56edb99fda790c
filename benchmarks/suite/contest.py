"""One benchmark of the suite: a stage of a workload on a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.contenders.contender import AUTO, GROUPED, LOOPED
from benchmarks.harness.devices import CPU
from benchmarks.harness.interleaved import Timings
from benchmarks.harness.memory import peak_bytes
from benchmarks.suite.parts import time_parts
from benchmarks.suite.record import Record, memory_line, timing_line
from benchmarks.suite.rounds import MOST_TIMES, Gathered, gather, hold
from benchmarks.suite.sets import DEFAULT, FULL, takes_part
from benchmarks.suite.stages import MEMORY, WHOLE_STEP, tasks_of
from benchmarks.workloads.workload import Workload

# Steps up to so many seconds are cheap enough to be taken apart, for about as long as this in all.
CHEAP_STEP, PARTS_SECONDS = 1.0, 0.5


@dataclass(frozen=True)
class Contest:
    """A benchmark's workload and device, and the terms of its contest.

    Rounds go on for about so many seconds; the longest step of another contender may take so many. One of
    `suite.sets.SETS` has the contenders. Lines for the reader at the terminal are said past pytest's capture.
    """

    benchmark: BenchmarkFixture
    workload: Workload
    device_name: str
    device: torch.device
    seconds: float
    longest: float
    which: str
    say: Callable[[str], None]

    def run(self, stage: str) -> Record:
        """Prove the stage's contenders equal, time them in rounds, and record the times.

        Raises:
            UnequalError: They are not equal.
        """
        makers = tasks_of(stage, self.workload, self.device)
        some = {name: makers[name] for name in makers if takes_part(name, self.which)}
        # A set with targets needs its contenders, however slow they are beside ours.
        gathered = gather(some, self.longest, MOST_TIMES if self.which in (DEFAULT, FULL) else math.inf)
        peaks = self._peaks(gathered) if stage == MEMORY else {}
        self.benchmark.group = stage
        timings = hold(self.benchmark, gathered, self.seconds)
        if self.benchmark.stats is None:
            # Benchmarks are disabled: every contender ran once, untimed.
            timings = Timings({AUTO: []})
        parts_ms = self._parts_ms(timings) if stage == WHOLE_STEP else {}
        setting = self.device_name, torch.get_num_threads(), "float32", AUTO
        record = Record(stage, self.workload, *setting, timings, peaks, gathered.absent, parts_ms)
        self.benchmark.extra_info.update(record.to_json())
        self._tell(record)
        return record

    def _peaks(self, gathered: Gathered) -> dict[str, int]:
        """The most bytes of each, its weights and a step's."""
        found = {}
        for name, task in gathered.tasks.items():
            task.clear()
            found[name] = task.weight_bytes + peak_bytes(task.step, self.device)
        return found

    def _parts_ms(self, timings: Timings) -> Mapping[str, float]:
        if self.device_name != CPU or timings.rounds == 0 or timings.median(AUTO) > CHEAP_STEP:
            return {}
        return time_parts(self.workload, "auto", PARTS_SECONDS)

    def _tell(self, record: Record) -> None:
        what = f"{record.stage} {record.workload} on {record.device}"
        self.say(f"{what}: {timing_line(record.timings) if record.timings.rounds else 'equal, and not timed'}")
        if record.bytes:
            self.say(f"{what}: {memory_line(record.bytes, LOOPED, GROUPED)}")
        for name, why in record.absent.items():
            self.say(f"{what}: without {name}: {why}")
