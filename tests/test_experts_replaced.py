"""Members of a stack that other modules have replaced, and stacks that are made or taken apart between two passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import celmoe
from celmoe import ExpertConfig, HierarchicalCELMoE
from celmoe.distributed import load_checkpoint, save_checkpoint
from celmoe.optim import load_state_by_name, state_by_name
from tests.lifecycle import WIDTH, Wide, build

# The wide experts of `build` are one stack: "ru", "uk", "it" and "fi".
MEMBERS = ("fi", "it", "ru", "uk")


def backward(model: HierarchicalCELMoE, names: list[str]) -> None:
    hidden = torch.ones(len(names), WIDTH, dtype=torch.float64).cumsum(0)
    model(hidden, {"language": names}).fused_hidden.square().sum().backward()


def trained(*replaced: str, seed: int = 0) -> tuple[HierarchicalCELMoE, torch.optim.Optimizer]:
    """A model with stacks, some members of which were replaced, and an optimizer that was made afterwards."""
    model = build(is_stacked=True, seed=seed)
    for name in replaced:
        model.level_modules["language"][name] = Wide().double()
    optimizer = celmoe.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for names in (["ru", "pl", "uk"], ["it", "fi", "ru"]):
        model.zero_grad()
        backward(model, names)
        optimizer.step()
    return model, optimizer


def values_of(model: HierarchicalCELMoE, name: str) -> dict[str, torch.Tensor]:
    return {key: each.clone() for key, each in model.level_modules["language"][name].state_dict().items()}


def assert_close(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-12)


CHANGES = {
    "rename": lambda m, o: m.rename_expert("language", "uk", "ua", optimizer=o),
    "remove": lambda m, o: m.remove_expert("language", "uk", optimizer=o),
    "add": lambda m, o: m.add_expert("language", "sk", ExpertConfig("sk"), warm_start="it", optimizer=o),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("replaced", [["ru"], ["ru", "fi"], ["fi", "it", "ru"]])
def test_changes_beside_a_replaced_member_leave_it_as_it_is(replaced, change):
    if change == "add" and "it" in replaced:
        replaced = replaced[:1]
    model, optimizer = trained(*replaced)
    twin, other = trained(*replaced)
    CHANGES[change](model, optimizer)
    held = [id(each) for group in optimizer.param_groups for each in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == set(map(id, model.parameters()))
    for each, own in ((model, optimizer), (twin, other)):
        each.zero_grad()
        backward(each, ["ru", "fi", "it"])
        own.step()
    for name in ("ru", "fi", "it"):
        assert_close(values_of(model, name), values_of(twin, name))
    states = [state_by_name(each, own)["state"] for each, own in ((model, optimizer), (twin, other))]
    for name in replaced:
        key = f"level_modules.language.{name}.up.weight"
        assert_close(states[0][key], states[1][key])


@pytest.mark.parametrize("change", CHANGES)
def test_a_replaced_member_that_no_optimizer_has_stays_outside(change):
    model = build(is_stacked=True)
    own = list(model.parameters())
    model.level_modules["language"]["ru"] = Wide().double()
    optimizer = celmoe.optim.SGD(own, lr=0.01, momentum=0.9)
    backward(model, ["ru", "it"])
    optimizer.step()
    before = values_of(model, "ru")
    CHANGES[change](model, optimizer)
    optimizer.step()
    assert_close(values_of(model, "ru"), before)
    inside = {id(each) for each in model.level_modules["language"]["ru"].parameters()}
    assert inside.isdisjoint(id(each) for group in optimizer.param_groups for each in group["params"])


def test_the_group_of_a_replaced_member_tells_nothing_of_the_stack():
    model = build(is_stacked=True)
    model.level_modules["language"]["ru"] = Wide().double()
    new = list(model.level_modules["language"]["ru"].parameters())
    others = [each for each in model.parameters() if all(each is not one for one in new)]
    optimizer = celmoe.optim.AdamW([{"params": others}, {"params": new, "lr": 0.5}], lr=0.01)
    model.add_expert("language", "sk", ExpertConfig("sk"), optimizer=optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(others), len(new)]


@pytest.mark.parametrize("make", [celmoe.optim.AdamW, celmoe.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("is_one", [True, False])
def test_a_source_outside_of_the_stack_tells_the_group(make, is_one):
    model = build(is_stacked=True)
    model.level_modules["language"]["ru"] = Wide().double()
    new = list(model.level_modules["language"]["ru"].parameters())
    others = [each for each in model.parameters() if all(each is not one for one in new)]
    if is_one:
        given = [make([{"params": others}, {"params": new, "lr": 0.5}], lr=0.01)]
    else:
        given = [make(others, lr=0.01), make(new, lr=0.5)]
    model.add_expert("language", "sk", ExpertConfig("sk"), warm_start="ru", optimizer=given)
    before = values_of(model, "sk")
    backward(model, ["sk", "it"])
    grad = model.level_modules["language"]["sk"].get_parameter("up.bias").grad.clone()
    for each in given:
        each.step()
    moved = (values_of(model, "sk")["up.bias"] - before["up.bias"]).abs().max()
    # PyTorch's optimizers have a stack in one group.
    rate = 0.01 if make is torch.optim.AdamW else 0.5
    expected = rate * float(grad.abs().max()) if make is celmoe.optim.SGD else rate
    assert expected * 0.9 < float(moved) < expected * 1.1


@pytest.mark.parametrize("make", [celmoe.optim.AdamW, celmoe.optim.SGD, torch.optim.AdamW])
def test_a_stack_whose_members_were_all_replaced_has_no_name(make, tmp_path):
    models = []
    for seed in range(2):
        model = build(is_stacked=True, seed=seed)
        for name in MEMBERS:
            model.level_modules["language"][name] = Wide().double()
        options = {"momentum": 0.9} if make is celmoe.optim.SGD else {}
        optimizer = make(model.parameters(), lr=0.01, **options)
        backward(model, ["ru", "pl", "it"])
        optimizer.step()
        models.append((model, optimizer))
    (model, optimizer), (other, its) = models
    state = state_by_name(model, optimizer)
    assert len([key for key in state["state"] if ".ru." in key]) == 3
    load_state_by_name(other, its, state)
    assert_same_states(state_by_name(other, its), state)
    other.load_state_dict(model.state_dict())
    save_checkpoint(tmp_path, model, optimizer)
    backward(other, ["uk"])
    its.step()
    load_checkpoint(tmp_path, other, its)
    assert_same_states(state_by_name(other, its), state)
    assert_close(values_of(other, "ru"), values_of(model, "ru"))


def assert_same_states(found: Any, expected: Any) -> None:
    assert found["state"].keys() == expected["state"].keys()
    for key, own in expected["state"].items():
        assert_close(found["state"][key], own)


def test_parameters_of_other_models_are_refused_as_before():
    model = build(is_stacked=True)
    optimizer = celmoe.optim.AdamW([*model.parameters(), torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(celmoe.CheckpointError, match="got 1 that the model does not have"):
        state_by_name(model, optimizer)


OPTIMIZERS = {
    "AdamW": (celmoe.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "SGD": (celmoe.optim.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("frozen", ["", "it"])
@pytest.mark.parametrize("passes", [["ru", "pl"], ["ru", "it", "fi"], []])
@pytest.mark.parametrize("how", ["stack", "unstack", "both", "one level", "back and forth"])
def test_absent_experts_stay_absent_where_stacks_are_made_between_two_passes(how, passes, frozen, kind):
    make, options = OPTIMIZERS[kind]
    plain, model = build(is_stacked=False), build(is_stacked=how != "stack")
    for each in (plain, model):
        if frozen:
            each.freeze("language", frozen)
        if passes:
            backward(each, passes)
    if how == "one level":
        celmoe.unstack_experts(model, ["language"])
    elif how in ("unstack", "both"):
        celmoe.unstack_experts(model)
    elif how == "back and forth":
        for _ in range(2):
            celmoe.unstack_experts(model)
            celmoe.stack_experts(model)
    if how in ("stack", "both"):
        celmoe.stack_experts(model)
    if how == "unstack":
        for name, parameter in plain.named_parameters():
            assert (model.get_parameter(name).grad is None) == (parameter.grad is None), name
    for each in (plain, model):
        optimizer = make(each.parameters(), **options)
        optimizer.step()
        backward(each, ["uk", "fi"])
        optimizer.step()
    assert_close(model.state_dict(), dict(plain.state_dict()))
