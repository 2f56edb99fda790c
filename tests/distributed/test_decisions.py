"""Loss scaling, clipping and checks for NaN decide alike on all ranks, and as in one process."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import celmoe
from celmoe.distributed import RemoteExpert, joined_mean, prepare_ddp, reduce_gradients, shard_experts, shard_levels
from celmoe.distributed.remote import stand_ins
from tests.distributed import jobs
from tests.distributed.jobs import Job, assert_close
from tests.distributed.test_data_parallel import DISJOINT, STEPS
from tests.marks import slow_but

# All languages but 'zh.Hant', then the traps: experts that one rank has samples of, and a rank without samples.
ALL = [[["ru", "pl", "fr"], ["it", "de", "ru"]]]
JOB = Job([ALL, ALL, DISJOINT, STEPS[3], ALL, ALL], optimizer="SGD")
LANGUAGE = "level_modules.language.{}.up.weight"
REPLICATED = "level_modules.universal.core.up.weight"
# By step: an expert, or None for a replicated parameter, and the value added to its gradient.
FAULTS = {
    "an expert of either rank": {0: ("de", "inf"), 2: ("ru", "inf")},
    "NaN": {1: ("fr", "nan"), 4: ("it", "nan")},
    "one rank has no samples": {3: ("it", "inf")},
    "replicated": {1: (None, "-inf")},
    "none": {},
}


def spread(layout, model, shape=None):
    """A model's loss as a function of a batch, and the call after the last backward pass."""
    size = dist.get_world_size() if dist.is_initialized() else 1

    def objective(module, batch, job):
        output = module(**batch.inputs(job))
        loss = jobs.loss_sum(job, output, batch)
        count = len(batch.languages)
        return loss / count if layout == "alone" else joined_mean(loss, count)

    after = dict  # does nothing
    if layout == "experts":
        shape = shape or (size,)
        names = ("data", "expert")[-len(shape) :]
        after = shard_experts(model, dist.init_device_mesh("cpu", shape, mesh_dim_names=names)).reduce_gradients
    elif layout == "levels":
        shard_levels(model, dist.init_device_mesh("cpu", (size,)))
    elif layout == "ddp":
        return prepare_ddp(model, objective), after
    elif layout == "reduced":
        after = partial(reduce_gradients, list(model.parameters()), dist.init_device_mesh("cpu", (size,)))
    return partial(objective, model), after


def spoiled(model, faults):
    """Make gradients non-finite in the backward pass of a step; return the function that sets the step.

    Replicated parameters' are on the second rank alone.
    """
    now = [0]
    rank, last = (dist.get_rank(), dist.get_world_size() - 1) if dist.is_initialized() else (0, 0)
    for step, (name, value) in faults.items():
        if name is None and rank != last:
            continue
        place = REPLICATED if name is None else LANGUAGE.format(name)
        for found, parameter in model.named_parameters():
            if found == place:
                parameter.register_hook(
                    lambda grad, step=step, value=float(value): grad + value if now[0] == step else None
                )
    return now


def spoil_part(model, now, faults):
    """The same in one rank's part of a gradient that has been reduced."""
    (step,) = now
    name, value = faults.get(step, ("", "0"))
    place = REPLICATED if name is None else LANGUAGE.format(name)
    for found, parameter in model.named_parameters():
        if found == place:
            parameter.grad.to_local().view(-1)[: int(dist.get_rank() == step % 2)] += float(value)


def local(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def train_scaled(layout, job, faults, max_norm=None, shape=None, init_scale=2.0**10):
    """Unscale, clip, step and update as accelerate and Lightning do; return the values after each step."""
    rank = dist.get_rank() if layout != "alone" else 0
    model = jobs.make_model(job)
    now = spoiled(model, faults)
    loss_of, after = spread(layout, model, shape)
    if layout == "levels":
        after = partial(spoil_part, model, now, faults)
    optimizer = jobs.OPTIMIZERS[job.optimizer](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=2)
    steps = []
    for step, (languages,) in enumerate(job.steps):
        now[0] = step
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        batches = jobs.make_batches(job, step, 0)
        assert len(batches) == len(languages)
        batch = jobs.joined(batches) if layout == "alone" else batches[rank]
        scaler.scale(loss_of(batch, job)).backward()
        after()
        norm = None
        if max_norm is not None:
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
        values = {name: local(value).clone() for name, value in model.state_dict().items()}
        steps.append({"scale": scaler.get_scale(), "state": scaler.state_dict(), "norm": local(norm), "values": values})
    return steps


_alone = {}


def as_alone(*args, **options):
    key = repr((args, options))
    if key not in _alone:
        _alone[key] = train_scaled("alone", *args, **options)
    return _alone[key]


def assert_decided_alike(found, alone, tolerance=jobs.TOLERANCE):
    """Scales as in one process, replicated weights to the bit as on the first rank, and all as in one process."""
    for step, wanted in enumerate(alone):
        together = {}
        for history in found:
            mine, first = history[step], found[0][step]
            assert mine["state"] == first["state"] == wanted["state"], f"step {step}"
            assert_close("norm", mine["norm"], first["norm"], 0.0) if not is_bad(mine["norm"]) else None
            for name in mine["values"].keys() & first["values"].keys():
                assert_close(name, mine["values"][name], first["values"][name], 0.0)
            together |= mine["values"]
        assert is_bad(wanted["norm"]) == is_bad(found[0][step]["norm"])
        if not is_bad(wanted["norm"]):
            assert_close("norm", found[0][step]["norm"], wanted["norm"], tolerance)
        assert_close(f"step {step}", together, wanted["values"], tolerance)


def is_bad(norm):
    return norm is not None and not norm.isfinite()


LAYOUTS = ["experts", "levels", "ddp", "reduced"]


@pytest.mark.parametrize(
    ("layout", "faults"),
    slow_but(
        [
            *(("experts", faults) for faults in FAULTS),
            ("levels", "an expert of either rank"),
            ("ddp", "NaN"),
            ("reduced", "one rank has no samples"),
        ],
        [(layout, faults) for layout in LAYOUTS for faults in FAULTS],
    ),
)
def test_one_scale_and_equal_weights(two, layout, faults):
    for max_norm in (None, 0.05):
        alone = as_alone(JOB, FAULTS[faults], max_norm)
        scales = [1024.0, *(step["scale"] for step in alone)]
        assert [step for step, (old, new) in enumerate(pairwise(scales)) if new < old] == list(FAULTS[faults])
        found = two.run(train_scaled, layout, JOB, FAULTS[faults], max_norm)
        assert_decided_alike(found, alone)


def test_beside_data_parallel_ranks(four):
    """An expert's gradients overflow on one of its copies, whose ranks tell each other and then all others."""
    steps = [[[["ru", "pl"], ["fr", "de"], ["it"], ["ru", "it"]]]] * 3
    job, faults = Job(steps, optimizer="SGD"), {0: ("de", "inf"), 1: (None, "nan")}
    found = four.run(train_scaled, "experts", job, faults, 0.05, (2, 2))
    assert_decided_alike(found, as_alone(job, faults, 0.05))


def test_a_scale_that_overflows_by_itself(two):
    """In float32, from a scale that is far too large, down to the first one at which no gradient overflows."""
    job = Job([ALL] * 12, optimizer="SGD", dtype=torch.float32)
    first, second = two.run(partial(train_scaled, init_scale=2.0**127), "experts", job, {})
    for mine, other in zip(first, second, strict=True):
        assert mine["state"] == other["state"]
        for name in mine["values"].keys() & other["values"].keys():
            assert_close(name, other["values"][name], mine["values"][name], 0.0)
    scales = [step["scale"] for step in first]
    num_skipped = sum(later < earlier for earlier, later in pairwise(scales))
    assert 3 < num_skipped < 11
    # Ranks' losses are twice those of one process before they are averaged.
    (*_, alone) = as_alone(job, {}, init_scale=2.0**127)
    assert alone["scale"] / 4 <= scales[-1] <= alone["scale"]


def some_gradients(model, scale):
    """A gradient for each parameter but those of 'zh.Hant', by its name; the mean of two ranks is half of it."""
    for name, parameter in model.named_parameters():
        if "Hant" not in name and "elsewhere" not in name:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5
            parameter.grad = (values * scale * (1.0 if "level_modules.language" in name else 0.5)).to(parameter.dtype)


def some_model(dtype):
    model = jobs.make_model(Job([], dtype=torch.float32 if dtype == "mixed" else dtype))
    if dtype == "mixed":
        model.level_modules["language"].bfloat16()
    return model


# Conditions that tell optimizers' groups, or whole optimizers, apart.
GROUPS = {
    "all": lambda name, parameter: True,
    "matrices": lambda name, parameter: parameter.ndim >= 2,
    "biases": lambda name, parameter: name.endswith(".bias"),
    "norms": lambda name, parameter: ".norm." in name,
    "a level": lambda name, parameter: name.startswith("level_modules.language."),
    "an expert": lambda name, parameter: name.startswith("level_modules.language.ru."),
    "never routed to": lambda name, parameter: "Hant" in name,
}


def norms_and_checks(dtype, scale, fault=None):
    """By group: its norm, whether all is finite, and how many gradients there are; then the clipped ones' bits."""
    model = some_model(dtype)
    is_alone = not dist.is_initialized()
    sharding = None
    if not is_alone:
        sharding = shard_experts(
            model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)), levels="language"
        )
    some_gradients(model, scale)
    for name, parameter in model.named_parameters():
        if fault is not None and name == LANGUAGE.format("de"):
            parameter.grad.view(-1)[-1] = fault
        if is_alone and parameter.grad is not None and "level_modules.language" in name:
            parameter.grad /= 2
        elif not is_alone and parameter.grad is not None and "level_modules.language" not in name:
            # The ranks' gradients differ; their mean is one process's.
            parameter.grad *= 0.5 if dist.get_rank() == 0 else 1.5
    if sharding is not None:
        sharding.reduce_gradients()
        assert all(not each.any() for each in stand_ins(model))
    found = {}
    for group, is_in in GROUPS.items():
        grads = [each.grad for name, each in model.named_parameters() if is_in(name, each) and each.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        found[group] = (norm.item(), norm.dtype, all(bool(each.isfinite().all()) for each in grads), len(grads))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert norm.isnan() or norm.item() == found["all"][0]
    found["clipped"] = {
        name: None if each.grad is None else each.grad for name, each in model.named_parameters() if "fusion" in name
    }
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, "mixed"], ids=str)
def test_norms_and_checks_are_those_of_one_process(two, dtype):
    """To the bit. With elements that are finite, but whose norms are not, nobody takes them for infinite."""
    largest = torch.finfo(torch.bfloat16 if dtype == "mixed" else dtype).max
    for scale, fault in ((1.0, None), (largest / 4, None), (1.0, float("inf")), (1.0, float("nan"))):
        wanted = norms_and_checks(dtype, scale, fault)
        for found in two.run(norms_and_checks, dtype, scale, fault):
            for group in GROUPS:
                assert repr(found[group]) == repr(wanted[group]), group
            for name, grad in found["clipped"].items():
                assert torch.equal(grad.nan_to_num(7.0), wanted["clipped"][name].nan_to_num(7.0))
        # The check has something to see.
        assert wanted["all"][2] == (fault is None)
        assert (wanted["all"][0] < float("inf")) == (scale == 1.0 and fault is None)


def norms_of_sharing_experts(shares):
    """Norms and the number of parameters, if experts on one rank share a tensor, a module, or everything."""
    model = some_model(torch.float64)
    experts = model.level_modules["language"]
    if shares == "a tensor":
        experts["pl"].up.weight = experts["ru"].up.weight
    elif shares == "a module":
        experts["pl"].norm = experts["ru"].norm
    else:
        experts["pl"] = experts["ru"]
    sharding = None
    if dist.is_initialized():
        mesh, loads = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)), {"fr": 2.0, "ru": 1.0, "pl": 1.0}
        sharding = shard_experts(model, mesh, levels="language", loads={"language": loads})
        assert [sharding.owners["language"][name] for name in loads] == [0, 1, 1]
    some_gradients(model, 1.0)
    if sharding is not None:
        sharding.reduce_gradients()
    else:
        for parameter in model.level_modules["language"].parameters():
            if parameter.grad is not None:
                parameter.grad /= 2
    return len(list(model.parameters())), torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()


@pytest.mark.parametrize("shares", ["a tensor", "a module", "all"])
def test_shared_tensors_count_once(two, shares):
    assert two.run(norms_of_sharing_experts, shares) == [norms_of_sharing_experts(shares)] * 2


def take_optimizer_steps(name):
    """The values on this rank after two steps of an optimizer."""
    model = some_model(torch.float32)
    is_alone = not dist.is_initialized()
    sharding = None
    if not is_alone:
        mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",))
        sharding = shard_experts(model, mesh, levels="language")
    parameters = [each for each in model.parameters() if each.ndim == 2 or name != "Muon"]
    optimizer = getattr(torch.optim, name)(parameters, lr=0.01, weight_decay=0.1)
    for scale in (1.0, 0.1):
        some_gradients(model, scale)
        if sharding is not None:
            sharding.reduce_gradients()
        else:
            for place, parameter in model.named_parameters():
                if parameter.grad is not None and "level_modules.language" in place:
                    parameter.grad /= 2
        optimizer.step()
    return model.state_dict()


OPTIMIZERS = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "Adafactor", "RMSprop", "ASGD"]


@pytest.mark.parametrize("name", [*OPTIMIZERS, "Muon"])
def test_optimizers_take_stand_ins_along(two, name):
    wanted = take_optimizer_steps(name)
    found = two.run(take_optimizer_steps, name)
    for mine in found:
        for place, value in mine.items():
            assert torch.equal(value, wanted[place]), place
    assert found[0].keys() | found[1].keys() == wanted.keys()


def penalties(name):
    """By step, between reduction and optimizer: the squares of all parameters, and those of the weights here."""
    model = some_model(torch.float32)
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",))
    sharding = shard_experts(model, mesh, levels="language")
    optimizer = jobs.OPTIMIZERS[name](model.parameters())
    found = []
    for has_gradients in (True, True, False):
        model.zero_grad()
        if has_gradients:
            some_gradients(model, 1.0)
        sharding.reduce_gradients()
        parts = model.parameters(), model.state_dict().values()
        found.append([sum(each.detach().square().sum() for each in part).item() for part in parts])
        optimizer.step()
        assert any(each.any() for each in stand_ins(model)) == has_gradients
    return found


@pytest.mark.parametrize("name", jobs.OPTIMIZERS)
def test_a_penalty_after_the_reduction_sees_no_stand_ins(two, name):
    """Optimizers move them; in the last step experts elsewhere have no gradients."""
    for found in two.run(penalties, name):
        for everything, weights in found:
            assert everything == weights


def two_optimizers():
    """Each optimizer takes its own group; the fault is in a bias, so matrices are stepped on, on every rank."""
    job = Job([ALL])
    model = jobs.make_model(job)
    sharding = shard_experts(model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)))
    groups = [[each for each in model.parameters() if (each.ndim == 2) == wanted] for wanted in (True, False)]
    optimizers = [torch.optim.SGD(group, lr=0.1) for group in groups]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    batch = jobs.make_batches(job, 0, 0)[dist.get_rank()]
    scaler.scale(joined_mean(model(**batch.inputs(job)).fused_hidden.sum(), len(batch.languages))).backward()
    for name, parameter in model.named_parameters():
        if name.endswith("language.de.up.bias"):
            parameter.grad[0] = float("inf")
    sharding.reduce_gradients()
    before = [[each.detach().clone() for each in group] for group in groups]
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    has_moved = [
        any(not torch.equal(old, new) for old, new in zip(olds, news, strict=True))
        for olds, news in zip(before, groups, strict=True)
    ]
    return has_moved, scaler.get_scale()


def test_each_of_two_optimizers_skips_or_steps_on_all_ranks(two):
    assert two.run(two_optimizers) == [([True, False], 32.0)] * 2


def step_with_gradients_on_one_rank():
    """One trained expert: the other rank has no gradient of its own, and would have nothing to check or to clip."""
    job = Job([[[["ru"], []]]], frozen=("core", *jobs.FAMILIES, "pl", "fr", "it", "de", "zh.Hant"), fusion="mean")
    model = jobs.make_model(job)
    sharding = shard_experts(model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)))
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    found = []
    for factor in (1.0, float("inf")):
        optimizer.zero_grad()
        batch = jobs.make_batches(job, 0, 0)[dist.get_rank()]
        loss = model(**batch.inputs(job)).fused_hidden.sum() * factor
        scaler.scale(joined_mean(loss, len(batch.languages))).backward()
        sharding.reduce_gradients()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        found.append((norm.item(), scaler.get_scale()))
    return found


def test_a_rank_without_gradients_of_its_own(two):
    first, second = two.run(step_with_gradients_on_one_rank)
    assert repr(first) == repr(second)
    assert first[0][0] > 0
    assert [scale for _, scale in first] == [64.0, 32.0]


def look_at_stand_ins():
    """The states that leave out stand-ins, and the stand-ins after moves and conversions."""
    model = some_model(torch.float32)
    whole = model.state_dict()
    sharding = shard_experts(model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)))
    own = {name: value for name, value in whole.items() if name in dict(model.named_parameters())}
    assert model.state_dict().keys() == own.keys() < whole.keys()
    missing, unexpected = model.load_state_dict(own, strict=True)
    assert not missing
    assert not unexpected
    missing, unexpected = model.load_state_dict(whole, strict=False)
    assert not missing
    assert set(unexpected) == whole.keys() - own.keys()
    remote = next(module for module in model.modules() if isinstance(module, RemoteExpert))
    names = [name for name, _ in remote.named_parameters()]
    assert names == [f"elsewhere.{name}" for name, _ in jobs.Expert(jobs.WIDTH, Job([])).named_parameters()]
    assert [tuple(each.shape) for each in remote.parameters()] == [(2,), (2,), (1, 2), (2,), (1, 2), (2,)]
    assert sum(each.numel() for each in remote.parameters()) == 12
    model.to(torch.bfloat16)
    model.requires_grad_(False).requires_grad_(True)
    some_gradients(model, 1.0)
    sharding.reduce_gradients()
    assert {each.grad.dtype for each in remote.parameters() if each.grad is not None} <= {torch.bfloat16}
    values = dict(model.named_parameters())
    batch = jobs.make_batches(Job([ALL], dtype=torch.bfloat16), 0, 0)[dist.get_rank()]
    given = (batch.hidden, {"language": batch.languages})
    changed = torch.func.functional_call(model, values, given).fused_hidden
    assert torch.equal(changed, model(*given).fused_hidden)
    # The gradients of a step that nothing was in: none, here and there.
    model.zero_grad()
    sharding.reduce_gradients()
    assert all(each.grad is None for each in model.parameters())
    return len(list(stand_ins(model)))


def test_stand_ins_are_in_no_state_and_follow_the_model(two):
    first, second = two.run(look_at_stand_ins)
    # Six parameters an expert; three families and six languages.
    assert first + second == 6 * 9


def add_parameters_after_sharding():
    model = some_model(torch.float32)
    sharding = shard_experts(model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)))
    name = "de"
    expert = model.level_modules["language"][name]
    if not isinstance(expert, RemoteExpert):
        expert.adapter = torch.nn.Linear(2, 2)
    sharding.reduce_gradients()  # it has no gradient yet
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    try:
        sharding.reduce_gradients()
    except celmoe.ProcessGroupError as error:
        return str(error), sharding.owners["language"][name]
    return "nothing"


def test_parameters_that_others_know_nothing_of_are_refused_by_all(two):
    first, second = two.run(add_parameters_after_sharding)
    assert first == second
    assert first[0] == (
        "'model' must have had all of its experts' trained parameters when 'shard_experts' was called (got gradients "
        f"of 'language.de.adapter.weight', 'language.de.adapter.bias' on ranks [{first[1]}]: add parameters before)"
    )


def wrap_a_network():
    """The scale after one rank's loss was infinite, with layers around the model."""
    found = []
    for layout in ("experts", "levels"):
        job = Job([ALL], has_network=True)
        model = jobs.make_model(job)
        network = jobs.network_of(model, job)
        if layout == "experts":
            sharding = shard_experts(model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)))
        else:
            mesh = dist.init_device_mesh("cpu", (2,))
            shard_levels(model, mesh)
            fully_shard(network, mesh=mesh)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        batch = jobs.make_batches(job, 0, 0)[dist.get_rank()]
        loss = joined_mean(network(**batch.inputs(job)).fused_hidden.sum(), len(batch.languages))
        scaler.scale(loss * (float("inf") if dist.get_rank() == 1 else 1.0)).backward()
        if layout == "experts":
            sharding.reduce_gradients(network)
        scaler.step(optimizer)
        scaler.update()
        found.append(scaler.get_scale())
    return found


def test_layers_around_a_model_skip_with_it(two):
    assert two.run(wrap_a_network) == [[32.0, 32.0]] * 2
