"""Optimizers of stacks beside PyTorch's on ordinary experts: absent experts stay as they are."""

from __future__ import annotations

import copy
import random
from functools import partial

import pytest
import torch

import celmoe
from celmoe import ConfigError, HierarchicalCELMoE, optim
from tests.stacks import MLP, NAMES, WIDTH, build, expert_of, run
from tests.test_stacked import Losing

TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-12}
STEPS = 10

OPTIONS = {
    "AdamW": [{}, {"amsgrad": True}, {"maximize": True}, {"foreach": True}, {"fused": True}, {"weight_decay": 0.3}],
    "Adam": [{}, {"amsgrad": True}, {"weight_decay": 0.1}],
    "SGD": [
        {"lr": 0.01},
        {"lr": 0.01, "momentum": 0.9},
        {"lr": 0.01, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        {"lr": 0.01, "momentum": 0.9, "nesterov": True, "foreach": True},
        {"lr": 0.01, "momentum": 0.9, "fused": True},
    ],
}
CASES = [(name, options) for name, all_options in OPTIONS.items() for options in all_options]


def routes_of(step: int) -> list[str]:
    """Routes to a few experts, so that others are absent; the last expert comes late."""
    return random.Random(step).choices(NAMES[: 5 if step < 4 else 6], k=random.Random(step).choice((1, 3, 6)))


def assert_same_parameters(plain: HierarchicalCELMoE, model: HierarchicalCELMoE, dtype: torch.dtype) -> None:
    found = model.state_dict()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(
            found[key], value, rtol=0, atol=TOLERANCES[dtype], msg=lambda text, key=key: f"{key}: {text}"
        )


def train(model: HierarchicalCELMoE, optimizer: torch.optim.Optimizer, steps: range, dtype: torch.dtype) -> None:
    for step in steps:
        run(model, routes_of(step), dtype)
        optimizer.step()


# In float32 the gradients are to the bit the same: Adam turns roundings of a small gradient into whole steps.
@pytest.mark.parametrize(
    ("engine", "dtype"), [("looped", torch.float32), ("looped", torch.float64), ("grouped", torch.float64)]
)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_absent_experts_stay_as_with_parameters_of_their_own(name, options, dtype, engine):
    plain, model = build(MLP, "looped").to(dtype), build(MLP, engine).to(dtype)
    celmoe.stack_experts(model)
    theirs, ours = getattr(torch.optim, name), getattr(optim, name)
    # PyTorch's fused SGD can't take a first momentum beside others.
    plain_options = options | {"fused": None} if name == "SGD" else options
    train(plain, theirs(plain.parameters(), **plain_options), range(STEPS), dtype)
    train(model, ours(model.parameters(), **options), range(STEPS), dtype)
    assert_same_parameters(plain, model, dtype)


def test_pytorchs_own_moves_absent_experts():
    """Otherwise the tests above would show nothing."""
    plain, model = build(MLP, "looped").double(), build(MLP).double()
    celmoe.stack_experts(model)
    train(plain, torch.optim.AdamW(plain.parameters()), range(STEPS), torch.float64)
    train(model, torch.optim.AdamW(model.parameters()), range(STEPS), torch.float64)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_parameters(plain, model, torch.float64)


@pytest.mark.parametrize("name", OPTIONS)
def test_ordinary_parameters_are_stepped_as_by_pytorch(name):
    plain, model = build(MLP, "looped").double(), build(MLP, "looped").double()
    options = OPTIONS[name][1]
    train(plain, getattr(torch.optim, name)(plain.parameters(), **options), range(STEPS), torch.float64)
    train(model, getattr(optim, name)(model.parameters(), **options), range(STEPS), torch.float64)
    assert_same_parameters(plain, model, torch.float64)


def _accumulated(model, optimizer):
    for first in (0, 3, 6):
        model.zero_grad()
        for step in range(first, first + 3):
            hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step)).double()
            model(hidden, {"language": [NAMES[step % 5], NAMES[step % 3], "e1"]}).fused_hidden.square().sum().backward()
        optimizer.step()


def _twice_in_one_backward(model, optimizer):
    for step in range(4):
        model.zero_grad()
        hidden = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(step)).double()
        first = model(hidden, {"language": [NAMES[step]]}).fused_hidden
        second = model(hidden, {"language": [NAMES[step + 1]]}).fused_hidden
        (first.square().sum() + second.square().sum()).backward()
        optimizer.step()


def _skipped(model, optimizer):
    for step in range(6):
        run(model, routes_of(step), torch.float64)
        if step % 2:
            optimizer.step()


def _forward_only(model, optimizer):
    for step in range(4):
        run(model, routes_of(step), torch.float64)
        model(torch.zeros(6, WIDTH).double(), {"language": NAMES})
        optimizer.step()


def _scheduled(model, optimizer):
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
    for step in range(6):
        run(model, routes_of(step), torch.float64)
        optimizer.step()
        scheduler.step()


def _cleared_to_zero(model, optimizer):
    for step in range(6):
        optimizer.zero_grad(set_to_none=False)
        hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step)).double()
        model(hidden, {"language": [NAMES[step], "e1", "e1"]}).fused_hidden.square().sum().backward()
        optimizer.step()


def _by_closure(model, optimizer):
    def closure(step):
        run(model, routes_of(step), torch.float64)
        return float(step)

    assert [optimizer.step(partial(closure, step)) for step in range(4)] == [0.0, 1.0, 2.0, 3.0]


def _asked_for_other_gradients(model, optimizer):
    for step in range(4):
        run(model, routes_of(step), torch.float64)
        hidden = torch.zeros(6, WIDTH).double().requires_grad_()
        torch.autograd.grad(model(hidden, {"language": NAMES}).fused_hidden.sum(), hidden)
        optimizer.step()


def _set_by_hand(model, optimizer):
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    for step in range(4):
        model.zero_grad()
        hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step)).double()
        loss = model(hidden, {"language": [NAMES[step], "e1", "e1"]}).fused_hidden.square().sum()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()


def _scaled(model, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(6):
        model.zero_grad()
        hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step)).double()
        loss = model(hidden, {"language": [NAMES[step], "e1", "e1"]}).fused_hidden.square().sum()
        scaler.scale(loss * (float("inf") if step == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()


WAYS = [
    *(_accumulated, _twice_in_one_backward, _skipped, _forward_only, _scheduled, _cleared_to_zero, _by_closure),
    *(_scaled, _asked_for_other_gradients, _set_by_hand),
]


@pytest.mark.parametrize("engine", ["looped", "grouped"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_train(way, name, engine):
    options = OPTIONS[name][1]
    plain, model = build(MLP, "looped").double(), build(MLP, engine).double()
    celmoe.stack_experts(model)
    way(plain, getattr(torch.optim, name)(plain.parameters(), **options))
    way(model, getattr(optim, name)(model.parameters(), **options))
    assert_same_parameters(plain, model, torch.float64)


def test_experts_that_only_a_loss_reaches_are_present():
    plain, model = build(Losing, "looped").double(), build(Losing).double()
    celmoe.stack_experts(model)
    for each, kind in ((plain, torch.optim.AdamW), (model, optim.AdamW)):
        optimizer = kind(each.parameters())
        for step in range(4):
            each.zero_grad()
            losses = each(torch.ones(3, WIDTH).double(), {"language": ["e0", "e1", "e2"]}).losses
            losses[f"language.e{step % 3}.size"].backward()
            optimizer.step()
    assert_same_parameters(plain, model, torch.float64)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_state_is_saved_and_loaded(name):
    options = OPTIONS[name][1]
    model = build(MLP).double()
    celmoe.stack_experts(model)
    optimizer = getattr(optim, name)(model.parameters(), **options)
    train(model, optimizer, range(4), torch.float64)
    twin = copy.deepcopy(model)
    again = getattr(optim, name)(twin.parameters(), **options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(4, 8), torch.float64)
    train(twin, again, range(4, 8), torch.float64)
    assert_same_parameters(model, twin, torch.float64)


def test_options_that_hide_the_steps_from_the_host_are_refused():
    model = build(MLP)
    for name in ("capturable", "differentiable"):
        with pytest.raises(ConfigError, match=f"'{name}' must be False"):
            optim.AdamW(model.parameters(), **{name: True})


def test_a_gradient_that_the_user_sets_is_of_all_experts():
    model = build(MLP).double()
    celmoe.stack_experts(model)
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    before = expert_of(model, "e3").up.weight.clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(expert_of(model, "e3").up.weight, before - 0.5)
