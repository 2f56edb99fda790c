"""Stand-ins for experts on other ranks: norms and optimizers see what one process sees; no state holds them."""

import pytest
import torch
import torch.distributed as dist

import celmoe
from celmoe.distributed import RemoteExpert, shard_experts
from celmoe.distributed.remote import stand_ins
from tests.distributed import jobs
from tests.distributed.jobs import Job
from tests.distributed.test_decisions import ALL, LANGUAGE


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
