"""Optimizers, copies and checkpoints of experts that are frozen."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

import celmoe
from celmoe import (
    CELMoEConfig,
    ExpertConfig,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    StackedError,
)
from tests.frozen import assert_same_gradients, by_the_oracle
from tests.stacks import MLP, NAMES, WIDTH, assert_same_state, build, by_expert, expert_of, run, stacked
from tests.test_stacked_changes import Acting


def test_pytorchs_optimizers_refuse_to_move_frozen_experts():
    model = stacked()
    for kind, options in ((torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.5}), (torch.optim.Adagrad, {})):
        optimizer = kind(model.parameters(), lr=0.1, **options)
        model.freeze("language", "e[13]")
        run(model, NAMES)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(StackedError, match=r"keep the frozen experts .* may move 'e1', 'e3' by .* celmoe\.optim"):
            optimizer.step()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        model.unfreeze("language")
        optimizer.step()


def test_pytorchs_optimizers_step_what_can_not_move_frozen_experts():
    model, other = stacked(), build()
    model.freeze("language", "e1")
    before = expert_of(model, "e1").up.weight.clone()
    run(model, NAMES), run(other, NAMES)
    # Without momentum and decay; of other parameters; with no gradients; with a whole stack frozen.
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    torch.optim.AdamW(other.parameters()).step()
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    model.freeze("language")
    run(model, NAMES)
    optimizer.step()
    assert torch.equal(before, expert_of(model, "e1").up.weight)


class Adapter(MLP):
    """Has a frozen base below the trained layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up.requires_grad_(False)


@pytest.mark.parametrize("is_stacked", [True, False])
def test_what_was_not_trained_before_is_not_trained_afterwards(is_stacked):
    model = (stacked if is_stacked else build)(Adapter)
    before = {name: tensor.requires_grad for name, tensor in by_expert(model).items()}
    assert 0 < sum(before.values()) < len(before)
    for pattern in ("e1", "e*"):
        model.freeze("language", pattern)
        model.freeze("language", pattern)
    assert not any(tensor.requires_grad for tensor in by_expert(model).values())
    assert not any(parameter.requires_grad for parameter in model.level_modules.parameters())
    model.unfreeze("language", "e2")
    assert {name: tensor.requires_grad for name, tensor in by_expert(model).items()} == {
        name: is_trained and name.startswith("e2.") for name, is_trained in before.items()
    }
    model.unfreeze("language")
    assert {name: tensor.requires_grad for name, tensor in by_expert(model).items()} == before


def test_what_nobody_froze_by_name_stays_as_it_is():
    model = build()
    expert_of(model, "e1").requires_grad_(False)
    model.unfreeze("language")
    assert not expert_of(model, "e1").up.weight.requires_grad


def test_a_parameter_that_experts_share_is_frozen_with_each_of_them():
    model = build()
    expert_of(model, "e1").up = expert_of(model, "e4").up
    weight = expert_of(model, "e1").up.weight
    model.freeze("language", "e1")
    model.freeze("language", "e4")
    model.unfreeze("language", "e1")
    assert not weight.requires_grad
    assert expert_of(model, "e1").down.weight.requires_grad
    model.unfreeze("language", "e4")
    assert weight.requires_grad
    model.freeze("language", "e[14]")
    model.unfreeze("language", "e4")
    assert not weight.requires_grad
    model.unfreeze("language", "e1")
    assert weight.requires_grad


def requires_grad(model: HierarchicalCELMoE) -> dict[str, bool]:
    return {name: tensor.requires_grad for name, tensor in by_expert(model).items()}


@pytest.mark.parametrize("kind", [MLP, Adapter])
@pytest.mark.parametrize("pattern", ["e[02]", "*"])
def test_freezing_outlives_stacking_and_unstacking(pattern, kind):
    never, model = build(kind, "looped"), build(kind)
    for each in (never, model):
        each.freeze("language", pattern)
    report = celmoe.stack_experts(model)
    assert [each.reason for each in report.classes] == [""]
    assert len(list(model.level_modules.parameters())) == 5
    assert requires_grad(model) == requires_grad(never)
    for found, expected in zip(run(model), run(never), strict=True):
        torch.testing.assert_close(found, expected)
    celmoe.unstack_experts(model)
    assert requires_grad(model) == requires_grad(never)
    assert all(type(each) is nn.Parameter for each in model.parameters())
    for each in (never, model):
        each.unfreeze("language")
    assert requires_grad(model) == requires_grad(never) == requires_grad(build(kind))
    celmoe.stack_experts(model)
    assert requires_grad(model) == requires_grad(never)


def test_an_expert_that_was_thawed_by_hand_is_stacked_as_it_is():
    model = build()
    model.freeze("language", "e[02]")
    expert_of(model, "e2").requires_grad_()
    celmoe.stack_experts(model)
    assert {name.split(".")[0] for name, is_trained in requires_grad(model).items() if not is_trained} == {"e0"}


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("is_stacked", [True, False])
@pytest.mark.parametrize("pattern", ["e[02]", "*"])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_frozen_like_its_model(way, pattern, is_stacked):
    model = (stacked if is_stacked else build)(Adapter)
    model.freeze("language", pattern)
    twin = COPIES[way](model)
    assert requires_grad(twin) == requires_grad(model)
    for found, expected in zip(run(twin), run(model), strict=True):
        torch.testing.assert_close(found, expected)
    twin.unfreeze("language")
    assert requires_grad(twin) == requires_grad(build(Adapter))
    assert requires_grad(model) != requires_grad(twin)


def test_pytorchs_optimizers_refuse_copies_with_frozen_experts():
    model = stacked()
    model.freeze("language", "e1")
    twin = pickle.loads(pickle.dumps(model))
    model.unfreeze("language")
    run(twin, NAMES)
    with pytest.raises(StackedError, match="keep the frozen experts"):
        torch.optim.AdamW(twin.parameters()).step()


@pytest.mark.parametrize("is_assigned", [True, False])
def test_checkpoints_know_nothing_of_it(is_assigned):
    plain, model = build(), stacked()
    model.freeze("language", "e[02]")
    assert_same_state(plain, model)
    other = build(seed=1)
    model.load_state_dict(other.state_dict(), assign=is_assigned)
    assert_same_state(other, model)
    assert not expert_of(model, "e0").up.weight.requires_grad
    assert expert_of(model, "e1").up.weight.requires_grad


def test_a_part_that_was_replaced_is_frozen_with_its_expert():
    plain, model = build(Acting, "looped"), stacked(Acting, "auto")
    for each in (plain, model):
        torch.manual_seed(5)
        expert_of(each, "e2").act = nn.Linear(WIDTH, WIDTH)
        each.freeze("language", "e2")
    assert requires_grad(model) == requires_grad(plain)
    for found, expected in zip(run(model), by_the_oracle(plain), strict=True):
        torch.testing.assert_close(found, expected)
    for each in (plain, model):
        each.unfreeze("language", "e*")
    assert requires_grad(model) == requires_grad(plain)
    assert all(requires_grad(model).values())
    for found, expected in zip(run(model), by_the_oracle(plain), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_penalty_on_a_frozen_experts_weights_reaches_none_of_them():
    plain, model = build(engine="looped"), stacked()
    for each in (plain, model):
        each.freeze("language", "e1")
        each.zero_grad()
        sum(expert_of(each, name).up.weight.square().sum() for name in ("e0", "e1")).backward()
    assert_same_gradients(plain, model, {"e1"})
    assert not expert_of(model, "e1").up.weight.square().requires_grad


def _calls(num_experts: int, pattern: str) -> int:
    """Calls of Python functions in a forward and a backward pass."""
    names = [f"e{number}" for number in range(num_experts)]
    level = HierarchyLevelConfig("language", {name: ExpertConfig(name) for name in names})
    model = HierarchicalCELMoE(CELMoEConfig(WIDTH, [level]), lambda *_: MLP(), engine="grouped")
    celmoe.stack_experts(model)
    model.freeze("language", pattern)
    plan = model.compile_routing({"language": names * 2})
    hidden = torch.randn(2 * num_experts, WIDTH)
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    for _ in range(3):
        model(hidden, plan).fused_hidden.sum().backward()
    sys.setprofile(count)
    try:
        model(hidden, plan).fused_hidden.sum().backward()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("pattern", ["e1", "e[12]"])
def test_the_hosts_work_does_not_grow_with_the_experts(pattern):
    """With one expert frozen, which runs alone, and with two."""
    few, many = _calls(6, pattern), _calls(60, pattern)
    assert many <= 1.05 * few


@pytest.mark.parametrize("pattern", ["e0", "e[024]", "e[0-4]"])
def test_what_was_found_for_frozen_members_holds_for_these_only(pattern):
    """Batches of other members, after some were found to run as one, or alone."""
    plain, model = build(MLP, "looped"), stacked(MLP, "grouped")
    for each in (plain, model):
        each.freeze("language", pattern)
    frozen = {name for name in NAMES if not expert_of(plain, name).up.weight.requires_grad}
    for routes in (["e0", "e1"], ["e0", "e2", "e5"], ["e5"], ["e0", "e2"], NAMES, ["e4", "e0", "e3"], NAMES):
        for found, expected in zip(run(model, routes), by_the_oracle(plain, routes), strict=True):
            torch.testing.assert_close(found, expected)
        assert_same_gradients(plain, model, frozen)
