"""The record of a benchmark, as pytest-benchmark's JSON holds it, and the lines that sum it up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.contenders.contender import AUTO
from benchmarks.harness.interleaved import Timings
from benchmarks.workloads.hierarchies import HIERARCHIES
from benchmarks.workloads.workload import Workload

# Fewer rounds have no quartiles.
FEWEST_ROUNDS = 2
_SIZES = {"expert": str, "hidden_size": int, "batch_size": int, "num_experts": int, "routes": str}
_FACTS = {"stage": str, "device": str, "threads": int, "dtype": str, "contender": str}


@dataclass(frozen=True)
class Record:
    """One benchmark: all contenders on one workload, one stage and one device.

    Attributes:
        stage: One of `stages.STAGES`.
        workload: The workload that was run.
        device: One of `devices.DEVICES`.
        threads: Of the CPU.
        dtype: Of hidden states and parameters.
        contender: The one that pytest-benchmark timed.
        timings: Round k of all contenders belongs together; empty if only memory was measured.
        bytes: By contender, the most bytes that lived at once in a step, weights included; of the memory stage only.
        absent: By contender, why it takes no part, and how to get it.
        parts_ms: The milliseconds of our step by part, if measured.
    """

    stage: str
    workload: Workload
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
        return (self.stage, self.workload, self.device, self.threads, self.dtype)

    def to_json(self) -> dict[str, Any]:
        """As `extra_info` of pytest-benchmark's JSON."""
        return {
            **{name: getattr(self, name) for name in _FACTS},
            "workload": str(self.workload),
            **{name: getattr(self.workload, name) for name in _SIZES},
            "positions": self.workload.positions,
            "seconds": {name: list(seconds) for name, seconds in self.timings.seconds.items()},
            **{name: dict(getattr(self, name)) for name in ("bytes", "absent", "parts_ms")},
        }


def from_json(info: Mapping[str, Any]) -> Record:
    """The record of an `extra_info`.

    Raises:
        ValueError: It is none, and why.
    """
    for key, kind in {**_FACTS, **_SIZES, "workload": str, "seconds": dict}.items():
        if not isinstance(info.get(key), kind):
            raise ValueError(  # noqa: TRY004  # a file that is not ours
                f"has no usable {key!r} (got {info.get(key)!r})"
            )
    lengths = {contender: len(each) for contender, each in info["seconds"].items()}
    if len(set(lengths.values())) > 1 or any(length < FEWEST_ROUNDS for length in lengths.values()):
        raise ValueError(f"has other than two or more rounds of every contender (got {lengths})")
    sizes = {name: info[name] for name in _SIZES}
    # Its hierarchy is told by its name alone.
    named = (Workload(**sizes, hierarchy=each) for each in HIERARCHIES)
    workload = next((each for each in named if str(each) == info["workload"]), Workload(**sizes))
    measured = {name: info.get(name, {}) for name in ("bytes", "absent", "parts_ms")}
    return Record(
        workload=workload, timings=Timings(info["seconds"]), **{name: info[name] for name in _FACTS}, **measured
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
