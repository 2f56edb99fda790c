"""FSDP2 by level: ranks whose samples take other experts train as one process on the joined batch."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import celmoe
from celmoe.distributed import joined_mean, shard_experts, shard_levels
from tests.distributed import jobs
from tests.distributed.jobs import Job, assert_as_alone, assert_close, assert_ranks_agree
from tests.distributed.test_data_parallel import ACCUMULATED, DISJOINT, STEPS, train_with_ddp
from tests.distributed.test_expert_parallel import TWO_BY_TWO
from tests.slow import slow_but


class Part(NamedTuple):
    """A rank's part of a tensor."""

    rows: torch.Tensor


def part(value):
    """This rank's part of a value."""
    return Part(value.to_local()) if isinstance(value, DTensor) else value


def put_together(histories, num_parts=2):
    """Join each group of so many ranks into one history that holds all parts; and keep each rank's inputs."""
    copies = []
    for first in range(0, len(histories), num_parts):
        steps = zip(*histories[first : first + num_parts], strict=True)
        copies.append([(_joined([seen for seen, _ in group]), group[0][1]) for group in steps])
    assert_ranks_agree(copies)
    return [[(copies[0][step][0], inputs) for step, (_, inputs) in enumerate(each)] for each in histories]


def _joined(parts):
    first = parts[0]
    if isinstance(first, dict):
        assert all(each.keys() == first.keys() for each in parts)
        return {key: _joined([each[key] for each in parts]) for key in first}
    if isinstance(first, Part):
        return torch.cat([each.rows for each in parts])
    for each in parts[1:]:
        assert_close("what all ranks hold", each, first, 0.0)
    return first


def train_with_levels_sharded(job, shape=None, *, reduces_always=False):
    """This rank's parts after each step. Gradients are reduced for the last micro-batch, or for each."""
    rank = dist.get_rank()
    model = jobs.make_model(job)
    shape = shape or (dist.get_world_size(),)
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")[-len(shape) :])
    shard_levels(model, mesh, **job.options)
    hierarchy, model = model, jobs.network_of(model, job)
    if job.has_network:
        fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = jobs.OPTIMIZERS[job.optimizer](model.parameters())
    history = []
    for step, micros in enumerate(job.steps):
        jobs.enter_stage(hierarchy, job, step)
        optimizer.zero_grad()
        leaves = []
        for micro in range(len(micros)):
            batch = jobs.make_batches(job, step, micro)[rank]
            model.set_requires_gradient_sync(reduces_always or micro == len(micros) - 1)
            with torch.autocast("cpu", enabled=job.autocast):
                output = model(**batch.inputs(job))
                loss = joined_mean(jobs.loss_sum(job, output, batch), len(batch.languages)) + jobs.extra_losses(output)
            loss.backward()
            leaves.append([leaf.grad for leaf in batch.leaves(job)])
        if job.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.max_norm)
        optimizer.step()
        seen = jobs.seen(model, optimizer)
        for found in seen.values():
            found |= {"value": part(found["value"]), "gradient": part(found["gradient"])}
            found["state"] = {key: part(value) for key, value in found["state"].items()}
        history.append((seen, leaves))
    return history


JOBS = {
    "looped": Job(STEPS),
    "grouped": Job(STEPS, engine="grouped"),
    "auto, SGD": Job(STEPS, engine="auto", optimizer="SGD"),
    "accumulated": Job(ACCUMULATED),
    "frozen on one rank, no fusion": Job(STEPS[1:4], frozen=("core", *jobs.FAMILIES, "ru", "pl"), fusion="mean"),
    "detached": Job(STEPS[:3], detached=("ru", "fr", "de", "it")),
    # All experts that are present, though not all there are: the level above is not reached, and gets no zeros. (What
    # is handed to the model does.)
    "present ones detached": Job(
        [*STEPS[:2], STEPS[5]], detached=("slavic", "romance"), objective="family", hidden_grad=False
    ),
    "all detached": Job(STEPS[:3], detached=tuple(jobs.FAMILY_OF)),
    "clipped": Job(STEPS[:3], max_norm=0.05, optimizer="SGD"),
    "part of the output": Job(STEPS[:3], objective="family"),
    "sequences and context": Job(STEPS, positions=3, has_context=True),
    "gathered once": Job(STEPS[:3], options={"reshard_after_forward": False}),
    "frozen for a while": Job([STEPS[0], STEPS[0], *STEPS[:2]], frozen_at={1: ("ru",), 2: ("ru", "fr")}),
    "in a network": Job(STEPS[:4], has_network=True, max_norm=0.05),
    "in a network, no fusion": Job(STEPS[1:5], has_network=True, fusion="mean"),
    "no gradient into the rows": Job(STEPS[:4], hidden_grad=False),
}


@pytest.mark.parametrize(
    "name",
    slow_but(
        [
            *("grouped", "accumulated", "frozen on one rank, no fusion", "present ones detached", "clipped"),
            *("sequences and context", "gathered once", "frozen for a while", "in a network"),
        ],
        JOBS,
    ),
)
def test_ranks_train_as_one_process(two, name):
    job = JOBS[name]
    histories = put_together(two.run(train_with_levels_sharded, job))
    assert all(assert_as_alone(job, histories).values())


def test_gradients_add_up_where_each_backward_pass_reduces_them(two):
    """Also those of experts that no later pass uses."""
    histories = put_together(two.run(train_reducing_always, JOBS["accumulated"]))
    assert all(assert_as_alone(JOBS["accumulated"], histories).values())


def train_reducing_always(job):
    return train_with_levels_sharded(job, reduces_always=True)


def test_parts_on_some_ranks_and_copies_on_others(four):
    job = Job(TWO_BY_TWO, engine="grouped", max_norm=0.5)
    histories = put_together(four.run(train_with_levels_sharded, job, (2, 2)))
    assert all(assert_as_alone(job, histories).values())


def test_losses_that_only_some_ranks_have(two):
    """An expert's loss is over one rank's rows, as under DDP; it must not start gathering before the levels below."""
    job = Job(STEPS, has_losses=True)
    histories = put_together(two.run(train_with_levels_sharded, job))
    for step, (theirs, _) in enumerate(two.run(train_with_ddp, job)[0]):
        assert_close(f"step {step}", histories[0][step][0], theirs, jobs.TOLERANCE)


def test_autocast(two):
    """Both round, each about as far from float32 as the other: they are twice as far apart at most."""
    job = Job([DISJOINT, STEPS[2]], dtype=torch.float32, autocast=True, optimizer="SGD")
    rounding = jobs.own_rounding(job)
    assert 1e-3 < rounding < 0.1
    histories = put_together(two.run(train_with_levels_sharded, job))
    assert all(assert_as_alone(job, histories, tolerance=2 * rounding).values())


def look_at_shards():
    """The bytes here and in all, and the errors of bad calls."""
    model = jobs.make_model(Job([]))
    mesh = dist.init_device_mesh("cpu", (2,))
    shard_levels(model, mesh)
    here = sum(parameter.to_local().nbytes for parameter in model.parameters())
    named = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",))
    texts = []
    for call in (lambda: shard_levels(model, mesh), lambda: shard_experts(model, named)):
        try:
            call()
        except celmoe.ConfigError as error:
            texts.append(str(error))
    # A pass without gradients, in which the ranks differ.
    batch = jobs.make_batches(Job(STEPS), 3, 0)[dist.get_rank()]
    with torch.no_grad():
        output = model(**batch.inputs(Job(STEPS)))
    return here, sum(parameter.numel() * 8 for parameter in model.parameters()), texts, output.fused_hidden


def test_parts_are_parts(two):
    (here, whole_bytes, texts, none), (*_, fused) = two.run(look_at_shards)
    assert 0.4 * whole_bytes < here < 0.75 * whole_bytes  # axes of odd length are not halved
    assert texts == ["'model' must not be sharded yet (got one that is)"] * 2
    assert none.shape == (0, jobs.WIDTH)
    job = Job(STEPS)
    batch = jobs.make_batches(job, 3, 0)[1]
    assert_close("fused", fused, jobs.make_model(job)(**batch.inputs(job)).fused_hidden.detach(), jobs.TOLERANCE)


def test_without_a_process_group():
    with pytest.raises(celmoe.ProcessGroupError, match="'shard_levels' must be called after torch"):
        shard_levels(jobs.make_model(Job([])), None)
