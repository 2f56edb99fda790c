"""A checkpoint keeps of an optimizer: state by name, on the right device, and hyperparameters."""

import json

import pytest
import torch
import torch.distributed as dist
from torch import nn

import celmoe
from celmoe.distributed import load_checkpoint, load_file, save_checkpoint, write_file
from celmoe.distributed.checkpoints import optimizer_state
from celmoe.distributed.checkpoints.manifest import read_manifest
from celmoe.distributed.checkpoints.pieces import opened
from celmoe.distributed.checkpoints.staging import stage
from celmoe.distributed.remote import stand_ins
from tests.distributed import jobs
from tests.distributed.jobs import Job, assert_close
from tests.distributed.test_checkpoints import build
from tests.distributed.test_data_parallel import STEPS

JOB = Job(STEPS[:1])
CPU, META = torch.device("cpu"), torch.device("meta")


def model_and(make, skip=()):
    """A model, and an optimizer that has stepped, but for some experts."""
    model = jobs.make_model(JOB)
    optimizer = make(model.parameters())
    for place, (name, parameter) in enumerate(model.named_parameters()):
        if not any(each in name for each in skip):
            parameter.grad = torch.full_like(parameter, 0.1 * (place + 1))
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def fresh(make):
    model = jobs.make_model(JOB)
    return model, make(model.parameters())


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, amsgrad=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "NAdam": torch.optim.NAdam,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
    "Adafactor": torch.optim.Adafactor,
    "SGD without momentum": torch.optim.SGD,
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, centered=True, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("way", ["directory", "file"])
def test_steps_go_on_as_if_nothing_had_happened(tmp_path, name, way):
    make = OPTIMIZERS[name]
    model, optimizer = model_and(make, skip=["Hant"])
    save_checkpoint(tmp_path / "checkpoint", model, optimizer)
    other, read = fresh(make)
    if way == "directory":
        load_checkpoint(tmp_path / "checkpoint", other, read)
    else:
        write_file(tmp_path / "checkpoint", tmp_path / "file.pt")
        load_file(tmp_path / "file.pt", other, read)
    assert_close("", jobs.seen(other, read), jobs.seen(model, optimizer), 0.0)
    for one, two in ((model, optimizer), (other, read)):
        for parameter in one.parameters():
            parameter.grad = torch.ones_like(parameter)
        two.step()
    assert_close("", jobs.seen(other, read), jobs.seen(model, optimizer), 0.0)


def land(folder, make, device, **changed):
    """The state that a load would give parameters of a device, which need not hold values."""
    model, optimizer = fresh(make)
    model.to(device)
    optimizer.param_groups[0].update(changed)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    content = read_manifest(folder)
    with opened(folder / content.generation) as reader:
        wanted = optimizer_state.targets(model, optimizer, content)
        staged = stage(wanted, content.tensors, lambda _, piece, into: reader.read(piece, into))
    found = optimizer_state.prepared(model, optimizer, content, staged)
    assert len(found) == len(list(model.parameters()))
    return {
        key: {(state[key].device, state[key].dtype) for state in found.values()} for key in next(iter(found.values()))
    }


@pytest.mark.parametrize("changed", [{"capturable": True}, {"fused": True}])
def test_a_step_that_is_read_on_the_device_lands_there(tmp_path, changed):
    # Under another default dtype a step is counted in that.
    torch.set_default_dtype(torch.float64)
    try:
        model, optimizer = model_and(torch.optim.AdamW)
    finally:
        torch.set_default_dtype(torch.float32)
    save_checkpoint(tmp_path, model, optimizer)
    assert land(tmp_path, torch.optim.AdamW, META, **changed) == {
        "exp_avg": {(META, torch.float64)},
        "exp_avg_sq": {(META, torch.float64)},
        "step": {(META, torch.float32)},
    }


def test_a_step_that_is_read_on_the_host_stays_there(tmp_path):
    save_checkpoint(tmp_path, *model_and(torch.optim.AdamW))
    assert land(tmp_path, torch.optim.AdamW, META)["step"] == {(CPU, torch.float32)}


@pytest.mark.parametrize(
    ("make", "keys"), [(torch.optim.NAdam, ["mu_product"]), (torch.optim.ASGD, ["eta", "mu", "ax"])]
)
def test_other_state_without_dimensions_lands_on_the_device(tmp_path, make, keys):
    save_checkpoint(tmp_path, *model_and(make))
    found = land(tmp_path, make, META)
    for key in keys:
        assert {device for device, _ in found[key]} == {META}


def test_state_is_in_the_dtype_in_which_it_was_saved(tmp_path):
    """An optimizer may keep more digits than its parameters have."""
    model, optimizer = model_and(torch.optim.AdamW)
    model.bfloat16()
    save_checkpoint(tmp_path, model, optimizer)
    other, read = fresh(torch.optim.AdamW)
    load_checkpoint(tmp_path, other.bfloat16(), read)
    assert {state["exp_avg"].dtype for state in read.state.values()} == {torch.float64}


def test_state_has_the_strides_of_its_parameter(tmp_path):
    def network():
        return nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)

    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, model, optimizer)
    other = network()
    read = torch.optim.AdamW(other.parameters())
    load_checkpoint(tmp_path, other, read)
    for parameter, wanted in zip(other.parameters(), model.parameters(), strict=True):
        state, saved = read.state[parameter]["exp_avg"], optimizer.state[wanted]["exp_avg"]
        assert state.stride() == saved.stride() == parameter.stride()
        assert torch.equal(state, saved)


def test_hyperparameters_come_back_as_what_they_are(tmp_path):
    model, optimizer = model_and(lambda parameters: torch.optim.AdamW(parameters, lr=0.25, betas=(0.5, 0.75)))
    optimizer.param_groups[0]["initial_lr"] = 0.5
    save_checkpoint(tmp_path, model, optimizer)
    lr = torch.tensor(0.1)
    other, read = fresh(lambda parameters: torch.optim.AdamW(parameters, lr=lr, fused=True))
    group = read.param_groups[0]
    load_checkpoint(tmp_path, other, read)
    assert read.param_groups[0] is group
    # A captured graph reads the tensor that it saw.
    assert group["lr"] is lr
    assert lr.item() == 0.25
    assert group["betas"] == (0.5, 0.75)
    assert group["initial_lr"] == 0.5
    assert group["params"] == list(other.parameters())


def test_what_json_has_not_is_refused(tmp_path):
    model, optimizer = model_and(torch.optim.SGD)
    parameter, extra = next(model.parameters()), {}
    cases = [
        (lambda: extra.update(a={1}), "'extra'"),
        (lambda: extra.update(a=torch.ones(2)), "'extra'"),
        (lambda: optimizer.param_groups[0].update(rule=print), "hyperparameter 'rule' of the optimizer's group 0"),
        (lambda: optimizer.param_groups[0].update(rule=torch.ones(2)), "hyperparameter 'rule'"),
        (lambda: optimizer.state[parameter].update(old=[torch.ones(2)]), "the optimizer's state 'old' of 'level_modul"),
    ]
    for act, start in cases:
        act()
        with pytest.raises(celmoe.CheckpointError, match="must be made of numbers, strings, None, lists") as caught:
            save_checkpoint(tmp_path, model, optimizer, extra=extra)
        assert str(caught.value).startswith(start)
        extra.clear()
        optimizer.param_groups[0].pop("rule", None)
        optimizer.state[parameter].pop("old", None)
    assert not list(tmp_path.iterdir())


class Counting(jobs.Expert):
    def get_extra_state(self):
        return {"seen": 3}


def test_module_state_that_is_no_tensor_is_refused(tmp_path):
    model = jobs.make_model(JOB)
    model.level_modules["language"]["ru"].__class__ = Counting
    with pytest.raises(celmoe.CheckpointError) as caught:
        save_checkpoint(tmp_path, model)
    assert str(caught.value) == (
        "'model' must have a state_dict of tensors (got dict as 'level_modules.language.ru._extra_state'). Keep such "
        "state in 'extra'"
    )


def with_remote_parameters(folder):
    """Parameters of experts that are elsewhere stand for gradients there: neither saved nor missed, nor loaded."""
    model, _, _ = build("experts", JOB)
    elsewhere = list(stand_ins(model))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_checkpoint(folder, model, optimizer)
    before = jobs.seen(model, optimizer)
    kept = [optimizer.state[each] for each in elsewhere]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_checkpoint(folder, model, optimizer)
    assert_close("", jobs.seen(model, optimizer), before, 0.0)
    assert all(optimizer.state[each] is state for each, state in zip(elsewhere, kept, strict=True))
    return len(elsewhere), dist.get_rank()


def test_parameters_of_experts_elsewhere_are_left_out(two, tmp_path):
    found = two.run(with_remote_parameters, tmp_path)
    assert all(count > 3 for count, _ in found)
    manifest = (tmp_path / "checkpoint.json").read_bytes().splitlines()[1]
    assert not [entry for entry in json.loads(manifest)["tensors"] if "elsewhere" in entry[0][1]]
    model, optimizer, _ = build("alone", JOB)
    load_checkpoint(tmp_path, model, optimizer)


def notes_of(model, optimizer):
    """The state of every parameter that a checkpoint has, by name."""
    names = model.state_dict().keys()
    return {name: dict(optimizer.state[each]) for name, each in model.named_parameters() if name in names}


def save_notes(folder):
    """Save state that is no tensor, another for every parameter; return the state after loading."""
    model, optimizer, _ = build("experts", JOB)
    for name, state in notes_of(model, optimizer).items():
        optimizer.state[model.get_parameter(name)] = {"note": name, **state}
    save_checkpoint(folder, model, optimizer)
    other, read, _ = build("experts", JOB)
    load_checkpoint(folder, other, read)
    return notes_of(other, read)


def test_state_that_is_no_tensor_is_kept_of_the_experts_of_all_ranks(two, tmp_path):
    first, second = two.run(save_notes, tmp_path)
    assert first.keys() != second.keys()
    model, optimizer, _ = build("alone", JOB)
    load_checkpoint(tmp_path, model, optimizer)
    wanted = {name: {"note": name} for name, _ in model.named_parameters()}
    assert first | second == notes_of(model, optimizer) == wanted


@pytest.mark.parametrize("way", ["directory", "file"])
def test_an_optimizer_that_has_stepped_keeps_nothing_of_its_own(tmp_path, way):
    """Experts that had no state when a checkpoint was saved have none after loading it."""
    model, optimizer, _ = build("alone", JOB)
    parameters = list(model.parameters())
    for parameter in parameters[::2]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_checkpoint(tmp_path / "folder", model, optimizer)
    write_file(tmp_path / "folder", tmp_path / "file.pt")
    other, stepped, _ = build("alone", JOB)
    for parameter in other.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    stepped.step()
    if way == "directory":
        load_checkpoint(tmp_path / "folder", other, stepped)
    else:
        load_file(tmp_path / "file.pt", other, stepped)
    found = [stepped.state.get(parameter) for parameter in other.parameters()]
    assert not any(found[1::2])
    for state, parameter in zip(found[::2], parameters[::2], strict=True):
        assert_close("state", state, optimizer.state[parameter], 0.0)
