"""The comparison of ranks with one process can fail: known wrong engines are each caught, and for their own reason."""

import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from celmoe.distributed import fully_sharded, gradients, remote, transport
from tests.distributed import test_data_parallel, test_expert_parallel, test_fully_sharded
from tests.distributed.jobs import DifferenceError, Job, assert_as_alone, assert_ranks_agree
from tests.distributed.pool import RankError, RankTimeoutError
from tests.distributed.test_data_parallel import DISJOINT, STEPS

PLAIN = Job([DISJOINT, STEPS[2]])
CLIPPED = Job([DISJOINT, STEPS[2]], optimizer="SGD", max_norm=0.05)
FIRST_TIME = Job([STEPS[0], STEPS[4]])


def _without_rank_one(bucket, groups, divisor):
    if dist.get_rank() == 1:
        for parameter in bucket:
            parameter.grad = torch.zeros_like(parameter)
    return REDUCE_BUCKET(bucket, groups, divisor)


def _swapped(tensors, way):
    received = EXCHANGE(tensors, way)
    if dist.get_rank() == 0 and len(received[0]) > 1:
        received[0][[0, -1]] = received[0][[-1, 0]]
    return received


def _exchanged(tensors, way):
    """Rows that came from the two ranks change places, if they are equally many."""
    received = EXCHANGE(tensors, way)
    first, second = way.received
    return [torch.cat([each[first:], each[:first]]) if first == second else each for each in received]


def _forgotten(parameters, groups, divisor):
    return None


def _zeros_for_none(parameters, groups):
    return [gradients._DENSE] * len(parameters)


def _own_mean(loss_sum, count, *, group=None):
    return loss_sum / max(count, 1)


def _undivided(parameters, groups, divisor):
    return REDUCE_OVER(parameters, groups, divisor // 2)


REDUCE_BUCKET, REDUCE_OVER, EXCHANGE = gradients._reduce_bucket, gradients.reduce_over, transport.exchange

# By name: the module, the attribute, its mutant, the training, the job, and the error that shows it.
EXPERTS, REDUCED, LEVELS, DDP = "experts", "reduced", "levels", "ddp"
MUTANTS = {
    "one rank's gradients dropped": (
        gradients,
        "_reduce_bucket",
        _without_rank_one,
        REDUCED,
        PLAIN,
        "gradient: differs",
    ),
    "one rank's gradients dropped, experts": (
        *(gradients, "_reduce_bucket", _without_rank_one, EXPERTS, PLAIN, "core.norm.weight gradient: differs"),
    ),
    "rows swapped": (transport, "exchange", _swapped, EXPERTS, PLAIN, "differs"),
    "rows of two ranks exchanged": (transport, "exchange", _exchanged, EXPERTS, PLAIN, "differs"),
    "not reduced": (gradients, "reduce_over", _forgotten, REDUCED, PLAIN, "rank 1, step 0"),
    "zeros for None": (
        gradients,
        "_joined_kinds",
        _zeros_for_none,
        REDUCED,
        PLAIN,
        "gradient: some, not none",
    ),
    "zeros for None, levels": (
        *(fully_sharded.Usage, "_settle", lambda self: None, LEVELS, PLAIN, "gradient: some, not none"),
    ),
    "each rank's own mean": (test_data_parallel, "joined_mean", _own_mean, DDP, PLAIN, "differs"),
    "each rank's own mean, levels": (test_fully_sharded, "joined_mean", _own_mean, LEVELS, PLAIN, "differs"),
    "norms not told": (remote.GradientNorms, "exchange", lambda self, levels: None, EXPERTS, CLIPPED, "rank 1, step 0"),
    "experts' gradients not divided": (
        *("celmoe.distributed.expert_parallel", "reduce_over", _undivided, EXPERTS, PLAIN, "gradient: differs"),
    ),
}
TRAININGS = {
    EXPERTS: test_expert_parallel.train_with_experts_spread,
    REDUCED: test_data_parallel.train_by_reduction,
    LEVELS: test_fully_sharded.train_with_levels_sharded,
    DDP: test_data_parallel.train_with_ddp,
}


def train_wrongly(name):
    """The values on a rank after each step of a wrong training."""
    where, attribute, wrong, training, job, _ = MUTANTS[name]
    patch = (
        mock.patch(f"{where}.{attribute}", wrong)
        if isinstance(where, str)
        else mock.patch.object(where, attribute, wrong)
    )
    with patch:
        return TRAININGS[training](job)


def _compare(job, histories):
    assert_ranks_agree(histories)
    assert_as_alone(job, histories)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_engine_is_caught(two, name):
    *_, job, reason = MUTANTS[name]
    histories = two.run(train_wrongly, name)
    if MUTANTS[name][3] == LEVELS:
        histories = test_fully_sharded.put_together(histories)
    with pytest.raises(DifferenceError) as error:
        _compare(job, histories)
    assert reason in str(error.value)


def _one_waits():
    if dist.get_rank() == 1:
        dist.barrier()


def _one_raises():
    if dist.get_rank() == 1:
        raise ValueError("of rank 1")
    dist.barrier()


def test_a_rank_that_hangs_or_raises_is_told(two):
    start = time.monotonic()
    with pytest.raises(RankTimeoutError, match=r"ranks \[1\] did not come back in 1 s"):
        two.run(_one_waits, limit=1.0)
    with pytest.raises(RankError, match="of rank 1"):
        two.run(_one_raises)
    assert time.monotonic() - start < 50
    assert two.run(dist.get_rank) == [0, 1]
