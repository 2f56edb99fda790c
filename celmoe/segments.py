"""Which rows belong to which member of a class, as the host and as the device want to know it.

Axes: R rows of all members, one member's after the other's; P members.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch


class Run(NamedTuple):
    """Neighbouring members with equally many rows: one batched product serves them all.

    Attributes:
        row: The first row.
        member: The first member.
        length: Rows of each.
        members: How many members.
    """

    row: int
    member: int
    length: int
    members: int


class Segments:
    """The rows of P members.

    Attributes:
        counts: Rows of each member; never zero.
        num_rows: Rows R.
        runs: The members by equal counts, in order.
        device: Where index tensors are made.
    """

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self.counts = tuple(counts)
        self.num_rows = sum(counts)
        self.device = device
        self.runs = _runs(self.counts)
        self._members: dict[int, torch.Tensor] = {}
        self._ends: dict[int, torch.Tensor] = {}
        self._padded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def member_of_row(self, factor: int = 1) -> torch.Tensor:
        """``[R · factor]`` int64: each row's member."""
        if factor not in self._members:
            counts = np.asarray(self.counts, dtype=np.int64) * factor
            members = np.repeat(np.arange(len(self.counts), dtype=np.int64), counts)
            self._members[factor] = torch.from_numpy(members).to(self.device, non_blocking=True)
        return self._members[factor]

    def ends(self, factor: int = 1) -> torch.Tensor:
        """``[P]`` int32: the row after the last one of each member, ``factor`` positions a row."""
        if factor not in self._ends:
            ends = np.cumsum(np.asarray(self.counts, dtype=np.int64) * factor, dtype=np.int32)
            self._ends[factor] = torch.from_numpy(ends).to(self.device, non_blocking=True)
        return self._ends[factor]

    def padded(self, factor: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices into rows with one row of zeros behind them, and back.

        Returns:
            ``[P · N]`` int64, N the most rows of a member: which row stands at each place, R · factor for none; and
            ``[R · factor]`` int64: each row's place.
        """
        if factor not in self._padded:
            counts = np.asarray(self.counts, dtype=np.int64) * factor
            most, total = int(counts.max()), self.num_rows * factor
            starts = np.cumsum(counts) - counts
            places = np.arange(total) + np.repeat(np.arange(len(counts)) * most - starts, counts)
            index = np.full(len(counts) * most, total, dtype=np.int64)
            index[places] = np.arange(total)
            self._padded[factor] = (
                torch.from_numpy(index).to(self.device, non_blocking=True),
                torch.from_numpy(places).to(self.device, non_blocking=True),
            )
        return self._padded[factor]


def _runs(counts: Sequence[int]) -> list[Run]:
    runs: list[Run] = []
    for member, (start, count) in enumerate(zip(accumulate(counts, initial=0), counts, strict=False)):
        if runs and runs[-1].length == count:
            runs[-1] = runs[-1]._replace(members=runs[-1].members + 1)
        else:
            runs.append(Run(start, member, count, 1))
    return runs
