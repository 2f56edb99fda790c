"""Loading an optimizer's state by name: refusals, groups, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import celmoe
from celmoe import (
    CELMoEConfig,
    CheckpointError,
    ExpertConfig,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    InputTypeError,
    optim,
)
from celmoe.optim import load_state_by_name, state_by_name
from tests.optim_by_name import UP, assert_same_states, made
from tests.stacks import MLP, NAMES, WIDTH, build
from tests.test_optim import OPTIONS, assert_same_parameters, train


def _without(state, name):
    state["state"].pop(name, None)
    for group in state["param_groups"]:
        group["params"].remove(name)


def _renamed(state):
    _without(state, UP.format("e0"))
    state["param_groups"][0]["params"].append(UP.format("e9"))


def _of_wrong_shape(state):
    state["state"][UP.format("e1")]["exp_avg"] = torch.zeros(3, 3)


def _of_few_axes(state):
    state["state"][UP.format("e1")]["exp_avg"] = torch.zeros(5)


def _split(state):
    group = state["param_groups"][0]
    state["param_groups"] = [{**group, "params": group["params"][:3]}, {**group, "params": group["params"][3:]}]


FAULTS = {
    "a missing name": (
        lambda state: _without(state, UP.format("e1")),
        CheckpointError,
        r"got none of '.*e1\.up\.weight'",
    ),
    "another name": (_renamed, CheckpointError, r"got none of '.*e0\.up\.weight'; nearest: "),
    "an unknown name": (
        lambda state: state["param_groups"][0]["params"].append("level_modules.language.e9.up.weight"),
        CheckpointError,
        r"parameters only \(got '.*e9\.up\.weight'; nearest: ",
    ),
    "an unknown state": (
        lambda state: state["state"].update({"other": {"step": torch.ones(())}}),
        CheckpointError,
        "parameters only",
    ),
    "a name twice": (
        lambda state: state["param_groups"][0]["params"].append(UP.format("e1")),
        CheckpointError,
        "more than once",
    ),
    "a wrong shape": (
        _of_wrong_shape,
        CheckpointError,
        r"'exp_avg' of '.*e1\.up\.weight' .*, \(16, 8\) \(got .*\(3, 3\)",
    ),
    "few axes": (_of_few_axes, CheckpointError, r"'exp_avg' of '.*e1\.up\.weight'"),
    "other groups": (_split, CheckpointError, "groups of the same parameters"),
    "an empty group more": (
        lambda state: state["param_groups"].append({"params": []}),
        CheckpointError,
        r"1 groups, like the optimizer \(got 2\)",
    ),
    "another optimizer's": (
        lambda state: state["param_groups"][0].pop("betas"),
        CheckpointError,
        "got no 'betas' for its group 0",
    ),
    "by position": (lambda state: state["param_groups"][0].update(params=[0, 1]), InputTypeError, "got another form"),
    "no groups": (lambda state: state.pop("param_groups"), InputTypeError, "got another form"),
    "no steps": (
        lambda state: [own.pop("step") for own in state["state"].values()],
        CheckpointError,
        "must have the 'step'",
    ),
    "other entries": (
        lambda state: state["state"][UP.format("e1")].pop("exp_avg"),
        CheckpointError,
        "the same entries for all experts",
    ),
}


# PyTorch's optimizers take any entries.
REFUSALS = [(fault, True) for fault in FAULTS]
REFUSALS += [(fault, False) for fault in FAULTS if fault not in ("no steps", "other entries")]


@pytest.mark.parametrize(("fault", "is_stacked"), REFUSALS)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(fault, is_stacked):
    change, error, words = FAULTS[fault]
    model, optimizer = made("AdamW", {}, is_stacked=is_stacked)
    train(model, optimizer, range(5), torch.float64)
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(state_by_name(model, optimizer))
    state["param_groups"][0]["lr"] = 5.0
    change(state)
    with pytest.raises(error, match=words):
        load_state_by_name(model, optimizer, state)
    assert_same_positional(optimizer.state_dict(), before)


def assert_same_positional(found: dict, expected: dict) -> None:
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for number, own in expected["state"].items():
        assert all(torch.equal(found["state"][number][key], value) for key, value in own.items())


def test_wrong_kinds_are_refused():
    model, optimizer = made("AdamW", {}, is_stacked=True)
    with pytest.raises(InputTypeError, match="'model' must be"):
        state_by_name(optimizer, optimizer)
    with pytest.raises(InputTypeError, match="'optimizer' must be"):
        state_by_name(model, model)
    with pytest.raises(CheckpointError, match=r"of the model's parameters \(got \d+ that the model does not have"):
        state_by_name(build(MLP), optimizer)


def test_groups_are_found_by_their_names():
    plain, model = build(MLP, "looped").double(), build(MLP, "looped").double()
    celmoe.stack_experts(model)
    # The fusion has no parameters: two groups of the same experts' tensors.
    states = []
    for each, kind in ((plain, torch.optim.AdamW), (model, optim.AdamW)):
        norms = [tensor for name, tensor in each.named_parameters() if "norm" in name]
        rest = [tensor for name, tensor in each.named_parameters() if "norm" not in name]
        optimizer = kind([{"params": norms, "lr": 0.5}, {"params": rest, "lr": 0.25}])
        train(each, optimizer, range(4), torch.float64)
        states.append(state_by_name(each, optimizer))
        again = kind([{"params": rest}, {"params": norms}])
        load_state_by_name(each, again, states[-1])
        assert [group["lr"] for group in again.param_groups] == [0.25, 0.5]
        assert {frozenset(group["params"]) for group in state_by_name(each, again)["param_groups"]} == {
            frozenset(group["params"]) for group in states[-1]["param_groups"]
        }
    assert_same_states(states[1], states[0])


def test_the_means_of_computing_stay_the_optimizers_own():
    plain, theirs = made("AdamW", {"foreach": True}, is_stacked=False)
    train(plain, theirs, range(2), torch.float64)
    model, ours = made("AdamW", {"fused": True}, is_stacked=True)
    load_state_by_name(model, ours, state_by_name(plain, theirs) | {})
    assert ours.param_groups[0]["fused"] is True
    assert ours.param_groups[0]["foreach"] is None


def test_a_loaded_state_has_memory_of_its_own():
    model, optimizer = made("AdamW", {}, is_stacked=False)
    train(model, optimizer, range(3), torch.float64)
    twin = copy.deepcopy(model)
    again = torch.optim.AdamW(twin.parameters())
    state = state_by_name(model, optimizer)
    load_state_by_name(twin, again, state)
    kept = copy.deepcopy(state)
    train(twin, again, range(3, 6), torch.float64)
    assert_same_states(state_by_name(model, optimizer), kept, 0.0)


@pytest.mark.parametrize("is_stacked", [True, False])
def test_a_loaded_state_holds_no_more_memory_than_it_needs(is_stacked):
    """A copy of a view may keep the whole stack that it was of."""
    model, optimizer = made("AdamW", {}, is_stacked=True)
    train(model, optimizer, range(6), torch.float64)
    goal, again = made("AdamW", {}, is_stacked=is_stacked)
    load_state_by_name(goal, again, state_by_name(model, optimizer))
    for parameter, own in again.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert own[key].untyped_storage().nbytes() == parameter.untyped_storage().nbytes()


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda state: pickle.loads(pickle.dumps(state)), "torch.save": _saved}


@pytest.mark.parametrize("by", ["name", "position"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_states_are_copied_and_saved(way, name, by):
    options = OPTIONS[name][1]
    model, optimizer = made(name, options, is_stacked=True)
    train(model, optimizer, range(4), torch.float64)
    twin = copy.deepcopy(model)
    again = getattr(optim, name)(twin.parameters(), **options)
    if by == "name":
        load_state_by_name(twin, again, WAYS[way](state_by_name(model, optimizer)))
    else:
        again.load_state_dict(WAYS[way](optimizer.state_dict()))
    train(model, optimizer, range(4, 8), torch.float64)
    train(twin, again, range(4, 8), torch.float64)
    assert_same_parameters(model, twin, torch.float64)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_model_and_its_optimizer_are_copied_together(way):
    model, optimizer = made("AdamW", {}, is_stacked=True)
    train(model, optimizer, range(4), torch.float64)
    twin, again = way((model, optimizer))
    train(model, optimizer, range(4, 8), torch.float64)
    train(twin, again, range(4, 8), torch.float64)
    assert_same_parameters(model, twin, torch.float64)
    assert_same_states(state_by_name(twin, again), state_by_name(model, optimizer), 0.0)


def test_names_of_a_hierarchy_with_odd_names_are_those_of_ordinary_experts():
    def hierarchy(is_stacked):
        torch.manual_seed(0)
        levels = [
            HierarchyLevelConfig("family", {name: ExpertConfig(name) for name in ("to", "a.b")}),
            HierarchyLevelConfig("language", {name: ExpertConfig(name) for name in NAMES}),
        ]
        model = HierarchicalCELMoE(CELMoEConfig(WIDTH, levels), lambda *_: MLP(), engine="looped")
        if is_stacked:
            celmoe.stack_experts(model)
        around = nn.ModuleDict({"first": nn.Linear(2, 2), "moe": model})
        optimizer = optim.AdamW(around.parameters())
        for parameter in around.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return state_by_name(around, optimizer)

    plain, stacked = hierarchy(is_stacked=False), hierarchy(is_stacked=True)
    assert sorted(plain["param_groups"][0]["params"]) == sorted(stacked["param_groups"][0]["params"])
    assert_same_states(stacked, plain)
