"""The rows of each member of a class, in forms for the host and for the device.

Axes: R rows of all members, one member's after the other's; P members.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from .values import CannotGroupError


class Run(NamedTuple):
    """Neighbouring members with equally many rows: one batched product serves all of these members.

    Attributes:
        row: The first row.
        member: The first member.
        length: Number of rows of each member.
        members: Number of members.
    """

    row: int
    member: int
    length: int
    members: int


class Bucket(NamedTuple):
    """Neighbouring members with about equally many rows: each member gets as many places as the largest has rows.

    Attributes:
        place: The first place.
        member: The first member.
        most: Number of places of each member: the largest member's number of rows.
        members: Number of members.
    """

    place: int
    member: int
    most: int
    members: int


# If fewer than one in so many members are present, taking their tensors out of the stack costs less than computing
# nothing for the others.
FEW_OF_A_STACK = 3
# Most places per row in a bucket: larger buckets save calls, but waste computation on empty places.
MOST_PLACES_A_ROW = 1.25


class Segments:
    """The rows of P members.

    Attributes:
        counts: Number of rows of each member; zero only for absent members of a stack.
        num_members: Number of members P.
        num_rows: Number of rows R.
        device: The device of index tensors.
        is_stacked: True if the members' tensors are stacked: then one call for all members moves no weights.
    """

    counts: Sequence[int]

    def __init__(self, counts: Sequence[int], device: torch.device, *, is_stacked: bool = False) -> None:
        self.counts = tuple(counts)
        self.num_members = len(self.counts)
        self.num_rows = sum(counts)
        self.device = device
        self.is_stacked = is_stacked
        self._members: dict[int, torch.Tensor] = {}
        self._ends: dict[int, torch.Tensor] = {}
        self._blocks: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._padded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._even: dict[int, tuple[torch.Tensor, int]] = {}

    @cached_property
    def is_even(self) -> bool:
        """True if all members have equally many rows, and some have any."""
        return len(set(self.counts)) == 1 and self.num_rows > 0

    @cached_property
    def runs(self) -> list[Run]:
        """The members by equal counts, in order."""
        return _runs(self.counts)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The members by similar counts, in order."""
        return _buckets(self.runs)

    def member_of_row(self, factor: int = 1) -> torch.Tensor:
        """``[R · factor]`` int64: each row's member."""
        if factor not in self._members:
            counts = np.asarray(self.counts, dtype=np.int64) * factor
            members = np.repeat(np.arange(len(self.counts), dtype=np.int64), counts)
            self._members[factor] = torch.from_numpy(members).to(self.device, non_blocking=True)
        return self._members[factor]

    def blocks(self, factor: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's block, ``[R · factor]`` int64, of at most ``most`` rows, and each block's member, ``[blocks]``."""
        if (factor, most) not in self._blocks:
            counts = np.asarray(self.counts, dtype=np.int64) * factor
            of_member = -(-counts // most)
            firsts = np.repeat(np.cumsum(counts) - counts, counts)
            places = (np.arange(len(firsts)) - firsts) // most
            block_of_row = np.repeat(np.cumsum(of_member) - of_member, counts) + places
            member_of_block = np.repeat(np.arange(len(counts), dtype=np.int64), of_member)
            self._blocks[factor, most] = (
                torch.from_numpy(block_of_row).to(self.device, non_blocking=True),
                torch.from_numpy(member_of_block).to(self.device, non_blocking=True),
            )
        return self._blocks[factor, most]

    def row_runs(self, factor: int = 1) -> list[tuple[int, int, int, int]]:
        """For each run its first row, the row after its last row, its first member and its number of members."""
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
        """Indices from rows, with one row of zeros behind the last, to places, and back.

        Returns:
            Two int64 tensors. The first gives the row of each place of all buckets, R · factor for an empty place. The
            second gives the place of each of the R · factor rows.
        """
        if factor not in self._padded:
            total = self.num_rows * factor
            counts = np.asarray(self.counts, dtype=np.int64) * factor
            firsts = np.concatenate(
                [(each.place + np.arange(each.members) * each.most) * factor for each in self.buckets]
            )
            # A row's place is its member's first place, plus the row's distance from the member's first row.
            places = np.arange(total) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)
            index = np.full(self.num_places * factor, total, dtype=np.int64)
            index[places] = np.arange(total)
            self._padded[factor] = (
                torch.from_numpy(index).to(self.device, non_blocking=True),
                torch.from_numpy(places).to(self.device, non_blocking=True),
            )
        return self._padded[factor]

    def even_places(self, factor: int = 1) -> tuple[torch.Tensor, int]:
        """``[R · factor]`` int64: each row's place if every member has as many as the largest; and how many."""
        if factor not in self._even:
            counts = np.asarray(self.counts, dtype=np.int64) * factor
            most = int(counts.max())
            firsts = np.arange(len(counts)) * most
            places = np.arange(self.num_rows * factor) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)
            self._even[factor] = torch.from_numpy(places).to(self.device, non_blocking=True), most
        return self._even[factor]

    @property
    def num_places(self) -> int:
        """Number of places in all buckets."""
        last = self.buckets[-1]
        return last.place + last.most * last.members


def _buckets(runs: Sequence[Run]) -> list[Bucket]:
    """Runs joined as long as their places are at most `MOST_PLACES_A_ROW` a row."""
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


class DeviceSegments(Segments):
    """The rows of P members, which only the device knows: one graph then serves all numbers of rows.

    Args:
        member_of_row: ``[R]`` int64: each row's member, ascending.
        num_members: Number of members P.
    """

    def __init__(self, member_of_row: torch.Tensor, num_members: int) -> None:
        self.num_members = num_members
        self.num_rows = member_of_row.shape[0]
        self.device = member_of_row.device
        self.is_stacked = True
        members = torch.arange(num_members, device=self.device)
        self._member_of_row = member_of_row
        self._found: dict[str, torch.Tensor] = {}
        self._last = torch.searchsorted(member_of_row, members, right=True, out_int32=True)

    @property
    def counts(self) -> Sequence[int]:  # type: ignore[override]  # unknown to the host
        """Refuses: the host does not know.

        Raises:
            CannotGroupError: Always.
        """
        raise CannotGroupError("need each expert's number of rows on the host")

    def member_of_row(self, factor: int = 1) -> torch.Tensor:
        """See `Segments.member_of_row`."""
        return self._member_of_row.unsqueeze(1).expand(-1, factor).reshape(-1)

    def ends(self, factor: int = 1) -> torch.Tensor:
        """See `Segments.ends`."""
        # A symbolic number has no hash.
        key = str(factor)
        if key not in self._found:
            self._found[key] = self._last * factor
        return self._found[key]
