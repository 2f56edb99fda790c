"""An optimizer's state by the experts' names: the same for stacked and ordinary experts, and from one to the other."""

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
    ExpertModule,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    InputTypeError,
    StackedError,
    optim,
)
from celmoe.optim import load_state_by_name, state_by_name
from tests.features import needs_distributed
from tests.test_optim import CASES, OPTIONS, assert_same_parameters, train
from tests.test_stacked import MLP, NAMES, WIDTH, Buffered, Recurrent, build, run

UP = "level_modules.language.{}.up.weight"


def made(
    name: str, options: dict, kind: type[nn.Module] = MLP, *, is_stacked: bool, dtype: torch.dtype = torch.float64
):
    """A model of its own, with `torch.optim`'s optimizer, or `celmoe.optim`'s for a stacked model."""
    model = build(kind, "looped").to(dtype)
    if is_stacked:
        celmoe.stack_experts(model)
    elif name == "SGD":
        # PyTorch's fused SGD can't take a first momentum beside others.
        options = options | {"fused": None}
    return model, getattr(optim if is_stacked else torch.optim, name)(model.parameters(), **options)


def assert_same_states(found: dict, expected: dict, tolerance: float = 1e-12) -> None:
    assert found["state"].keys() == expected["state"].keys()
    for name, own in expected["state"].items():
        assert list(found["state"][name]) == list(own), name
        for key, value in own.items():
            mine = found["state"][name][key]
            if not isinstance(value, torch.Tensor):
                assert mine == value
                continue
            torch.testing.assert_close(
                mine,
                value,
                rtol=0,
                atol=tolerance,
                # PyTorch's optimizers load these in the parameter's dtype.
                check_dtype=key not in ("step", "eta", "mu", "mu_product"),
                msg=lambda text, at=(name, key): f"{at}: {text}",
            )
    assert [group["params"] for group in found["param_groups"]] == [
        group["params"] for group in expected["param_groups"]
    ]


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
