"""Words for measurements: devices, workloads, numbers."""

from __future__ import annotations

from benchmarks.workloads.hierarchies import TREE, UNIFORM
from benchmarks.workloads.workload import Workload

DEVICE_NAMES = {"cpu": "CPU", "cuda": "CUDA", "directml": "DirectML"}


def workload_words(workload: Workload) -> str:
    """``linear, H 64, B 4,096, E 256``; hierarchy and routes only if they are not the usual ones."""
    words = [
        workload.expert,
        f"H {workload.hidden_size}",
        f"B {workload.batch_size:,}",
        f"E {workload.num_experts}",
    ]
    return ", ".join([*words, *unusual(workload)])


def unusual(workload: Workload) -> list[str]:
    """Its routes and hierarchy in words, if they are not the usual ones."""
    routes = [f"{workload.routes} routes"] * (workload.routes != UNIFORM)
    return routes + [workload.hierarchy] * (workload.hierarchy != TREE)


def ms_words(ms: float) -> str:
    """Milliseconds in three digits, microseconds below a tenth."""
    if ms < 0.1:
        return f"{_digits(1e3 * ms)} µs"
    return f"{_digits(ms)} ms"


def times_words(ratio: float) -> str:
    """A ratio in three digits or so."""
    return f"{ratio:.2f}" if ratio < 10 else _digits(ratio)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def mebibytes_words(count: float) -> str:
    """Bytes in MiB, without the unit."""
    return _digits(count / 2**20)
