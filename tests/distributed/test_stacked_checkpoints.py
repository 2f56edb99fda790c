"""Checkpoints of stacked experts: from each layout to each other, training goes on as one process's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from torch.nn.parallel import DistributedDataParallel

import celmoe
from celmoe.distributed import (
    load_checkpoint,
    load_file,
    reduce_gradients,
    save_checkpoint,
    shard_experts,
    shard_levels,
    write_file,
)
from celmoe.stacked.member import held
from tests.distributed import jobs
from tests.distributed.jobs import Job, assert_close
from tests.distributed.test_stacked import OPTIMIZERS, drawn_steps, loss_of
from tests.slow import slow_but

FIRST, ALL = 4, 8
STEPS = drawn_steps(4, ALL)


class Layout:
    """A model and its optimizer as they are spread over ranks; ``alone`` is one process on the joined batches."""

    def __init__(self, name, job):
        self.job = job
        self.is_alone = not dist.is_initialized()
        self.model = self.network = jobs.make_model(job)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()  # so that a load that does nothing shows
        kind, _, how = name.partition(", ")
        if how == "stacked":
            celmoe.stack_experts(self.model)
        self.reduce = None
        if kind == "experts":
            sharding = shard_experts(self.model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)))
            self.reduce = sharding.reduce_gradients
        elif kind == "levels":
            shard_levels(self.model, dist.init_device_mesh("cpu", (2,)))
        elif kind == "ddp":
            self.network = DistributedDataParallel(self.model)
        elif kind == "copies":
            mesh = dist.init_device_mesh("cpu", (2,))
            self.reduce = lambda: reduce_gradients(self.model.parameters(), mesh)
        makers = OPTIMIZERS if how == "stacked" else jobs.OPTIMIZERS
        self.optimizer = makers[job.optimizer](self.model.parameters())

    def train(self, steps):
        """The values that are here after each step."""
        history = []
        for step in steps:
            self.optimizer.zero_grad()
            batches = jobs.make_batches(self.job, step, 0)
            if self.is_alone:
                batch = jobs.joined(batches)
                output = self.network(**batch.inputs(self.job))
                (jobs.loss_sum(self.job, output, batch) / len(batch.languages)).backward()
            else:
                loss_of(self.job, self.network, batches[dist.get_rank()]).backward()
            if self.reduce is not None:
                self.reduce()
            self.optimizer.step()
            history.append({name: jobs.whole(each).clone() for name, each in held(self.model)[0].items()})
        return history


ALONE = ["alone", "alone, stacked"]
TOGETHER = ["copies", "copies, stacked", "ddp, stacked", "experts", "experts, stacked", "levels", "levels, stacked"]


# Examples of the usual profile.
USUAL = 100


def save(name, job, folder):
    layout = Layout(name, job)
    start = jobs.make_model(job)
    save_checkpoint(folder / "start", start)
    load_checkpoint(folder / "start", layout.model)
    layout.train(range(FIRST))
    save_checkpoint(folder / "saved", layout.model, layout.optimizer, extra={"name": name})


def go_on(names, job, folder):
    """After each step, the values of each layout that goes on from the checkpoint."""
    histories = []
    for name in names:
        layout = Layout(name, job)
        load_checkpoint(folder / "saved", layout.model, layout.optimizer)
        histories.append(layout.train(range(FIRST, ALL)))
    return histories


def assert_goes_on(job, name, histories):
    alone = jobs.train_alone(job)
    for step in range(FIRST, ALL):
        here = [history[step - FIRST] for history in histories]
        theirs = alone[step][0]
        assert set().union(*here) == theirs.keys()
        for key, expected in theirs.items():
            for each in here:
                if key in each:
                    assert_close(f"{name}, step {step}, {key}", each[key], expected["value"], jobs.TOLERANCE)


# SGD's state has no number of steps.
CASES = [(name, "AdamW") for name in [*ALONE, *TOGETHER]]
CASES += [(name, "SGD") for name in ("alone, stacked", "levels, stacked")]


@pytest.mark.parametrize(
    ("name", "optimizer"),
    slow_but(
        [
            *((f"{layout}, stacked", "AdamW") for layout in ("alone", "copies", "ddp", "experts", "levels")),
            *(("experts", "AdamW"), ("levels", "AdamW"), ("alone, stacked", "SGD")),
        ],
        CASES,
    ),
)
def test_from_each_layout_to_each(two, name, optimizer, tmp_path):
    job = Job(STEPS, optimizer=optimizer, engine="auto")
    if name in ALONE:
        save(name, job, tmp_path)
    else:
        two.run(save, name, job, tmp_path)
    for each, history in zip(ALONE, go_on(ALONE, job, tmp_path), strict=True):
        assert_goes_on(job, f"{name} to {each}", [history])
    # All pairs under the thorough profile; else each layout is gone on from, and to, by several.
    start = CASES.index((name, optimizer))
    few = [TOGETHER[start % len(TOGETHER)]]
    layouts = TOGETHER if settings.default.max_examples > USUAL else few
    by_rank = two.run(go_on, layouts, job, tmp_path)
    for place, each in enumerate(layouts):
        assert_goes_on(job, f"{name} to {each}", [histories[place] for histories in by_rank])


def test_one_file(two, tmp_path):
    """A checkpoint of stacks spread over ranks becomes one file, which any layout reads."""
    job = Job(STEPS, engine="auto")
    two.run(save, "experts, stacked", job, tmp_path)
    write_file(tmp_path / "saved", tmp_path / "file.pt")
    layout = Layout("alone, stacked", job)
    assert load_file(tmp_path / "file.pt", layout.model, layout.optimizer) == {"name": "experts, stacked"}
    assert_goes_on(job, "one file", [layout.train(range(FIRST, ALL))])


def test_an_optimizer_with_one_step_for_all_refuses_different_ones(tmp_path):
    job = Job(STEPS, engine="auto")
    save("alone", job, tmp_path)
    model = jobs.make_model(job)
    celmoe.stack_experts(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(celmoe.CheckpointError, match=r"^'optimizer' must keep the experts' states apart"):
        load_checkpoint(tmp_path / "saved", model, optimizer)
    assert not optimizer.state
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_groups_by_expert(two, tmp_path):
    """Members of a stack in groups of their own, whose numbers another layout does not have."""
    job = Job(STEPS, engine="auto")

    def made(*, is_stacked):
        model = jobs.make_model(job)
        if is_stacked:
            celmoe.stack_experts(model)
        groups = celmoe.parameter_groups(model, {"language/r*": {"lr": 1e-3}, "language/*": {"amsgrad": True}})
        return model, (celmoe.optim.AdamW if is_stacked else torch.optim.AdamW)(groups, lr=1e-2)

    def train(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            batch = jobs.joined(jobs.make_batches(job, step, 0))
            jobs.loss_sum(job, model(**batch.inputs(job)), batch).backward()
            optimizer.step()

    model, optimizer = made(is_stacked=True)
    train(model, optimizer, range(FIRST))
    save_checkpoint(tmp_path, model, optimizer)
    train(model, optimizer, range(FIRST, ALL))
    for is_stacked in (True, False):
        other, its = made(is_stacked=is_stacked)
        load_checkpoint(tmp_path, other, its)
        train(other, its, range(FIRST, ALL))
        assert_close("values", dict(other.state_dict()), dict(model.state_dict()), jobs.TOLERANCE)
