"""A built model's config, changed: structure has no effect, flags are read at every call."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

from celmoe import (
    CELMoEConfig,
    CELMoELossAPI,
    ConfigError,
    ConfigTypeError,
    ExpertConfig,
    ExpertModule,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    PlanError,
    RoutingCompiler,
    UnknownExpertError,
    UnknownLevelError,
)
from celmoe.reference import reference_forward
from tests.refusals import WIDTH, rows
from tests.test_layout import three_levels

LANGUAGES = {"language": ["ru", "fr", "ru"]}
ALL = {"area": ["west", "east", "west"], "family": ["romance", "slavic", "slavic"], **LANGUAGES}


class Sized(ExpertModule):
    """A linear expert with a loss, which every engine runs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch):
        hidden = self.linear(batch.hidden)
        return ExpertResult(hidden, {"size": hidden.pow(2).mean()})


def build(config, engine="auto"):
    torch.manual_seed(0)
    return HierarchicalCELMoE(config, lambda *_: Sized(), engine=engine)


def swap(config):
    config.levels.reverse()


def renamed_expert(config):
    experts = config.levels[2].experts
    experts["uk"] = experts.pop("ru")


def other_parents(config):
    for name, parent in {"ru": "romance", "fr": None}.items():
        config.levels[2].experts[name].parent = parent


STRUCTURE = {
    "a level renamed": lambda config: setattr(config.levels[2], "name", "tongue"),
    "two levels' names swapped": lambda config: (
        setattr(config.levels[1], "name", "language"),
        setattr(config.levels[2], "name", "family"),
    ),
    "an expert renamed": renamed_expert,
    "an expert dropped": lambda config: config.levels[2].experts.pop("ru"),
    "an expert more": lambda config: config.levels[2].experts.update(it=ExpertConfig("it", parent="romance")),
    "all experts dropped": lambda config: config.levels[1].experts.clear(),
    "experts replaced": lambda config: setattr(config.levels[1], "experts", {"x": ExpertConfig("x")}),
    "experts in another order": lambda config: setattr(
        config.levels[2], "experts", dict(reversed(config.levels[2].experts.items()))
    ),
    "other parents": other_parents,
    "levels swapped": swap,
    "a level more": lambda config: config.levels.append(HierarchyLevelConfig("last", {"x": ExpertConfig("x")})),
    "a level removed": lambda config: config.levels.pop(1),
    "all levels removed": lambda config: config.levels.clear(),
    "levels replaced": lambda config: setattr(config, "levels", []),
    "a level disabled": lambda config: setattr(config.levels[1], "enabled", False),
}


@pytest.mark.parametrize("engine", ["looped", "auto", "grouped"])
@pytest.mark.parametrize("change", STRUCTURE)
def test_changes_of_structure_have_no_effect(change, engine):
    config = three_levels()
    model, fresh = build(config, engine=engine).eval(), build(three_levels(), engine=engine).eval()
    plan = fresh.compile_routing(LANGUAGES)
    STRUCTURE[change](config)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for routing in (LANGUAGES, ALL, plan, {**ALL, "language": [0, 1, 0]}):
            hidden, other = rows().requires_grad_(), rows().requires_grad_()
            found, wanted = twin(hidden, routing), fresh(other, routing)
            assert torch.equal(found.fused_hidden, wanted.fused_hidden)
            assert {name: each.routes for name, each in found.levels.items()} == {
                name: each.routes for name, each in wanted.levels.items()
            }
            assert found.losses.keys() == wanted.losses.keys()
            assert found.loss_weights == wanted.loss_weights
            found.fused_hidden.sum().backward()
            wanted.fused_hidden.sum().backward()
            assert torch.equal(hidden.grad, other.grad)
            told = reference_forward(twin, rows(), routing)
            torch.testing.assert_close(told.fused_hidden, wanted.fused_hidden)
        assert str(twin.explain(LANGUAGES)) == str(fresh.explain(LANGUAGES))
        assert str(twin.explain()) == str(fresh.explain())


@pytest.mark.parametrize("change", STRUCTURE)
def test_changes_of_structure_are_told_to_who_asks(change):
    config = three_levels()
    model = build(config)
    model.check_config()
    STRUCTURE[change](config)
    with pytest.raises((ConfigError, ConfigTypeError)):
        model.check_config()


def test_the_first_difference_is_named():
    config = three_levels()
    model = build(config)
    other_parents(config)
    with pytest.raises(ConfigError) as caught:
        model.check_config()
    assert str(caught.value) == (
        "'config' must have the structure that the model was built with, parent 'slavic' for expert 'ru' of level "
        "'language' (got 'romance'); build a new model"
    )


@pytest.mark.parametrize("change", ["an expert renamed", "a level renamed", "an expert more", "other parents"])
def test_plans_of_the_changed_config_are_refused(change):
    config = three_levels()
    model = build(config)
    STRUCTURE[change](config)
    routing = {"language": "fr"} if change != "a level renamed" else {"tongue": "fr"}
    if change == "other parents":
        routing["family"] = "slavic"
    with pytest.raises(PlanError, match="must be a plan of a config with"):
        model(rows(), RoutingCompiler(config)(routing, 3))


def test_new_names_stay_unknown():
    config = three_levels()
    model = build(config)
    renamed_expert(config)
    config.levels[0].name = "zone"
    with pytest.raises(UnknownExpertError, match="got 'uk' for 1 of 1 samples"):
        model(rows(1), {"language": ["uk"]})
    with pytest.raises(UnknownLevelError, match="got 'zone'"):
        model(rows(1), {"zone": "east", "language": "ru"})


# Flags


def is_detached(model, expert="ru"):
    hidden = rows(1).requires_grad_()
    model(hidden, {"language": [expert]}).levels["area"].hidden.sum().backward()
    hidden.grad = None
    output = model(hidden, {"language": [expert]}).levels["language"].hidden
    return torch.autograd.grad(output.sum(), hidden, allow_unused=True)[0] is None


@pytest.mark.parametrize(
    "stop",
    [
        lambda level: setattr(level.experts["ru"], "stop_gradient_from_parent", True),
        lambda level: level.experts.update(ru=dataclasses.replace(level.experts["ru"], stop_gradient_from_parent=True)),
        lambda level: level.experts.update(ru=ExpertConfig("ru", gradient_scale=0.0)),
        lambda level: setattr(level, "experts", {"ru": ExpertConfig("ru", stop_gradient_from_parent=True)}),
        lambda level: level.experts.pop("ru").__setattr__("stop_gradient_from_parent", True),
        lambda level: (level.experts.clear(), level.experts.update(ru=ExpertConfig("other", gradient_scale=-1.0))),
    ],
    ids=["set", "replaced", "new", "new experts", "dropped", "cleared"],
)
@pytest.mark.parametrize("engine", ["looped", "auto", "grouped"])
def test_flags_are_those_under_the_experts_name(stop, engine):
    model = build(three_levels(), engine=engine)
    assert not is_detached(model)
    level = model.levels[2]
    stop(level)
    assert is_detached(model)
    assert not is_detached(model, "fr")
    assert is_detached(copy.deepcopy(model))
    level.experts["ru"] = ExpertConfig("ru")
    assert not is_detached(model)


def test_loss_weights_of_replaced_and_dropped_experts():
    model = build(three_levels()).eval()
    experts = model.levels[2].experts
    experts["ru"].loss_weight = 3.0
    experts["fr"] = dataclasses.replace(experts["fr"], loss_weight=5.0)
    del experts["ru"]
    output = model(rows(), LANGUAGES)
    weights = {name: weight for name, weight in output.loss_weights.items() if name.startswith("language")}
    assert weights == {"language.fr.size": 5.0, "language.ru.size": 3.0}
    total = sum(value * output.loss_weights[name] for name, value in output.losses.items())
    torch.testing.assert_close(CELMoELossAPI().compute(output).total, total)


def test_the_fallback_of_the_level_that_the_model_has():
    config = three_levels()
    model = build(config)
    level = config.levels[2]
    config.levels[2] = dataclasses.replace(level, fallback_expert="fr")
    with pytest.raises(KeyError):
        model.compile_routing(None, 2)
    with pytest.raises(ConfigError, match="fallback_expert None in level 'language'"):
        model.check_config()
    level.fallback_expert = "ru"
    assert model.compile_routing(None, 2).routes("language") == ["ru", "ru"]


@pytest.mark.parametrize("wrong", [None, "ru", 1.0, {"gradient_scale": 0.0}])
@pytest.mark.parametrize("engine", ["looped", "auto", "grouped"])
def test_what_is_no_config_of_an_expert_is_told(wrong, engine):
    model = build(three_levels(), engine=engine)
    model.levels[2].experts["ru"] = wrong
    for call in (lambda: model(rows(), LANGUAGES), lambda: RoutingCompiler(model.config), model.check_config):
        with pytest.raises(
            ConfigTypeError, match=r"^\"?.*levels\['language'\]\.experts\['ru'\].* must be an ExpertConfig"
        ):
            call()
    assert model(rows(1), {"language": ["fr"]}).levels["language"].routes == ["fr"]


@pytest.mark.parametrize("engine", ["auto", "grouped"])
def test_modules_that_were_never_in_the_config_are_told(engine):
    model = build(three_levels(), engine=engine)
    model.level_modules["language"]["it"] = Sized()
    with pytest.raises(ConfigTypeError, match=r"experts\['it'\].* must be an ExpertConfig \(got None\)"):
        model.explain()
    with pytest.raises(UnknownExpertError, match="got 'it'"):
        model(rows(1), {"language": ["it"]})


def test_a_list_of_levels_changed_by_its_reader_changes_nothing():
    model = build(CELMoEConfig(WIDTH, [HierarchyLevelConfig("a", {"x": ExpertConfig("x")})]))
    twin = pickle.loads(pickle.dumps(model))
    for each in (model, twin):
        each.levels.clear()
        assert each(rows(), None).levels["a"].routes == ["x"] * 3
