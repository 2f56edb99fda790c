"""Ranks without samples between modules that FSDP2 has sharded: no collective is skipped, and nothing diverges."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import celmoe
from celmoe.distributed import joined_mean, prepare_ddp, reduce_gradients, shard_experts, shard_levels, transport
from celmoe.distributed.remote import stand_ins
from tests.distributed import jobs
from tests.distributed.jobs import Job, assert_close
from tests.slow import slow_but

# Either rank without samples, both, and neither; all samples at one expert, which only one rank holds.
BATCHES = [[["ru", "fr"], ["de"]], [[], ["it", "it", "ru"]], [["pl"], []], [[], []], [["it"], ["it", "it"]]]
LAYOUTS = ("replicated", "ddp", "levels", "experts", "all experts")


class Shifted(jobs.Expert):
    """Reads rows of the context, a tensor that all experts share, and a mask."""

    def __init__(self, job):
        super().__init__(jobs.WIDTH, job)

    def forward(self, batch):
        result = super().forward(batch)
        result.hidden = result.hidden + batch.context["all"]
        return result


class Network(nn.Module):
    """A model whose rows, mask and context come from trained modules, with another behind it."""

    def __init__(self, job):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.rows, self.shift, self.all, self.after = (
                nn.Linear(jobs.WIDTH, jobs.WIDTH, dtype=job.dtype) for _ in range(4)
            )
            self.mask = nn.Linear(jobs.WIDTH, 1, dtype=job.dtype)
            config = jobs.make_model(job).config
            self.model = celmoe.HierarchicalCELMoE(config, lambda *_: Shifted(job), engine=job.engine).to(job.dtype)

    def forward(self, hidden, languages):
        whole = self.all(hidden.new_ones(7, jobs.WIDTH)).mean(0)
        context = {"shift": self.shift(hidden), "all": celmoe.Shared(whole)}
        mask = self.mask(hidden).sigmoid().squeeze(-1)
        output = self.model(self.rows(hidden), {"language": languages}, context, mask)
        output.fused_hidden = self.after(output.fused_hidden)
        return output


def objective(network, job, batch):
    """This rank's part of the joined mean."""
    output = network(batch.hidden, batch.languages)
    return joined_mean(jobs.loss_sum(job, output, batch), len(batch.languages))


def whole(tensor):
    """A copy of the whole tensor, even if this rank holds a part."""
    return jobs.whole(tensor).clone()


def seen(network):
    """Every parameter and its gradient, but for those that stand for others."""
    elsewhere = set(stand_ins(network))
    return {
        name: {"gradient": None if each.grad is None else whole(each.grad), "value": whole(each.detach())}
        for name, each in network.named_parameters()
        if each not in elsewhere
    }


def train(layout, job, shape=(2,), names=("expert",)):
    """The values on this rank after each step."""
    network = Network(job)
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=names)
    after_backward = loss_of = None
    if layout == "ddp":
        loss_of = prepare_ddp(network, lambda module, batch: objective(module, job, batch))
    elif layout == "levels":
        shard_levels(network.model, mesh)
    elif "experts" in layout:
        levels = network.model.level_modules if layout == "all experts" else None
        after_backward = shard_experts(network.model, mesh, levels=levels).reduce_gradients
    else:
        after_backward = lambda: reduce_gradients(network.model.parameters(), mesh)  # noqa: E731
    if layout != "ddp":
        for part in (network.rows, network.shift, network.all, network.mask, network.after):
            fully_shard(part, mesh=mesh)
    if layout == "levels":
        fully_shard(network, mesh=mesh)
    optimizer = jobs.OPTIMIZERS[job.optimizer](network.parameters())
    history = []
    for step in range(len(job.steps)):
        optimizer.zero_grad()
        batch = jobs.make_batches(job, step, 0)[dist.get_rank()]
        loss = objective(network, job, batch) if loss_of is None else loss_of(batch)
        loss.backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()
        history.append(seen(network))
    return history


@cache
def train_alone(optimizer, detached):
    """One process, for every layout."""
    return _train_alone(make_job(optimizer=optimizer, detached=detached))


def _train_alone(job):
    """One process on the joined batches."""
    network = Network(job)
    optimizer = jobs.OPTIMIZERS[job.optimizer](network.parameters())
    history = []
    for step in range(len(job.steps)):
        optimizer.zero_grad()
        batch = jobs.joined(jobs.make_batches(job, step, 0))
        output = network(batch.hidden, batch.languages)
        (jobs.loss_sum(job, output, batch) / max(len(batch.languages), 1)).backward()
        optimizer.step()
        history.append(seen(network))
    return history


def make_job(**options):
    return Job([[batch] for batch in BATCHES], has_context=True, **options)


TRAININGS = {"attached": ("AdamW", "looped", ()), "a level detached": ("SGD", "grouped", tuple(jobs.FAMILY_OF))}


@pytest.mark.parametrize(
    ("layout", "training"),
    slow_but(
        [
            *((layout, "attached") for layout in ("ddp", "levels", "experts")),
            *((layout, "a level detached") for layout in ("replicated", "all experts")),
        ],
        [(layout, training) for layout in LAYOUTS for training in TRAININGS],
    ),
)
def test_ranks_train_as_one_process(two, layout, training):
    optimizer, engine, detached = TRAININGS[training]
    job = make_job(optimizer=optimizer, detached=detached, engine=engine)
    histories = two.run(train, layout, job)
    for step, alone in enumerate(train_alone(optimizer, detached)):
        together = histories[0][step] | histories[1][step]
        for name in histories[0][step].keys() & histories[1][step].keys():
            assert_close(f"step {step}, {name}", histories[1][step][name], histories[0][step][name], 0.0)
        assert_close(f"step {step}", together, alone, jobs.TOLERANCE)


def exchange_all():
    """Exchange rows of many kinds at once; return the received rows beside the expected ones."""
    rank = dist.get_rank()
    found = []
    for sent in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 3)):
        for shapes in PACKED:
            # Both ranks send alike, so the rows of the other one are known.
            tensors = [_rows(sum(sent), shape, dtype, layout) for shape, dtype, layout in shapes]
            starts = (0, sent[0])
            received = transport.exchange(tensors, transport.Way(dist.group.WORLD, sent, (sent[rank],) * 2))
            mine = [tensor[starts[rank] : starts[rank] + sent[rank]] for tensor in tensors]
            found += [
                (each.dtype, tuple(each.shape), torch.equal(each, torch.cat([part, part])), tuple(part.shape[1:]))
                for each, part in zip(received, mine, strict=True)
            ]
    return found


def _rows(size, shape, dtype, layout):
    if layout == "expanded":
        return torch.ones((), dtype=dtype).expand(size, *shape)
    rows = torch.arange(size * torch.Size(shape).numel()).reshape(size, *shape).to(dtype)
    return rows if layout == "plain" else torch.stack([rows, rows], -1)[..., 0]


PLAIN, ODD, WIDE = ((4,), torch.float32, "plain"), ((3,), torch.bool, "plain"), ((2, 2), torch.float64, "plain")
PACKED = [
    [PLAIN, ODD],
    [ODD, WIDE, ODD, PLAIN],
    [((0,), torch.float64, "plain"), ODD, ((3, 0), torch.int64, "plain"), WIDE],
    [((), torch.bool, "plain"), ((), torch.float64, "plain")],
    [((1,), torch.float32, "expanded")],
    [((), torch.bfloat16, "strided"), ((2,), torch.complex128, "expanded")],
    [((0, 2), torch.float32, "expanded")],
]


def test_rows_travel_whatever_their_sizes(two):
    """A mask of three bytes a row shifts the tensors beside it, and one row or none has arbitrary strides."""
    for found in two.run(exchange_all):
        assert len(found) == 5 * sum(map(len, PACKED))
        for dtype, shape, is_equal, trailing in found:
            assert is_equal, (dtype, shape)
            assert shape[1:] == trailing


def pass_rows(rank_sizes, trailing, mask_dtype):
    """The gradients of rows and mask of a model whose experts are spread, on ranks of so many samples."""
    size = rank_sizes[dist.get_rank()]
    model = jobs.make_model(Job([], fusion="mean"))
    for experts in model.level_modules.values():
        for name in experts:
            experts[name] = Masked(torch.float64)
    shard_experts(model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)))
    hidden = torch.ones(size, *trailing, jobs.WIDTH, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(size, *trailing).to(mask_dtype).requires_grad_(mask_dtype.is_floating_point)
    # An expanded gradient, as of a sum.
    model(hidden, {"language": ["ru", "it", "de"][:size]}, mask=mask).levels["language"].hidden.sum().backward()
    return hidden.grad, mask.grad


class Masked(celmoe.ExpertModule):
    """Twice the rows that a mask leaves."""

    def __init__(self, dtype):
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 2.0, dtype=dtype))

    def forward(self, batch):
        return celmoe.ExpertResult(batch.hidden * self.scale * batch.mask.unsqueeze(-1))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("trailing", [(), (3,), (0,)], ids=str)
@pytest.mark.parametrize("sizes", [(3, 0), (0, 1), (0, 0), (1, 1), (2, 3)], ids=str)
def test_rows_and_masks_of_any_number(two, sizes, trailing, mask_dtype):
    for size, (hidden, mask) in zip(sizes, two.run(pass_rows, sizes, trailing, mask_dtype), strict=True):
        assert torch.equal(hidden, torch.full((size, *trailing, jobs.WIDTH), 8.0, dtype=torch.float64))
        if mask_dtype == torch.float32:
            assert torch.equal(mask, torch.full((size, *trailing), 24.0 * jobs.WIDTH))


def test_a_group_without_samples_beside_one_with_some(four):
    """Its modules before and after the model take part in the collectives of all ranks."""
    job = Job([[[[], [], ["ru"], []]], [[["fr"], ["it"], [], []]], [[[], [], [], []]]], has_context=True)
    histories = four.run(train_in_groups, job)
    for step, alone in enumerate(_train_alone(job)):
        together = {name: value for history in histories for name, value in history[step].items()}
        assert_close(f"step {step}", together, alone, jobs.TOLERANCE)


def train_in_groups(job):
    return train("experts", job, (2, 2), ("data", "expert"))


class Looking(celmoe.ExpertModule):
    """Looks integers up, and returns a loss."""

    def __init__(self):
        super().__init__()
        self.table, self.linear = nn.Embedding(5, 1), nn.Linear(jobs.WIDTH, jobs.WIDTH)

    def forward(self, batch):
        rows = batch.hidden
        made = self.linear(rows if rows.is_floating_point() else self.table(rows).squeeze(-1))
        return celmoe.ExpertResult(made, {"size": made.square().sum()})


def minimize_experts_losses(shard, sizes, dtype):
    """A backward pass from experts' losses alone: the dtype of the first level's rows, and the encoder's gradient."""
    size = sizes[dist.get_rank()]
    with torch.random.fork_rng():
        torch.manual_seed(6)
        model = celmoe.HierarchicalCELMoE(jobs.make_model(Job([])).config, lambda *_: Looking())
        encoder = nn.Linear(jobs.WIDTH, jobs.WIDTH)
    shard(model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)))
    hidden = torch.ones(size, jobs.WIDTH, dtype=dtype)
    output = model(encoder(hidden) if dtype.is_floating_point else hidden, {"language": ["ru", "it", "de"][:size]})
    total = celmoe.CELMoELossAPI().compute(output).total
    total.backward()
    return output.levels["universal"].hidden.dtype, total.item(), encoder.weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("sizes", [(3, 0), (0, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("shard", [shard_levels, shard_experts])
def test_experts_losses_alone(two, shard, sizes, dtype):
    for size, (found, total, gradient) in zip(
        sizes, two.run(minimize_experts_losses, shard, sizes, dtype), strict=True
    ):
        assert found == torch.float32
        assert (total > 0) >= (size > 0)
        assert (gradient is not None) == dtype.is_floating_point
        if gradient is not None:
            assert gradient.any() == (size > 0)
