"""Optimizers when experts come and go: groups, state, refusals, and what compiled models do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import celmoe
from celmoe import (
    CELMoEConfig,
    ConfigError,
    ExpertConfig,
    HierarchicalCELMoE,
    StackedError,
)
from celmoe.optim.per_expert import shares_of
from tests.experts_changed import BOTH, run, trained
from tests.lifecycle import WIDTH, Wide, assert_same, build, factory, picture


@BOTH
def test_groups_stay_the_same_objects(is_stacked):
    model = build(is_stacked=is_stacked)
    groups = celmoe.parameter_groups(model, {"language/p*": {"lr": 0.5}, "language/[ru]*": {"lr": 0.1}})
    optimizer = celmoe.optim.AdamW(groups, lr=0.01)
    kept = list(optimizer.param_groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ConfigError, match=r"'optimizer' must have 'up\.weight' of .* \(got 2 groups with it; give"):
        model.add_expert("language", "x", ExpertConfig("x"), optimizer=optimizer)
    model.add_expert("language", "x", ExpertConfig("x"), warm_start="ru", optimizer=optimizer)
    model.add_expert("language", "y", ExpertConfig("y"), warm_start="it", optimizer=optimizer)
    model.rename_expert("language", "uk", "a", optimizer=optimizer)
    model.remove_expert("language", "ru", optimizer=optimizer)
    assert [*map(id, optimizer.param_groups)] == [*map(id, kept)]
    # The groups are those of a new optimizer.
    wanted = {"language/p*": {"lr": 0.5}, "language/[ax]": {"lr": 0.1}}
    fresh = celmoe.optim.AdamW(celmoe.parameter_groups(model, wanted), lr=0.01)
    shares = [{(id(each), str(members)) for each, _, members in some} for some in shares_of(optimizer)]
    assert shares == [{(id(each), str(members)) for each, _, members in some} for some in shares_of(fresh)]
    run(model, ["x", "y", "a"])
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.01)


@BOTH
def test_an_optimizer_of_something_else(is_stacked):
    model, head = build(is_stacked=is_stacked), nn.Linear(2, 2)

    class Else(Wide):
        pass

    two = torch.optim.SGD([{"params": head.weight}, {"params": head.bias}], lr=0.1)
    one = torch.optim.SGD([head.weight], lr=0.1)
    for given in (two, [one, torch.optim.SGD([head.bias], lr=0.1)]):
        with pytest.raises(ConfigError, match=r"'optimizer' must have 'up\.weight' of .* \(got 0 groups with it"):
            model.add_expert("language", "x", ExpertConfig("x"), factory=lambda *_: Else(), optimizer=given)
    # A new expert of frozen ones, which an optimizer does not have.
    model.add_expert("language", "x", ExpertConfig("x"), factory=lambda *_: Else(), optimizer=one)
    assert len(one.param_groups[0]["params"]) == 4
    if is_stacked:
        # Nobody can train one member of a stack by an optimizer that does not have the stack.
        model.add_expert("language", "y", ExpertConfig("y"), optimizer=two)
        assert [len(group["params"]) for group in two.param_groups] == [1, 1]


@BOTH
def test_several_optimizers_each_take_what_they_have_of_others(is_stacked):
    model = build(is_stacked=is_stacked)
    named = dict(model.named_parameters())
    matrices = [each for name, each in named.items() if name.endswith("weight")]
    vectors = [each for name, each in named.items() if name.endswith("bias")]
    optimizers = [torch.optim.SGD(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(vectors, lr=0.1)]
    run(model, ["ru", "it", "pl"])
    for each in optimizers:
        each.step()
    model.add_expert("language", "x", ExpertConfig("x"), warm_start="ru", optimizer=optimizers)
    model.add_expert("language", "y", ExpertConfig("y", metadata={"is_narrow": True}), optimizer=optimizers)
    model.rename_expert("language", "ru", "z", optimizer=optimizers)
    model.remove_expert("language", "uk", optimizer=optimizers)
    held = [[id(each) for each in optimizer.param_groups[0]["params"]] for optimizer in optimizers]
    now = dict(model.named_parameters())
    assert held[0] == [id(each) for name, each in now.items() if name.endswith("weight")]
    assert held[1] == [id(each) for name, each in now.items() if name.endswith("bias")]


def test_tensors_that_nobodys_optimizer_has_stay_outside():
    model = build(is_stacked=False)
    optimizer = torch.optim.SGD([each for name, each in model.named_parameters() if "up." not in name], lr=0.1)
    model.add_expert("language", "x", ExpertConfig("x"), optimizer=optimizer)
    held = set(map(id, optimizer.param_groups[0]["params"]))
    expert = model.level_modules["language"]["x"]
    assert id(expert.down.weight) in held
    assert id(expert.up.weight) not in held


def test_groups_of_a_stack_that_the_new_expert_does_not_join():
    model = build(is_stacked=True)
    groups = celmoe.parameter_groups(model, {"language/*": {"lr": 0.5}})
    optimizer = celmoe.optim.AdamW(groups, lr=0.01)

    class Else(Wide):
        pass

    model.add_expert(
        "language", "x", ExpertConfig("x"), factory=lambda *_: Else(), warm_start="ru", optimizer=optimizer
    )
    model.add_expert("language", "y", ExpertConfig("y"), factory=lambda *_: Else(), optimizer=optimizer)
    held = set(map(id, optimizer.param_groups[0]["params"]))
    for name in ("x", "y"):
        assert {id(each) for each in model.level_modules["language"][name].parameters()} <= held


class Tied(celmoe.ExpertModule):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)
        self.down.weight = self.up.weight

    def forward(self, batch):
        return celmoe.ExpertResult(self.down(torch.tanh(self.up(batch.hidden))))


def test_experts_that_tie_their_own_tensors():
    config = CELMoEConfig.from_tree(["a", "b"], ["l"], WIDTH)
    model = HierarchicalCELMoE(config, lambda *_: Tied())
    celmoe.stack_experts(model)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.inference_mode():
        model.add_expert("l", "c", ExpertConfig("c"), warm_start="a", optimizer=optimizer)
        model.rename_expert("l", "a", "z", optimizer=optimizer)
    model.remove_expert("l", "b", optimizer=optimizer)
    assert [*map(id, optimizer.param_groups[0]["params"])] == [*map(id, model.parameters())]
    assert not any(each.is_inference() for each in model.parameters())
    model(torch.ones(2, WIDTH), {"l": ["c", "z"]}).fused_hidden.sum().backward()
    optimizer.step()


def test_optimizers_whose_state_is_not_by_parameter_are_refused():
    model = build(is_stacked=False)
    optimizer = torch.optim.LBFGS(model.parameters())
    before = picture(model)
    with pytest.raises(ConfigError, match="got LBFGS"):
        model.add_expert("language", "x", ExpertConfig("x"), optimizer=optimizer)
    assert_same(picture(model), before)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
        (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
        (torch.optim.NAdam, {}),
        (torch.optim.Adamax, {}),
        (torch.optim.Adadelta, {}),
    ],
)
def test_pytorchs_optimizers_of_stacks_keep_everybodys_state(kind, options):
    changed, same = build(is_stacked=True), build(is_stacked=True)
    optimizers = [kind(each.parameters(), **options) for each in (changed, same)]
    for model, optimizer in zip((changed, same), optimizers, strict=True):
        for _ in range(2):
            run(model, ["ru", "it", "pl"])
            optimizer.step()
    changed.add_expert("language", "aa", ExpertConfig("aa"), warm_start="uk", optimizer=optimizers[0])
    changed.remove_expert("language", "es", optimizer=optimizers[0])
    changed.rename_expert("language", "it", "zz", optimizer=optimizers[0])
    for _ in range(3):
        run(changed, ["ru", "zz", "pl"])
        optimizers[0].step()
        run(same, ["ru", "it", "pl"])
        optimizers[1].step()
    found = changed.state_dict()
    for key, value in same.state_dict().items():
        if ".es." not in key:
            torch.testing.assert_close(found[key.replace(".it.", ".zz.")], value, rtol=0, atol=2e-6)


def test_state_whose_first_value_nobody_knows_is_refused():
    model = build(is_stacked=True)
    optimizer = torch.optim.Rprop(model.parameters())
    run(model, ["ru", "it"])
    optimizer.step()
    before = picture(model, optimizer)
    with pytest.raises(StackedError, match="'optimizer' must have a state whose first value is known"):
        model.add_expert("language", "x", ExpertConfig("x"), optimizer=optimizer)
    assert_same(picture(model, optimizer), before)
    model.remove_expert("language", "ru", optimizer=optimizer)


@BOTH
def test_compiled_models_compile_anew(is_stacked):
    model = build(is_stacked=is_stacked)
    compiled = torch.compile(model, backend="eager")
    hidden = torch.randn(3, WIDTH, dtype=torch.float64)
    for change in (
        lambda: None,
        lambda: model.rename_expert("language", "pl", "aa"),
        lambda: model.add_expert("language", "x", ExpertConfig("x", parent="romance"), warm_start="it"),
        lambda: model.remove_expert("language", "ru"),
    ):
        change()
        names = [*model.levels[1].experts]
        plan = model.compile_routing({"language": [names[0], names[-1], names[1]]})
        expected = model(hidden, plan).fused_hidden
        torch.testing.assert_close(compiled(hidden, plan).fused_hidden, expected, rtol=0, atol=1e-12)


@BOTH
@pytest.mark.parametrize("engine", ["grouped", "auto"])
def test_engines_decide_anew(engine, is_stacked):
    config = CELMoEConfig.from_tree(["a", "b", "c"], ("l",), WIDTH, use_learned_fusion=False)
    model = HierarchicalCELMoE(config, factory, engine=engine)
    if is_stacked:
        celmoe.stack_experts(model)
    optimizer = celmoe.optim.AdamW(model.parameters())
    for change in (
        lambda: None,
        lambda: model.add_expert("l", "0", ExpertConfig("0"), warm_start="b", optimizer=optimizer),
        lambda: model.rename_expert("l", "a", "z", optimizer=optimizer),
        lambda: model.remove_expert("l", "c", optimizer=optimizer),
    ):
        change()
        names = [*config.levels[0].experts] * 2
        hidden = torch.randn(len(names), WIDTH)
        output = model(hidden, {"l": names})
        expected = celmoe.reference.reference_forward(model, hidden, {"l": names})
        torch.testing.assert_close(output.fused_hidden, expected.fused_hidden)
        output.fused_hidden.sum().backward()
        optimizer.step()
        assert {id(each) for each in optimizer.param_groups[0]["params"]} == set(map(id, model.parameters()))


def test_a_stack_that_an_expert_has_left():
    model, optimizer = trained(is_stacked=True)
    model.level_modules["language"]["ru"] = Wide().double()
    model.remove_expert("language", "uk", optimizer=optimizer)
    model.rename_expert("language", "ru", "rr", optimizer=optimizer)
    names = {name for stack in model._stacks["language"] for name in stack.names}
    assert not {"rr", "uk"} & names
    run(model, ["rr", "it", "fi"])
    optimizer.step()


def test_a_removed_expert_is_an_ordinary_module():
    model = build(is_stacked=True)
    expert = model.level_modules["language"]["ru"]
    kept = {name: each.clone() for name, each in expert.state_dict().items()}
    model.remove_expert("language", "ru")
    assert type(expert) is Wide
    assert all(torch.equal(each, kept[name]) for name, each in expert.state_dict().items())
    with torch.no_grad():
        expert.up.weight.zero_()
    model.level_modules["language"]["uk"] = expert
    run(model, ["uk"])


def test_compiled_training_of_stacks_goes_on():
    """The graphs of a changed model count its members anew, and step nobody else."""
    models = [build(is_stacked=True) for _ in range(2)]
    for model in models:
        for level in [*model.levels]:
            for name in [name for name, each in level.experts.items() if each.metadata.get("is_narrow")]:
                model.remove_expert(level.name, name)
    calls = [torch.compile(models[0], backend="eager"), models[1]]
    optimizers = [celmoe.optim.AdamW(model.parameters(), lr=0.01) for model in models]
    changes = (
        lambda _model, _optimizer: None,
        lambda model, optimizer: model.add_expert(
            "language", "aa", ExpertConfig("aa", parent="other"), warm_start="uk", optimizer=optimizer
        ),
        lambda model, optimizer: model.rename_expert("language", "fi", "bb", optimizer=optimizer),
        lambda model, optimizer: model.remove_expert("language", "ru", optimizer=optimizer),
    )
    for change in changes:
        for model, optimizer in zip(models, optimizers, strict=True):
            change(model, optimizer)
        names = [*models[0].levels[1].experts]
        for routes in ([names[-1], names[1]], [names[1], names[1]], [names[2], names[0]]):
            for model, call, optimizer in zip(models, calls, optimizers, strict=True):
                optimizer.zero_grad()
                hidden = torch.ones(2, WIDTH, dtype=torch.float64).cumsum(0)
                call(hidden, model.compile_routing({"language": routes})).fused_hidden.square().sum().backward()
                optimizer.step()
        for key, value in models[1].state_dict().items():
            torch.testing.assert_close(models[0].state_dict()[key], value, rtol=0, atol=1e-9)


class Scalar(celmoe.ExpertModule):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(()))

    def forward(self, batch):
        return celmoe.ExpertResult(batch.hidden * self.factor)


@pytest.mark.parametrize("kind", [celmoe.optim.AdamW, torch.optim.NAdam, torch.optim.AdamW])
def test_parameters_without_axes(kind):
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        config = CELMoEConfig.from_tree(["a", "b", "c"], ["l"], WIDTH, use_learned_fusion=False)
        models.append(HierarchicalCELMoE(config, lambda *_: Scalar(), engine="looped"))
        celmoe.stack_experts(models[-1])
    optimizers = [kind(model.parameters(), lr=0.1) for model in models]
    for step in range(6):
        if step == 3:
            models[0].add_expert("l", "0", ExpertConfig("0"), optimizer=optimizers[0])
            models[0].remove_expert("l", "b", optimizer=optimizers[0])
            models[0].rename_expert("l", "a", "z", optimizer=optimizers[0])
        for model, optimizer in zip(models, optimizers, strict=True):
            first = "z" if "z" in model.levels[0].experts else "a"
            optimizer.zero_grad()
            model(torch.ones(2, WIDTH), {"l": [first, "c"]}).fused_hidden.square().sum().backward()
            optimizer.step()
    found, expected = [model.level_modules["l"] for model in models]
    torch.testing.assert_close(found["z"].factor, expected["a"].factor.detach(), rtol=0, atol=2e-6)
    torch.testing.assert_close(found["c"].factor, expected["c"].factor.detach(), rtol=0, atol=2e-6)


def test_experts_that_were_put_back_in_another_order():
    model = build(is_stacked=False)
    registry = model.level_modules["language"]
    expert = registry["ru"]
    del registry["ru"]
    with pytest.raises(ConfigError, match="must hold the experts of the config"):
        model.remove_expert("language", "pl")
    registry["ru"] = expert
    model.add_expert("language", "x", ExpertConfig("x"))
    assert [*registry] == [*model.levels[1].experts] == ["ru", "pl", "uk", "it", "es", "fi", "hu", "x"]


def test_factories_that_are_empty_containers():
    class Factory(list):
        def __call__(self, *_):
            return Wide()

    config = CELMoEConfig.from_tree(["a", "b"], ["l"], WIDTH)
    model = HierarchicalCELMoE(config, factory)
    model.add_expert("l", "c", ExpertConfig("c", metadata={"is_narrow": True}), factory=Factory())
    assert type(model.level_modules["l"]["c"]) is Wide


@pytest.mark.parametrize("call", ["add", "remove", "rename"])
def test_factored_moments_are_refused(call):
    """Adafactor keeps one moment for the vectors of all members of a stack."""
    model = build(is_stacked=True)
    optimizer = torch.optim.Adafactor(model.parameters())
    run(model, ["ru", "it", "pl"])
    optimizer.step()
    before = picture(model, optimizer)
    calls = {
        "add": lambda: model.add_expert("language", "x", ExpertConfig("x"), optimizer=optimizer),
        "remove": lambda: model.remove_expert("language", "uk", optimizer=optimizer),
        "rename": lambda: model.rename_expert("language", "uk", "x", optimizer=optimizer),
    }
    with pytest.raises(StackedError, match="'optimizer' must keep a state that can be told apart by expert"):
        calls[call]()
    assert_same(picture(model, optimizer), before)


def test_factored_moments_of_ordinary_experts_stay():
    model = build(is_stacked=False)
    optimizer = torch.optim.Adafactor(model.parameters())
    run(model, ["ru", "it", "pl"])
    optimizer.step()
    state = {id(parameter): own for parameter, own in optimizer.state.items()}
    model.add_expert("language", "x", ExpertConfig("x"), optimizer=optimizer)
    model.rename_expert("language", "it", "a", optimizer=optimizer)
    model.remove_expert("language", "ru", optimizer=optimizer)
    kept = {id(parameter): own for parameter, own in optimizer.state.items()}
    assert all(state[key] is own for key, own in kept.items())
    assert len(kept) == len(state) - 3
    run(model, ["a", "x", "pl"])
    optimizer.step()


def test_learning_rates_and_gradients_of_others_stay():
    for is_stacked in (False, True):
        model, optimizer = trained(is_stacked=is_stacked)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        before = {
            name: None if each.grad is None else each.grad.clone()
            for name, each in model.level_modules["language"]["uk"].named_parameters()
        }
        assert any(each is not None for each in before.values())
        model.add_expert("language", "x", ExpertConfig("x"), optimizer=optimizer)
        model.remove_expert("language", "it", optimizer=optimizer)
        model.rename_expert("language", "uk", "a", optimizer=optimizer)
        found = {name: each.grad for name, each in model.level_modules["language"]["a"].named_parameters()}
        assert_same(found, before)
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[0]["lr"] < 0.01
