"""Tables of figures as CSV files, and the columns that they share."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness.interleaved import Timings
from benchmarks.workloads.workload import Workload


def workload_columns(workload: Workload) -> dict[str, object]:
    """The columns that describe the workload."""
    return {
        "experts": workload.expert,
        "H": workload.hidden_size,
        "B": workload.batch_size,
        "E": workload.num_experts,
    }


def ratio_columns(timings: Timings, slower: str, faster: str) -> dict[str, str]:
    """The columns that say how fast: the median of the ratios within rounds, and their quartiles."""
    low, high = timings.quartiles(slower, faster)
    found = {"ratio": timings.ratio(slower, faster), "first_quartile": low, "third_quartile": high}
    return {name: f"{value:.3f}" for name, value in found.items()}


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """A CSV file with the first row's keys for its header; ``None`` is an empty cell, and no row an empty file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))
