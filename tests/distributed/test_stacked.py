"""Stacked experts on several ranks: they train as ordinary experts of one process on the joined batch."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import celmoe
from celmoe.distributed import joined_mean, prepare_ddp, reduce_gradients, shard_experts, shard_levels
from celmoe.stacked.member import held
from celmoe.stacked.stack import slot_of
from tests.distributed import jobs
from tests.distributed.jobs import Job, assert_close
from tests.distributed.test_data_parallel import ACCUMULATED, STEPS
from tests.distributed.test_expert_parallel import TWO_BY_TWO
from tests.slow import slow_but

OPTIMIZERS = {
    "SGD": lambda parameters: celmoe.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "AdamW": lambda parameters: celmoe.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, eps=1e-3),
}


def drawn_steps(seed, number, ranks=2):
    """Batches in which experts, or all samples of a rank, are absent at random."""
    draw = random.Random(seed)
    names = list(jobs.FAMILY_OF)
    steps = []
    while len(steps) < number:
        batches = [[draw.choice(names) for _ in range(draw.choice([0, 1, 1, 2, 4]))] for _ in range(ranks)]
        if any(batches):
            steps.append([batches])
    return steps


JOBS = {
    "looped": Job(STEPS),
    "grouped": Job(STEPS, engine="grouped"),
    "auto, SGD": Job(STEPS, engine="auto", optimizer="SGD"),
    "ten steps with random absences": Job(drawn_steps(0, 10), engine="auto"),
    "ten more, SGD": Job(drawn_steps(1, 10), engine="grouped", optimizer="SGD"),
    "accumulated": Job(ACCUMULATED, engine="grouped"),
    "clipped": Job(STEPS[:3], engine="auto", max_norm=0.05, optimizer="SGD"),
    "detached": Job(STEPS[:4], detached=("ru", "fr"), engine="grouped"),
    "sequences and context": Job(STEPS[1:5], positions=3, has_context=True, engine="grouped"),
    "frozen for a while": Job(
        drawn_steps(6, 6), engine="auto", frozen_at={0: ("ru", "de"), 2: ("ru", "fr"), 4: ("de",)}
    ),
    "in a network": Job(STEPS[:5], has_network=True, engine="auto"),
    "no gradient into the rows": Job(STEPS, hidden_grad=False, engine="auto"),
}

# What each way of training is shown with by default.
USUAL = ("grouped", "ten steps with random absences", "clipped", "frozen for a while", "in a network")


def stacked_model(job):
    model = jobs.make_model(job)
    report = celmoe.stack_experts(model)
    assert [each.level for each in report.classes if not each.reason] == ["family", "language"]
    for name in job.frozen_at.get(0, ()):
        model.freeze("language", name)
    return model


def values_of(model):
    """The values that are here, by the names that they have without stacks."""
    here, _ = held(model)
    return {name: jobs.whole(each).clone() for name, each in here.items()}


def train_in_step(job, model, optimizer, run, *, backward=None):
    """The values after each step; ``run(batch, is_last)`` gives the loss of one micro-batch."""
    history = []
    (hierarchy,) = [each for each in model.modules() if isinstance(each, celmoe.HierarchicalCELMoE)]
    for step, micros in enumerate(job.steps):
        for name in jobs.FAMILY_OF if job.frozen_at else ():
            freezes = hierarchy.freeze if name in job.frozen_at.get(step, ()) else hierarchy.unfreeze
            freezes("language", name)
        optimizer.zero_grad()
        for micro in range(len(micros)):
            batch = jobs.make_batches(job, step, micro)[dist.get_rank()]
            is_last = micro == len(micros) - 1
            loss = run(batch, is_last)
            (backward or torch.Tensor.backward)(loss)
        if job.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.max_norm)
        optimizer.step()
        history.append(values_of(model))
    return history


def loss_of(job, network, batch):
    return joined_mean(jobs.loss_sum(job, network(**batch.inputs(job)), batch), len(batch.languages))


def train_with_plain_ddp(job, **options):
    hierarchy = stacked_model(job)
    model = jobs.network_of(hierarchy, job)
    parallel = DistributedDataParallel(model, **options)
    optimizer = OPTIMIZERS[job.optimizer](model.parameters())

    def run(batch, is_last):
        with contextlib.nullcontext() if is_last else parallel.no_sync():
            loss = loss_of(job, parallel, batch)
            if not is_last:
                loss.backward()
                return None
        return loss

    return train_in_step(job, model, optimizer, run, backward=lambda loss: None if loss is None else loss.backward())


def train_with_prepare_ddp(job, **options):
    hierarchy = stacked_model(job)
    model = jobs.network_of(hierarchy, job)
    parallel = prepare_ddp(model, lambda network, batch: loss_of(job, network, batch), **options)
    optimizer = OPTIMIZERS[job.optimizer](model.parameters())

    def run(batch, is_last):
        with contextlib.nullcontext() if is_last else parallel.no_sync():
            return parallel(batch)

    return train_in_step(job, model, optimizer, run)


def assert_values_as_alone(job, histories):
    """Each rank has, after each step, the values of one process with ordinary experts, and all have the same bits."""
    for step, (alone, _) in enumerate(jobs.train_alone(job)):
        for rank, history in enumerate(histories):
            assert history[step].keys() == alone.keys()
            for name, theirs in alone.items():
                assert_close(f"rank {rank}, step {step}, {name}", history[step][name], theirs["value"], jobs.TOLERANCE)
                assert_close(f"ranks, step {step}, {name}", history[step][name], histories[0][step][name], 0.0)


@pytest.mark.parametrize("name", slow_but([*USUAL, "accumulated", "detached"], JOBS))
def test_plain_ddp_does_not_search(two, name):
    job = JOBS[name]
    assert_values_as_alone(job, two.run(train_with_plain_ddp, job))


@pytest.mark.parametrize("name", slow_but([*USUAL[1:], "no gradient into the rows"], JOBS))
def test_prepared_ddp(two, name):
    job = JOBS[name]
    assert_values_as_alone(job, two.run(train_with_prepare_ddp, job))


def by_one_reduction(job):
    """A rank without samples makes no backward pass."""
    model = stacked_model(job)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    optimizer = OPTIMIZERS[job.optimizer](model.parameters())

    def run(batch, is_last):
        loss = loss_of(job, model, batch)
        if batch.languages:
            loss.backward()
        if is_last:
            reduce_gradients(model.parameters(), mesh)

    return train_in_step(job, model, optimizer, run, backward=lambda _: None)


@pytest.mark.parametrize(
    "name", slow_but(["accumulated", *USUAL[:3]], [name for name, job in JOBS.items() if not job.has_network])
)
def test_one_reduction_after_the_backward_passes(two, name):
    job = JOBS[name]
    assert_values_as_alone(job, two.run(by_one_reduction, job))


def train_with_experts_spread(job, shape=(2,), names=("expert",), **options):
    rank = dist.get_rank()
    model = stacked_model(job)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(rank == 0)  # the first rank's are everyone's
    sharding = shard_experts(model, dist.init_device_mesh("cpu", shape, mesh_dim_names=names), **options)
    model = jobs.network_of(model, job)
    optimizer = OPTIMIZERS[job.optimizer](model.parameters())

    def run(batch, is_last):
        loss_of(job, model, batch).backward()
        if is_last:
            sharding.reduce_gradients(model)

    return train_in_step(job, model, optimizer, run, backward=lambda _: None)


def assert_spread_values_as_alone(job, histories):
    """Each expert is on one rank of the experts' dimension, with the values of one process; the rest is everywhere."""
    for step, (alone, _) in enumerate(jobs.train_alone(job)):
        here = [history[step] for history in histories]
        assert set().union(*here) == alone.keys()
        for name, theirs in alone.items():
            some = [each[name] for each in here if name in each]
            assert len(some) in (
                {1, len(here) // 2} if "level_modules.language" in name else {1, len(here) // 2, len(here)}
            )
            for each in some:
                assert_close(f"step {step}, {name}", each, theirs["value"], jobs.TOLERANCE)


@pytest.mark.parametrize("name", slow_but([*USUAL, "auto, SGD"], JOBS))
def test_experts_spread(two, name):
    job = JOBS[name]
    assert_spread_values_as_alone(job, two.run(train_with_experts_spread, job))


def in_copies(job):
    return train_with_experts_spread(job, (2, 2), ("copies", "expert"))


def test_experts_spread_in_copies(four):
    """Copies of a stack meet other members."""
    job = Job([*TWO_BY_TWO, *drawn_steps(3, 4, ranks=4)], engine="grouped")
    assert_spread_values_as_alone(job, four.run(in_copies, job))


def look_at_spread_stacks():
    """The numbers of parameters and of their experts; and the errors of bad calls."""
    model = stacked_model(Job([]))
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",))
    # One rank's fault is an error on every rank.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if dist.get_rank() else None
    said = []
    with pytest.raises(celmoe.StackedError) as caught:
        shard_experts(model, mesh)
    said.append(str(caught.value))
    assert slot_of(model.level_modules["language"]["ru"]).stack.names == tuple(sorted(jobs.FAMILY_OF))
    del optimizer, caught
    sharding = shard_experts(model, mesh)
    for call in (celmoe.stack_experts, celmoe.unstack_experts):
        with pytest.raises(celmoe.StackedError) as caught:
            call(model)
        said.append(str(caught.value))
    own = {name for name, rank in sharding.owners["language"].items() if rank == dist.get_rank()}
    stacks = {slot.stack for each in model.level_modules["language"].modules() if (slot := slot_of(each)) is not None}
    assert [set(stack.names) for stack in stacks] == [own]
    return len(list(model.level_modules["language"].parameters())), len(own), said


def test_spread_stacks_hold_their_own_members(two):
    (number, first, said), (same_number, second, same_said) = two.run(look_at_spread_stacks)
    assert (first, second) == (3, 3)
    assert number == same_number == 2 * len(list(jobs.Expert(jobs.WIDTH, Job([])).parameters()))
    assert said == same_said
    spread = (
        "'model' must be stacked or unstacked before it is spread over ranks (got one that is; save a checkpoint, and "
        "load it into a new model)"
    )
    held = (
        "'model' must be spread over ranks before its optimizer is made (got parameters that a SGD holds; make it anew "
        "from model.parameters() afterwards)"
    )
    assert said == [held, spread, spread]


def train_with_levels_sharded(job, shape=None, **options):
    model = stacked_model(job)
    shape = shape or (dist.get_world_size(),)
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")[-len(shape) :])
    shard_levels(model, mesh, **options)
    model = jobs.network_of(model, job)
    if job.has_network:
        fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = OPTIMIZERS[job.optimizer](model.parameters())

    def run(batch, is_last):
        model.set_requires_gradient_sync(is_last)
        return loss_of(job, model, batch)

    return train_in_step(job, model, optimizer, run)


@pytest.mark.parametrize("name", slow_but([*USUAL, "accumulated", "sequences and context"], JOBS))
def test_levels_sharded(two, name):
    job = JOBS[name]
    assert_spread_values_as_alone(job, two.run(train_with_levels_sharded, job))


def in_copies_of_parts(job):
    return train_with_levels_sharded(job, (2, 2))


def test_levels_sharded_in_copies(four):
    job = Job([*TWO_BY_TWO, *drawn_steps(3, 4, ranks=4)], engine="grouped")
    assert_spread_values_as_alone(job, four.run(in_copies_of_parts, job))


def test_levels_sharded_over_more_ranks_than_a_level_has_experts(four):
    """The fourth rank holds none of three families."""
    job = Job(drawn_steps(5, 5, ranks=4), engine="auto")
    assert_spread_values_as_alone(job, four.run(train_with_levels_sharded, job))


def look_at_sharded_stacks():
    """The operations that work on a stack of which this rank holds some members."""
    job = Job(STEPS)
    model = stacked_model(job)
    shard_levels(model, dist.init_device_mesh("cpu", (2,)))
    expert = model.level_modules["language"]["ru"]
    attempts = {
        "read": lambda: expert.up.weight,
        "list": lambda: list(expert.parameters()),
        "save": model.state_dict,
        "load": lambda: model.load_state_dict(jobs.make_model(job).state_dict()),
        "groups": lambda: celmoe.parameter_groups(model, {"language/r*": {"lr": 0.1}}),
        "unstack": lambda: celmoe.unstack_experts(model),
        "stack": lambda: celmoe.stack_experts(model),
    }
    said = {}
    for what, attempt in attempts.items():
        with pytest.raises(celmoe.StackedError) as caught:
            attempt()
        said[what] = str(caught.value)
    explained = str(model.explain({"language": ["ru", "fr"]}))
    names = [name for name, _ in model.named_parameters()]
    model.level_modules["language"].unshard()
    weight = expert.up.weight.detach().clone()
    model.level_modules["language"].reshard()
    return said, explained.count("language"), names, weight


def test_views_of_sharded_stacks_are_refused(two):
    (said, explained, names, weight), (same, *_) = two.run(look_at_sharded_stacks)
    assert said == same
    view = "'up.weight' of expert 'ru' must be read or written while this rank holds the whole stack (got one that is "
    cure = (
        "sharded over ranks; call the level's unshard() on all ranks, model.level_modules[...].unshard(), or "
        "save_checkpoint and load_checkpoint)"
    )
    assert said["read"] == view + cure
    for what in ("list", "save", "load", "groups"):
        assert said[what].endswith(cure), what
    for what in ("stack", "unstack"):
        assert said[what].startswith("'model' must be stacked or unstacked before it is spread over ranks")
    assert explained
    assert sum("stack:" in name for name in names) == 2 * len(list(jobs.Expert(jobs.WIDTH, Job([])).parameters()))
    assert_close("a view", weight, jobs.make_model(Job([])).level_modules["language"]["ru"].up.weight.detach(), 0.0)


def refuse_other_axes():
    model = stacked_model(Job([]))
    with pytest.raises(celmoe.StackedError) as caught:
        shard_levels(model, dist.init_device_mesh("cpu", (2,)), shard_placement_fn=lambda _: Shard(1))
    return str(caught.value), not any(isinstance(each, DTensor) for each in model.parameters())


def test_stacks_are_sharded_by_experts_only(two):
    for said, is_unchanged in two.run(refuse_other_axes):
        assert said.startswith(
            "'shard_placement_fn' must leave stacks to be sharded by experts, on their first axis (got"
        )
        assert is_unchanged


def norms_by_expert(layout):
    """The norms of a step's gradients, by one process or by ranks, before a step is made."""
    job = Job(drawn_steps(7, 2), engine="auto", objective="fused")
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = jobs.make_model(job) if layout == "alone" else stacked_model(job)
    parallel, reduces = model, lambda: None
    if layout == "ddp":
        parallel = DistributedDataParallel(model)
    elif layout == "experts":
        reduces = shard_experts(model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",))).reduce_gradients
    elif layout == "levels":
        shard_levels(model, dist.init_device_mesh("cpu", (2,)))
    found = []
    for step in range(2):
        model.zero_grad()
        batches = jobs.make_batches(job, step, 0)
        if layout == "alone":
            batch = jobs.joined(batches)
            (jobs.loss_sum(job, model(**batch.inputs(job)), batch) / len(batch.languages)).backward()
        else:
            loss_of(job, parallel, batches[rank]).backward()
        reduces()
        found.append(celmoe.gradient_norms(model))
    return found


@pytest.mark.parametrize("layout", ["ddp", "levels", "experts"])
def test_norms_by_expert(two, layout):
    """A rank that holds some experts only knows the norms of these."""
    by_rank = two.run(norms_by_expert, layout)
    for step, theirs in enumerate(norms_by_expert("alone")):
        for level, norms in theirs.items():
            here = [found[step][level] for found in by_rank]
            assert set().union(*here) == norms.keys(), (step, level)
            assert layout == "experts" or here[0].keys() == here[1].keys()
            for each in here:
                assert each == pytest.approx({name: norms[name] for name in each}, rel=1e-10)


class Checkpointed(jobs.Network):
    """A network whose experts run again in the backward pass, then outside of the wrapper."""

    def __init__(self, model, job, use_reentrant):
        super().__init__(model, job)
        self.use_reentrant = use_reentrant

    def forward(self, hidden, routing):
        def run(rows):
            return self.model(rows, routing).fused_hidden

        rows = torch.utils.checkpoint.checkpoint(run, self.first(hidden), use_reentrant=self.use_reentrant)
        return celmoe.CELMoEOutput({}, self.last(rows))


WAYS = {
    "gradients are views of buckets": {"gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 0.0001},
    "prepared, no search": {},
    "cleared before the backward pass": {},
    "checkpointed": {},
    "checkpointed, reentrant": {},
    "a wrapper after another": {},
}


def train_in_a_way(job, way):
    hierarchy = stacked_model(job)
    model = jobs.network_of(hierarchy, job)
    if way.startswith("checkpointed"):
        model = Checkpointed(hierarchy, job, way.endswith("reentrant"))
    optimizer = OPTIMIZERS[job.optimizer](model.parameters())
    parallel = DistributedDataParallel(model, **WAYS[way])
    if way == "prepared, no search":
        parallel = prepare_ddp(model, lambda network, batch: loss_of(job, network, batch), find_unused_parameters=False)
        return train_in_step(job, model, optimizer, lambda batch, _: parallel(batch))
    if way == "a wrapper after another":
        loss_of(job, parallel, jobs.make_batches(job, 0, 0)[0]).backward()
        parallel = DistributedDataParallel(model)

    def backward(loss):
        if way.startswith("cleared"):
            optimizer.zero_grad()
        loss.backward()

    return train_in_step(job, model, optimizer, lambda batch, _: loss_of(job, parallel, batch), backward=backward)


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_use_ddp(two, way):
    job = Job(drawn_steps(2, 6), engine="auto", has_network=True, objective="fused")
    assert_values_as_alone(job, two.run(train_in_a_way, job, way))


def errors_of_ddp():
    """The errors that come before any collective."""
    batch = jobs.make_batches(Job(STEPS), 0, 0)[dist.get_rank()].inputs(Job(STEPS))
    found = []

    def trying(model, *, joins=False, **options):
        parallel = DistributedDataParallel(model, **options)
        with parallel.join() if joins else contextlib.nullcontext():
            with pytest.raises(celmoe.StackedError) as caught:
                parallel(**batch)
            # A rank that leaves the block waits for the others.
            parallel._join_config = parallel._join_config._replace(enable=False)
        found.append(str(caught.value))

    trying(stacked_model(Job([])), static_graph=True)
    model = stacked_model(Job([]))
    model.level_modules["language"]["ru"].up = nn.Linear(jobs.WIDTH, 2 * jobs.WIDTH, dtype=torch.float64)
    trying(model)
    trying(stacked_model(Job([])), joins=True)
    return found


def test_what_would_hang_is_refused(two):
    first, second = two.run(errors_of_ddp)
    assert first == second
    assert first == [
        (
            "'static_graph' must be False for a model with stacked experts, for no step has the graph of the step "
            "before (got True)"
        ),
        (
            "'find_unused_parameters' must be True where not all of a level's experts are stacked (got False, and in "
            "level 'language' 'ru', which a rank's batch may lack; call celmoe.distributed.prepare_ddp)"
        ),
        (
            "'join' must not be entered by a DDP of stacked experts, for ranks that have ended join no members (got a "
            "forward pass in it; give a rank without samples an empty batch)"
        ),
    ]
