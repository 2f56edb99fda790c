"""Checkpoints: written by some ranks, read by others, spread in other ways, and as one file."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import celmoe
from celmoe.distributed import (
    joined_mean,
    load_checkpoint,
    load_file,
    save_checkpoint,
    shard_experts,
    shard_levels,
    write_file,
)
from tests.distributed import jobs
from tests.distributed.jobs import Job, assert_close
from tests.distributed.test_data_parallel import STEPS
from tests.slow import slow_after

JOB = Job(STEPS[:4])
LAYOUTS = ["alone", "experts", "levels"]


def build(layout, job):
    """A model spread in one way, its optimizer, and the call between backward pass and step."""
    model = jobs.make_model(job)
    between = None
    if layout == "experts":
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("expert",))
        between = shard_experts(model, mesh).reduce_gradients
    elif layout == "levels":
        shard_levels(model, dist.init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, jobs.OPTIMIZERS[job.optimizer](model.parameters()), between


def train(layout, job, steps, read=None, write=None, *, from_file=False):
    """Take some steps, from a checkpoint and to one; return the values at the end."""
    rank, is_alone = (0, True) if layout == "alone" else (dist.get_rank(), False)
    model, optimizer, between = build(layout, job)
    extra = {}
    if read is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()  # a load that does nothing would show
        extra = (load_file if from_file else load_checkpoint)(read, model, optimizer)
    for step in steps:
        optimizer.zero_grad()
        batches = jobs.make_batches(job, step, 0)
        batch = jobs.joined(batches) if is_alone else batches[rank]
        output = model(**batch.inputs(job))
        loss = jobs.loss_sum(job, output, batch)
        (loss / len(batch.languages) if is_alone else joined_mean(loss, len(batch.languages))).backward()
        if between is not None:
            between()
        optimizer.step()
    if write is not None:
        save_checkpoint(write, model, optimizer, extra={"step": steps[-1] + 1})
    seen = {
        name: {
            "value": jobs.whole(found["value"]),
            "state": {key: jobs.whole(value) for key, value in found["state"].items()},
        }
        for name, found in jobs.seen(model, optimizer).items()
    }
    return seen, extra, optimizer.param_groups[0]["lr"]


def run(two, layout, *args, **options):
    """In the processes that the layout wants; all that they hold together."""
    results = [train(layout, *args, **options)] if layout == "alone" else two.run(_train, layout, args, options)
    together = {}
    for seen, *_ in results:
        together |= seen
    return together, results[0][1], results[0][2]


def _train(layout, args, options):
    return train(layout, *args, **options)


@pytest.mark.parametrize("optimizer", slow_after(1, ["AdamW", "SGD"]))
@pytest.mark.parametrize(("writer", "reader"), [(a, b) for a in LAYOUTS for b in LAYOUTS if (a, b) != ("alone",) * 2])
def test_training_goes_on_in_another_layout(two, tmp_path, writer, reader, optimizer):
    job = replace(JOB, optimizer=optimizer)
    run(two, writer, job, [0, 1], write=tmp_path / "checkpoint")
    if reader == "alone":
        # A single file, which any process reads.
        write_file(tmp_path / "checkpoint", tmp_path / "file.pt")
        content = torch.load(tmp_path / "file.pt", weights_only=True)
        jobs.make_model(job).load_state_dict(content["model"], strict=True)
        found, extra, _ = run(two, reader, job, [2, 3], read=tmp_path / "file.pt", from_file=True)
    else:
        found, extra, _ = run(two, reader, job, [2, 3], read=tmp_path / "checkpoint")
    assert extra == {"step": 2}
    wanted, *_ = run(two, "alone", job, [0, 1, 2, 3])
    assert_close("", found, wanted, jobs.TOLERANCE)
    # 'zh.Hant' has never been routed to.
    assert all(not found[name]["state"] for name in found if "Hant" in name)
    assert sum(bool(value["state"]) for value in found.values()) > 20


@pytest.mark.parametrize("layout", slow_after(1, ["experts", "levels"]))
def test_training_goes_on_from_two_ranks_to_four_and_to_one(two, four, tmp_path, layout):
    job = replace(JOB, steps=[STEPS[0], [[["ru"], ["de", "it"], [], ["fr"]]], STEPS[2]])
    run(two, layout, job, [0], write=tmp_path / "two")
    run(four, layout, job, [1], read=tmp_path / "two", write=tmp_path / "four")
    write_file(tmp_path / "four", tmp_path / "file.pt")
    found, extra, _ = run(two, "alone", job, [2], read=tmp_path / "file.pt", from_file=True)
    assert extra == {"step": 2}
    wanted, *_ = run(two, "alone", job, [0, 1, 2])
    assert_close("", found, wanted, jobs.TOLERANCE)


@pytest.mark.parametrize("reader", LAYOUTS)
def test_an_ordinary_state_dict(two, tmp_path, reader):
    model = jobs.make_model(JOB)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(index)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    results = [_read_file(reader, tmp_path)] if reader == "alone" else two.run(_read_file, reader, tmp_path)
    together = {}
    for seen in results:
        together |= seen
    assert_close("", together, {name: value.detach() for name, value in model.named_parameters()}, 0.0)


def _read_file(layout, folder):
    model, *_ = build(layout, JOB)
    load_file(folder / "model.pt", model)
    return {name: jobs.whole(value) for name, value in model.state_dict().items()}


def refusals(folder):
    """The errors of each rank about checkpoints that do not fit; nothing may have changed."""
    model, optimizer, _ = build("experts", JOB)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts = []
    for name in ("fewer", "more", "wider", "model"):
        try:
            load_file(folder / f"{name}.pt", model, optimizer)
        except celmoe.CheckpointError as error:
            texts.append(str(error))
    save_checkpoint(folder / "checkpoint", model)
    try:
        load_checkpoint(folder / "checkpoint", model, optimizer)
    except celmoe.CheckpointError as error:
        texts.append(str(error))
    try:
        save_checkpoint(folder / "other", model, torch.optim.SGD(jobs.make_model(JOB).parameters(), lr=0.1))
    except celmoe.CheckpointError as error:
        texts.append(str(error))
    assert_close("state", dict(model.state_dict()), before, 0.0)
    assert not optimizer.state
    return texts


def test_what_does_not_fit_is_refused_by_every_rank(two, tmp_path):
    state = jobs.make_model(JOB).state_dict()
    torch.save(state, tmp_path / "model.pt")
    torch.save({key: value for key, value in state.items() if ".ru." not in key}, tmp_path / "fewer.pt")
    torch.save(state | {"level_modules.language.xx.up.bias": torch.ones(2)}, tmp_path / "more.pt")
    torch.save(state | {"fusion.norm.bias": torch.ones(2)}, tmp_path / "wider.pt")
    first, second = two.run(refusals, tmp_path)
    assert first == second
    starts = [
        "rank 0: 'directory' or 'file' must hold a checkpoint of this model (got lacking 'level_modules.language.ru.",
        (
            "rank 0: 'directory' or 'file' must hold a checkpoint of this model (got lacking none; too many: "
            "'level_modules.language.xx.up.bias')"
        ),
        (
            "rank 0: 'directory' or 'file' must hold a checkpoint of this model (got 'fusion.norm.bias' of shape "
            "(2,), here (6,))"
        ),
        "rank 0: 'directory' or 'file' must hold a checkpoint of this model (got one without an optimizer)",
        "rank 0: 'directory' or 'file' must hold a checkpoint of this model (got one without an optimizer)",
        "rank 0: 'optimizer' must be of the model's parameters (got 65 that the model does not have)",
    ]
    assert len(first) == len(starts)
    for text, start in zip(first, starts, strict=True):
        assert text.startswith(start), text


def keeps_extras(folder):
    """Each rank's own extra, as a load returns it."""
    model, _, _ = build("experts", JOB)
    save_checkpoint(folder, model, extra={"rank": dist.get_rank()})
    return load_checkpoint(folder, model)


def test_the_first_ranks_extra_is_kept(two, tmp_path):
    assert two.run(keeps_extras, tmp_path) == [{"rank": 0}, {"rank": 0}]


def experts_named(names):
    level = celmoe.HierarchyLevelConfig("language", {name: celmoe.ExpertConfig(name) for name in names})
    config = celmoe.CELMoEConfig(jobs.WIDTH, [level])
    return celmoe.HierarchicalCELMoE(config, lambda *_: jobs.Expert(jobs.WIDTH, JOB))


def error_of_loading(file, names):
    model = experts_named(names)
    sharding = shard_experts(model, dist.init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)))
    assert sharding.owners["language"] == {name: rank for rank, name in enumerate(names)}
    with pytest.raises(celmoe.CheckpointError) as caught:
        load_file(file, model)
    return str(caught.value)


@pytest.mark.parametrize("names", [("a", "ab"), ("ab", "a")], ids=" ".join)
@pytest.mark.parametrize("unknown", ["abc.up.bias", "ab.more"])
def test_unknown_tensors_are_refused_whatever_expert_s_name_theirs_begins_with(two, tmp_path, names, unknown):
    """Each rank lacks an expert whose name theirs begins with: it may leave out that expert's tensors alone."""
    name = f"level_modules.language.{unknown}"
    torch.save(experts_named(names).state_dict() | {name: torch.ones(2)}, tmp_path / "file.pt")
    for said in two.run(error_of_loading, tmp_path / "file.pt", names):
        assert f"too many: '{name}'" in said


def test_one_file_has_an_optimizers_state_that_is_no_tensor(tmp_path):
    model, optimizer, _ = build("alone", JOB)
    first = next(model.parameters())
    optimizer.state[first] = {"momentum_buffer": torch.ones_like(first), "count": 7, "rate": 0.5, "note": None}
    save_checkpoint(tmp_path / "folder", model, optimizer)
    write_file(tmp_path / "folder", tmp_path / "file.pt")
    other, read, _ = build("alone", JOB)
    load_file(tmp_path / "file.pt", other, read)
    found = read.state[next(other.parameters())]
    assert {key: found[key] for key in ("count", "rate", "note")} == {"count": 7, "rate": 0.5, "note": None}
    assert torch.equal(found["momentum_buffer"], torch.ones_like(first))


def test_one_file_keeps_the_order_of_more_than_ten_groups(tmp_path):
    def grouped(rates):
        model, *_ = build("alone", JOB)
        groups = [{"params": [each], "lr": rate} for each, rate in zip(model.parameters(), rates, strict=False)]
        return model, torch.optim.SGD(groups)

    rates = [0.5 * place for place in range(12)]
    save_checkpoint(tmp_path / "folder", *grouped(rates))
    write_file(tmp_path / "folder", tmp_path / "file.pt")
    other, read = grouped([7.0] * 12)
    load_file(tmp_path / "file.pt", other, read)
    assert [group["lr"] for group in read.param_groups] == rates
