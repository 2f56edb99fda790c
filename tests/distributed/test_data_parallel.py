"""DDP: ranks whose samples take other experts train as one process on the joined batch."""

import contextlib

import pytest
import torch
import torch.distributed as dist

import celmoe
from celmoe.distributed import joined_mean, prepare_ddp, reduce_gradients
from tests.distributed import jobs
from tests.distributed.jobs import Job, assert_as_alone, assert_ranks_agree
from tests.slow import slow_after, slow_but

DISJOINT = [[["ru", "ru", "pl"], ["fr", "de", "it"]]]  # one step of one micro-batch
# Every trap at once, one after another: the same experts, disjoint ones, uneven batches, none on one rank, one of them
# for the first time, and none anywhere ('zh.Hant').
STEPS = [
    [[["ru", "fr", "ru"], ["fr", "ru", "ru"]]],
    DISJOINT,
    [[["ru"], ["de", "it", "de", "fr", "pl"]]],
    [[[], ["it", "it"]]],
    [[["de", "de"], []]],
    [[["fr"], ["ru"]]],
]
ACCUMULATED = [[[["ru"], ["fr", "fr"]], [["de"], ["it"]], [["pl", "ru"], []]], [[["it"], ["it"]], [["ru"], ["de"]]]]


def train_with_ddp(job):
    """The values on this rank after each step."""
    rank = dist.get_rank()
    hierarchy = jobs.make_model(job)
    model = jobs.network_of(hierarchy, job)
    optimizer = jobs.OPTIMIZERS[job.optimizer](model.parameters())

    def objective(module, batch):
        output = module(**batch.inputs(job))
        return joined_mean(jobs.loss_sum(job, output, batch), len(batch.languages)) + jobs.extra_losses(output)

    parallel = prepare_ddp(model, objective, **job.options)
    history = []
    for step, micros in enumerate(job.steps):
        jobs.enter_stage(hierarchy, job, step)
        optimizer.zero_grad()
        leaves = []
        for micro in range(len(micros)):
            batch = jobs.make_batches(job, step, micro)[rank]
            is_last = micro == len(micros) - 1
            with contextlib.nullcontext() if is_last else parallel.no_sync():
                with torch.autocast("cpu", enabled=job.autocast):
                    loss = parallel(batch)
                loss.backward()
            leaves.append([leaf.grad for leaf in batch.leaves(job)])
        if job.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.max_norm)
        optimizer.step()
        history.append((jobs.seen(model, optimizer), leaves))
    return history


JOBS = {
    "looped": Job(STEPS),
    "grouped": Job(STEPS, engine="grouped"),
    "auto, SGD": Job(STEPS, engine="auto", optimizer="SGD"),
    "accumulated": Job(ACCUMULATED),
    "accumulated, grouped, views": Job(ACCUMULATED, engine="grouped", options={"gradient_as_bucket_view": True}),
    "frozen on one rank, no fusion": Job(STEPS[1:3], frozen=("core", *jobs.FAMILIES, "ru", "pl"), fusion="mean"),
    "detached": Job([DISJOINT] * 2, detached=("ru", "fr")),
    "clipped": Job(STEPS[:3], max_norm=0.05, optimizer="SGD"),
    "part of the output": Job(STEPS[:3], objective="family"),
    "sequences": Job(STEPS[1:4], positions=3, has_context=True),
    "frozen for a while": Job([STEPS[0], STEPS[0], *STEPS[:2]], frozen_at={1: ("ru",), 2: ("ru", "fr")}),
    "in a network": Job(STEPS[:4], has_network=True),
    "small buckets": Job(STEPS[:4], options={"bucket_cap_mb": 0.0001}),
}


@pytest.mark.parametrize(
    "name",
    slow_but(
        [
            *("grouped", "auto, SGD", "accumulated, grouped, views", "frozen on one rank, no fusion", "clipped"),
            *("sequences", "frozen for a while", "in a network", "small buckets"),
        ],
        JOBS,
    ),
)
def test_ranks_train_as_one_process(two, name):
    job = JOBS[name]
    histories = two.run(train_with_ddp, job)
    assert_ranks_agree(histories)
    evidence = assert_as_alone(job, histories)
    assert all(evidence.values())


def test_autocast(two):
    """Both round, each about as far from float32 as the other: they are twice as far apart at most."""
    job = Job([DISJOINT, STEPS[2]], dtype=torch.float32, autocast=True, optimizer="SGD")
    rounding = jobs.own_rounding(job)
    assert 1e-3 < rounding < 0.1
    histories = two.run(train_with_ddp, job)
    assert_ranks_agree(histories)
    evidence = assert_as_alone(job, histories, tolerance=2 * rounding)
    assert all(evidence.values())


def train_by_reduction(job):
    """Train with one reduction after the backward passes; a rank without samples makes no backward pass."""
    rank = dist.get_rank()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    model = jobs.make_model(job)
    optimizer = jobs.OPTIMIZERS[job.optimizer](model.parameters())
    history = []
    for step, micros in enumerate(job.steps):
        optimizer.zero_grad()
        leaves = []
        for micro in range(len(micros)):
            batch = jobs.make_batches(job, step, micro)[rank]
            with torch.autocast("cpu", enabled=job.autocast):
                loss = joined_mean(jobs.loss_sum(job, model(**batch.inputs(job)), batch), len(batch.languages))
            if batch.languages and loss.requires_grad:
                loss.backward()
            # Without a backward pass there is no gradient, of no rows.
            leaves.append([leaf.grad if batch.languages else torch.zeros_like(leaf) for leaf in batch.leaves(job)])
        reduce_gradients(model.parameters(), mesh)
        if job.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.max_norm)
        optimizer.step()
        history.append((jobs.seen(model, optimizer), leaves))
    return history


@pytest.mark.parametrize(
    "name",
    slow_after(
        3, ["grouped", "accumulated", "frozen on one rank, no fusion", "looped", "clipped", "part of the output"]
    ),
)
def test_one_reduction_after_the_backward_passes_is_the_same(two, name):
    job = JOBS[name]
    histories = two.run(train_by_reduction, job)
    assert_ranks_agree(histories)
    evidence = assert_as_alone(job, histories)
    assert all(evidence.values())


def one_rank_is_refused_what_both_would_hang_on():
    job = Job(STEPS[:1])
    found = []

    def trying(call, *args, **options):
        try:
            call(*args, **options)
        except celmoe.CELMoEError as error:
            found.append((type(error).__name__, str(error)))

    model = jobs.make_model(job)
    trying(prepare_ddp, model, "loss")
    trying(prepare_ddp, model, lambda module: None, static_graph=True)
    trying(prepare_ddp, model, lambda module: None, find_unused_parameters=False)
    trying(joined_mean, 1.0, 1)
    trying(joined_mean, torch.ones(2), 1)
    trying(joined_mean, torch.ones(()), -1)
    trying(prepare_ddp(model, lambda module: 1.0))
    trying(prepare_ddp(model, lambda module: torch.ones(2)))
    parallel = prepare_ddp(model, lambda module: torch.ones(()))
    model.level_modules["language"]["ru"] = jobs.Expert(jobs.WIDTH, job).double()
    trying(parallel)
    model.level_modules["language"]["ru"].norm = torch.nn.SyncBatchNorm(jobs.WIDTH)
    trying(prepare_ddp, model, lambda module: None)
    return found


def test_what_would_hang_is_refused(two):
    first, second = two.run(one_rank_is_refused_what_both_would_hang_on)
    assert first == second
    assert [(kind, text) for kind, text in first if not text.startswith("'objective' must be callable")] == [
        ("ConfigError", "'static_graph' must be False, for no step has the graph of the step before (got True)"),
        (
            "ConfigError",
            (
                "'find_unused_parameters' must be True, for which experts a batch has is known only when it comes "
                "(got False)"
            ),
        ),
        ("InputTypeError", "'loss_sum' must be a tensor (got float)"),
        ("InputError", "'loss_sum' must be a scalar (got shape (2,))"),
        ("InputError", "'count' must be at least 0 (got -1)"),
        ("InputTypeError", "'objective' must return a tensor (got float)"),
        ("InputError", "'objective' must return a floating-point scalar (got shape (2,), torch.float32)"),
        (
            "ProcessGroupError",
            (
                "'model' must have had all trained parameters when 'prepare_ddp' was called (got "
                "'level_modules.language.ru.norm.weight', 'level_modules.language.ru.norm.bias', "
                "'level_modules.language.ru.up.weight', 'level_modules.language.ru.up.bias', "
                "'level_modules.language.ru.down.weight', 'level_modules.language.ru.down.bias' since: replaced, or "
                "frozen then; call it again)"
            ),
        ),
        (
            "ConfigError",
            (
                "'model' must have no SyncBatchNorm in its experts, for it waits for ranks that do not run the expert "
                "(got one at 'level_modules.language.ru.norm')"
            ),
        ),
    ]
    assert len(first) == 10


@pytest.mark.parametrize(
    "call",
    [
        lambda: prepare_ddp(jobs.make_model(Job([])), lambda model: None),
        lambda: joined_mean(torch.ones(()), 1),
        lambda: reduce_gradients([], None),
    ],
    ids=["prepare_ddp", "joined_mean", "reduce_gradients"],
)
def test_without_a_process_group(call, request):
    name = request.node.callspec.id
    with pytest.raises(celmoe.ProcessGroupError) as error:
        call()
    assert str(error.value) == (
        f"'{name}' must be called after torch.distributed.init_process_group (got no process group; torchrun sets "
        f"what it reads from the environment)"
    )


def buffer_after_a_pass(options):
    """A buffer that every rank has set to its number."""
    job = Job(STEPS[:1])
    model = jobs.make_model(job)
    model.fusion.register_buffer("seen", torch.zeros(()))
    parallel = prepare_ddp(model, lambda module, each: jobs.loss_sum(job, module(**each.inputs(job)), each), **options)
    model.fusion.seen.fill_(dist.get_rank())
    parallel(jobs.make_batches(job, 0, 0)[dist.get_rank()]).backward()
    return model.fusion.seen.item()


@pytest.mark.parametrize(
    ("options", "buffers"),
    [({}, [0, 1]), ({"forward_sync_buffers": False}, [0, 1]), ({"forward_sync_buffers": True}, [0, 0])],
    ids=["left out", "off", "on"],
)
def test_the_first_ranks_buffers_are_everyones_where_the_caller_asks(two, options, buffers):
    assert two.run(buffer_after_a_pass, options) == buffers


def unfrozen_since(what):
    """The error of a call after something was unfrozen that was frozen when DDP was prepared."""
    job = Job(STEPS[:1])
    model = jobs.make_model(job)
    parts = {"expert": model.level_modules["language"]["ru"], "level": model.level_modules["family"]}
    part = parts.get(what, model.fusion)
    part.requires_grad_(False)
    batch = jobs.make_batches(job, 0, 0)[dist.get_rank()]
    parallel = prepare_ddp(model, lambda module, each: jobs.loss_sum(job, module(**each.inputs(job)), each))
    parallel(batch)
    part.requires_grad_(True)
    with pytest.raises(celmoe.ProcessGroupError) as caught:
        parallel(batch)
    return str(caught.value)


@pytest.mark.parametrize("what", ["expert", "level", "fusion"])
def test_parameters_unfrozen_since_are_refused(two, what):
    for said in two.run(unfrozen_since, what):
        assert said.startswith("'model' must have had all trained parameters when 'prepare_ddp' was called (got '")
        assert said.endswith("since: replaced, or frozen then; call it again)")
