"""Every refused config, factory, fusion, engine, loss weight and loss, to the letter."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pytest
import torch

from celmoe import (
    CELMoEConfig,
    ConfigError,
    ConfigTypeError,
    ExpertConfig,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    RoutingCompiler,
)
from tests.config_errors import INF, NAN, levels
from tests.refusals import GOOD, WIDTH, assert_error, build, level, rows, two_levels


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
