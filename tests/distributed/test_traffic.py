"""The bytes of real steps are those of the model, counted at the dispatch of collectives and at TCP's sockets.

On four ranks, with experts and parts in copies: ``python -m benchmarks scaling --count 2 4``, which exits with 1 if the
two disagree.
"""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from benchmarks.tables.scaling import layouts
from benchmarks.tables.scaling.collectives import ALL_GATHER, ALL_REDUCE, QUANTITIES, REDUCE_SCATTER
from benchmarks.tables.scaling.compared import Compared
from benchmarks.tables.scaling.counting import Counter, SocketBytes, UnknownCollectiveError, socket_bytes
from benchmarks.tables.scaling.layouts import DDP, EXPERTS, LEVELS, REDUCED
from benchmarks.tables.scaling.runs import Case, count
from benchmarks.tables.scaling.sizes import bytes_of, sizes_of_workload
from benchmarks.workloads.hierarchies import EVEN, ZIPF
from benchmarks.workloads.workload import Workload

LINEAR = Workload("linear", 64, 256, 64, ZIPF)  # some of its experts are absent
MLP = Workload("mlp", 32, 1024, 16)
CASES = {
    "DDP": Case(DDP, LINEAR),
    "reduced": Case(REDUCED, replace(LINEAR, batch_size=64)),
    "reduced, MLPs": Case(REDUCED, MLP),
    "levels": Case(LEVELS, MLP),
    "experts": Case(EXPERTS, LINEAR),
    "experts, MLPs": Case(EXPERTS, MLP),
    "experts, Zipf MLPs": Case(EXPERTS, replace(MLP, routes=ZIPF)),
    "experts, masks": Case(EXPERTS, Workload("masked-block", 16, 256, 8)),
    "experts, no gradient into the rows": Case(EXPERTS, replace(LINEAR, hierarchy=EVEN, num_experts=32)),
}


@pytest.fixture(scope="module")
def compared(two):
    """A case beside the model, counted once."""
    found = {}

    def compare(name):
        if name not in found:
            found[name] = Compared(CASES[name], two.run(count, CASES[name]))
        return found[name]

    return compare


@pytest.mark.parametrize("name", CASES)
def test_counted_bytes_are_those_of_the_model(compared, name):
    assert compared(name).differences == []


def test_absent_experts_are_among_the_cases(compared):
    whole = bytes_of(sizes_of_workload(CASES["reduced"].workload).parameters)
    for each in compared("reduced").counted:
        assert each.traffic[ALL_REDUCE].given < 0.8 * whole


EXCHANGES, SHARDED, ROWS = layouts._exchanges, layouts.fully_sharded, layouts.rows_of


def _without_way_back(rows, share, num_parts, has_gradient):
    return EXCHANGES(rows, share, num_parts, False)


def _half_the_samples(rows, share, num_parts, has_gradient):
    return EXCHANGES(rows, share / 2, num_parts, has_gradient)


def _gathered_once(sizes, num_parts, num_copies=1):
    moved = SHARDED(sizes, num_parts, num_copies)
    return [
        each for number, each in enumerate(moved) if each.what != "language parameters" or moved.index(each) == number
    ]


def _without_masks(workload):
    return ROWS(workload)._replace(other_bytes=0)


def _as_if_all_present(levels, load):
    return sum(float(level.expert_bytes.sum()) for level in levels)


# The attribute, its mutant, the case, and the collective that shows it.
MUTANTS = {
    "gradients do not come back": ("_exchanges", _without_way_back, "experts", "all-to-all"),
    "half the samples": ("_exchanges", _half_the_samples, "experts, MLPs", "all-to-all"),
    "gathered once": ("fully_sharded", _gathered_once, "levels", "all-gather"),
    "absent experts reduced": ("_present_bytes", _as_if_all_present, "reduced", "all-reduce"),
    "no anchor": ("_ANCHOR_BYTES", 0, "DDP", "all-reduce"),
    "flags of four bytes": ("_FLAG_BYTES", 4, "reduced, MLPs", "all-reduce"),
    "no masks": ("rows_of", _without_masks, "experts, masks", "all-to-all"),
    "nothing said of rows": ("_SAID_OF_ROWS", 0, "experts", "all-gather"),
    "nothing said of gradients": ("_SAID_OF_GRADIENTS", 0, "experts", "all-gather"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_model_is_caught(compared, name):
    attribute, wrong, case, reason = MUTANTS[name]
    found = compared(case)
    with mock.patch.object(layouts, attribute, wrong):
        differing = found.differences
    assert differing
    assert all(f": {reason}: " in each for each in differing)
    assert not found.differences


@pytest.mark.parametrize("kind", [ALL_GATHER, REDUCE_SCATTER])
def test_a_collective_that_was_not_seen_is_caught(compared, kind):
    """By the model, and by TCP, which knows nothing of the model."""
    found = compared("levels")
    unseen = [
        each._replace(traffic={other: moved for other, moved in each.traffic.items() if other != kind})
        for each in found.counted
    ]
    texts = replace(found, counted=unseen).differences
    for rank in (0, 1):
        assert f"{found.case}, rank {rank}: {kind}: 0 bytes given" in "".join(texts)
        assert any(text.startswith(f"{found.case}, rank {rank}: TCP: ") for text in texts)


def _count_each():
    """Make every kind of call, with 80 bytes of this rank's; and return the error of a call that can't be counted."""
    mine, whole, group = torch.ones(10, dtype=torch.float64), torch.ones(20, dtype=torch.float64), dist.group.WORLD
    with Counter() as counter:
        dist.all_reduce(mine)
        functional.all_reduce(mine, "sum", group).wait()
        dist.all_gather_single(whole, mine)
        dist.all_gather([torch.empty_like(mine), torch.empty_like(mine)], mine)
        functional.all_gather_single(mine, 0, group).wait()
        dist.reduce_scatter_single(mine, whole)
        functional.reduce_scatter_single(whole, "sum", 0, group).wait()
        dist.all_to_all_single(torch.empty_like(mine), mine)
        functional.all_to_all_single(mine, None, None, group).wait()
        dist.all_to_all_single(torch.empty(6 if dist.get_rank() == 0 else 14), torch.empty(10), *_splits())
        dist.barrier()
    before = socket_bytes()
    big = torch.ones(100_000, dtype=torch.float64)
    dist.all_reduce(big)
    dist.barrier()
    after = socket_bytes()
    try:
        with Counter():
            dist.broadcast(mine, 0)
    except UnknownCollectiveError as error:
        return counter.traffic, [now - then for then, now in zip(before, after, strict=True)], str(error)
    raise AssertionError("a broadcast was counted")


def _splits():
    """Rows received and sent: either rank sends three to the first and seven to the second."""
    return ([3, 3] if dist.get_rank() == 0 else [7, 7]), [3, 7]


def test_every_call_is_counted(two):
    reduced, gathered = (80, 80, 80, 80), (80, 160, 80, 80)
    scattered, exchanged = (160, 80, 80, 80), (80, 80, 40, 40)
    uneven = [(40, 24, 28, 12), (40, 56, 12, 28)]
    for rank, (traffic, (sent, received), text) in enumerate(two.run(_count_each)):
        wanted = [reduced] * 2 + [gathered] * 3 + [scattered] * 2 + [exchanged] * 2 + [uneven[rank]]
        assert [tuple(getattr(each, name) for name in QUANTITIES) for each in traffic] == wanted
        # A ring of two sends an all-reduce's payload once.
        assert SocketBytes(sent, received) == pytest.approx((800_000, 800_000), rel=0.01)
        assert "a collective must be one of allreduce_, " in text
        assert "(got 'c10d::broadcast_')" in text
