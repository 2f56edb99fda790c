"""Configs as dicts that JSON gives back, and from trees of names."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from celmoe import CELMoEConfig, ConfigError, ConfigTypeError, ExpertConfig, HierarchyLevelConfig, RoutingCompiler

TREE = {"slavic": ["ru", "pl"], "romance": ["it"]}


def every_field() -> CELMoEConfig:
    """A config without a default left, with names that modules refuse, and an order that sorting changes."""
    families = {name: ExpertConfig(f"label of {name}", 0.5) for name in ("z.w", "to", "", "é")[:2]}
    languages = {
        "zh.Hant": ExpertConfig("x", np.float32(0.5), True, {"size": [1, {"a": None}], "b": "ü"}, parent="z.w"),
        "a": ExpertConfig("a", gradient_scale=1, parent="to"),
        "\ud800": ExpertConfig("b", gradient_scale=np.float64(0.25)),
    }
    levels = [
        HierarchyLevelConfig("family", families, "to"),
        HierarchyLevelConfig("between", {"z.w": ExpertConfig("z"), "to": ExpertConfig("t")}, enabled=False),
        HierarchyLevelConfig("language", languages, "a"),
    ]
    return CELMoEConfig(
        np.int64(8), levels, False, 0.25, fusion_type="position_aware", fusion_max_positions=np.int32(3)
    )


@pytest.mark.parametrize("sort_keys", [False, True])
def test_json_gives_a_config_back(sort_keys):
    config = every_field()
    again = CELMoEConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=sort_keys)))
    assert again == config
    assert [[*level.experts] for level in again.levels] == [[*level.experts] for level in config.levels]
    assert RoutingCompiler(again).layout == RoutingCompiler(config).layout
    assert config.to_dict() == again.to_dict()


def test_an_empty_config_and_defaults():
    assert CELMoEConfig.from_dict(CELMoEConfig(4).to_dict()) == CELMoEConfig(4)
    level = {"name": "l", "order": ["a"], "experts": {"a": {"name": "a"}}}
    found = CELMoEConfig.from_dict({"hidden_size": 4, "levels": [level]})
    assert found == CELMoEConfig(4, [HierarchyLevelConfig("l", {"a": ExpertConfig("a")})])


def test_a_dict_shares_nothing_with_the_config():
    config = every_field()
    config.to_dict()["levels"][2]["experts"]["zh.Hant"]["metadata"]["size"].append(2)
    assert config == every_field()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ((1, 2), "got tuple (1, 2)"),
        ({"a": {1, 2}}, "metadata"),
        (np.float64(0.5), "got float64"),
        (lambda: None, "got function"),
        ({1: "a"}, "a mapping with keys 1"),
        (float("nan"), "must be finite, as JSON has it (got nan)"),
        ([1, [object()]], "['size'][1][0]"),
    ],
)
def test_metadata_that_json_does_not_give_back(value, words):
    level = HierarchyLevelConfig("l", {"a": ExpertConfig("a", metadata={"size": value})})
    with pytest.raises((ConfigTypeError, ConfigError)) as error:
        CELMoEConfig(4, [level]).to_dict()
    assert words in str(error.value)
    assert "levels['l'].experts" in str(error.value)


def _changed(*path: Any, value: Any) -> dict[str, Any]:
    data = CELMoEConfig.from_tree(TREE, ("family", "language"), 4).to_dict()
    place: Any = data
    for step in path[:-1]:
        place = place[step]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (3, "'data' must be a dict, as 'to_dict' gives it (got int)"),
        (_changed("hidden_size", value=KeyError), "'data' must have 'hidden_size'"),
        (_changed("hiddensize", value=4), "'data' must have known fields only (got 'hiddensize'"),
        (_changed("hidden_size", value="4"), "'hidden_size' must be an integer"),
        (_changed("levels", value={}), "'levels' must be a list of dicts"),
        (_changed("levels", 0, "order", value=KeyError), "'levels[0]' must have 'order'"),
        (_changed("levels", 0, "order", value=["slavic"]), "'levels[0].order' must have the name of each expert once"),
        (_changed("levels", 0, "order", value=["slavic"] * 2), "'levels[0].order' must have the name"),
        (
            _changed("levels", 0, "order", value=["slavic", "romanic"]),
            "'romanic' for 'slavic', 'romance')",
        ),
        (_changed("levels", 0, "order", value=["slavic", []]), "'levels[0].order' must have the name"),
        (_changed("levels", 0, "order", value="slavic"), "'levels[0].order' must be a list of names"),
        (_changed("levels", 1, "experts", value=["ru"]), "'levels[1].experts' must be a dict by name"),
        (_changed("levels", 1, "experts", "ru", "wait", value=1), "must have known fields only (got 'wait'"),
        (_changed("levels", 1, "experts", "ru", value=None), "must be a dict"),
        (_changed("levels", 1, "experts", "ru", "loss_weight", value=None), "'loss_weight' must be a number"),
        (_changed("levels", 1, "name", value=KeyError), "'levels[1]' must have 'name'"),
    ],
)
def test_dicts_that_are_refused(data, words):
    with pytest.raises((ConfigTypeError, ConfigError)) as error:
        CELMoEConfig.from_dict(data)
    assert words in str(error.value)


def test_a_tree():
    config = CELMoEConfig.from_tree(TREE, levels=("family", "language"), hidden_size=4, use_learned_fusion=False)
    families = {name: ExpertConfig(name) for name in ("slavic", "romance")}
    parents = {"ru": "slavic", "pl": "slavic", "it": "romance"}
    languages = {name: ExpertConfig(name, parent=parent) for name, parent in parents.items()}
    levels = [HierarchyLevelConfig("family", families), HierarchyLevelConfig("language", languages)]
    assert config == CELMoEConfig(4, levels, use_learned_fusion=False)


def test_trees_of_one_and_of_three_levels():
    one = CELMoEConfig.from_tree(["b", "a"], ["l"], 4)
    assert [*one.levels[0].experts] == ["b", "a"]
    tree = {"ie": {"slavic": ["ru"], "romance": []}, "uralic": {"finnic": ["fi"]}}
    three = CELMoEConfig.from_tree(tree, ["phylum", "family", "language"], 4)
    assert [*three.levels[1].experts] == ["slavic", "romance", "finnic"]
    assert three.levels[2].experts["fi"].parent == "finnic"
    assert three.levels[1].experts["finnic"].parent == "uralic"


@pytest.mark.parametrize(
    ("tree", "levels", "words"),
    [
        (TREE, "family", "'levels' must be a sequence of the levels' names"),
        (TREE, [], "'levels' must be a sequence of the levels' names, at least one (got [])"),
        (TREE, ["family"], "'tree' must have a list of the experts of level 'family', for there are 1 levels"),
        (TREE, ["a", "b", "c"], "'tree' must have a dict of the experts of level 'b' below 'slavic'"),
        (
            ["ru"],
            ["a", "b"],
            "must have a dict of the experts of level 'a', for there are 2 levels (got ['ru'])",
        ),
        ({"a": "ru"}, ["a", "b"], "a list of the experts of level 'b' below 'a', for there are 2 levels (got 'ru')"),
        ({"a": ["x"], "b": ["x"]}, ["f", "l"], "level 'l' once (got 'x' below 'a' and 'b')"),
        (["x", "x"], ["l"], "each expert of level 'l' once"),
        ([3], ["l"], "must be a string (got 3)"),
        ({"a": []}, ["f", "l"], "must hold at least one expert"),
        (TREE, ["l", "l"], "distinct names"),
    ],
)
def test_trees_that_are_refused(tree, levels, words):
    with pytest.raises((ConfigTypeError, ConfigError)) as error:
        CELMoEConfig.from_tree(tree, levels, 4)
    assert words in str(error.value)


def test_a_tree_has_its_levels_from_the_tree():
    with pytest.raises(TypeError, match="levels"):
        CELMoEConfig.from_tree(TREE, ("family", "language"), 4, levels=[])
