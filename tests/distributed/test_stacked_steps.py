"""Unusual steps of stacked experts on several ranks, and wrong ones, which are caught."""

from __future__ import annotations

import itertools
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import celmoe
from celmoe.distributed import shard_experts, shard_levels
from celmoe.stacked.rows import members_here
from tests.distributed import jobs, test_stacked
from tests.distributed.jobs import DifferenceError, Job, assert_close
from tests.distributed.test_stacked import OPTIMIZERS, STEPS, drawn_steps, loss_of, stacked_model, values_of

LAYOUTS = ["ddp", "ddp that searches", "levels", "experts"]


def train(job, layout, *, scales=False, keeps_zeros=False):
    """The values after each step: of ranks, or of one process with ordinary experts (``alone``)."""
    is_alone = layout == "alone"
    model = jobs.make_model(job) if is_alone else stacked_model(job)
    parallel, reduces = model, lambda: None
    if layout.startswith("ddp"):
        parallel = DistributedDataParallel(model, find_unused_parameters=layout != "ddp")
    elif layout == "levels":
        shard_levels(model, dist.init_device_mesh("cpu", (2,)))
    elif layout == "experts":
        reduces = shard_experts(model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",))).reduce_gradients
    optimizer = (jobs.OPTIMIZERS if is_alone else OPTIMIZERS)[job.optimizer](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scales)
    history = []
    for step in range(len(job.steps)):
        optimizer.zero_grad(set_to_none=not keeps_zeros)
        batches = jobs.make_batches(job, step, 0)
        if is_alone:
            batch = jobs.joined(batches)
            loss = jobs.loss_sum(job, model(**batch.inputs(job)), batch) / len(batch.languages)
        else:
            loss = loss_of(job, parallel, batches[dist.get_rank()])
            if scales and step == 2 and dist.get_rank() == 1:
                loss = loss * float("inf")
        scaler.scale(loss).backward()
        reduces()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        history.append(values_of(model))
    return history


def train_keeping_zeros(job, layout):
    return train(job, layout, keeps_zeros=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_that_are_cleared_to_zeros(two, layout):
    """Experts with gradients of zeros are stepped, as in one process."""
    job = Job(drawn_steps(11, 5), engine="auto")
    alone = train(job, "alone", keeps_zeros=True)
    for history in two.run(train_keeping_zeros, job, layout):
        for step, (here, theirs) in enumerate(zip(history, alone, strict=True)):
            for name, value in here.items():
                assert_close(f"step {step}, {name}", value, theirs[name], jobs.TOLERANCE)


def train_with_scaler(job, layout):
    return train(job, layout, scales=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_skip_a_step_with_one_ranks_infinity(two, layout):
    job = Job(drawn_steps(14, 5), engine="auto", dtype=torch.float32)
    first, second = two.run(train_with_scaler, job, layout)
    for step, (one, other) in enumerate(zip(first, second, strict=True)):
        for name in one.keys() & other.keys():
            assert_close(f"step {step}, {name}", one[name], other[name], 0.0)
    for history in (first, second):
        are_same = [
            all(torch.equal(before[name], after[name]) for name in before)
            for before, after in itertools.pairwise(history)
        ]
        assert are_same == [False, True, False, False]


def train_with_zero(job):
    """Each rank's optimizer has some of the parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.optim import ZeroRedundancyOptimizer
    model = stacked_model(job)
    parallel = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), celmoe.optim.AdamW, lr=0.01, weight_decay=0.1, eps=1e-3)
    return test_stacked.train_in_step(job, model, optimizer, lambda batch, _: loss_of(job, parallel, batch))


def test_optimizers_of_some_parameters_each(two):
    job = Job(drawn_steps(12, 5), engine="auto")
    test_stacked.assert_values_as_alone(job, two.run(train_with_zero, job))


PART = Job(STEPS[:5], objective="family", engine="auto")


@pytest.mark.parametrize("training", ["train_with_experts_spread", "train_with_levels_sharded"])
def test_an_objective_of_one_level(two, training):
    test_stacked.assert_spread_values_as_alone(PART, two.run(getattr(test_stacked, training), PART))


def test_an_objective_of_one_level_under_prepared_ddp(two):
    test_stacked.assert_values_as_alone(PART, two.run(test_stacked.train_with_prepare_ddp, PART))


def _first_rows(stack):
    return range(len(members_here(stack)))


# By name: the attribute, its mutant, the training, and true if experts are then on one rank each.
WRONG = {
    "notes that ranks keep to themselves": (
        *("celmoe.optim.per_expert.join_reached", lambda: None, "train_with_plain_ddp", False),
    ),
    "notes of an earlier step": (
        *("celmoe.stacked.parallel.forget_cleared", lambda _: None, "train_with_plain_ddp", False),
    ),
    "notes that a reduction leaves to ranks": (
        *("celmoe.distributed.gradients.set_reached", lambda *_: None, "by_one_reduction", False),
    ),
    "notes that sharded stacks have not": (
        *("celmoe.distributed.fully_sharded.set_reached", lambda *_: None, "train_with_levels_sharded", True),
    ),
    "steps of another rank's members": (
        *("celmoe.optim.per_expert.members_here", _first_rows, "train_with_levels_sharded", True),
    ),
}


def train_wrongly(job, name):
    where, wrong, training, _ = WRONG[name]
    with mock.patch(where, wrong):
        return getattr(test_stacked, training)(job)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_step_is_caught(two, name):
    job = Job(STEPS, engine="auto")
    histories = two.run(train_wrongly, job, name)
    compare = test_stacked.assert_spread_values_as_alone if WRONG[name][3] else test_stacked.assert_values_as_alone
    with pytest.raises(DifferenceError, match=r"step \d, .*level_modules.*: differs"):
        compare(job, histories)
