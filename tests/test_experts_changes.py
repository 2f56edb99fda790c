"""Adding, removing and renaming experts: the state that moves along, the refusals, and that these change nothing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import celmoe
from celmoe import (
    CELMoEConfig,
    CELMoEError,
    ConfigError,
    ConfigTypeError,
    ExpertConfig,
    HierarchicalCELMoE,
    InputTypeError,
    PlanError,
    RoutingCompiler,
    StackedError,
    UnknownExpertError,
    UnknownLevelError,
)
from tests.experts_changed import BOTH, run, trained
from tests.lifecycle import WIDTH, Narrow, Wide, assert_same, build, factory, picture


def _odd(*_: Any) -> nn.Module:
    return nn.Linear(WIDTH, 2)


def _raising(*_: Any) -> nn.Module:
    torch.rand(3)
    raise ZeroDivisionError


REFUSALS: dict[str, tuple[type[Exception], str, Any]] = {
    "a name that exists": (
        ConfigError,
        "'name' must be new to level 'language' (got 'ru', which it has)",
        lambda m, o: m.add_expert("language", "ru", ExpertConfig("ru"), optimizer=o),
    ),
    "an empty name": (
        ConfigError,
        "'name' must be a non-empty string",
        lambda m, o: m.add_expert("language", "", ExpertConfig("x"), optimizer=o),
    ),
    "a number for a name": (
        ConfigTypeError,
        "'name' must be a string (got 3)",
        lambda m, o: m.add_expert("language", 3, ExpertConfig("x"), optimizer=o),
    ),
    "no config": (
        ConfigTypeError,
        "'config' must be an ExpertConfig (got {})",
        lambda m, o: m.add_expert("language", "x", {}, optimizer=o),
    ),
    "an unknown level": (
        UnknownLevelError,
        "'level' must be a level of the model (got 'languages'; nearest: 'language')",
        lambda m, o: m.add_expert("languages", "x", ExpertConfig("x"), optimizer=o),
    ),
    "an unknown parent": (
        ConfigError,
        "must be an expert of level 'family' (got 'slavics'; nearest: 'slavic')",
        lambda m, o: m.add_expert("language", "x", ExpertConfig("x", parent="slavics"), optimizer=o),
    ),
    "a parent on the first level": (
        ConfigError,
        "must be None",
        lambda m, o: m.add_expert("family", "x", ExpertConfig("x", parent="ru"), optimizer=o),
    ),
    "an unknown source": (
        UnknownExpertError,
        "'warm_start' must be an expert of level 'language' (got 'rus'; nearest: 'ru'",
        lambda m, o: m.add_expert("language", "x", ExpertConfig("x"), warm_start="rus", optimizer=o),
    ),
    "a source of another kind": (
        ConfigError,
        "'warm_start' must be an expert like the new one (got 'pl' of level",
        lambda m, o: m.add_expert("language", "x", ExpertConfig("x"), warm_start="pl", optimizer=o),
    ),
    "a source of another shape": (
        ConfigError,
        "'warm_start' must be an expert like the new one",
        lambda m, o: m.add_expert("language", "x", ExpertConfig("x"), factory=_odd, warm_start="pl", optimizer=o),
    ),
    "a factory that raises": (
        ZeroDivisionError,
        "",
        lambda m, o: m.add_expert("language", "x", ExpertConfig("x"), factory=_raising, optimizer=o),
    ),
    "a factory of classes": (
        ConfigTypeError,
        "must return a torch.nn.Module (got the class Wide",
        lambda m, o: m.add_expert("language", "x", ExpertConfig("x"), factory=lambda *_: Wide, optimizer=o),
    ),
    "no factory": (
        ConfigTypeError,
        "'factory' must be callable (got 3)",
        lambda m, o: m.add_expert("language", "x", ExpertConfig("x"), factory=3, optimizer=o),
    ),
    "no optimizer": (
        InputTypeError,
        "'optimizer' must be a torch.optim.Optimizer, or several of them (got str)",
        lambda m, _: m.add_expert("language", "x", ExpertConfig("x"), optimizer=["x"]),
    ),
    "somebody's parent": (
        ConfigError,
        "the parent of 'ru', 'pl', 'uk' in level 'language'; remove those first",
        lambda m, o: m.remove_expert("family", "slavic", optimizer=o),
    ),
    "the fallback": (
        ConfigError,
        "'name' must not be the fallback (got expert 'other' of level 'family'",
        lambda m, o: m.remove_expert("family", "other", optimizer=o),
    ),
    "nobody": (
        UnknownExpertError,
        "'name' must be an expert of level 'language' (got 'rux'; nearest: 'ru')",
        lambda m, o: m.remove_expert("language", "rux", optimizer=o),
    ),
    "a new name that exists": (
        ConfigError,
        "'new_name' must be new to level 'language' (got 'pl', which it has)",
        lambda m, o: m.rename_expert("language", "ru", "pl", optimizer=o),
    ),
    "the same name": (
        ConfigError,
        "'new_name' must be new",
        lambda m, o: m.rename_expert("language", "ru", "ru", optimizer=o),
    ),
    "an empty new name": (
        ConfigError,
        "'new_name' must be",
        lambda m, o: m.rename_expert("language", "ru", "", optimizer=o),
    ),
    "a new name of another kind": (
        ConfigTypeError,
        "'new_name' must be",
        lambda m, o: m.rename_expert("language", "ru", None, optimizer=o),
    ),
    "nobody to rename": (
        UnknownExpertError,
        "'name' must be",
        lambda m, o: m.rename_expert("language", None, "x", optimizer=o),
    ),
}


@BOTH
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_call_changes_nothing(case, is_stacked):
    kind, words, call = REFUSALS[case]
    model, optimizer = trained(is_stacked=is_stacked)
    before = picture(model, optimizer)
    with pytest.raises(kind) as error:
        call(model, optimizer)
    assert words in str(error.value)
    assert isinstance(error.value, CELMoEError) or kind is ZeroDivisionError
    assert_same(picture(model, optimizer), before)


@BOTH
def test_the_last_expert_stays(is_stacked):
    model, optimizer = trained(is_stacked=is_stacked)
    for name in ("ru", "pl", "uk", "it", "es", "fi"):
        model.remove_expert("language", name, optimizer=optimizer)
    before = picture(model, optimizer)
    with pytest.raises(
        ConfigError, match=r"'name' must leave an expert to level 'language' \(got 'hu', the last one\)"
    ):
        model.remove_expert("language", "hu", optimizer=optimizer)
    assert_same(picture(model, optimizer), before)
    run(model, ["hu", "hu"])
    optimizer.step()


@pytest.mark.parametrize("call", ["add", "remove", "rename"])
def test_who_holds_a_stack_must_be_given(call):
    model, optimizer = trained(is_stacked=True)
    other = torch.optim.SGD(list(model.parameters())[:1], lr=0.1)
    calls = {
        "add": lambda given: model.add_expert("family", "x", ExpertConfig("x"), optimizer=given),
        "remove": lambda given: model.remove_expert("language", "ru", optimizer=given),
        "rename": lambda given: model.rename_expert("family", "slavic", "x", optimizer=given),
    }
    given = [None, other] if call == "remove" else [None, other, optimizer]
    for each in given:
        before = picture(model, optimizer, other)
        with pytest.raises(StackedError, match="'optimizer' must be given, for stacked parameters are made anew"):
            calls[call](each)
        assert_same(picture(model, optimizer, other), before)
    calls[call]([optimizer, other])
    held = {id(each) for group in [*optimizer.param_groups, *other.param_groups] for each in group["params"]}
    assert held == set(map(id, model.parameters()))


def test_models_without_optimizers_change():
    for is_stacked in (False, True):
        model = build(is_stacked=is_stacked)
        model.add_expert("language", "x", ExpertConfig("x"))
        model.remove_expert("language", "ru")
        model.rename_expert("language", "x", "y")
        assert [*model.level_modules["language"]] == ["pl", "uk", "it", "es", "fi", "hu", "y"]
        run(model, ["y", "pl"])


@BOTH
def test_children_fallback_and_handles_follow(is_stacked):
    model = build(is_stacked=is_stacked)
    config, families, languages = model.config, *model.config.levels
    ru, slavic = languages.experts["ru"], families.experts["slavic"]
    model.rename_expert("family", "slavic", "east")
    model.rename_expert("family", "other", "rest")
    assert model.config is config
    assert model.levels == config.levels
    assert [*families.experts] == ["east", "romance", "rest"]
    assert families.fallback_expert == "rest"
    assert languages.experts["ru"] is ru
    assert families.experts["east"] is slavic
    assert (ru.parent, slavic.name) == ("east", "east")
    model.check_config()
    ru.loss_weight = 0.5
    assert model._levels[1].flags("ru").loss_weight == 0.5


def test_configs_that_stand_in_two_places_are_copied():
    shared = ExpertConfig("any", parent="a")
    levels = [
        celmoe.HierarchyLevelConfig("one", {"a": ExpertConfig("a")}),
        celmoe.HierarchyLevelConfig("two", {"a": shared, "b": shared}),
        celmoe.HierarchyLevelConfig("three", {"c": shared}),
    ]
    model = HierarchicalCELMoE(CELMoEConfig(WIDTH, levels), factory)
    model.rename_expert("one", "a", "z")
    assert [each.parent for each in levels[1].experts.values()] == ["z", "z"]
    assert levels[2].experts["c"].parent == "a"
    model.rename_expert("two", "a", "y")
    assert levels[2].experts["c"].parent == "y"
    assert levels[1].experts["y"].parent == "z"


def test_a_config_of_two_models_is_refused():
    model = build(is_stacked=False)
    other = HierarchicalCELMoE(model.config, factory)
    model.add_expert("language", "x", ExpertConfig("x"))
    with pytest.raises(ConfigError, match="'config' must have the structure that the model was built with"):
        other.remove_expert("language", "ru")
    assert len(other.level_modules["language"]) == 7


def test_experts_that_two_levels_share_in_one_dict_change_in_one():
    experts = {"a": ExpertConfig("a"), "b": ExpertConfig("b")}
    levels = [celmoe.HierarchyLevelConfig(name, experts) for name in ("one", "two")]
    model = HierarchicalCELMoE(CELMoEConfig(WIDTH, levels), factory)
    model.remove_expert("one", "b")
    assert ([*levels[0].experts], [*levels[1].experts], [*experts]) == (["a"], ["a", "b"], ["a", "b"])


@BOTH
@pytest.mark.parametrize("change", ["add", "remove", "rename"])
def test_old_plans_and_compilers_are_refused(change, is_stacked):
    model = build(is_stacked=is_stacked)
    compiler, plan = RoutingCompiler(model.config), model.compile_routing({"language": ["ru", "it"]})
    copied = pickle.loads(pickle.dumps(plan))
    if change == "add":
        model.add_expert("language", "x", ExpertConfig("x"))
    elif change == "remove":
        model.remove_expert("language", "hu")
    else:
        model.rename_expert("language", "hu", "x")
    hidden = torch.zeros(2, WIDTH, dtype=torch.float64)
    for each in (plan, copied, compiler({"language": ["ru", "it"]})):
        with pytest.raises(PlanError, match="in level 'language'"):
            model(hidden, each)
    model(hidden, RoutingCompiler(model.config)({"language": ["ru", "it"]}))
    assert "language" in str(model.explain({"language": ["ru", "it"]}))


@BOTH
def test_a_new_expert_is_like_the_others(is_stacked):
    model = build(is_stacked=is_stacked).eval()
    model.add_expert("language", "x", ExpertConfig("x"), warm_start="ru")
    model.add_expert("language", "y", ExpertConfig("y", metadata={"is_narrow": True}), factory=lambda *_: Narrow())
    for name in ("x", "y"):
        expert = model.level_modules["language"][name]
        assert {each.dtype for each in (*expert.parameters(), *expert.buffers())} == {torch.float64}
        assert not any(module.training for module in expert.modules())
    assert torch.equal(
        run(model, ["x"])[0],
        model(torch.ones(1, WIDTH).double(), {"family": ["other"], "language": ["ru"]}).fused_hidden[0],
    )
    if is_stacked:
        assert sorted(name for stack in model._stacks["language"] for name in stack.names) == sorted(
            model.levels[1].experts
        )


def test_a_new_expert_unlike_others_has_parameters_of_its_own():
    model, optimizer = trained(is_stacked=True)

    class Other(Wide):
        pass

    model.add_expert("language", "x", ExpertConfig("x"), factory=lambda *_: Other(), optimizer=optimizer)
    assert all(type(each) is nn.Parameter for each in model.level_modules["language"]["x"].parameters())
    run(model, ["x", "ru"])
    before = model.level_modules["language"]["x"].up.weight.clone()
    optimizer.step()
    assert not torch.equal(before, model.level_modules["language"]["x"].up.weight)
    model.rename_expert("language", "x", "z", optimizer=optimizer)
    model.remove_expert("language", "z", optimizer=optimizer)
    assert {id(each) for group in optimizer.param_groups for each in group["params"]} == set(
        map(id, model.parameters())
    )


def test_factories_of_copies_and_of_unpickled_models():
    model = build(is_stacked=False)
    copied = copy.deepcopy(model)
    copied.add_expert("language", "x", ExpertConfig("x"))
    assert "x" not in model.config.levels[1].experts
    unpickled = pickle.loads(pickle.dumps(model))
    with pytest.raises(ConfigError, match="'factory' must be given, for a model that was unpickled has none"):
        unpickled.add_expert("language", "x", ExpertConfig("x"))
    unpickled.add_expert("language", "x", ExpertConfig("x"), factory=factory)
    with_lambda = HierarchicalCELMoE(build(is_stacked=False).config, lambda *_: Wide())
    pickle.loads(pickle.dumps(with_lambda))


def test_a_factory_that_gives_shared_modules():
    shared = Wide()
    config = CELMoEConfig(WIDTH, [celmoe.HierarchyLevelConfig("l", {name: ExpertConfig(name) for name in "ab"})])
    model = HierarchicalCELMoE(config, lambda _level, name, _metadata: shared if name != "b" else Wide())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="'warm_start' must be an expert that shares what the new expert shares"):
        model.add_expert("l", "c", ExpertConfig("c"), warm_start="b", optimizer=optimizer)
    model.add_expert("l", "c", ExpertConfig("c"), warm_start="a", optimizer=optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 2 * 3 + 3  # two modules, and the fusion's gate and norm
    model.remove_expert("l", "a", optimizer=optimizer)
    assert shared.up.weight in set(optimizer.param_groups[0]["params"])
    model.remove_expert("l", "c", optimizer=optimizer)
    assert not any(shared.up.weight is each for each in optimizer.param_groups[0]["params"])


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH).double()
        self.moe = build(is_stacked=False)
        self.head = nn.Linear(WIDTH, 2).double()


@pytest.mark.parametrize("is_named", [False, True])
def test_a_model_inside_another(is_named):
    outer = Outer()
    given = outer.named_parameters() if is_named else outer.parameters()
    optimizer = torch.optim.AdamW(given)
    outer.moe.add_expert("family", "x", ExpertConfig("x"), optimizer=optimizer)
    outer.moe.rename_expert("language", "ru", "r.u", optimizer=optimizer)
    outer.moe.remove_expert("language", "pl", optimizer=optimizer)
    held = optimizer.param_groups[0]["params"]
    assert [*map(id, held)] == [*map(id, outer.parameters())]
    if is_named:
        assert optimizer.param_groups[0]["param_names"] == [name for name, _ in outer.named_parameters()]
