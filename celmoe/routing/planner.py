"""Turn every level's codes into the indices of a plan: a stable sort of samples by expert, O(B) a level.

Axes: B samples; R memberships, P experts present, N samples without an expert, M samples with several or a weight.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from .memberships import Memberships
from .routes import RouteTable, SampleCodes, code_array

# Up to this many samples, Python's bytes beat NumPy, which takes a few dozen calls. Each of them finds the processor's
# caches cold after a training step, and that costs more than the work. A byte has no room for more.
FEW_SAMPLES = 255
_BYTES = bytes(range(256))
# The place of the lowest byte among the eight of an integer.
_LOWEST_BYTE = 0 if sys.byteorder == "little" else 7

# The ids of samples without an expert, and of samples with several.
NO_EXPERT = -1
SEVERAL_EXPERTS = -2


class HostMixture(NamedTuple):
    """The host's part of a level of which some samples have several experts, or none.

    Attributes:
        num_passed: Samples N without an expert.
        most: The most experts of a sample among those with several, or with a weight; 0 if there are none.
        weights: By expert present, the sum of the weights of its rows.
        first: The place of the first of the mixture's index tensors among the parts of the packed buffer.
    """

    num_passed: int
    most: int
    weights: tuple[float, ...]
    first: int


# The host's part of one level: LevelPlan's first fields in order (name, present, counts, is_sorted, follows_previous),
# the places of its four index tensors among the parts of the packed buffer, and its mixture's part.
HostLevel: TypeAlias = tuple[
    tuple[str, tuple[str, ...], tuple[int, ...], bool, bool], tuple[int, int, int, int], HostMixture | None
]


# An order that equals no other.
_NO_ORDER = np.full(1, -1, dtype=np.int64)

# The parts of a plan: the host's part of each level; all index tensors end to end, int64, on the CPU; and the length of
# each index tensor.
Indices: TypeAlias = tuple[Sequence[HostLevel], torch.Tensor, Sequence[int]]


def sort_samples(tables: Sequence[RouteTable], codes: Sequence[SampleCodes], batch_size: int) -> Indices:
    """Sort one batch's samples by expert, at each level.

    Args:
        tables: One table a level.
        codes: The codes of each level's B samples.
        batch_size: Samples B.
    """
    is_small = 0 < batch_size <= FEW_SAMPLES and Memberships not in map(type, codes)
    sort = _sort_few if is_small and all(table.ids_of_bytes for table in tables) else _sort_many
    return sort(tables, codes, batch_size)


def _sort_few(tables: Sequence[RouteTable], codes: Sequence[SampleCodes], batch_size: int) -> Indices:
    # Samples, codes, ids and ends are bytes, whose methods do in one call what takes a loop over lists.
    identity = _BYTES[:batch_size]
    parts: list[bytes | bytearray] = [identity]
    levels: list[HostLevel] = []
    # The order of the level above, and the places of the order and its inverse among the parts.
    previous, places = identity, (0, 0)
    for table, given in zip(tables, codes, strict=True):
        code = _code_bytes(given, batch_size)
        present = sorted(set(code))
        counts = tuple(map(code.count, present))
        order = bytes(sorted(identity, key=code.__getitem__)) if len(present) > 1 else identity
        follows, is_sorted = order == previous, order == identity
        if not follows:
            previous = order
            if is_sorted:
                places = (0, 0)
            else:
                places = (len(parts), len(parts) + 1)
                parts += (order, bytes.maketrans(order, identity)[:batch_size])
        experts = tuple(map(table.sorted_experts.__getitem__, present))
        known = (table.level, experts, counts, is_sorted, follows and bool(levels))
        levels.append((known, (*places, len(parts), len(parts) + 1), None))
        parts += (code.translate(table.ids_of_bytes), bytes(accumulate(counts)))
    joined = b"".join(parts)
    integers = bytearray(8 * len(joined))
    integers[_LOWEST_BYTE::8] = joined
    return levels, torch.frombuffer(integers, dtype=torch.int64), [*map(len, parts)]


def _code_bytes(codes: SampleCodes, batch_size: int) -> bytes | bytearray:
    assert not isinstance(codes, Memberships)
    if isinstance(codes, bytearray):
        return codes
    return bytes([codes]) * batch_size if isinstance(codes, int) else codes.astype(np.uint8, copy=False).tobytes()


def _sort_many(tables: Sequence[RouteTable], codes: Sequence[SampleCodes], batch_size: int) -> Indices:
    # NumPy's default integer has 32 bits on Windows before 2.0.
    identity = np.arange(batch_size, dtype=np.int64)
    parts: list[npt.NDArray[np.int64]] = [identity]
    levels: list[HostLevel] = []
    # The order of the level above: an array, or None for the identity; and the places of its parts.
    previous: npt.NDArray[np.int64] | None = None
    places = (0, 0)
    for table, code in zip(tables, codes, strict=True):
        if isinstance(code, Memberships):
            found, own = _sorted_mixed(table, code, len(parts))
            levels.append(found)
            parts += own
            # No order of another level is this one's: rows are more, or fewer, than samples.
            previous, places = _NO_ORDER, (0, 0)
            continue
        experts, counts, order = _sorted(table, code, batch_size)
        follows = _equal(order, previous)
        if not follows:
            previous, places = order, (0, 0)
            if order is not None:
                inverse = np.empty_like(identity)
                inverse[order] = identity
                places = (len(parts), len(parts) + 1)
                parts += (order, inverse)
        ids = (
            np.full_like(identity, table.ids[code])
            if isinstance(code, int)
            else table.ids_by_code.take(code_array(code))
        )
        known = (table.level, experts, tuple(counts.tolist()), order is None, follows and bool(levels))
        levels.append((known, (*places, len(parts), len(parts) + 1), None))
        parts += (ids, np.add.accumulate(counts, dtype=np.int64))
    return levels, torch.from_numpy(np.concatenate(parts)), [*map(len, parts)]


def _sorted_mixed(table: RouteTable, given: Memberships, first: int) -> tuple[HostLevel, list[npt.NDArray[np.int64]]]:
    """One level's plan: the host's part, and the index tensors, the first of which is part ``first`` of the buffer.

    Rows stand by expert, then by sample. Behind them come the samples without an expert, as rows of nobody.
    """
    codes, samples, weights, size = given
    num_rows = len(codes)
    counts = np.bincount(codes, minlength=1)
    present = counts.nonzero()[0]
    by_expert = codes.argsort(kind="stable")
    place_of_row = np.empty(num_rows, dtype=np.int64)
    place_of_row[by_expert] = np.arange(num_rows)
    per_sample = np.bincount(samples, minlength=size)
    passed = np.flatnonzero(per_sample == 0)
    is_mixed = per_sample > 1
    is_mixed[samples[weights != 1.0]] = True
    mixed = np.flatnonzero(is_mixed)
    of_mixed = is_mixed[samples]
    widths, most = per_sample[mixed], int(per_sample[mixed].max(initial=0))
    # Behind all rows come the sums of the samples with several experts.
    inverse = np.empty(size, dtype=np.int64)
    inverse[samples[~of_mixed]] = place_of_row[~of_mixed]
    inverse[passed] = num_rows + np.arange(len(passed))
    inverse[mixed] = num_rows + len(passed) + np.arange(len(mixed))
    # An empty slot is filled by a row of zeros, behind the rows of all these samples.
    slots = np.full((len(mixed), most), int(of_mixed.sum()), dtype=np.int64)
    slots[np.arange(most) < widths[:, None]] = np.arange(int(of_mixed.sum()))
    ids = np.full(size, NO_EXPERT, dtype=np.int64)
    ids[samples] = table.ids_by_code[codes]
    ids[mixed] = SEVERAL_EXPERTS
    rows = np.concatenate([weights[by_expert], np.ones(len(passed))])
    experts = tuple([table.sorted_experts[each] for each in present.tolist()])
    sums = np.bincount(codes, weights=weights, minlength=1)[present]
    known = (table.level, experts, tuple(counts[present].tolist()), False, False)
    host = HostMixture(len(passed), most, tuple(sums.tolist()), first + 4)
    order = np.concatenate([samples[by_expert], passed])
    ends = np.add.accumulate(counts[present], dtype=np.int64)
    own = [order, inverse, ids, ends, place_of_row[of_mixed], slots.reshape(-1), _as_integers(rows)]
    return (known, (first, first + 1, first + 2, first + 3), host), own


def _as_integers(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Weights in a buffer of integers: each as four floats of 32 bits, which add up to it exactly, on any device."""
    parts = np.zeros((len(weights), 4), dtype=np.float32)
    rest = weights.copy()
    for part in range(3):
        parts[:, part] = rest
        rest -= parts[:, part]
    return parts.reshape(-1).view(np.int64)


def _sorted(
    table: RouteTable, code: SampleCodes, batch_size: int
) -> tuple[tuple[str, ...], npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """The experts present, the number of samples of each, and the sorting order, ``None`` for the identity."""
    if isinstance(code, int) or len(table.experts) == 1:
        only = table.sorted_experts[code if isinstance(code, int) else 0]
        return ((only,) if batch_size else ()), np.full(min(batch_size, 1), batch_size, dtype=np.int64), None
    assert not isinstance(code, Memberships)
    code = code_array(code)
    counts = np.bincount(code)
    present = counts.nonzero()[0]
    experts = tuple([table.sorted_experts[each] for each in present.tolist()])
    is_sorted = bool((code[:-1] <= code[1:]).all())
    # NumPy's stable argsort is a radix sort for the codes' 8 and 16 bits.
    return experts, counts[present], None if is_sorted else code.argsort(kind="stable")


def _equal(order: npt.NDArray[np.int64] | None, previous: npt.NDArray[np.int64] | None) -> bool:
    """True if two orders are equal; ``None`` is the identity, which no array equals."""
    if order is None or previous is None:
        return order is previous
    # Most orders that differ do so at an end, and comparing a whole batch costs as much as sorting the batch.
    return bool(order[0] == previous[0] and order[-1] == previous[-1] and (order == previous).all())
