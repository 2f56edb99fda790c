"""Experts that are frozen, stacked and not, beside the oracle on experts whose parameters require no gradients."""

from __future__ import annotations

import copy
import pickle
import random
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
    InputTypeError,
    StackedError,
    UnknownExpertError,
    UnknownLevelError,
    optim,
)
from celmoe.optim import state_by_name
from celmoe.reference import reference_forward
from tests.test_optim import OPTIONS, assert_same_parameters, routes_of
from tests.test_optim_by_name import assert_same_states
from tests.test_stacked import (
    ENGINES,
    MLP,
    NAMES,
    ROUTES,
    WIDTH,
    Acting,
    Buffered,
    Losing,
    Normed,
    Recurrent,
    assert_same_state,
    build,
    by_expert,
    expert_of,
    run,
    stacked,
)

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


def by_the_oracle(model: HierarchicalCELMoE, routes=ROUTES, dtype=torch.float32):
    hidden = torch.randn(len(routes), WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    model.zero_grad()
    output = reference_forward(model, hidden, {"language": routes})
    (output.fused_hidden.square().sum() + sum(output.losses.values())).backward()
    return output.fused_hidden.detach(), hidden.grad


def assert_same_gradients(plain: HierarchicalCELMoE, model: HierarchicalCELMoE, frozen: set[str]) -> None:
    theirs = by_expert(plain)
    for name, tensor in by_expert(model).items():
        wanted = theirs[name].grad
        assert tensor.requires_grad == theirs[name].requires_grad, name
        if name.split(".")[0] in frozen:
            assert tensor.grad is None
        elif tensor.grad is not None or wanted is not None:
            torch.testing.assert_close(tensor.grad, torch.zeros_like(tensor) if wanted is None else wanted)
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.dim() and len(parameter) == len(NAMES):
            assert not any(parameter.grad[NAMES.index(name)].any() for name in frozen)


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
