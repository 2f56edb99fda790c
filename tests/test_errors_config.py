"""Every refused config, factory, fusion, engine, loss weight and loss, to the letter."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

from celmoe import (
    CELMoEConfig,
    CELMoELossAPI,
    ConfigError,
    ConfigTypeError,
    EngineError,
    ExpertConfig,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    InputError,
    InputTypeError,
    LossBundle,
    LossTerm,
    RoutingCompiler,
    UnknownLevelError,
)
from tests.refusals import GOOD, WIDTH, Counting, assert_error, build, level, rows, two_levels

NAN, INF = math.nan, math.inf


def expert(**fields):
    return lambda: ExpertConfig(**{"name": "e", **fields})


def of_level(**fields):
    return lambda: HierarchyLevelConfig(**{"name": "l", "experts": {}, **fields})


def config(**fields):
    return lambda: CELMoEConfig(**{"hidden_size": WIDTH, **fields})


GRADIENT_SCALE = "celmoe-vp 3.0.0 had gradient_scale in this place, which is keyword-only here"
FUSION_TYPE = "celmoe-vp 3.0.0 had fusion_type in this place, which is keyword-only here"

TYPES = [
    (expert(name=1), "'name' must be a string (got 1)"),
    (expert(name=None), "'name' must be a string (got None)"),
    (expert(loss_weight="1"), "'loss_weight' must be a number (got '1')"),
    (expert(loss_weight=None), "'loss_weight' must be a number (got None)"),
    (expert(loss_weight=True), "'loss_weight' must be a number (got True)"),
    (expert(loss_weight=1j), "'loss_weight' must be a number (got 1j)"),
    (expert(loss_weight=torch.tensor(1.0)), "'loss_weight' must be a number (got tensor(1.))"),
    (expert(stop_gradient_from_parent=1), "'stop_gradient_from_parent' must be a bool (got 1)"),
    (expert(stop_gradient_from_parent=None), "'stop_gradient_from_parent' must be a bool (got None)"),
    (expert(stop_gradient_from_parent="no"), "'stop_gradient_from_parent' must be a bool (got 'no')"),
    (expert(metadata=None), "'metadata' must be a mapping (got None)"),
    (expert(metadata=[("a", 1)]), "'metadata' must be a mapping (got [('a', 1)])"),
    (expert(metadata=True), "'metadata' must be a mapping (got True)"),
    (expert(metadata=0.5), f"'metadata' must be a mapping (got 0.5); {GRADIENT_SCALE}: gradient_scale=0.5"),
    (expert(gradient_scale="1"), "'gradient_scale' must be a number (got '1')"),
    (expert(gradient_scale=False), "'gradient_scale' must be a number (got False)"),
    (expert(parent=1), "'parent' must be a string (got 1)"),
    (expert(parent=["slavic"]), "'parent' must be a string (got ['slavic'])"),
    (of_level(name=0), "'name' must be a string (got 0)"),
    (of_level(name=None), "'name' must be a string (got None)"),
    (of_level(experts=None), "'experts' must be a mapping of names to ExpertConfig (got None)"),
    (of_level(experts=["a", "b"]), "'experts' must be a mapping of names to ExpertConfig (got ['a', 'b'])"),
    (of_level(fallback_expert=0), "'fallback_expert' must be a string (got 0)"),
    (of_level(enabled=1), "'enabled' must be a bool (got 1)"),
    (of_level(enabled="yes"), "'enabled' must be a bool (got 'yes')"),
    (config(hidden_size="64"), "'hidden_size' must be an integer (got '64')"),
    (config(hidden_size=64.0), "'hidden_size' must be an integer (got 64.0)"),
    (config(hidden_size=True), "'hidden_size' must be an integer (got True)"),
    (config(hidden_size=None), "'hidden_size' must be an integer (got None)"),
    (config(levels=None), "'levels' must be a list of HierarchyLevelConfig (got None)"),
    (config(levels="family"), "'levels' must be a list of HierarchyLevelConfig (got 'family')"),
    (config(use_learned_fusion=None), "'use_learned_fusion' must be a bool (got None)"),
    (config(use_learned_fusion=0.1), "'use_learned_fusion' must be a bool (got 0.1)"),
    (config(fusion_dropout=None), "'fusion_dropout' must be a number (got None)"),
    (config(fusion_dropout=False), "'fusion_dropout' must be a number (got False)"),
    (
        config(fusion_dropout="position_aware"),
        f"'fusion_dropout' must be a number (got 'position_aware'); {FUSION_TYPE}: fusion_type='position_aware'",
    ),
    (config(fusion_max_positions=512.0), "'fusion_max_positions' must be an integer (got 512.0)"),
]
VALUES = [
    (expert(loss_weight=NAN), "'loss_weight' must be finite (got nan)"),
    (expert(loss_weight=-INF), "'loss_weight' must be finite (got -inf)"),
    (expert(gradient_scale=NAN), "'gradient_scale' must be finite (got nan)"),
    (expert(gradient_scale=INF), "'gradient_scale' must be finite (got inf)"),
    (expert(parent=""), "'parent' must be a non-empty string (got '')"),
    (of_level(name=""), "'name' must be a non-empty string (got '')"),
    (of_level(fallback_expert=""), "'fallback_expert' must be a non-empty string (got '')"),
    (config(hidden_size=0), "'hidden_size' must be at least 1 (got 0)"),
    (config(hidden_size=-1), "'hidden_size' must be at least 1 (got -1)"),
    (config(fusion_dropout=NAN), "'fusion_dropout' must be finite (got nan)"),
    (config(fusion_dropout=-0.1), "'fusion_dropout' must be between 0 and 1 (got -0.1)"),
    (config(fusion_dropout=1.5), "'fusion_dropout' must be between 0 and 1 (got 1.5)"),
    (config(fusion_max_positions=0), "'fusion_max_positions' must be at least 1 (got 0)"),
    (
        config(fusion_type="positon_aware"),
        "'fusion_type' must be one of 'learned', 'position_aware' (got 'positon_aware')",
    ),
    (config(fusion_type=None), "'fusion_type' must be one of 'learned', 'position_aware' (got None)"),
    (config(fusion_type=["learned"]), "'fusion_type' must be one of 'learned', 'position_aware' (got ['learned'])"),
]


@pytest.mark.parametrize(("make", "message"), TYPES, ids=[message for _, message in TYPES])
def test_fields_of_the_wrong_kind(make, message):
    with pytest.raises(ConfigTypeError) as caught:
        make()
    assert_error(caught.value, ConfigTypeError, TypeError, message)


@pytest.mark.parametrize(("make", "message"), VALUES, ids=[message for _, message in VALUES])
def test_fields_out_of_range(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert_error(caught.value, ConfigError, ValueError, message)


def test_positional_calls_written_for_the_other_version():
    with pytest.raises(ConfigTypeError, match=r"gradient_scale=0\.5$"):
        ExpertConfig("e", 1.0, False, 0.5)
    with pytest.raises(ConfigTypeError, match=r"gradient_scale=0$"):
        ExpertConfig("e", 1.0, False, 0)
    with pytest.raises(ConfigTypeError, match=r"fusion_type='learned'$"):
        CELMoEConfig(WIDTH, [], True, "learned")
    for call in (lambda: ExpertConfig("e", 1.0, False, 0.5, {}), lambda: CELMoEConfig(WIDTH, [], True, "learned", 0.1)):
        with pytest.raises(TypeError, match="positional argument"):
            call()


def test_a_refused_assignment_leaves_the_old_value():
    one = ExpertConfig("e", loss_weight=2.0)
    with pytest.raises(ConfigError):
        one.loss_weight = NAN
    assert one.loss_weight == 2.0
    with pytest.raises(ConfigError):
        dataclasses.replace(one, gradient_scale=INF)
    whole = two_levels()
    with pytest.raises(ConfigTypeError):
        whole.hidden_size = "64"
    assert whole == two_levels()


def test_what_is_accepted():
    ExpertConfig("", 0, False, MappingProxyType({}), gradient_scale=-3)
    ExpertConfig("e", np.float32(0.5), gradient_scale=Fraction(1, 2))
    ExpertConfig("e", -1.0)
    HierarchyLevelConfig("l", MappingProxyType({"e": ExpertConfig("e")}))
    CELMoEConfig(np.int64(4), fusion_dropout=0, fusion_max_positions=np.int32(3))
    CELMoEConfig(4, fusion_dropout=1)
    for name in ("é", "\n", "a.b", "to", " ", "\ud800"):
        HierarchyLevelConfig(name, {name: ExpertConfig(name, parent=name)}, name)


def test_levels_may_be_any_sequence():
    levels = tuple(two_levels().levels)
    assert build(CELMoEConfig(WIDTH, levels))(rows(), GOOD).fused_hidden.shape == (3, WIDTH)


def test_what_was_not_given_survives_replace():
    one = dataclasses.replace(ExpertConfig("e", stop_gradient_from_parent=True), loss_weight=2.0)
    assert one.gradient_scale is None
    assert one.input_gradient_scale == 0.0
    assert dataclasses.replace(one, gradient_scale=0.25).input_gradient_scale == 0.25
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one


# Structure, seen when a model or compiler is built


def levels(*each):
    return CELMoEConfig(WIDTH, list(each))


def children(disabled=False, **parents):
    above = level("family", ("slavic", "romance"), enabled=not disabled)
    experts = {name: ExpertConfig(name, parent=parent) for name, parent in parents.items()}
    return levels(level("all", ("all",)), above, HierarchyLevelConfig("language", experts))


def with_experts(experts, **fields):
    return levels(HierarchyLevelConfig("l", experts, **fields))


STRUCTURES = {
    "no level": (
        levels(),
        (ConfigError, ValueError),
        "'levels' must hold at least one enabled level (got none)",
    ),
    "all disabled": (
        levels(level("a", enabled=False), level("b", enabled=False)),
        (ConfigError, ValueError),
        "'levels' must hold at least one enabled level (got 2, all disabled)",
    ),
    "one disabled": (
        levels(level("a", enabled=False)),
        (ConfigError, ValueError),
        "'levels' must hold at least one enabled level (got 1, all disabled)",
    ),
    "two of one name": (
        levels(level("a"), level("b"), level("a")),
        (ConfigError, ValueError),
        "'levels' must have distinct names (got 'a' more than once)",
    ),
    "more of one name": (
        levels(level("b"), level("a"), level("a"), level("b"), level("c")),
        (ConfigError, ValueError),
        "'levels' must have distinct names (got 'a', 'b' more than once)",
    ),
    "no expert": (
        with_experts({}),
        (ConfigError, ValueError),
        "\"levels['l'].experts\" must hold at least one expert (got none)",
    ),
    "empty name": (
        with_experts({"": ExpertConfig("x")}),
        (ConfigError, ValueError),
        "\"a name in levels['l'].experts\" must be a non-empty string (got '')",
    ),
    "number for a name": (
        with_experts({1: ExpertConfig("1")}),
        (ConfigTypeError, TypeError),
        "\"a name in levels['l'].experts\" must be a string (got 1)",
    ),
    "no ExpertConfig": (
        with_experts({"x": {"name": "x"}}),
        (ConfigTypeError, TypeError),
        "\"levels['l'].experts['x']\" must be an ExpertConfig (got {'name': 'x'})",
    ),
    "no level config": (
        levels(level("a"), "b"),
        (ConfigTypeError, TypeError),
        "'levels[1]' must be a HierarchyLevelConfig (got 'b')",
    ),
    "parent on the first level": (
        with_experts({"x": ExpertConfig("x", parent="y")}),
        (ConfigError, ValueError),
        "'parent' of expert 'x' in level 'l' must be None, for there is no level above (got 'y')",
    ),
    "unknown parent": (
        children(ru="slavik", fr="romance"),
        (ConfigError, ValueError),
        (
            "'parent' of expert 'ru' in level 'language' must be an expert of level 'family' "
            "(got 'slavik'; nearest: 'slavic')"
        ),
    ),
    "several unknown parents": (
        children(ru="slavik", fr="romanc"),
        (ConfigError, ValueError),
        (
            "'parent' of experts 'ru', 'fr' in level 'language' must be an expert of level 'family' "
            "(got 'slavik', 'romanc'; nearest to 'slavik': 'slavic'; nearest to 'romanc': 'romance')"
        ),
    ),
    "parent two levels up": (
        children(ru="all"),
        (ConfigError, ValueError),
        (
            "'parent' of expert 'ru' in level 'language' must be an expert of level 'family' "
            "(got 'all'; known: 'slavic', 'romance')"
        ),
    ),
    "parent past a disabled level": (
        children(disabled=True, ru="all"),
        (ConfigError, ValueError),
        (
            "'parent' of expert 'ru' in level 'language' must be an expert of level 'family' "
            "(got 'all'; known: 'slavic', 'romance')"
        ),
    ),
    "parent of a disabled level's expert": (
        levels(
            level("all", ("one", "two")),
            HierarchyLevelConfig("mid", {"m": ExpertConfig("m", parent="three")}, enabled=False),
            level("low"),
        ),
        (ConfigError, ValueError),
        ("'parent' of expert 'm' in level 'mid' must be an expert of level 'all' (got 'three'; known: 'one', 'two')"),
    ),
    "no config": (
        {"hidden_size": 4},
        (ConfigTypeError, TypeError),
        "'config' must be a CELMoEConfig (got {'hidden_size': 4})",
    ),
}


@pytest.mark.parametrize("case", STRUCTURES)
def test_structures_that_are_refused(case):
    whole, (kind, builtin), message = STRUCTURES[case]
    calls = []
    for make in (RoutingCompiler, lambda config: HierarchicalCELMoE(config, lambda *names: calls.append(names))):
        with pytest.raises(kind) as caught:
            make(whole)
        assert_error(caught.value, kind, builtin, message)
    assert not calls


def test_an_empty_config_may_be_filled_first():
    whole = CELMoEConfig(WIDTH)
    whole.levels.append(HierarchyLevelConfig("family", {}))
    whole.levels[0].experts["slavic"] = ExpertConfig("slavic")
    whole.levels.append(level("language", ("ru", "de", "fr")))
    assert build(whole).compile_routing({"language": ["ru"]}).routes("family") == ["slavic"]
    assert CELMoEConfig(WIDTH).levels == []


def test_disabled_levels_may_be_empty_or_share_a_name():
    whole = levels(HierarchyLevelConfig("x", {}, enabled=False), level("y", ("a",)), level("y", ("b",), enabled=False))
    assert [each.name for each in build(whole).levels] == ["y"]


# Factory, fusion and engine


class Builder:
    def __call__(self, level_name, name, metadata):
        return None


FACTORIES = {
    "None": (lambda *_: None, "got NoneType"),
    "class": (lambda *_: nn.Linear, "got the class Linear"),
    "function": (lambda *_: torch.relu, "got builtin_function_or_method"),
    "lambda": (lambda *_: lambda batch: batch, "got function"),
    "list": (lambda *_: [nn.Linear(4, 4)], "got list"),
    "tensor": (lambda *_: torch.zeros(3), "got Tensor"),
    "object": (Builder(), "got NoneType"),
}


@pytest.mark.parametrize("case", FACTORIES)
def test_factories_that_return_no_module(case):
    factory, got = FACTORIES[case]
    with pytest.raises(ConfigTypeError) as caught:
        HierarchicalCELMoE(two_levels(), factory)
    message = f"'expert_factory' must return a torch.nn.Module ({got} for expert 'slavic' of level 'family')"
    assert_error(caught.value, ConfigTypeError, TypeError, message)


@pytest.mark.parametrize("factory", [None, "Linear", {}])
def test_factories_that_cannot_be_called(factory):
    with pytest.raises(ConfigTypeError) as caught:
        HierarchicalCELMoE(two_levels(), factory)
    assert_error(caught.value, ConfigTypeError, TypeError, f"'expert_factory' must be callable (got {factory!r})")


def test_a_factory_that_raises_is_not_disguised():
    error = KeyError("size")

    def factory(*_):
        raise error

    with pytest.raises(KeyError) as caught:
        HierarchicalCELMoE(two_levels(), factory)
    assert caught.value is error


def test_the_factory_is_called_once_an_expert_in_the_configs_order():
    whole = levels(
        level("b", ("z", "a")),
        level("off", enabled=False),
        HierarchyLevelConfig("a", {"k": ExpertConfig("name differs", metadata={"depth": 2})}),
    )
    calls = []
    HierarchicalCELMoE(whole, lambda *names: calls.append(names) or Counting())
    assert calls == [("b", "z", {}), ("b", "a", {}), ("a", "k", {"depth": 2})]
    assert calls[2][2] is whole.levels[2].experts["k"].metadata


@pytest.mark.parametrize("fusion", ["learned", 1, True, [nn.Identity()]])
def test_fusions_that_cannot_be_called(fusion):
    with pytest.raises(ConfigTypeError) as caught:
        build(fusion_module=fusion)
    message = f"'fusion_module' must be a torch.nn.Module, or a callable that is no class (got {fusion!r})"
    assert_error(caught.value, ConfigTypeError, TypeError, message)


def test_a_class_is_no_fusion():
    with pytest.raises(ConfigTypeError) as caught:
        build(fusion_module=nn.Identity)
    message = f"'fusion_module' must be a torch.nn.Module, or a callable that is no class (got {nn.Identity!r})"
    assert_error(caught.value, ConfigTypeError, TypeError, message)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("loop", "got 'loop'; nearest: 'looped'"),
        ("LOOPED", "got 'LOOPED'; nearest: 'looped', 'grouped'"),
        ("", "got ''; known: {known}"),
        (None, "got None; known: {known}"),
        (1, "got 1; known: {known}"),
    ],
)
def test_unknown_engines(engine, words, monkeypatch):
    from celmoe.engines.registry import ENGINES

    monkeypatch.delenv("CELMOE_ENGINE", raising=False)
    known = ", ".join(repr(name) for name in ENGINES)
    calls = []
    with pytest.raises(EngineError) as caught:
        HierarchicalCELMoE(two_levels(), lambda *names: calls.append(names), engine=engine)
    message = f"'engine' must be one of {known} ({words.format(known=known)})"
    assert_error(caught.value, EngineError, ValueError, message)
    assert not calls


def test_an_engine_set_later_is_checked_too():
    from celmoe.engines.registry import ENGINES

    model = build()
    with pytest.raises(EngineError, match="'engine' must be one of"):
        model.engine = "fast"
    model.engine = "auto"
    assert model.engine in ENGINES
    assert model(rows(), GOOD).fused_hidden.shape == (3, WIDTH)


def test_the_engine_of_the_environment(monkeypatch):
    from celmoe.engines.registry import ENGINES

    for value, engine in (("looped", "looped"), ("", None), ("auto", None)):
        monkeypatch.setenv("CELMOE_ENGINE", value)
        assert build().engine == (engine or build(engine="auto").engine)
    known = ", ".join(repr(name) for name in ENGINES)
    for value in ("Looped", "fast", " looped"):
        monkeypatch.setenv("CELMOE_ENGINE", value)
        with pytest.raises(EngineError) as caught:
            build()
        assert str(caught.value).startswith(f"'CELMOE_ENGINE' must be one of {known} (got {value!r}; ")
    # The environment does not decide for an engine asked for by name, nor for a model that exists.
    monkeypatch.setenv("CELMOE_ENGINE", "looped")
    model = build()
    monkeypatch.setenv("CELMOE_ENGINE", "nonsense")
    assert model(rows(), GOOD).fused_hidden.shape == (3, WIDTH)
    assert build(engine="looped").engine == "looped"


def test_the_engine_is_keyword_only():
    with pytest.raises(TypeError, match="positional argument"):
        HierarchicalCELMoE(two_levels(), lambda *_: Counting(), None, "looped")


# Losses

WEIGHTS = [
    (NAN, ConfigError, ValueError, "'weight' must be finite (got nan)"),
    (INF, ConfigError, ValueError, "'weight' must be finite (got inf)"),
    (None, ConfigTypeError, TypeError, "'weight' must be a number (got None)"),
    ("1", ConfigTypeError, TypeError, "'weight' must be a number (got '1')"),
    (True, ConfigTypeError, TypeError, "'weight' must be a number (got True)"),
]


@pytest.mark.parametrize(("weight", "kind", "builtin", "message"), WEIGHTS, ids=[repr(each[0]) for each in WEIGHTS])
def test_weights_of_losses(weight, kind, builtin, message):
    api, bundle = CELMoELossAPI(), LossBundle()
    one = torch.tensor(1.0)
    for call in (
        lambda: api.add_global("x", print, weight),
        lambda: api.add_level("family", "x", print, weight),
        lambda: api.add_bridge("family", "language", "x", print, weight),
        lambda: bundle.add("x", one, weight),
        lambda: LossTerm("x", one, weight),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert_error(caught.value, kind, builtin, message)
    assert api.global_losses == api.bridge_losses == bundle.terms == []
    assert api.level_losses == {}


@pytest.mark.parametrize("value", [None, [1.0], "1.0", 1j])
def test_loss_values_that_are_neither_tensor_nor_number(value):
    with pytest.raises(InputTypeError) as caught:
        LossBundle().add("x", value)
    message = f"'value' of loss 'x' must be a tensor or a number (got {value!r})"
    assert_error(caught.value, InputTypeError, TypeError, message)


@pytest.mark.parametrize("value", [1.5, 2, np.float32(2), np.float64(2)])
def test_numbers_are_loss_values(value):
    """celmoe-vp sums them, unless they come first."""
    bundle = LossBundle()
    bundle.add("x", value, 2.0)
    bundle.add("y", torch.tensor(1.0))
    assert bundle.total == 2 * value + 1
    assert bundle.as_dict() == {"x": value, "y": 1.0}
    assert LossBundle([LossTerm("x", value)]).as_dict() == {"x": value}


def test_loss_values_that_are_no_scalars():
    bundle = LossBundle()
    bundle.add("x", torch.ones(1))
    assert bundle.as_dict() == {"x": 1.0}
    bundle.add("y", torch.ones(2, 3))
    with pytest.raises(ValueError) as caught:
        bundle.as_dict()
    assert str(caught.value) == "'value' of loss 'y' must be a scalar (got shape (2, 3))"


def test_a_bundle_without_terms():
    for bundle in (LossBundle(), LossBundle([]), CELMoELossAPI().compute(quiet())):
        with pytest.raises(ValueError, match=r"^'terms' must hold at least one loss term \(got none\)$"):
            _ = bundle.total
        assert bundle.as_dict() == {}


def quiet():
    output = build()(rows(), GOOD)
    output.losses.clear()
    return output


def test_losses_of_unknown_levels():
    output = build()(rows(), GOOD)
    for register, name, who in (
        (lambda api: api.add_level("familly", "size", print), "familly", "level loss 'size'"),
        (lambda api: api.add_bridge("familly", "language", "tie", print), "familly", "bridge loss 'tie'"),
        (lambda api: api.add_bridge("language", "familly", "tie", print), "familly", "bridge loss 'tie'"),
    ):
        api = CELMoELossAPI()
        ran = []
        api.add_global("first", lambda *_, ran=ran: ran.append(1) or torch.tensor(1.0))
        register(api)
        with pytest.raises(UnknownLevelError) as caught:
            api.compute(output)
        message = f"{who} must be registered for levels of the output (got {name!r}; nearest: 'family')"
        assert_error(caught.value, UnknownLevelError, KeyError, message)
        assert not ran


def test_losses_of_several_unknown_levels():
    api = CELMoELossAPI()
    api.add_level("familly", "size", print)
    api.add_bridge("familly", "langage", "tie", print)
    with pytest.raises(UnknownLevelError) as caught:
        api.compute(build()(rows(), GOOD))
    message = (
        "level loss 'size', bridge loss 'tie' must be registered for levels of the output (got 'familly', 'langage'; "
        "nearest to 'familly': 'family'; nearest to 'langage': 'language')"
    )
    assert_error(caught.value, UnknownLevelError, KeyError, message)


def test_flags_from_numpy_are_flags():
    made = ExpertConfig("e", stop_gradient_from_parent=np.bool_(True))
    assert made.stop_gradient_from_parent is True
    assert CELMoEConfig(4, use_learned_fusion=np.bool_(False)).use_learned_fusion is False


@pytest.mark.parametrize("wrong", [0.5, None, "loss"])
def test_losses_that_cannot_be_called(wrong):
    api = CELMoELossAPI()
    for add in (
        lambda: api.add_global("x", wrong),
        lambda: api.add_level("level", "x", wrong),
        lambda: api.add_bridge("upper", "lower", "x", wrong),
    ):
        with pytest.raises(ConfigTypeError) as caught:
            add()
        assert str(caught.value) == f"'fn' of loss 'x' must be callable (got {wrong!r})"
    assert [api.global_losses, api.level_losses, api.bridge_losses] == [[], {}, []]


def test_a_bundle_without_terms_has_no_total():
    with pytest.raises(InputError, match="'terms' must hold at least one loss term"):
        LossBundle().total  # noqa: B018
