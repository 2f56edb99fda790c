"""Means over many samples in any dtype, and the reduction of sparse gradients."""

import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

import celmoe
from benchmarks.multilingual.learning.losses import mean
from celmoe.distributed import joined_mean, prepare_ddp, reduce_gradients, shard_experts, shard_levels
from tests.distributed import jobs

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def means(dtype, counts, loss):
    """This rank's part of a mean, its gradient, and that of a loss that was scaled up."""
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True) if len(counts) == 1 else None
    count = counts[dist.get_rank() % len(counts)]
    found = []
    for scale in (1.0, 1024.0):
        loss_sum = torch.tensor(loss if count else 0.0, dtype=dtype, requires_grad=True)
        value = joined_mean(loss_sum, count, group=group)
        assert value.dtype == dtype
        assert value.shape == ()
        (value * scale).backward()
        found += [value.item(), loss_sum.grad.item() / scale]
    return found


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_mean_over_many_samples(two, dtype):
    """The mean is rounded to the loss's dtype once, even if the dtype has no number for the count."""
    tolerance = 2 * torch.finfo(dtype).eps if dtype in FLOATS[:2] else 2e-7
    for counts in ([70_000], [100_000], [40_000, 30_000], [70_001, 0], [3, 5_000_000], [2**31, 2**31 + 7]):
        loss, total = 50_000.0, sum(counts)
        for rank, (value, slope, _, scaled_slope) in enumerate(two.run(means, dtype, counts, loss)):
            has_samples = counts[rank % len(counts)] > 0
            # Subnormal numbers are as far from each other as the smallest of them is from zero.
            spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            wanted = len(counts) * loss / total if has_samples else 0.0
            assert value == pytest.approx(wanted, rel=tolerance, abs=spacing)
            assert slope == pytest.approx(len(counts) / total, rel=tolerance, abs=spacing)
            assert scaled_slope == pytest.approx(len(counts) / total, rel=tolerance, abs=spacing / 1024)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("counts", [[0], [0, 0]], ids=["one rank", "two ranks"])
def test_a_mean_over_no_samples_at_all(two, dtype, counts):
    for value, slope, scaled_value, scaled_slope in two.run(means, dtype, counts, 1.0):
        assert value == scaled_value == 0.0
        assert math.isfinite(slope)
        assert math.isfinite(scaled_slope)


def other_kinds():
    """Integers' means are floats; shapes stay; counts are whole."""
    found = [joined_mean(torch.tensor(7), 70_000).dtype, tuple(joined_mean(torch.ones(1, 1), torch.tensor(4)).shape)]
    for count in (2.5, torch.tensor(2.5), None, "2"):
        try:
            joined_mean(torch.ones(()), count)
        except celmoe.InputTypeError as error:
            found.append(str(error))
    return found


def test_other_kinds_of_sums_and_counts(two):
    assert (
        two.run(other_kinds)
        == [
            [
                torch.float32,
                (1, 1),
                "'count' must be an integer (got 2.5)",
                "'count' must be an integer (got tensor(2.5000))",
                "'count' must be an integer (got None)",
                "'count' must be an integer (got '2')",
            ]
        ]
        * 2
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_job_s_own_mean(dtype):
    loss_sum = torch.tensor(50_000.0, dtype=dtype)
    for count in (0, 7, 70_000, 5_000_000):
        found = mean(loss_sum, torch.tensor(count))
        assert found.dtype == dtype
        assert found.item() == pytest.approx(
            loss_sum.item() / max(count, 1), rel=1e-2 if found.dtype != dtype else 8e-3
        )


def averaged(dtype):
    """Half the largest number on each rank: their mean is there, their sum is not."""
    parameter = nn.Parameter(torch.zeros(3, dtype=dtype))
    parameter.grad = torch.full((3,), torch.finfo(dtype).max * 0.75, dtype=dtype)
    reduce_gradients([parameter], dist.init_device_mesh("cpu", (2,)))
    return parameter.grad.tolist()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_averages_of_large_gradients(two, dtype):
    largest = torch.tensor(torch.finfo(dtype).max * 0.75, dtype=dtype).item()
    assert two.run(averaged, dtype) == [[largest] * 3] * 2


# Rows of an embedding that each rank looks up: None without a backward pass, 'dense' for one through the whole table.
LOOK_UPS = {
    "other rows, some twice": [[1, 4, 4], [0, 4]],
    "the same": [[2, 3], [2, 3]],
    "none on one rank": [[5, 1, 1, 0], None],
    "an empty batch": [[], [3]],
    "empty batches": [[], []],
    "none at all": [None, None],
    "dense on one rank": [[1, 4], "dense"],
    "dense and none": ["dense", None],
}


def gradient_of(table, rows, factor):
    """The gradient of a table after these look-ups."""
    table.weight.grad = None
    if rows is not None:
        used = table.weight if rows == "dense" else table(torch.tensor(rows, dtype=torch.int64))
        (used.square().sum() * factor).backward()
    return table.weight.grad


def make_table():
    table = nn.Embedding(6, 4, sparse=True)
    with torch.no_grad():
        table.weight.copy_(torch.arange(24.0).view(6, 4))
    return table


def reduce_sparse(look_ups, shape=(2,)):
    """The joined gradient of a table, between other parameters; dense, and whether it was."""
    rank = dist.get_rank()
    table, before, after = make_table(), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    gradient_of(table, look_ups[rank], 1.0 + rank)
    before.grad = torch.full((3,), float(rank))
    if rank == 0:
        after.grad = torch.ones(2)
    reduce_gradients([before, table.weight, after], dist.init_device_mesh("cpu", shape))
    grad = table.weight.grad
    size = len(look_ups)
    assert before.grad.tolist() == [(size - 1) / 2] * 3
    assert after.grad.tolist() == [1 / size] * 2
    if grad is None:
        return None, None
    return grad.to_dense(), grad.is_sparse and (grad.is_coalesced(), grad.indices().tolist())


def assert_joined(found, look_ups):
    wanted = [gradient_of(make_table(), rows, 1.0 + rank) for rank, rows in enumerate(look_ups)]
    there = [each for each in wanted if each is not None]
    rows = sorted({row for rows in look_ups if isinstance(rows, list) for row in rows})
    for grad, entries in found:
        if not there:
            assert grad is None
            continue
        torch.testing.assert_close(grad, sum(each.to_dense() for each in there) / len(look_ups))
        assert torch.equal(grad, found[0][0])
        assert entries == (False if "dense" in look_ups else (True, [rows]))


@pytest.mark.parametrize("name", LOOK_UPS)
def test_sparse_gradients(two, name):
    assert_joined(two.run(reduce_sparse, LOOK_UPS[name]), LOOK_UPS[name])


def test_sparse_gradients_in_two_dimensions(four):
    look_ups = [[1, 1], None, [], [5, 1]]
    assert_joined(four.run(reduce_sparse, look_ups, (2, 2)), look_ups)


class Table(celmoe.ExpertModule):
    """Adds to each row one of a table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, jobs.WIDTH, sparse=True, dtype=torch.float64)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, batch):
        return celmoe.ExpertResult(batch.hidden * self.scale + self.table(batch.context["word"]))


def make_model_with_tables():
    torch.manual_seed(0)
    levels = [
        celmoe.HierarchyLevelConfig("all", {"all": celmoe.ExpertConfig("all")}),
        celmoe.HierarchyLevelConfig("some", {name: celmoe.ExpertConfig(name) for name in "abc"}),
    ]
    config = celmoe.CELMoEConfig(jobs.WIDTH, levels, fusion_dropout=0.0)
    return celmoe.HierarchicalCELMoE(config, lambda *_: Table()).double()


def refuse_tables():
    """DDP and `fully_shard` can't reduce a table's gradient if a rank has none; a frozen table has none to reduce."""
    model, found = make_model_with_tables(), []
    mesh = dist.init_device_mesh("cpu", (2,))
    for call in (partial(prepare_ddp, model, lambda model: None), partial(shard_levels, model, mesh)):
        try:
            call()
        except celmoe.ConfigError as error:
            found.append(str(error))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("table" not in name)
    prepare_ddp(model, lambda model: None)
    return found


def test_sparse_gradients_of_experts_are_refused_where_ranks_would_hang(two):
    text = (
        "'model' must have no embedding with sparse=True in its experts for '{}' (got one at "
        "'level_modules.all.all.table': set sparse=False, or call reduce_gradients instead)"
    )
    assert two.run(refuse_tables) == [[text.format("prepare_ddp"), text.format("shard_levels")]] * 2


def train_with_tables(rank, size):
    """Experts with sparse gradients, an optimizer of their own, and an overflow in one of them at the second step."""
    model = make_model_with_tables()
    sharding = None
    if size > 1:
        sharding = shard_experts(model, dist.init_device_mesh("cpu", (size,), mesh_dim_names=("expert",)))
    tables = [each for name, each in model.named_parameters() if "table" in name]
    others = [each for name, each in model.named_parameters() if "table" not in name]
    optimizers = [torch.optim.SparseAdam(tables, lr=0.1), torch.optim.SGD(others, lr=0.1)]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scales = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        hidden = torch.randn(6, jobs.WIDTH, generator=generator, dtype=torch.float64)
        words, names = torch.tensor([0, 3, 3, 1, 0, 2]), list("abbaba")
        if step == 1:
            hidden[5] = float("inf")  # of an 'a'
        share = slice(rank * 4, rank * 4 + 4) if size > 1 else slice(None)
        for optimizer in optimizers:
            optimizer.zero_grad()
        output = model(hidden[share], {"some": names[share]}, context={"word": words[share]})
        loss = output.fused_hidden.square().sum() / 6 * size
        scaler.scale(loss).backward()
        if sharding is not None:
            sharding.reduce_gradients()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, model.state_dict()


def train_tables_on_a_rank():
    return train_with_tables(dist.get_rank(), dist.get_world_size())


def test_experts_with_sparse_gradients(two):
    scales, wanted = train_with_tables(0, 1)
    assert scales == [64.0, 32.0, 32.0]
    for found_scales, found in two.run(train_tables_on_a_rank):
        assert found_scales == scales
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-11, atol=1e-12)
