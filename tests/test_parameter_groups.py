"""Learning rates and other hyperparameters by expert, of stacked experts beside ordinary ones."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import celmoe
from celmoe import CheckpointError, ConfigError, InputTypeError, UnknownExpertError, optim
from celmoe.optim import load_state_by_name, state_by_name
from tests.optim_by_name import assert_same_states
from tests.stacks import MLP, WIDTH, build, by_expert, expert_of, stacked
from tests.test_optim import STEPS, WAYS, assert_same_parameters, train

PATTERNS = {
    "language/e[03]": {"lr": 0.05, "weight_decay": 0.3},
    "language/e2": {"lr": 0.0},
    "language/e1": {"lr": 0.02, "weight_decay": 0.0},
}
# By optimizer, options of all groups and of the first one.
OPTIONS = {
    "AdamW": ({}, {"betas": (0.5, 0.6), "eps": 1e-3, "amsgrad": True}),
    "Adam": ({"amsgrad": True}, {"amsgrad": False}),
    "SGD": ({"lr": 0.01, "momentum": 0.9}, {"momentum": 0.0, "weight_decay": 0.1}),
}


def patterns_of(name: str) -> dict[str, dict]:
    return PATTERNS | {"language/e[03]": PATTERNS["language/e[03]"] | OPTIONS[name][1]}


def made(name: str, patterns: dict | None = None, *, is_stacked: bool, engine: str = "looped"):
    model = build(MLP, engine if is_stacked else "looped").double()
    if is_stacked:
        celmoe.stack_experts(model)
    groups = celmoe.parameter_groups(model, patterns_of(name) if patterns is None else patterns)
    return model, getattr(optim if is_stacked else torch.optim, name)(groups, **OPTIONS[name][0])


@pytest.mark.parametrize("engine", ["looped", "grouped"])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_expert_has_the_options_of_its_group(name, engine):
    plain, theirs = made(name, is_stacked=False)
    model, ours = made(name, is_stacked=True, engine=engine)
    before = expert_of(model, "e2").up.weight.clone()
    schedulers = [torch.optim.lr_scheduler.StepLR(each, 3, 0.5) for each in (theirs, ours)]
    for step in range(STEPS):
        train(plain, theirs, range(step, step + 1), torch.float64)
        train(model, ours, range(step, step + 1), torch.float64)
        for scheduler in schedulers:
            scheduler.step()
    assert_same_parameters(plain, model, torch.float64)
    if name != "SGD":
        assert torch.equal(before, expert_of(model, "e2").up.weight)
    assert_same_states(state_by_name(model, ours), state_by_name(plain, theirs))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_train_in_groups(way, name):
    plain, theirs = made(name, is_stacked=False)
    model, ours = made(name, is_stacked=True)
    way(plain, theirs)
    way(model, ours)
    assert_same_parameters(plain, model, torch.float64)


def test_a_stack_is_in_the_parameters_of_one_group():
    model, ours = made("AdamW", is_stacked=True)
    everything = [each for group in ours.param_groups for each in group["params"]]
    assert len({*map(id, everything)}) == len(everything)
    assert {*map(id, everything)} == {*map(id, model.parameters())}
    assert [len(group["params"]) for group in ours.param_groups[1:3]] == [0, 0]


def test_experts_in_no_group_are_not_stepped():
    plain, model = build(MLP, "looped").double(), build(MLP, "looped").double()
    celmoe.stack_experts(model)
    pair = []
    for each, kind in ((plain, torch.optim.AdamW), (model, optim.AdamW)):
        optimizer = kind(expert_of(each, "e0").parameters(), lr=0.01)
        optimizer.add_param_group({"params": list(expert_of(each, "e3").parameters()), "lr": 0.02})
        train(each, optimizer, range(4), torch.float64)
        # Groups may come later.
        optimizer.add_param_group({"params": list(expert_of(each, "e1").parameters()), "lr": 0.03})
        train(each, optimizer, range(4, 8), torch.float64)
        pair.append(optimizer)
    assert_same_parameters(plain, model, torch.float64)
    assert_same_states(state_by_name(model, pair[1]), state_by_name(plain, pair[0]))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("is_stepped", ["both", "one"])
def test_experts_of_one_stack_in_two_optimizers(is_stepped, set_to_none):
    """Each clears its own experts' gradients only."""
    plain, model = build(MLP, "looped").double(), build(MLP, "looped").double()
    celmoe.stack_experts(model)
    for each, kinds in ((plain, (torch.optim.AdamW, torch.optim.SGD)), (model, (optim.AdamW, optim.SGD))):
        often = kinds[0]([{"params": expert_of(each, name).parameters()} for name in ("e0", "e2")], lr=0.01)
        seldom = kinds[1]([{"params": expert_of(each, name).parameters()} for name in ("e1", "e3")], lr=0.01)
        for step in range(9):
            often.zero_grad(set_to_none)
            if step % 3 == 0:
                seldom.zero_grad(set_to_none)
            hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step)).double()
            routes = [f"e{step % 3}", "e1", f"e{step % 4}"]
            each(hidden, {"language": routes}).fused_hidden.square().sum().backward()
            often.step()
            if step % 3 == 2 and is_stepped == "both":
                seldom.step()
    assert_same_parameters(plain, model, torch.float64)
    for name, tensor in by_expert(plain).items():
        if tensor.grad is not None and name.split(".")[0] in ("e0", "e1", "e2", "e3"):
            torch.testing.assert_close(by_expert(model)[name].grad, tensor.grad)


def test_a_single_tensor_is_a_group():
    plain, model = build(MLP, "looped").double(), build(MLP, "looped").double()
    celmoe.stack_experts(model)
    for each, kind in ((plain, torch.optim.SGD), (model, optim.SGD)):
        optimizer = kind([{"params": expert_of(each, "e0").up.weight}], lr=0.5)
        train(each, optimizer, range(4), torch.float64)
    assert_same_parameters(plain, model, torch.float64)


def _whole(model, optimizer):
    optimizer.add_param_group({"params": list(model.level_modules.parameters())})


TWICE = {
    "the same expert": lambda model, optimizer: optimizer.add_param_group(
        {"params": list(expert_of(model, "e0").parameters())}
    ),
    "one tensor of it": lambda model, optimizer: optimizer.add_param_group(
        {"params": [expert_of(model, "e1").up.bias, expert_of(model, "e0").up.bias]}
    ),
    "the whole stack": _whole,
    "an expert twice": lambda model, optimizer: optimizer.add_param_group(
        {"params": [expert_of(model, "e1").up.bias, expert_of(model, "e1").up.bias]}
    ),
    "a view beside its stack": lambda model, _: optim.SGD(
        [*model.level_modules.parameters(), expert_of(model, "e0").up.bias], lr=0.1
    ),
}


@pytest.mark.parametrize("attempt", TWICE)
def test_a_second_group_is_refused_and_changes_nothing(attempt):
    model = stacked()
    optimizer = optim.AdamW(expert_of(model, "e0").parameters())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="in more than one"):
        TWICE[attempt](model, optimizer)
    assert optimizer.state_dict() == before


def test_an_expert_of_a_stack_that_is_in_a_group_is_refused():
    model = stacked()
    optimizer = optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match="in one parameter group only"):
        optimizer.add_param_group({"params": [expert_of(model, "e0").up.bias]})


def test_names_of_views_are_refused():
    model = stacked()
    with pytest.raises(ConfigError, match="without names"):
        optim.AdamW(expert_of(model, "e0").named_parameters())


@pytest.mark.parametrize("is_read_without_gradients", [True, False])
def test_pytorchs_optimizers_refuse_views(is_read_without_gradients):
    model = stacked()
    with torch.set_grad_enabled(not is_read_without_gradients):
        views = list(expert_of(model, "e0").parameters())
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
            kind(views, lr=0.1)


def test_what_is_no_group_is_refused_as_by_pytorch():
    model = stacked()
    optimizer = optim.AdamW(model.parameters())
    for wrong in ([], {"params": {torch.zeros(1)}}):
        with pytest.raises(TypeError):
            optimizer.add_param_group(wrong)
    with pytest.raises(KeyError):
        optimizer.add_param_group({"lr": 1.0})


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state)), _saved])
def test_the_state_of_groups_is_saved_and_loaded(way, name):
    model, optimizer = made(name, is_stacked=True)
    train(model, optimizer, range(4), torch.float64)
    twin = copy.deepcopy(model)
    defaults = {pattern: {} for pattern in PATTERNS}
    again = getattr(optim, name)(celmoe.parameter_groups(twin, defaults), **OPTIONS[name][0])
    again.load_state_dict(way(optimizer.state_dict()))
    train(model, optimizer, range(4, 8), torch.float64)
    train(twin, again, range(4, 8), torch.float64)
    assert_same_parameters(model, twin, torch.float64)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_model_and_its_groups_are_copied_together(way):
    model, optimizer = made("AdamW", is_stacked=True)
    train(model, optimizer, range(4), torch.float64)
    twin, again = way((model, optimizer))
    train(model, optimizer, range(4, 8), torch.float64)
    train(twin, again, range(4, 8), torch.float64)
    assert_same_parameters(model, twin, torch.float64)


def test_a_state_of_other_groups_is_refused():
    model, optimizer = made("AdamW", is_stacked=True)
    train(model, optimizer, range(4), torch.float64)
    other = optim.AdamW(celmoe.parameter_groups(model, {**PATTERNS, "language/e2": {}, "language/e1": {}}))
    other.load_state_dict(optimizer.state_dict())
    moved = {"language/e[02]": {}, "language/e3": {}, "language/e1": {}}
    other = optim.AdamW(celmoe.parameter_groups(model, moved))
    with pytest.raises(CheckpointError, match="the same experts as the optimizer's"):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(CheckpointError, match="groups of the same parameters"):
        load_state_by_name(model, other, state_by_name(model, optimizer))
    assert not other.state


@pytest.mark.parametrize("name", OPTIONS)
def test_a_state_of_groups_goes_to_a_stack_and_back(name):
    never, theirs = made(name, is_stacked=False)
    train(never, theirs, range(5), torch.float64)
    model, ours = made(name, is_stacked=True)
    model.load_state_dict(never.state_dict())
    load_state_by_name(model, ours, state_by_name(never, theirs))
    assert_same_states(state_by_name(model, ours), state_by_name(never, theirs), 0.0)
    train(never, theirs, range(5, 10), torch.float64)
    train(model, ours, range(5, 10), torch.float64)
    assert_same_parameters(never, model, torch.float64)
    again, back = made(name, is_stacked=False)
    load_state_by_name(again, back, state_by_name(model, ours))
    assert_same_states(state_by_name(again, back), state_by_name(never, theirs))


def names_in(groups, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        sorted({names[id(each)].split(".")[2] for each in group["params"] if id(each) in names}) for group in groups
    ]


def test_the_first_pattern_has_an_expert():
    model = build()
    groups = celmoe.parameter_groups(model, {"language/e1": {"lr": 1.0}, "*/e[1-3]": {"lr": 2.0}})
    assert names_in(groups[:2], model) == [["e1"], ["e2", "e3"]]
    assert [group.get("lr") for group in groups] == [1.0, 2.0, None]
    given = [each for group in groups for each in group["params"]]
    assert {*map(id, given)} == {*map(id, model.parameters())}
    assert len(given) == len({*map(id, given)})


def test_no_pattern_is_one_group_of_all():
    for model in (build(), stacked()):
        (group,) = celmoe.parameter_groups(model, {})
        assert [*map(id, group["params"])] == [*map(id, model.parameters())]


def test_a_whole_stack_in_one_group_is_for_any_optimizer():
    model = stacked()
    groups = celmoe.parameter_groups(model, {"language/*": {"lr": 0.5}})
    assert {*map(id, groups[0]["params"])} == {*map(id, model.level_modules.parameters())}
    torch.optim.AdamW(groups)


def test_a_shared_parameter_is_in_the_first_group_that_has_it():
    model = build()
    expert_of(model, "e1").up = expert_of(model, "e4").up
    groups = celmoe.parameter_groups(model, {"language/e4": {}, "language/e1": {}})
    ids = [{*map(id, group["params"])} for group in groups]
    assert id(expert_of(model, "e1").up.weight) in ids[0]
    assert not ids[0] & ids[1]
    torch.optim.AdamW(groups)


WRONG = {
    "nobody": (
        lambda model: celmoe.parameter_groups(model, {"language/x*": {}}),
        UnknownExpertError,
        "nearest: 'language/e",
    ),
    "a slip": (
        lambda model: celmoe.parameter_groups(model, {"langage/e1": {}}),
        UnknownExpertError,
        "nearest: 'language/e",
    ),
    "another case": (
        lambda model: celmoe.parameter_groups(model, {"language/E1": {}}),
        UnknownExpertError,
        "nearest: ",
    ),
    "hidden": (
        lambda model: celmoe.parameter_groups(model, {"language/*": {}, "language/e1": {}}),
        ConfigError,
        "'language/e1' after patterns that match all its experts; put it before them",
    ),
    "parameters": (
        lambda model: celmoe.parameter_groups(model, {"language/*": {"params": []}}),
        ConfigError,
        "without 'params'",
    ),
    "no model": (lambda model: celmoe.parameter_groups(model.fusion, {}), InputTypeError, "HierarchicalCELMoE"),
    "no mapping": (lambda model: celmoe.parameter_groups(model, ["language/*"]), InputTypeError, "must map patterns"),
    "no options": (
        lambda model: celmoe.parameter_groups(model, {"language/*": 0.1}),
        InputTypeError,
        "must map patterns",
    ),
    "no pattern": (lambda model: celmoe.parameter_groups(model, {1: {}}), InputTypeError, "must be a string"),
}


@pytest.mark.parametrize("attempt", WRONG)
def test_wrong_patterns_are_refused(attempt):
    call, error, words = WRONG[attempt]
    for model in (build(), stacked()):
        with pytest.raises(error, match=words):
            call(model)
