"""Expert parallelism: experts spread over ranks compute, and learn, the same as in one process."""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import celmoe
from celmoe.distributed import RemoteExpert, joined_mean, meeting, reduce_gradients, shard_experts, shard_levels
from celmoe.distributed.placement import balanced
from tests.distributed import jobs
from tests.distributed.jobs import Job, assert_as_alone, assert_ranks_agree
from tests.distributed.test_data_parallel import ACCUMULATED, DISJOINT, STEPS
from tests.slow import slow_but


def train_with_experts_spread(job, shape=(2,), names=("expert",), **options):
    """The values on this rank after each step."""
    rank = dist.get_rank()
    model = jobs.make_model(job)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(rank == 0)  # the first rank's are everyone's
    sharding = shard_experts(model, dist.init_device_mesh("cpu", shape, mesh_dim_names=names), **options)
    hierarchy, model = model, jobs.network_of(model, job)
    optimizer = jobs.OPTIMIZERS[job.optimizer](model.parameters())
    history = []
    for step, micros in enumerate(job.steps):
        jobs.enter_stage(hierarchy, job, step)
        optimizer.zero_grad()
        leaves = []
        for micro in range(len(micros)):
            batch = jobs.make_batches(job, step, micro)[rank]
            with torch.autocast("cpu", enabled=job.autocast):
                output = model(**batch.inputs(job))
                loss = joined_mean(jobs.loss_sum(job, output, batch), len(batch.languages)) + jobs.extra_losses(output)
            loss.backward()
            leaves.append([leaf.grad for leaf in batch.leaves(job)])
        sharding.reduce_gradients(model)
        if job.max_norm is not None:
            sharding.clip_gradients(job.max_norm, model)
        optimizer.step()
        history.append((jobs.seen(model, optimizer), leaves))
    return history


JOBS = {
    "looped": Job(STEPS),
    "grouped": Job(STEPS, engine="grouped"),
    "auto, SGD, losses": Job(STEPS, engine="auto", optimizer="SGD", has_losses=True),
    "grouped, losses": Job(STEPS[:3], engine="grouped", has_losses=True),
    "accumulated": Job(ACCUMULATED),
    "frozen, no fusion": Job(STEPS[1:4], frozen=("core", *jobs.FAMILIES, "ru", "pl"), fusion="mean"),
    "detached": Job(STEPS[:3], detached=("ru", "fr", "de", "it")),
    "present ones detached": Job([*STEPS[:2], STEPS[5]], detached=("slavic", "romance"), objective="family"),
    "all detached": Job(STEPS[:3], detached=tuple(jobs.FAMILY_OF), objective="fused", fusion="mean"),
    "clipped": Job(STEPS[:3], max_norm=0.05, optimizer="SGD"),
    "part of the output": Job(STEPS[:3], objective="family"),
    "sequences and context": Job(STEPS, positions=3, has_context=True),
    "experts that mix their rows": Job(STEPS[:4], mixes=True),
    "frozen for a while": Job([STEPS[0], STEPS[0], *STEPS[:2]], frozen_at={1: ("ru",), 2: ("ru", "fr")}),
    "in a network": Job(STEPS[:4], has_network=True, max_norm=0.05),
    "in a network, no fusion": Job(STEPS[1:5], has_network=True, fusion="mean"),
    "no gradient into the rows": Job(STEPS[:4], hidden_grad=False),
}


@pytest.mark.parametrize(
    "name",
    slow_but(
        [
            *("auto, SGD, losses", "grouped, losses", "accumulated", "frozen, no fusion", "present ones detached"),
            *("clipped", "sequences and context", "experts that mix their rows", "frozen for a while", "in a network"),
        ],
        JOBS,
    ),
)
def test_ranks_train_as_one_process(two, name):
    job = JOBS[name]
    histories = two.run(train_with_experts_spread, job)
    assert_ranks_agree(histories)
    evidence = assert_as_alone(job, histories)
    assert all(evidence.values())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        # A level in between stays data-parallel, so that its rows differ from rank to rank.
        ("looped", {"levels": ["language", "universal"]}),
        ("sequences and context", {"levels": "language"}),
        # All on the second rank: the first has no expert of the level.
        ("frozen, no fusion", {"loads": {"language": {"ru": 1.0}, "family": dict.fromkeys(jobs.FAMILIES, 0.0)}}),
    ],
    ids=["two of three levels", "one level", "loads"],
)
def test_levels_and_loads(two, name, options):
    job = JOBS[name]
    histories = two.run(_with_options, job, options)
    assert_ranks_agree(histories)
    assert all(assert_as_alone(job, histories).values())


def _with_options(job, options):
    return train_with_experts_spread(job, **options)


def test_autocast(two):
    """Both round, each about as far from float32 as the other: they are twice as far apart at most."""
    job = Job([DISJOINT, *STEPS[2:4]], dtype=torch.float32, autocast=True, optimizer="SGD")
    rounding = jobs.own_rounding(job)
    assert 1e-3 < rounding < 0.1
    histories = two.run(train_with_experts_spread, job)
    assert_ranks_agree(histories)
    assert all(assert_as_alone(job, histories, tolerance=2 * rounding).values())


class Narrow(celmoe.ExpertModule):
    """Returns rows in bfloat16 for rows of any dtype."""

    def forward(self, batch):
        return celmoe.ExpertResult(batch.hidden.bfloat16())


def run_narrow_experts(languages):
    """The dtype of the last level's rows, and how many ranks have an expert of these languages."""
    model = jobs.make_model(Job([], fusion="mean"))
    for name in model.level_modules["language"]:
        model.level_modules["language"][name] = Narrow()
    sharding = shard_experts(model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)))
    hidden = torch.ones(len(languages), jobs.WIDTH, dtype=torch.float64)
    output = model(hidden, {"language": languages})
    return output.levels["language"].hidden.dtype, len({sharding.owners["language"][each] for each in languages})


@pytest.mark.parametrize(("languages", "num_ranks"), [(["ru", "ru"], 1), (["it"], 1), (["ru", "pl", "fr", "it"], 2)])
def test_a_rank_that_no_rows_come_to_has_no_say_in_the_experts_dtype(two, languages, num_ranks):
    assert two.run(run_narrow_experts, languages) == [(torch.bfloat16, num_ranks)] * 2


class Same(celmoe.ExpertModule):
    """Gives the rows that it is given."""

    def forward(self, batch):
        return celmoe.ExpertResult(batch.hidden)


def run_beside_no_samples(narrow, levels):
    """The dtype of the last level's rows: float32 ones on the first rank, on the second none, of float64."""
    model = jobs.make_model(Job([], fusion="mean"))
    for level, experts in model.level_modules.items():
        for name in experts:
            experts[name] = Narrow() if level == narrow else Same()
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",))
    shard_experts(model, mesh, levels=levels)
    languages, dtype = ([], torch.float64) if dist.get_rank() else (["ru", "it"], torch.float32)
    output = model(torch.ones(len(languages), jobs.WIDTH, dtype=dtype), {"language": languages})
    return output.levels["language"].hidden.dtype


@pytest.mark.parametrize(
    ("narrow", "levels", "dtype"),
    # A level in between, which is not spread, leaves the rank without samples its own dtype.
    [(None, None, torch.float32), ("family", ["universal", "language"], torch.bfloat16)],
    ids=["as given", "a level in between"],
)
def test_a_rank_without_samples_has_no_say_in_the_rows_dtype(two, narrow, levels, dtype):
    assert two.run(run_beside_no_samples, narrow, levels) == [dtype] * 2


def train_with_group_without_cpu(job):
    """Train over a group that only devices can talk over."""
    with mock.patch.object(meeting.dist, "get_backend_config", return_value="cuda:nccl"):
        return train_with_experts_spread(job)


def test_ranks_meet_on_the_device_where_the_group_has_no_other(two):
    job = JOBS["auto, SGD, losses"]
    histories = two.run(train_with_group_without_cpu, job)
    assert_ranks_agree(histories)
    assert all(assert_as_alone(job, histories).values())


TWO_BY_TWO = [
    [[["ru", "ru"], ["fr", "de"], ["ru"], ["it", "pl", "it"]]],
    [[["ru"], [], ["de", "de", "fr"], ["fr"]]],
    [[["it"], ["it"], ["it"], ["it", "zh.Hant"]]],
    [[[], [], ["pl", "de"], ["ru"]]],
]


def test_a_group_without_samples_beside_one_with_some(four):
    """It makes a backward pass like the others, through a level that nothing came to."""
    steps = [[[[], [], ["ru"], []]], [[["fr"], ["it"], ["ru"], []]]]
    job = Job(steps, objective="family", fusion="mean", frozen=("core",), hidden_grad=False)
    histories = four.run(train_with_experts_spread, job, (2, 2), ("data", "expert"))
    assert_ranks_agree(histories)
    assert all(assert_as_alone(job, histories).values())


@pytest.mark.parametrize(
    ("names", "engine"),
    slow_but(
        [(("data", "expert"), "grouped"), (("expert", "data"), "looped")],
        [(names, engine) for names in (("data", "expert"), ("expert", "data")) for engine in ("looped", "grouped")],
    ),
    ids=["data first-looped", "data first-grouped", "experts first-looped", "experts first-grouped"],
)
def test_beside_data_parallel_ranks(four, engine, names):
    job = Job(TWO_BY_TWO, engine=engine, max_norm=0.5)
    histories = four.run(train_with_experts_spread, job, (2, 2), names)
    assert_ranks_agree(histories)
    assert all(assert_as_alone(job, histories).values())


def look_without_gradients():
    """The outputs of a pass without gradients, this rank's values, and the error of a call of a remote expert."""
    job = Job(STEPS, engine="auto", has_losses=True)
    model = jobs.make_model(job)
    sharding = shard_experts(model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)))
    batch = jobs.make_batches(job, 2, 0)[dist.get_rank()]
    with torch.no_grad():
        output = model(batch.hidden, model.compile_routing({"language": batch.languages}))
    remote = next(module for module in model.level_modules["language"].values() if isinstance(module, RemoteExpert))
    with pytest.raises(celmoe.ProcessGroupError) as error:
        remote(celmoe.ExpertBatch(batch.hidden))
    hiddens = {name: level.hidden for name, level in output.levels.items()} | {"fused": output.fused_hidden}
    routes = {name: level.routes for name, level in output.levels.items()}
    names = list(model.state_dict())
    text = str(model.explain())
    return hiddens, routes, dict(output.losses), output.loss_weights, names, sharding.owners, str(error.value), text


def test_outputs_without_gradients(two):
    job = Job(STEPS, has_losses=True)
    found = two.run(look_without_gradients)
    model, batches = jobs.make_model(job), jobs.make_batches(job, 2, 0)
    expected = model(**jobs.joined(batches).inputs(job))
    start = 0
    for (hiddens, routes, *_), batch in zip(found, batches, strict=True):
        end = start + len(batch.languages)
        for name, level in expected.levels.items():
            jobs.assert_close(name, hiddens[name], level.hidden.detach()[start:end], jobs.TOLERANCE)
            assert routes[name] == level.routes[start:end]
        jobs.assert_close("fused", hiddens["fused"], expected.fused_hidden.detach()[start:end], jobs.TOLERANCE)
        start = end
    losses = found[0][2] | found[1][2]
    jobs.assert_close("losses", losses, {k: v.detach() for k, v in expected.losses.items()}, jobs.TOLERANCE)
    weights = found[0][3] | found[1][3]
    assert weights == {key: 2 * weight for key, weight in expected.loss_weights.items()}
    shared = set(found[0][4]) & set(found[1][4])
    assert {name.split(".")[0] for name in shared} == {"fusion", "level_modules"}
    assert all(".universal." in name for name in shared if name.startswith("level_modules"))
    assert set(found[0][4]) | set(found[1][4]) == {name for name, _ in model.named_parameters()}
    assert found[0][5] == found[1][5]
    assert sorted(found[0][5]["language"].values()) == [0, 0, 0, 1, 1, 1]
    assert "must be called on rank 1 of its mesh's dimension, which holds it (got a call with 1 samples" in found[0][6]
    assert all("language: 3 Expert looped" in text for *_, text in found)


def refusals():
    """The error of each bad call; none may leave the other rank waiting."""
    rank = dist.get_rank()
    job = Job(STEPS, has_context=True)
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",))
    found = []

    def trying(call, *args, **options):
        try:
            call(*args, **options)
        except celmoe.CELMoEError as error:
            found.append((type(error).__name__, str(error)))
        else:
            found.append(("nothing", ""))

    model = jobs.make_model(job)
    trying(shard_experts, model, "mesh")
    trying(shard_experts, torch.nn.Linear(2, 2), mesh)
    trying(shard_levels, torch.nn.Linear(2, 2), mesh)
    trying(reduce_gradients, [], (2,))
    trying(shard_experts, model, mesh, dimension="experts")
    trying(shard_experts, model, dist.init_device_mesh("cpu", (2,)))
    trying(shard_experts, model, mesh, levels=["langauge"])
    trying(shard_experts, model, mesh, levels=[])
    trying(shard_experts, model, mesh, loads={"langauge": {}})
    # Levels are checked in every call, experts also on levels that are not spread.
    every = {level.name: {} for level in model.levels}
    trying(shard_experts, model, mesh, loads=every | {"langauge": {}})
    trying(shard_experts, model, mesh, levels=["language"], loads={"language": {}, "famly": {}})
    trying(shard_experts, model, mesh, levels=["language"], loads={"family": {"slavik": 1.0}})
    trying(shard_experts, model, mesh, levels=["language"], loads={"family": {"slavic": -1.0}})
    trying(shard_experts, model, mesh, loads={"language": {"rus": 1.0}})
    trying(shard_experts, model, mesh, loads={"language": {"ru": -1.0}})
    trying(shard_experts, model, mesh, loads={"language": {"ru": True}})
    trying(shard_experts, model, mesh, loads={"language": {"ru": float(rank)}})
    other = jobs.make_model(job)
    if rank:
        other.level_modules["language"]["ru"].norm = torch.nn.LayerNorm(2)
    trying(shard_experts, other, mesh, loads={"language": {}})
    shared = jobs.make_model(job)
    shared.level_modules["language"]["ru"].up = shared.level_modules["language"]["pl"].up
    trying(shard_experts, shared, mesh)
    shard_experts(model, mesh)
    trying(shard_experts, model, mesh)
    batch = jobs.make_batches(job, 0, 0)[rank]
    given = batch.inputs(job)
    # One rank's rows are wider in one respect: both must say so.
    longer = batch.hidden.detach().unsqueeze(1).expand(-1, 2 + rank, -1)
    trying(model, **given | {"hidden": longer, "context": {"shift": longer}, "mask": longer[..., 0]})
    trying(model, **given | {"context": {"shift": batch.shift.detach() if rank else batch.shift}})
    trying(model, **given | {"mask": batch.mask.detach() if rank else batch.mask})
    with torch.set_grad_enabled(bool(rank)):
        trying(model, **given)
    # Rows of one rank are no tensors, which can't travel: a list, then an array on the rank that has samples.
    texts = {"shift": batch.shift, "texts": ["x"] * len(batch.hidden)}
    trying(model, **given | {"context": texts if rank else {"shift": batch.shift}})
    array = np.zeros(0 if rank else len(batch.hidden))
    if rank:
        empty = {"hidden": batch.hidden[:0], "routing": {"language": []}, "mask": batch.mask[:0]}
        trying(model, **empty | {"context": {"shift": batch.shift[:0], "array": array}})
    else:
        trying(model, **given | {"context": {"shift": batch.shift, "array": array}})
    if rank:
        given = {"hidden": batch.hidden[:0], "routing": {"language": []}}
    trying(model, **given)
    # And after all that they still understand each other.
    output = model(**jobs.make_batches(job, 0, 0)[rank].inputs(job))
    output.fused_hidden.sum().backward()
    return found


def test_what_would_hang_is_refused_by_every_rank(two):
    first, second = two.run(refusals)
    assert first == second
    wanted = [
        ("ConfigTypeError", "'mesh' must be a torch.distributed DeviceMesh (got str)"),
        ("ConfigTypeError", "'model' must be a HierarchicalCELMoE (got Linear)"),
        ("ConfigTypeError", "'model' must be a HierarchicalCELMoE (got Linear)"),
        ("ConfigTypeError", "'mesh' must be a torch.distributed DeviceMesh (got tuple)"),
        ("MeshError", "'dimension' must be a dimension of the mesh (got 'experts'; nearest: 'expert')"),
        ("MeshError", "'dimension' must be a dimension of the mesh (got 'expert'; its dimensions have no names)"),
        ("UnknownLevelError", "'levels' must be levels of the model (got 'langauge'; nearest: 'language')"),
        ("ConfigError", "'levels' must hold at least one level (got none; no level has several experts)"),
        ("UnknownLevelError", "'loads' must have levels of the model for keys (got 'langauge'; nearest: 'language')"),
        ("UnknownLevelError", "'loads' must have levels of the model for keys (got 'langauge'; nearest: 'language')"),
        ("UnknownLevelError", "'loads' must have levels of the model for keys (got 'famly'; nearest: 'family')"),
        ("UnknownExpertError", "\"loads['family']\" must have experts of the level for keys (got 'slavik'; nearest: "),
        ("ConfigError", "\"loads['family']['slavic']\" must be at least 0 (got -1.0)"),
        ("UnknownExpertError", "'loads['language']' must have experts of the level"),
        ("ConfigError", "\"loads['language']['ru']\" must be at least 0 (got -1.0)"),
        ("ConfigTypeError", "\"loads['language']['ru']\" must be a number (got True)"),
        ("ProcessGroupError", "'model' must be the same on all ranks (got other levels or loads on ranks [1]"),
        (
            "ProcessGroupError",
            "'model' must be the same on all ranks (got other parameters on ranks [1] than on rank 0",
        ),
        ("ConfigError", "'model' must share no tensor between experts on different ranks"),
        ("ConfigError", "'model' must not be sharded yet (got one that is)"),
        (
            "InputError",
            "'rows of hidden' must be alike on all ranks that share experts (got (2, 6) on [0], (3, 6) on [1]",
        ),
        ("InputError", "'rows of context' must be alike on all ranks that share experts (got (((6,), torch.float64, T"),
        (
            "InputError",
            "'rows of mask' must be alike on all ranks that share experts (got ((), torch.float64, True) on",
        ),
        ("InputError", "'gradients recorded' must be alike on all ranks that share experts (got False on [0], True on"),
        (
            "InputError",
            "'context['texts']' must be a dense tensor where experts are spread over ranks (got another batch-aligned",
        ),
        ("InputError", "'context['array']' must be a dense tensor where experts are spread over ranks (got another"),
        ("InputError", "'context' and 'mask' must be of one structure on all ranks that share experts, also where"),
    ]
    assert [kind for kind, _ in first] == [kind for kind, _ in wanted]
    for (_, text), (_, start) in zip(first, wanted, strict=True):
        assert text.replace('"', "'").startswith(start.replace('"', "'")), text


def test_a_mesh_that_leaves_ranks_out(four):
    texts = four.run(_shard_over_some)
    assert set(texts) == {"'mesh' must have one rank for each of the 4 processes (got 2, dimensions 'expert')"}


def _shard_over_some():
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    try:
        shard_experts(jobs.make_model(Job(STEPS)), mesh["expert"])
    except celmoe.MeshError as error:
        return str(error)
    return "none"


def test_without_a_process_group():
    with pytest.raises(celmoe.ProcessGroupError, match="'shard_experts' must be called after torch"):
        shard_experts(jobs.make_model(Job([])), None)


@pytest.mark.parametrize(
    ("costs", "num_ranks", "owners"),
    [
        ([1, 1, 1, 1], 2, (0, 1, 0, 1)),
        ([5, 1, 1, 1, 1, 1], 2, (0, 1, 1, 1, 1, 1)),
        ([0, 0, 0], 3, (0, 1, 2)),
        ([3, 2, 2], 2, (0, 1, 1)),
        ([1], 4, (0,)),
    ],
)
def test_placement(costs, num_ranks, owners):
    assert balanced(costs, num_ranks) == owners


def shared_with_all(what):
    """The error for an expert whose tensor every rank holds, too; or none."""
    model = jobs.make_model(Job(STEPS[:1]))
    expert = model.level_modules["language"]["ru"]
    if what == "the fusion's weight":
        model.fusion.gates[0].weight = expert.down.weight
    elif what == "a buffer of the fusion":
        expert.register_buffer("table", torch.ones(2))
        model.fusion.register_buffer("table", expert.table)
    elif what == "a level of one expert":
        model.level_modules["universal"]["core"].down.weight = expert.down.weight
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("expert",))
    with pytest.raises(celmoe.ConfigError) as caught:
        shard_experts(model, mesh, levels=["language"])
    return str(caught.value)


@pytest.mark.parametrize("what", ["the fusion's weight", "a buffer of the fusion", "a level of one expert"])
def test_a_tensor_shared_with_what_every_rank_holds_is_refused(two, what):
    for said in two.run(shared_with_all, what):
        assert "or with what every rank holds (got " in said
        assert "language.ru" in said


def owners_by(loads):
    model = jobs.make_model(Job(STEPS[:1]))
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("expert",))
    owners = shard_experts(model, mesh, levels=["language"], loads={"language": loads}).owners["language"]
    return [owners[name] for name in loads]


@pytest.mark.parametrize("unit", [1.0, 0.01, 1e6])
def test_experts_left_out_of_loads_weigh_nothing_whatever_the_unit(two, unit):
    assert two.run(owners_by, {"fr": 2 * unit, "ru": unit, "pl": unit}) == [[0, 1, 1]] * 2
