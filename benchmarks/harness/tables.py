"""Tables of figures as CSV files, and the columns that they share."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.workloads.workload import Workload


class RatioOfTimes(Protocol):
    """A ratio of times, with its quartiles over the rounds."""

    @property
    def ratio(self) -> float:
        """The median."""

    @property
    def low(self) -> float:
        """The first quartile."""

    @property
    def high(self) -> float:
        """The third quartile."""


def workload_columns(workload: Workload) -> dict[str, object]:
    """The columns that describe the workload."""
    return {
        "experts": workload.expert,
        "H": workload.hidden_size,
        "B": workload.batch_size,
        "E": workload.num_experts,
    }


def ratio_columns(timing: RatioOfTimes) -> dict[str, str]:
    """The columns that say how fast."""
    return {
        "ratio": f"{timing.ratio:.3f}",
        "first_quartile": f"{timing.low:.3f}",
        "third_quartile": f"{timing.high:.3f}",
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """A CSV file with the first row's keys for its header."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))
