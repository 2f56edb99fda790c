"""The record that a benchmark adds to pytest-benchmark's JSON, and the line that sums it up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch

from benchmarks.contenders.contender import AUTO
from benchmarks.harness.interleaved import Timings
from benchmarks.workloads.workload import Workload


class Record(TypedDict):
    """One benchmark.

    Attributes:
        stage: One of `stages.STAGES`.
        workload: As it prints.
        expert: Its kind of expert.
        hidden_size: Width H.
        batch_size: Samples B.
        num_experts: Experts E of the last level.
        routes: ``"uniform"`` or ``"zipf"``.
        positions: Positions S; ``None`` without.
        device: One of `devices.DEVICES`.
        threads: Of PyTorch.
        dtype: Of hidden states and weights.
        contender: The contender that pytest-benchmark timed.
        seconds: By contender, of each round: round k of all of them belongs together.
        bytes: By contender, the most bytes that lived at once in a step, weights included; of the memory stage only.
        absent: By contender, why it takes no part, and how to get it.
        parts_ms: The milliseconds of our step by part, if measured.
    """

    stage: str
    workload: str
    expert: str
    hidden_size: int
    batch_size: int
    num_experts: int
    routes: str
    positions: int | None
    device: str
    threads: int
    dtype: str
    contender: str
    seconds: Mapping[str, Sequence[float]]
    bytes: Mapping[str, int]
    absent: Mapping[str, str]
    parts_ms: Mapping[str, float]


def make_record(
    stage: str,
    workload: Workload,
    device: str,
    timings: Timings,
    absent: Mapping[str, str],
    *,
    peak_bytes: Mapping[str, int],
    parts_ms: Mapping[str, float],
) -> Record:
    """The record of a benchmark that has just been held in this process."""
    return Record(
        stage=stage,
        workload=str(workload),
        expert=workload.expert,
        hidden_size=workload.hidden_size,
        batch_size=workload.batch_size,
        num_experts=workload.num_experts,
        routes=workload.routes,
        positions=workload.positions,
        device=device,
        threads=torch.get_num_threads(),
        dtype="float32",
        contender=AUTO,
        seconds={name: list(seconds) for name, seconds in timings.seconds.items()},
        bytes=dict(peak_bytes),
        absent=dict(absent),
        parts_ms=dict(parts_ms),
    )


def timing_line(timings: Timings) -> str:
    """Our median, and the others' as multiples of it; above 1, ours is faster."""
    others = [f"{name} {timings.ratio(name, AUTO):.2f}" for name in timings.seconds if name != AUTO]
    ours = f"{AUTO} {1e3 * timings.median(AUTO):.3g} ms, {timings.rounds} rounds"
    return f"{ours}; times as long: {', '.join(others)}" if others else ours


def memory_line(peak_bytes: Mapping[str, int], looped: str, grouped: str) -> str:
    """The peaks in MB, and the ratio of the grouped engine's peak to the looped engine's."""
    peaks = ", ".join(f"{name} {peak / 1e6:.1f}" for name, peak in peak_bytes.items())
    return (
        f"peak MB: {peaks}; grouped by looped {peak_bytes[grouped] / peak_bytes[looped]:.2f} (at most 1.2 is allowed)"
    )
