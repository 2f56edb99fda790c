"""Loss scaling, clipping and checks for NaN decide alike on all ranks, and as in one process."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from celmoe.distributed import joined_mean, prepare_ddp, reduce_gradients, shard_experts, shard_levels
from tests.distributed import jobs
from tests.distributed.jobs import Job, assert_close
from tests.distributed.test_data_parallel import DISJOINT, STEPS
from tests.slow import slow_but

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
        values = {name: jobs.whole(value).clone() for name, value in model.state_dict().items()}
        steps.append(
            {"scale": scaler.get_scale(), "state": scaler.state_dict(), "norm": jobs.whole(norm), "values": values}
        )
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
