"""Turn every level's codes into the indices of a plan: a stable sort of samples by expert, O(B) a level.

Axes: B samples.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from .routes import CodeArray, Codes, RouteTable, code_array

# Up to this many samples, Python's lists beat NumPy. NumPy takes a few dozen calls, each of which finds the processor's
# caches cold after a training step, and that costs more than the work.
FEW_SAMPLES = 64


# The host's part of one level: LevelPlan's first fields in order (name, present, counts, is_sorted, follows_previous),
# and the places of its four index tensors among the parts of the packed buffer.
HostLevel: TypeAlias = tuple[tuple[str, tuple[str, ...], tuple[int, ...], bool, bool], tuple[int, int, int, int]]


# The parts of a plan: the host's part of each level; all index tensors end to end, int64, on the CPU; and the length of
# each index tensor.
Indices: TypeAlias = tuple[Sequence[HostLevel], torch.Tensor, Sequence[int]]


def sort_samples(tables: Sequence[RouteTable], codes: Sequence[Codes | int], batch_size: int) -> Indices:
    """Sort one batch's samples by expert, at each level.

    Args:
        tables: One table a level.
        codes: The codes ``[B]`` of each level, or one code for the whole batch.
        batch_size: Samples B.
    """
    sort = _sort_few if 0 < batch_size <= FEW_SAMPLES else _sort_many
    return sort(tables, codes, batch_size)


def _sort_few(tables: Sequence[RouteTable], codes: Sequence[Codes | int], batch_size: int) -> Indices:
    identity = [*range(batch_size)]
    flat, sizes = [*identity], [batch_size]
    levels: list[HostLevel] = []
    # The order of the level above, and the places of the order and its inverse among the parts.
    previous, places = identity, (0, 0)
    for table, codes_or_one in zip(tables, codes, strict=True):
        code = codes_or_one if isinstance(codes_or_one, bytearray) else _code_list(codes_or_one, batch_size)
        present = sorted(set(code)) if len(table.experts) > 1 else [0]
        counts = tuple(map(code.count, present))
        order = sorted(identity, key=code.__getitem__) if len(present) > 1 else identity
        follows, is_sorted = order == previous, order == identity
        if not follows:
            previous = order
            if is_sorted:
                places = (0, 0)
            else:
                places = (len(sizes), len(sizes) + 1)
                inverse = identity.copy()
                for row, sample in enumerate(order):
                    inverse[sample] = row
                flat += order
                flat += inverse
                sizes += (batch_size, batch_size)
        experts = tuple(map(table.sorted_experts.__getitem__, present))
        known = (table.level, experts, counts, is_sorted, follows and bool(levels))
        levels.append((known, (*places, len(sizes), len(sizes) + 1)))
        flat += map(table.ids.__getitem__, code)
        flat += accumulate(counts)
        sizes += (batch_size, len(counts))
    return levels, torch.frombuffer(array("q", flat), dtype=torch.int64), sizes


def _code_list(codes: CodeArray | int, batch_size: int) -> list[int]:
    return [codes] * batch_size if isinstance(codes, int) else codes.tolist()


def _sort_many(tables: Sequence[RouteTable], codes: Sequence[Codes | int], batch_size: int) -> Indices:
    # NumPy's default integer has 32 bits on Windows before 2.0.
    identity = np.arange(batch_size, dtype=np.int64)
    parts: list[npt.NDArray[np.int64]] = [identity]
    levels: list[HostLevel] = []
    # The order of the level above: an array, or None for the identity; and the places of its parts.
    previous: npt.NDArray[np.int64] | None = None
    places = (0, 0)
    for table, code in zip(tables, codes, strict=True):
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
        levels.append((known, (*places, len(parts), len(parts) + 1)))
        parts += (ids, np.add.accumulate(counts, dtype=np.int64))
    return levels, torch.from_numpy(np.concatenate(parts)), [*map(len, parts)]


def _sorted(
    table: RouteTable, code: Codes | int, batch_size: int
) -> tuple[tuple[str, ...], npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """The experts present, the number of samples of each, and the sorting order, ``None`` for the identity."""
    if isinstance(code, int) or len(table.experts) == 1:
        only = table.sorted_experts[code if isinstance(code, int) else 0]
        return ((only,) if batch_size else ()), np.full(min(batch_size, 1), batch_size, dtype=np.int64), None
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
