"""Losses averaged over samples: ranks with any shares learn the same as one process on the joined batch."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import celmoe
from celmoe import CELMoELossAPI
from celmoe.distributed import joined_mean, prepare_ddp, reduce_gradients, shard_experts, shard_levels
from celmoe.distributed.sharded_level import Passage, ShardedLevel
from tests.distributed import jobs
from tests.distributed.jobs import DifferenceError, Job, assert_close

BATCHES = {
    "even, disjoint": [["ru", "ru", "pl"], ["fr", "de", "it"]],
    "even, the same experts": [["ru", "fr", "ru"], ["fr", "ru", "ru"]],
    "uneven": [["ru"], ["de", "it", "de", "fr", "ru"]],
    "one has none": [[], ["it", "it", "de"]],
    "one expert of one sample": [["zh.Hant"], []],
}


def make_model(job, is_stacked):
    model = jobs.make_model(job)
    for level in model.level_modules.values():
        for expert in level.values():
            expert.has_losses = True
    model.levels[0].experts["core"].loss_weight = 3.0
    if is_stacked:
        celmoe.stack_experts(model)
    return model


def gradients_of(module):
    found = {}
    for name, parameter in module.named_parameters():
        if "elsewhere" not in name and parameter.grad is not None:
            found[name] = (
                parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad.clone()
            )
    return found


def step(way, batches, options=None, mutant=None):
    """This rank's total, the weights of its experts' losses, and its gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    options = {"engine": "looped", "is_stacked": False, "shape": (size,), "names": ("expert",), **(options or {})}
    job = Job([[batches]], engine=options["engine"])
    model = make_model(job, options["is_stacked"])
    batch = jobs.make_batches(job, 0, 0)[rank]
    count = len(batch.languages)
    seen = []

    def objective(module):
        output = module(**batch.inputs(job))
        bundle = CELMoELossAPI(normalize="samples").compute(output)
        seen.append((bundle.total.item(), {term.name: term.weight for term in bundle.terms}))
        if way == "experts":
            return joined_mean(jobs.loss_sum(job, output, batch), count) + bundle.total
        return joined_mean(jobs.loss_sum(job, output, batch) + bundle.total * count, count)

    mesh = dist.init_device_mesh("cpu", options["shape"], mesh_dim_names=options["names"])
    with MUTANTS[mutant]() if mutant else contextlib.nullcontext():
        match way:
            case "ddp":
                parallel = prepare_ddp(model, objective)
                parallel().backward()
            case "reduced":
                objective(model).backward()
                reduce_gradients(model.parameters(), mesh)
            case "levels":
                objective(shard_levels(model, mesh)).backward()
            case "experts":
                sharding = shard_experts(model, mesh, levels=options.get("levels"))
                objective(model).backward()
                sharding.reduce_gradients()
    return *seen[0], gradients_of(model)


def alone(batches, ranks=slice(None)):
    """The same of one process on the joined batch of some ranks."""
    job = Job([[batches]])
    model = make_model(job, is_stacked=False)
    batch = jobs.joined(jobs.make_batches(job, 0, 0)[ranks])
    output = model(**batch.inputs(job))
    bundle = CELMoELossAPI(normalize="samples").compute(output)
    (jobs.loss_sum(job, output, batch) / len(batch.languages) + bundle.total).backward()
    return bundle.total.item(), {term.name: term.weight for term in bundle.terms}, gradients_of(model)


def assert_as_alone(way, batches, found):
    total, _, wanted = alone(batches)
    sizes = [len(each) for each in batches]
    weights = [1 / len(sizes)] * len(sizes) if way == "experts" else [size / sum(sizes) for size in sizes]
    assert sum(weight * each[0] for weight, each in zip(weights, found, strict=True)) == pytest.approx(total, rel=1e-12)
    missing = set(wanted)
    for rank, (_, _, own) in enumerate(found):
        for name, gradient in own.items():
            if name in wanted:
                assert_close(f"rank {rank}: {name}", gradient, wanted[name], jobs.TOLERANCE)
                missing.discard(name)
            elif "stack:" not in name:
                assert not gradient.any(), name
    return missing


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("way", ["ddp", "reduced", "levels", "experts"])
def test_ranks_learn_as_one_process(two, way, batches):
    assert not assert_as_alone(way, BATCHES[batches], two.run(step, way, BATCHES[batches]))


@pytest.mark.parametrize(
    "options", [{"engine": "grouped"}, {"levels": ["language"]}, {"levels": ["universal"]}], ids=str
)
@pytest.mark.parametrize("batches", ["uneven", "one has none"])
def test_engines_and_levels_that_are_spread(two, options, batches):
    assert not assert_as_alone("experts", BATCHES[batches], two.run(step, "experts", BATCHES[batches], options))


@pytest.mark.parametrize("way", ["ddp", "levels", "experts"])
def test_stacked_experts_have_the_same_totals(two, way):
    for batches in (BATCHES["uneven"], BATCHES["one has none"]):
        found = two.run(step, way, batches, {"is_stacked": True})
        plain = two.run(step, way, batches)
        for stacked, ordinary in zip(found, plain, strict=True):
            assert stacked[0] == pytest.approx(ordinary[0], rel=1e-12)
            assert stacked[1] == pytest.approx(ordinary[1], rel=1e-12)
        assert_as_alone(way, batches, found)


def test_weights_by_hand(two):
    """Experts of spread levels count once for all ranks, whose number their weights have; others on each rank."""
    found = two.run(step, "experts", [["ru"], ["de", "it", "de"]])
    assert [each[1]["universal.core.size"] for each in found] == pytest.approx([2 * 3 / 4, 2 * 3 * 3 / 4])
    spread = {name: weight for each in found for name, weight in each[1].items() if "core" not in name}
    assert spread == pytest.approx(
        {
            "family.slavic.size": 2 / 4,
            "family.germanic.size": 2 * 2 / 4,
            "family.romance.size": 2 / 4,
            "language.ru.size": 2 * 0.5 / 4,
            "language.de.size": 2 * 2 / 4,
            "language.it.size": 2 / 4,
        }
    )
    own = two.run(step, "ddp", [["ru"], ["de", "it", "de"]])
    assert own[0][1] == {"universal.core.size": 3.0, "family.slavic.size": 1.0, "language.ru.size": 0.5}
    assert own[1][1]["language.de.size"] == pytest.approx(2 / 3)


class Pooled(torch.nn.Module):
    def forward(self, hiddens):
        return torch.cat(hiddens).sum()


def shares_of_pooled():
    model = make_model(Job([]), is_stacked=False)
    model.fusion = Pooled()
    shard_experts(model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)))
    batch = jobs.make_batches(Job([[[["ru"], ["de", "it", "de"]]]]), 0, 0)[dist.get_rank()]
    return model(batch.hidden, {"language": batch.languages}).loss_shares["universal.core.size"]


def test_a_fusion_may_give_other_than_rows(two):
    assert two.run(shares_of_pooled) == [2 * 1 / 4, 2 * 3 / 4]


def test_groups_of_as_many_samples_beside_each_other(four):
    """Each group of ranks that share experts has a batch of its own; the groups' totals are averaged."""
    batches = [["ru"], ["fr", "de", "ru"], [], ["it", "it", "pl", "de"]]
    found = four.run(step, "experts", batches, {"shape": (2, 2), "names": ("data", "expert")})
    halves = [alone(batches, slice(2))[0], alone(batches, slice(2, 4))[0]]
    for half, ranks in zip(halves, (found[:2], found[2:]), strict=True):
        assert sum(each[0] for each in ranks) / 2 == pytest.approx(half, rel=1e-12)


def compiled_step(is_compiled):
    """Totals and gradients of this rank in two steps of other experts."""
    steps = [[BATCHES["uneven"]], [BATCHES["even, disjoint"]]]
    model = make_model(Job(steps), is_stacked=False)
    sharding = shard_experts(model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)))
    call = torch.compile(model, backend="aot_eager") if is_compiled else model
    found = []
    for number in range(len(steps)):
        model.zero_grad()
        batch = jobs.make_batches(Job(steps), number, 0)[dist.get_rank()]
        output = call(batch.hidden, model.compile_routing({"language": batch.languages}))
        total = CELMoELossAPI(normalize="samples").compute(output).total
        (output.fused_hidden.sum() + total).backward()
        sharding.reduce_gradients()
        found.append((output.loss_shares, gradients_of(model)))
    return found


def test_compiled_beside_spread_experts(two):
    for found, wanted in zip(two.run(compiled_step, True), two.run(compiled_step, False), strict=True):
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine[0] == theirs[0]
            assert_close("gradients", mine[1], theirs[1], jobs.TOLERANCE)


def shares_through(wrapper):
    """An output's shares behind a wrapper of PyTorch's that takes outputs apart, and those of the bare model."""
    batch = jobs.make_batches(Job([[BATCHES["uneven"]]]), 0, 0)[dist.get_rank()]
    given = batch.hidden, {"language": batch.languages}
    wanted = make_model(Job([]), is_stacked=False)(*given).loss_shares
    model = make_model(Job([]), is_stacked=False)
    if wrapper == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        policy = MixedPrecisionPolicy(output_dtype=torch.float32)
        model = shard_levels(model, dist.init_device_mesh("cpu", (2,)), mp_policy=policy)
    output = model(*given)
    levels = {name: share for level in output.levels.values() for name, share in level.loss_shares.items()}
    return output.loss_shares, levels, wanted


@pytest.mark.parametrize("wrapper", ["ddp", "levels with another dtype"])
def test_wrappers_keep_shares(two, wrapper):
    for found, levels, wanted in two.run(shares_through, wrapper):
        assert found == levels == wanted != {}


# --- wrong averages ---------------------------------------------------------------------------------------------------


def _own_shares():
    """Shares of the rows that came to the experts here."""
    right = ShardedLevel.run

    def wrong(self, *rest):
        output, blocks = right(self, *rest)
        total = sum({name.rpartition(".")[0]: share for name, share in output.loss_shares.items()}.values())
        output.loss_shares = {name: share / total for name, share in output.loss_shares.items()}
        return output, blocks

    return mock.patch.object(ShardedLevel, "run", wrong)


def _no_ranks():
    """Weights that forget the number of ranks."""
    right = ShardedLevel.run

    def wrong(self, *rest):
        output, blocks = right(self, *rest)
        output.loss_weights = {name: weight / 2 for name, weight in output.loss_weights.items()}
        return output, blocks

    return mock.patch.object(ShardedLevel, "run", wrong)


def _each_ranks_mean():
    """Levels that are not spread average over ranks, without weights for their shares."""
    right = Passage.leave

    def wrong(self, model, args, output):
        shares = {name: dict(level.loss_shares) for name, level in output.levels.items()}
        right(self, model, args, output)
        output.loss_shares |= shares["universal"]

    return mock.patch.object(Passage, "leave", wrong)


MUTANTS = {"shares of rows here": _own_shares, "ranks forgotten": _no_ranks, "each rank's mean": _each_ranks_mean}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_average_is_caught(two, mutant):
    with pytest.raises((DifferenceError, AssertionError)):
        assert_as_alone("experts", BATCHES["uneven"], two.run(step, "experts", BATCHES["uneven"], None, mutant))
