"""Experts that are frozen, stacked and not, beside the oracle on experts whose parameters require no gradients."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from celmoe import (
    HierarchicalCELMoE,
    InputTypeError,
    StackedError,
    UnknownExpertError,
    UnknownLevelError,
    optim,
)
from celmoe.optim import state_by_name
from tests.frozen import assert_same_gradients, by_the_oracle
from tests.optim_by_name import assert_same_states
from tests.stacks import ENGINES, MLP, NAMES, ROUTES, WIDTH, Recurrent, build, by_expert, expert_of, run, stacked
from tests.test_optim import OPTIONS, assert_same_parameters, routes_of
from tests.test_stacked import Buffered, Losing, Normed

# By name, steps of freezing and unfreezing, each with the experts that are frozen then.
STEPS = [
    ("freeze", "e[02]", {"e0", "e2"}),
    ("freeze", "e2", {"e0", "e2"}),
    ("freeze", "e[35]", {"e0", "e2", "e3", "e5"}),
    ("unfreeze", "e0", {"e2", "e3", "e5"}),
    ("freeze", "*", set(NAMES)),
    ("unfreeze", "e[0-2]", {"e3", "e4", "e5"}),
    ("unfreeze", "*", set()),
]
KINDS = [MLP, Buffered, Recurrent, Losing, Normed]


def freeze_by_hand(model: HierarchicalCELMoE, frozen: set[str]) -> None:
    for name in NAMES:
        expert_of(model, name).requires_grad_(name not in frozen)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("is_stacked", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_experts_run_as_before_and_get_no_gradients(kind, is_stacked, engine):
    plain, model = build(kind, "looped"), (stacked if is_stacked else build)(kind, engine)
    run(model)
    for verb, pattern, frozen in STEPS:
        getattr(model, verb)("language", pattern)
        freeze_by_hand(plain, frozen)
        for routes in (ROUTES, NAMES, ["e1", "e1", "e4"]):
            for _ in range(2):
                for found, expected in zip(run(model, routes), by_the_oracle(plain, routes), strict=True):
                    torch.testing.assert_close(found, expected)
                assert_same_gradients(plain, model, frozen)


def test_frozen_and_other_experts_of_a_stack_run_as_one_each():
    model = stacked(MLP, "grouped")
    model.freeze("language", "e[02]")
    run(model, NAMES)
    (level,) = model.explain({"language": NAMES}).levels
    assert [(each.experts, each.engine) for each in level.classes] == [
        (("e0", "e2"), "grouped"),
        (("e1", "e3", "e4", "e5"), "grouped"),
    ]


class Asking(MLP):
    """Computes something else if it is frozen."""

    def forward(self, batch):
        result = super().forward(batch)
        result.hidden = result.hidden * (2.0 if self.up.weight.requires_grad else 5.0)
        return result


@pytest.mark.parametrize("engine", ["auto", "looped"])
def test_an_expert_sees_that_it_is_frozen(engine):
    plain, model = build(Asking, "looped"), stacked(Asking, engine)
    for verb, pattern, frozen in STEPS:
        run(model)
        getattr(model, verb)("language", pattern)
        freeze_by_hand(plain, frozen)
        torch.testing.assert_close(run(model)[0], by_the_oracle(plain)[0])


@pytest.mark.parametrize("is_stacked", [True, False])
def test_names_come_in_the_levels_order(is_stacked):
    model = (stacked if is_stacked else build)()
    assert model.freeze("language", "e[420]") == ["e0", "e2", "e4"]
    assert model.freeze("language") == NAMES
    assert model.unfreeze("language", "e1") == ["e1"]
    assert model.unfreeze("language") == NAMES


WRONG = {
    "a level": (("langage", "*"), UnknownLevelError, "'level' must be a level of the model .* nearest: 'language'"),
    "an expert": (("language", "x*"), UnknownExpertError, "'pattern' must match experts of level 'language'"),
    "another case": (("language", "E1"), UnknownExpertError, "nearest: 'e1'"),
    "a list": (("language", ["e1"]), InputTypeError, "'pattern' must be a string"),
}


@pytest.mark.parametrize("verb", ["freeze", "unfreeze"])
@pytest.mark.parametrize("attempt", WRONG)
def test_what_matches_nobody_is_refused_and_changes_nothing(attempt, verb):
    given, error, words = WRONG[attempt]
    for model in (build(), stacked()):
        model.freeze("language", "e2")
        with pytest.raises(error, match=words):
            getattr(model, verb)(*given)
        assert {name for name in NAMES if not expert_of(model, name).up.weight.requires_grad} == {"e2"}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("engine", ["looped", "grouped"])
def test_frozen_experts_are_not_stepped(engine, name):
    options = OPTIONS[name][1]
    plain, model = build(MLP, "looped").double(), stacked(MLP, engine).double()
    pair = []
    for each, kind in ((plain, getattr(torch.optim, name)), (model, getattr(optim, name))):
        optimizer = kind(each.parameters(), **options)
        pair.append(optimizer)
        for step in range(14):
            if step % 2 == 0 and step // 2 < len(STEPS):
                verb, pattern, _ = STEPS[step // 2]
                getattr(each, verb)("language", pattern)
            optimizer.zero_grad(set_to_none=step % 3 > 0)
            hidden = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(step)).double()
            routes = random.Random(step).choices(NAMES, k=6)
            each(hidden, {"language": routes}).fused_hidden.square().sum().backward()
            optimizer.step()
    assert_same_parameters(plain, model, torch.float64)
    assert_same_states(state_by_name(model, pair[1]), state_by_name(plain, pair[0]))


def test_a_frozen_expert_keeps_weights_moments_and_steps():
    model = stacked().double()
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    run(model, NAMES, torch.float64)
    optimizer.step()
    model.freeze("language", "e2")
    weights = expert_of(model, "e2").up.weight.clone()
    state = copy.deepcopy(state_by_name(model, optimizer)["state"])
    for step in range(4):
        run(model, [*routes_of(step), "e2"], torch.float64)
        optimizer.step()
    now = state_by_name(model, optimizer)["state"]
    assert torch.equal(weights, expert_of(model, "e2").up.weight)
    frozen = [name for name in state if ".e2." in name]
    assert len(frozen) == 5
    assert all(torch.equal(now[name][key], value) for name in frozen for key, value in state[name].items())
    assert not torch.equal(
        now["level_modules.language.e1.up.weight"]["exp_avg"], state["level_modules.language.e1.up.weight"]["exp_avg"]
    )


def test_gradients_that_someone_sets_do_not_move_a_frozen_expert():
    model = stacked()
    model.freeze("language", "e2")
    optimizer = optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    before = {name: tensor.clone() for name, tensor in by_expert(model).items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, tensor in by_expert(model).items():
        torch.testing.assert_close(tensor, before[name] - (0.0 if name.startswith("e2.") else 0.5))
    assert not any(".e2." in name for name in state_by_name(model, optimizer)["state"])


def _between_passes(model, optimizer, step):
    hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step)).double()
    loss = model(hidden, {"language": ["e0", "e1", "e1"]}).fused_hidden.square().sum()
    (model.freeze if step % 2 else model.unfreeze)("language", "e1")
    loss.backward()
    optimizer.step()


def _before_the_step(model, optimizer, step):
    hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step)).double()
    model(hidden, {"language": ["e0", "e1", "e1"]}).fused_hidden.square().sum().backward()
    (model.freeze if step % 2 else model.unfreeze)("language", "e1")
    optimizer.step()


def _for_a_moment(model, optimizer, step):
    hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step)).double()
    model(hidden, {"language": ["e0", "e1", "e1"]}).fused_hidden.square().sum().backward()
    if step % 2:
        model.freeze("language", "e1")
        model(hidden, {"language": ["e1", "e2", "e1"]}).fused_hidden.square().sum().backward()
        model.unfreeze("language", "e1")
    optimizer.step()
    if step == 5:
        model.freeze("language", "e1")


@pytest.mark.parametrize("engine", ["looped", "grouped"])
@pytest.mark.parametrize("way", [_between_passes, _before_the_step, _for_a_moment])
def test_freezing_at_odd_times(way, engine):
    plain, model = build(MLP, "looped").double(), stacked(MLP, engine).double()
    for each, kind in ((plain, torch.optim.AdamW), (model, optim.AdamW)):
        optimizer = kind(each.parameters())
        for step in range(6):
            optimizer.zero_grad()
            way(each, optimizer, step)
    assert_same_parameters(plain, model, torch.float64)
    assert_same_gradients(plain, model, {"e1"})


@pytest.mark.parametrize("is_stacked", [True, False])
def test_gradients_of_frozen_experts_are_dropped(is_stacked):
    model = (stacked if is_stacked else build)()
    run(model, NAMES)
    kept = expert_of(model, "e1").up.weight.grad.clone()
    model.freeze("language", "e2")
    assert expert_of(model, "e2").up.weight.grad is None
    assert torch.equal(expert_of(model, "e1").up.weight.grad, kept)
    model.unfreeze("language", "e2")
    assert not torch.count_nonzero(torch.zeros(1) if (grad := expert_of(model, "e2").up.weight.grad) is None else grad)


@pytest.mark.parametrize("patterns", [["e[13]"], ["e1", "e3"], ["e[1-3]"], ["*"]])
def test_a_gradient_of_frozen_experts_alone_is_none(patterns):
    """Optimizers that see one parameter would take its zeros for everybody's gradient."""
    model = stacked()
    run(model, ["e1", "e3"])
    for pattern in patterns:
        model.freeze("language", pattern)
    assert all(each.grad is None for each in model.level_modules["language"].parameters())
    before = {key: value.clone() for key, value in model.state_dict().items() if "language" in key}
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("is_noted", [True, False])
def test_a_gradient_of_others_stays_when_experts_freeze(is_noted):
    model = stacked()
    run(model, ["e1", "e2"])
    if not is_noted:
        for each in model.level_modules["language"].parameters():
            each.grad = None
            each.grad = torch.ones_like(each)
    model.freeze("language", "e1")
    assert torch.count_nonzero(expert_of(model, "e2").up.weight.grad)


def test_frozen_experts_that_were_replaced_hold_nobody_back():
    model = stacked()
    model.freeze("language", "e[12]")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.level_modules["language"]["e1"] = MLP()
    run(model, NAMES)
    with pytest.raises(StackedError, match=r"may move 'e2' by"):
        optimizer.step()
    # A part of it still reads the stack.
    part = expert_of(model, "e2")
    part.up = torch.nn.Linear(part.up.in_features, part.up.out_features)
    with pytest.raises(StackedError, match=r"may move 'e2' by"):
        optimizer.step()
    model.level_modules["language"]["e2"] = MLP()
    optimizer.step()
