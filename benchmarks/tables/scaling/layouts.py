"""The model: the bytes that a training step moves at one rank, for each layout that `celmoe.distributed` has.

A step is one forward pass, ``joined_mean``, one backward pass, and ``reduce_gradients`` if the layout has it.
Everything is trained, gradients are of the parameters' dtype, every rank has B samples. The model leaves out clipping,
which communicates under `shard_levels` alone, and the work of the first step alone.

Formulas are of payload; `collectives` adds a ring's traffic. Axes: N ranks, G of them in a dimension that shares
parameters or experts, D in the dimension of copies (N = G·D), E experts of a level, s the share of a level's samples
that goes to this rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from benchmarks.tables.scaling.collectives import Traffic, all_gather, all_reduce, all_to_all, reduce_scatter
from benchmarks.tables.scaling.load import Load, Spread
from benchmarks.tables.scaling.sizes import LevelSizes, ModelSizes, bytes_of
from benchmarks.workloads.workload import Workload

DDP, REDUCED, LEVELS, EXPERTS = "prepare_ddp", "reduce_gradients", "shard_levels", "shard_experts"
LAYOUTS = (DDP, REDUCED, LEVELS, EXPERTS)

# Bytes of the scalar that `prepare_ddp` adds, of an entry in DDP's map of used parameters, and of an entry in ours.
_ANCHOR_BYTES, _USED_BYTES, _FLAG_BYTES = 4, 4, 1
_INTEGER_BYTES = 8
# Integers before the counts: the shape of rows, their number, their dtype, and a flag for gradients.
_SAID_OF_ROWS = 4
# Integers that agree on dtypes: a flag for rows, their dtype, and a flag for gradients.
_SAID_OF_DTYPES = 3
# Numbers for an expert's gradient: its state and its norm. The numbers of all experts follow as many others.
_SAID_OF_GRADIENTS = 2


class Rows(NamedTuple):
    """A rank's batch.

    Attributes:
        batch_size: Samples B.
        hidden_bytes: Bytes of one sample's hidden states.
        other_bytes: Bytes of one sample's mask and context, which get no gradient.
        has_input_gradient: True if gradients flow into the input of the first spread level, for a trained level below
            or an encoder.
    """

    batch_size: int
    hidden_bytes: int
    other_bytes: int = 0
    has_input_gradient: bool = True


def rows_of(workload: Workload) -> Rows:
    """The batches of its ranks, that come from nothing that is trained."""
    one = replace(workload, batch_size=1)
    mask, lowest = one.mask(), next(iter(workload.levels().values()))
    return Rows(
        workload.batch_size,
        one.hidden().nbytes,
        0 if mask is None else mask.nbytes,
        has_input_gradient=len(lowest) == 1,
    )


def data_parallel(sizes: ModelSizes, num_ranks: int) -> list[Traffic]:
    """`prepare_ddp`: all-reduces of all gradients, P + 4 bytes, and of 4 bytes a parameter for which were used."""
    parameters = sizes.parameters
    return [
        _joined_mean(num_ranks),
        all_reduce("gradients", bytes_of(parameters) + _ANCHOR_BYTES, num_ranks),
        all_reduce("used parameters", _USED_BYTES * (len(parameters) + 1), num_ranks),
    ]


def reduced(sizes: ModelSizes, load: Load, num_ranks: int) -> list[Traffic]:
    """`reduce_gradients`: all-reduces of present experts' gradients, and of 1 byte a parameter for which exist."""
    nbytes = bytes_of(sizes.others) + _present_bytes(sizes.levels, load)
    return [_joined_mean(num_ranks), *_reduce(len(sizes.parameters), nbytes, [num_ranks])]


def fully_sharded(sizes: ModelSizes, num_parts: int, num_copies: int = 1) -> list[Traffic]:
    """`shard_levels`: whole levels, absent experts too, are gathered twice and reduced once.

    With Q bytes of a level's parameters, each padded to G rows at least: all-gathers of Q in both passes and a
    reduce-scatter of Q. Parameters outside the levels take one all-gather less. Copies add an all-reduce of Q / G over
    them. The step ends with an all-reduce of 1 byte an experts' parameter, over each dimension.
    """
    groups = [each for each in (num_parts, num_copies) if each > 1]
    moved = [_joined_mean(num_parts * num_copies)]
    for name, parameters, gathered in [
        *((level.name, level.parameters, 2) for level in sizes.levels),
        ("other", list(sizes.others), 1),
    ]:
        nbytes = sum(parameter.padded_bytes(num_parts) for parameter in parameters)
        moved += [all_gather(f"{name} parameters", nbytes, num_parts) for _ in range(gathered)]
        moved.append(reduce_scatter(f"{name} gradients", nbytes, num_parts))
        if num_copies > 1:
            moved.append(all_reduce(f"{name} gradients", nbytes / num_parts, num_copies))
    flags = _FLAG_BYTES * sum(len(level.parameters) for level in sizes.levels)
    return moved + [all_reduce("used parameters", flags, each) for each in groups]


def expert_parallel(
    sizes: ModelSizes, load: Load, rows: Rows, spread: Spread, num_parts: int, num_copies: int = 1, rank: int = 0
) -> list[Traffic]:
    """`shard_experts` and its ``reduce_gradients``: samples travel, experts don't.

    For each spread level, with h bytes of a sample's hidden states: an all-to-all to the experts gives B·h and takes
    G·s·B·h, and one back gives G·s·B·h and takes B·h. The backward pass has both again. The first all-to-all has mask
    and context too. Before the levels, an all-gather takes ``8·(4 + ΣE)`` bytes from each rank, and one or two take 24
    bytes a level.

    After the levels, the parameters that every rank holds are all-reduced over all dimensions in turn. This rank's
    present experts are all-reduced over the dimension of copies. Both take 1 byte more a parameter, for its presence.
    An all-gather of ``16·(1 + n)`` bytes from each rank shares the norms of experts' gradients, with n the most tensors
    of experts on one of the G.

    Args:
        sizes: The model, whole.
        load: The load of all ranks' samples.
        rows: The batch of each rank.
        spread: The ranks of the experts.
        num_parts: Ranks G that they are spread over.
        num_copies: Ranks D that hold the same experts.
        rank: This one's position among the G.
    """
    num_ranks = num_parts * num_copies
    integers = _SAID_OF_ROWS + sum(len(owners) for owners in spread.owners.values())
    moved = [_joined_mean(num_ranks), _said("counts", integers, num_parts)]
    for position, shares in enumerate(spread.shares.values()):
        has_gradient = rows.has_input_gradient or position > 0
        moved += _exchanges(rows, float(shares[rank]), num_parts, has_gradient)
        moved += [_said("dtypes", _SAID_OF_DTYPES, num_parts)] * (1 if position == 0 else 2)

    whole = [level for level in sizes.levels if level.name not in spread.owners]
    num_parameters = sum(len(level.parameters) for level in whole) + len(sizes.others)
    nbytes = bytes_of(sizes.others) + _present_bytes(whole, load)
    moved += _reduce(num_parameters, nbytes, [num_parts, num_copies])
    tensors = sum(
        np.bincount(spread.owners[level.name], level.expert_tensors, num_parts)
        for level in sizes.levels
        if level.name in spread.owners
    )
    moved.append(_said("gradients' norms", _SAID_OF_GRADIENTS * (1 + int(np.max(tensors))), num_parts))
    num_mine, mine_bytes = 0, 0.0
    for level in sizes.levels:
        if level.name in spread.owners:
            is_mine = spread.owners[level.name] == rank
            num_mine += int(level.expert_tensors[is_mine].sum())
            mine_bytes += float((level.expert_bytes * load.present[level.name])[is_mine].sum())
    return moved + (_reduce(num_mine, mine_bytes, [num_copies]) if num_mine else [])


def _exchanges(rows: Rows, share: float, num_parts: int, has_gradient: bool) -> list[Traffic]:
    """The all-to-alls of one level."""

    def exchange(what: str, nbytes: int, *, is_outward: bool) -> Traffic:
        ours, theirs = rows.batch_size * nbytes, num_parts * share * rows.batch_size * nbytes
        kept = share * ours
        return all_to_all(what, ours, theirs, kept) if is_outward else all_to_all(what, theirs, ours, kept)

    moved = [
        exchange("rows to experts", rows.hidden_bytes + rows.other_bytes, is_outward=True),
        exchange("rows back", rows.hidden_bytes, is_outward=False),
        exchange("gradients to experts", rows.hidden_bytes, is_outward=True),
    ]
    return moved + ([exchange("gradients back", rows.hidden_bytes, is_outward=False)] if has_gradient else [])


def _present_bytes(levels: Iterable[LevelSizes], load: Load) -> float:
    """Bytes that the present experts of levels are expected to have."""
    return sum(float(level.expert_bytes @ load.present[level.name]) for level in levels)


def _reduce(num_parameters: int, nbytes: float, group_sizes: Iterable[int]) -> list[Traffic]:
    """All-reduce the map of existing gradients, then the gradients, over groups in turn."""
    groups = [size for size in group_sizes if size > 1]
    flags = [all_reduce("existing gradients", _FLAG_BYTES * num_parameters, size) for size in groups]
    return flags + [all_reduce("gradients", nbytes, size) for size in groups]


def _joined_mean(num_ranks: int) -> Traffic:
    return all_reduce("samples of the loss", _INTEGER_BYTES, num_ranks)


def _said(what: str, integers: int, num_ranks: int) -> Traffic:
    """Everyone's integers, to everyone."""
    return all_gather(what, _INTEGER_BYTES * integers * num_ranks, num_ranks)
