"""Ranks' trackers together count the same as one process on the joined batches."""

from __future__ import annotations

import json

import pytest
import torch.distributed as dist

from celmoe import LoadTracker
from celmoe.distributed import shard_experts
from tests.distributed import jobs
from tests.distributed.jobs import Job
from tests.distributed.test_data_parallel import STEPS


def tracked(is_spread):
    """The merged tracker's state, and the state of a tracker on each rank that goes on from there."""
    job = Job(STEPS)
    model = jobs.make_model(job)
    if is_spread:
        shard_experts(model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)))
    tracker = LoadTracker(2.0)
    for step in range(len(STEPS)):
        batch = jobs.make_batches(job, step, 0)[dist.get_rank()]
        plan = model.compile_routing({"language": batch.languages}, len(batch.languages))
        model(batch.hidden, plan)
        tracker.update(plan)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, tracker)
    return json.dumps(LoadTracker.merged(gathered).state_dict()), tracker.load()["language"].samples


@pytest.mark.parametrize("is_spread", [False, True])
def test_merged_over_ranks(two, is_spread):
    (first, own), (second, _) = two.run(tracked, is_spread)
    assert first == second
    job = Job(STEPS)
    model, tracker = jobs.make_model(job), LoadTracker(2.0)
    for step in range(len(STEPS)):
        batch = jobs.joined(jobs.make_batches(job, step, 0))
        tracker.update(model.compile_routing({"language": batch.languages}))
    merged = LoadTracker()
    merged.load_state_dict(json.loads(first))
    assert merged.load() == tracker.load()
    assert merged.absent() == tracker.absent()
    assert merged.scalars() == pytest.approx(tracker.scalars(), rel=1e-12)
    assert sum(own.values()) < sum(tracker.load()["language"].samples.values())
