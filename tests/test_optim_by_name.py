"""An optimizer's state by the experts' names: the same for stacked and ordinary experts, and from one to the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import celmoe
from celmoe import (
    ExpertModule,
    ExpertResult,
    StackedError,
    optim,
)
from celmoe.optim import load_state_by_name, state_by_name
from tests.features import needs_distributed
from tests.optim_by_name import UP, assert_same_states, made
from tests.stacks import MLP, NAMES, WIDTH, Recurrent, build, run
from tests.test_optim import CASES, OPTIONS, assert_same_parameters, train
from tests.test_stacked import Buffered


@needs_distributed
@pytest.mark.parametrize("kind", [MLP, Buffered, Recurrent])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_form_is_pytorchs(name, kind):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    plain, theirs = made(name, OPTIONS[name][1], kind, is_stacked=False)
    train(plain, theirs, range(3), torch.float64)
    expected, found = get_optimizer_state_dict(plain, theirs), state_by_name(plain, theirs)
    assert_same_states(found, expected, 0.0)
    assert found["param_groups"] == expected["param_groups"]
    assert list(found) == list(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_state_goes_to_a_stack_and_back(name, options, dtype):
    tolerance = 2e-6 if dtype is torch.float32 else 1e-12
    never, theirs = made(name, options, is_stacked=False, dtype=dtype)
    train(never, theirs, range(5), dtype)
    model, ours = made(name, options, is_stacked=True, dtype=dtype)
    model.load_state_dict(never.state_dict())
    load_state_by_name(model, ours, state_by_name(never, theirs))
    assert_same_states(state_by_name(model, ours), state_by_name(never, theirs), 0.0)
    train(never, theirs, range(5, 10), dtype)
    train(model, ours, range(5, 10), dtype)
    assert_same_parameters(never, model, dtype)
    assert_same_states(state_by_name(model, ours), state_by_name(never, theirs), tolerance)
    again, back = made(name, options, is_stacked=False, dtype=dtype)
    again.load_state_dict(model.state_dict())
    load_state_by_name(again, back, state_by_name(model, ours))
    train(never, theirs, range(10, 15), dtype)
    train(again, back, range(10, 15), dtype)
    assert_same_parameters(never, again, dtype)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_expert_that_was_never_stepped_has_no_state(name):
    model, ours = made(name, OPTIONS[name][1], is_stacked=True)
    assert state_by_name(model, ours)["state"] == {}
    train(model, ours, range(3), torch.float64)
    assert UP.format("e5") not in state_by_name(model, ours)["state"]
    assert UP.format("e0") in state_by_name(model, ours)["state"]


def test_no_momentum_is_no_state():
    plain, theirs = made("SGD", {"lr": 0.1}, is_stacked=False)
    model, ours = made("SGD", {"lr": 0.1}, is_stacked=True)
    train(plain, theirs, range(3), torch.float64)
    train(model, ours, range(3), torch.float64)
    assert state_by_name(plain, theirs)["state"] == state_by_name(model, ours)["state"] == {}
    for each in (theirs, ours):
        each.param_groups[0].update(momentum=0.9, dampening=0.5)
    train(plain, theirs, range(3, 6), torch.float64)
    train(model, ours, range(3, 6), torch.float64)
    assert_same_parameters(plain, model, torch.float64)


def test_an_ordinary_models_own_optimizer_gives_what_pytorchs_gives():
    plain, theirs = made("AdamW", {}, is_stacked=False)
    model = build(MLP, "looped").double()
    ours = optim.AdamW(model.parameters())
    train(plain, theirs, range(4), torch.float64)
    train(model, ours, range(4), torch.float64)
    assert_same_states(state_by_name(model, ours), state_by_name(plain, theirs))


OTHERS = {
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "AdamW": {},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "Adagrad": {},
    "Adadelta": {},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "ASGD": {},
    "Rprop": {},
}


@pytest.mark.parametrize("name", OTHERS)
def test_pytorchs_optimizers_of_stacks_have_all_experts_states(name):
    """All experts are present: then PyTorch's optimizers do the same to a stack as to its experts."""
    kind = getattr(torch.optim, name)
    plain, model = build(MLP, "looped").double(), build(MLP, "looped").double()
    celmoe.stack_experts(model)
    theirs, ours = kind(plain.parameters(), **OTHERS[name]), kind(model.parameters(), **OTHERS[name])
    for each, optimizer in ((plain, theirs), (model, ours)):
        for _ in range(3):
            run(each, NAMES, torch.float64)
            optimizer.step()
    assert_same_states(state_by_name(model, ours), state_by_name(plain, theirs))
    for goal, state in ((model, state_by_name(plain, theirs)), (plain, state_by_name(model, ours))):
        again = kind(goal.parameters(), **OTHERS[name])
        load_state_by_name(goal, again, state)
        run(goal, NAMES, torch.float64)
        again.step()
    assert_same_parameters(plain, model, torch.float64)


def test_each_expert_counts_its_own_steps():
    """PyTorch adds to the very tensor that it was given."""
    model = build(MLP, "looped").double()
    celmoe.stack_experts(model)
    optimizer = torch.optim.AdamW(model.parameters())
    run(model, NAMES, torch.float64)
    optimizer.step()
    state = state_by_name(model, optimizer)["state"]
    steps = [own["step"] for own in state.values()]
    steps[0] += 1
    assert [step.item() for step in steps] == [2.0] + [1.0] * (len(steps) - 1)


class Square(ExpertModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, WIDTH))

    def forward(self, batch):
        return ExpertResult(batch.hidden @ self.weight.t() @ self.weight)


class Small(ExpertModule):
    """Has parameters of one number, which look like counts of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.rand(()))
        self.one = nn.Parameter(torch.rand(1))
        self.matrix = nn.Parameter(torch.rand(1, 1))

    def forward(self, batch):
        return ExpertResult(batch.hidden * self.scalar + self.one * batch.hidden.square() + self.matrix)


@pytest.mark.parametrize("name", [*OTHERS, *(f"celmoe.{name}" for name in OPTIONS)])
def test_parameters_of_one_number(name):
    is_ours = name.startswith("celmoe.")
    options = OPTIONS[name.removeprefix("celmoe.")][1] if is_ours else OTHERS[name]
    plain, model = build(Small, "looped").double(), build(Small, "looped").double()
    celmoe.stack_experts(model)
    theirs = getattr(torch.optim, name.removeprefix("celmoe."))
    kind = getattr(optim, name.removeprefix("celmoe.")) if is_ours else theirs
    pair = [(plain, theirs), (model, kind)]
    states = []
    for each, of_each in pair:
        optimizer = of_each(each.parameters(), **options)
        for routes in (NAMES, NAMES) if not is_ours else (NAMES[:3], NAMES[1:4]):
            run(each, routes, torch.float64)
            optimizer.step()
        states.append(state_by_name(each, optimizer))
    assert_same_states(states[1], states[0])
    for (each, of_each), state in zip(pair, states[::-1], strict=True):
        again = of_each(each.parameters(), **options)
        load_state_by_name(each, again, state)
        assert_same_states(state_by_name(each, again), states[0])
        run(each, NAMES, torch.float64)
        again.step()
    assert_same_parameters(plain, model, torch.float64)


def test_factored_moments_are_cut_where_they_are_by_expert():
    plain, model = build(Square, "looped"), build(Square, "looped")
    celmoe.stack_experts(model)
    theirs, ours = torch.optim.Adafactor(plain.parameters()), torch.optim.Adafactor(model.parameters())
    for each, optimizer in ((plain, theirs), (model, ours)):
        run(each, NAMES)
        optimizer.step()
    assert_same_states(state_by_name(model, ours), state_by_name(plain, theirs), 1e-6)
    again = torch.optim.Adafactor(model.parameters())
    load_state_by_name(model, again, state_by_name(plain, theirs))
    assert_same_states(state_by_name(model, again), state_by_name(plain, theirs), 0.0)


def test_factored_moments_of_vectors_can_not_be_told_apart():
    model = build(MLP, "looped")
    celmoe.stack_experts(model)
    optimizer = torch.optim.Adafactor(model.parameters())
    run(model, NAMES)
    optimizer.step()
    with pytest.raises(StackedError, match=r"told apart by expert \(got 'col_var', a tensor of shape \(1, 8\)"):
        state_by_name(model, optimizer)


def test_state_that_is_no_tensor_can_not_be_told_apart():
    model = build(MLP, "looped")
    celmoe.stack_experts(model)
    optimizer = torch.optim.LBFGS(model.parameters())
    run(model, NAMES)
    optimizer.step(lambda: model.zero_grad() or run(model, NAMES)[0].sum().item())
    with pytest.raises(StackedError, match="told apart by expert"):
        state_by_name(model, optimizer)


def test_one_count_of_steps_can_not_keep_several():
    plain, theirs = made("AdamW", {}, is_stacked=False)
    train(plain, theirs, range(6), torch.float64)
    model = build(MLP, "looped").double()
    celmoe.stack_experts(model)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(StackedError, match="several values of 'step'; take an optimizer of celmoe"):
        load_state_by_name(model, optimizer, state_by_name(plain, theirs))
    assert not optimizer.state


def test_a_missing_state_is_refused_where_all_experts_have_one():
    plain, theirs = made("AdamW", {}, is_stacked=False)
    train(plain, theirs, range(1), torch.float64)
    model = build(MLP, "looped").double()
    celmoe.stack_experts(model)
    with pytest.raises(StackedError, match="no state for"):
        load_state_by_name(model, torch.optim.AdamW(model.parameters()), state_by_name(plain, theirs))
