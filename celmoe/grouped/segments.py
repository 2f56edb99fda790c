"""Which rows belong to which member of a class, as the host and as the device want to know it.

Axes: R rows of all members, one member's after the other's; P members.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
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


class Bucket(NamedTuple):
    """Neighbouring members with about equally many rows, each given the places of the largest of them.

    Attributes:
        place: The first place.
        member: The first member.
        most: Places of each: the most rows of a member.
        members: How many members.
    """

    place: int
    member: int
    most: int
    members: int


# So many places for a row, at the most: more members a bucket are fewer calls, and more that is computed in vain.
MOST_PLACES_A_ROW = 1.25


class Segments:
    """The rows of P members.

    Attributes:
        counts: Rows of each member; never zero.
        num_rows: Rows R.
        runs: The members by equal counts, in order.
        buckets: The members by like counts, in order.
        device: Where index tensors are made.
    """

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self.counts = tuple(counts)
        self.num_rows = sum(counts)
        self.device = device
        self.runs = _runs(self.counts)
        self.buckets = _buckets(self.runs)
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

    def row_runs(self, factor: int = 1) -> list[tuple[int, int, int, int]]:
        """For each run its first row, the row after its last, its first member and how many members it has."""
        return [
            (row * factor, (row + length * members) * factor, member, members)
            for row, member, length, members in self.runs
        ]

    def ends(self, factor: int = 1) -> torch.Tensor:
        """``[P]`` int32: the row after the last one of each member, ``factor`` positions a row."""
        if factor not in self._ends:
            ends = np.cumsum(np.asarray(self.counts, dtype=np.int64) * factor, dtype=np.int32)
            self._ends[factor] = torch.from_numpy(ends).to(self.device, non_blocking=True)
        return self._ends[factor]

    def padded(self, factor: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices from rows, with one row of zeros behind them, to places, and back.

        Returns:
            int64: for each place of all buckets its row, R · factor where there is none; and for each of the R · factor
            rows its place.
        """
        if factor not in self._padded:
            total = self.num_rows * factor
            counts = np.asarray(self.counts, dtype=np.int64) * factor
            firsts = np.concatenate(
                [(each.place + np.arange(each.members) * each.most) * factor for each in self.buckets]
            )
            # Each row's place: its member's first one, and as far behind it as the row is behind the member's first.
            places = np.arange(total) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)
            index = np.full(self.num_places * factor, total, dtype=np.int64)
            index[places] = np.arange(total)
            self._padded[factor] = (
                torch.from_numpy(index).to(self.device, non_blocking=True),
                torch.from_numpy(places).to(self.device, non_blocking=True),
            )
        return self._padded[factor]

    @property
    def num_places(self) -> int:
        """Places of all buckets."""
        last = self.buckets[-1]
        return last.place + last.most * last.members


def _buckets(runs: Sequence[Run]) -> list[Bucket]:
    """Runs joined while their places are at most so many a row."""
    buckets: list[Bucket] = []
    rows = 0
    for run in runs:
        if buckets:
            last = buckets[-1]
            most, members = max(last.most, run.length), last.members + run.members
            if most * members <= MOST_PLACES_A_ROW * (rows + run.length * run.members):
                buckets[-1] = Bucket(last.place, last.member, most, members)
                rows += run.length * run.members
                continue
        place = buckets[-1].place + buckets[-1].most * buckets[-1].members if buckets else 0
        buckets.append(Bucket(place, run.member, run.length, run.members))
        rows = run.length * run.members
    return buckets


def _runs(counts: Sequence[int]) -> list[Run]:
    runs: list[Run] = []
    row = member = 0
    for count, group in groupby(counts):
        members = len(list(group))
        runs.append(Run(row, member, count, members))
        row, member = row + count * members, member + members
    return runs
