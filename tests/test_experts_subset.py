"""Smaller models: which experts they have, that they compute the same, and that they share nothing."""

from __future__ import annotations

import random

import pytest
import torch

import celmoe
from celmoe import (
    CELMoEConfig,
    ConfigError,
    ConfigTypeError,
    ExpertConfig,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    InputTypeError,
    LearnedFusion,
    MissingRouteError,
    UnknownExpertError,
    UnknownLevelError,
)
from tests.lifecycle import WIDTH, Wide, build, factory


def names_of(model: HierarchicalCELMoE) -> dict[str, list[str]]:
    found = {level.name: [*level.experts] for level in model.config.levels}
    assert {level.name: [*model.level_modules[level.name]] for level in model.levels} == {
        level.name: found[level.name] for level in model.levels
    }
    return found


@pytest.mark.parametrize("is_stacked", [False, True])
def test_parents_are_included(is_stacked):
    model = build(is_stacked=is_stacked)
    one = model.subset({"language": ["it"]})
    assert names_of(one) == {"family": ["romance"], "language": ["it"]}
    hidden = torch.randn(3, WIDTH, dtype=torch.float64)
    assert torch.equal(one(hidden).fused_hidden, model(hidden, {"language": "it"}).fused_hidden)
    assert type(one.level_modules["language"]["it"]) is Wide
    mine = {each.untyped_storage().data_ptr() for each in (*one.parameters(), *one.buffers())}
    theirs = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    assert not mine & theirs
    assert sum(each.untyped_storage().nbytes() for each in one.parameters()) == sum(
        each.nbytes for each in one.parameters()
    )
    one.add_expert("language", "x", ExpertConfig("x", parent="romance"))
    assert "x" not in model.levels[1].experts
    one.config.levels[1].experts["it"].loss_weight = 2.0
    assert model.levels[1].experts["it"].loss_weight == 1.0


def test_patterns_and_names():
    model = build(is_stacked=False)
    assert names_of(model.subset({"language": "?u"})) == {"family": ["slavic", "other"], "language": ["ru", "hu"]}
    assert names_of(model.subset({"language": ["it", "p*"]}))["language"] == ["pl", "it"]
    config = CELMoEConfig.from_tree(["a[b]", "ab", "*"], ["l"], WIDTH)
    odd = HierarchicalCELMoE(config, factory)
    assert names_of(odd.subset({"l": ["*"]})) == {"l": ["*"]}
    assert names_of(odd.subset({"l": ["a[b]"]})) == {"l": ["a[b]"]}


def test_levels_below_keep_the_children():
    model = build(is_stacked=False)
    model.add_expert("language", "xx", ExpertConfig("xx"))
    found = names_of(model.subset({"family": ["slavic"]}))
    assert found == {"family": ["slavic"], "language": ["ru", "pl", "uk", "xx"]}


def test_experts_without_a_parent_keep_the_fallback():
    model = build(is_stacked=False)
    model.add_expert("language", "xx", ExpertConfig("xx"))
    for experts in ({"language": ["xx", "it"]}, {"language": ["xx", "it"], "family": ["romance"]}):
        one = model.subset(experts)
        assert names_of(one) == {"family": ["romance", "other"], "language": ["it", "xx"]}
        hidden = torch.randn(2, WIDTH, dtype=torch.float64)
        routes = {"language": ["xx", "it"]}
        assert torch.equal(one(hidden, routes).fused_hidden, model(hidden, routes).fused_hidden)


def test_without_a_fallback_the_level_stays_whole():
    model = build(is_stacked=False)
    model.add_expert("language", "xx", ExpertConfig("xx"))
    model.levels[0].fallback_expert = None
    one = model.subset({"language": ["xx"]})
    assert names_of(one) == {"family": ["slavic", "romance", "other"], "language": ["xx"]}
    with pytest.raises(MissingRouteError):
        one(torch.zeros(1, WIDTH, dtype=torch.float64))


def test_a_fallback_that_is_not_kept_is_none():
    model = build(is_stacked=False)
    assert [level.fallback_expert for level in model.subset({"language": ["ru", "it"]}).levels] == [None, None]
    assert [level.fallback_expert for level in model.subset({"language": ["ru", "fi"]}).levels] == ["other", None]


def test_disabled_levels_lead_up():
    levels = [
        HierarchyLevelConfig("top", {"t": ExpertConfig("t"), "u": ExpertConfig("u")}),
        HierarchyLevelConfig(
            "off", {"m": ExpertConfig("m", parent="u"), "n": ExpertConfig("n", parent="t")}, enabled=False
        ),
        HierarchyLevelConfig("low", {"x": ExpertConfig("x", parent="m"), "y": ExpertConfig("y", parent="n")}),
        HierarchyLevelConfig("end", {"z": ExpertConfig("z", parent="y")}, enabled=False),
    ]
    model = HierarchicalCELMoE(CELMoEConfig(WIDTH, levels), factory).eval()
    one = model.subset({"low": ["x"]})
    assert names_of(one) == {"top": ["u"], "off": ["m"], "low": ["x"], "end": []}
    hidden = torch.randn(2, WIDTH)
    assert torch.equal(one(hidden).fused_hidden, model(hidden, {"low": "x"}).fused_hidden)
    with pytest.raises(UnknownLevelError):
        model.subset({"off": ["m"]})


def test_the_rest_of_the_model_is_kept():
    class Own(HierarchicalCELMoE):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.head = torch.nn.Linear(WIDTH, 2)
            self.note = ["a"]

    shared = Wide()
    config = CELMoEConfig.from_tree(["a", "b", "c"], ["l"], WIDTH)
    model = Own(config, lambda *_: shared, LearnedFusion(WIDTH, 1, 0.5), engine="looped").eval()
    model.freeze("l", "a")
    one = model.subset({"l": ["a", "c"]})
    assert type(one) is Own
    assert one.engine == "looped"
    assert not any(module.training for module in one.modules())
    assert one.level_modules["l"]["a"] is one.level_modules["l"]["c"] is not shared
    assert torch.equal(one.head.weight, model.head.weight)
    assert one.note is not model.note
    assert not one.level_modules["l"]["a"].up.weight.requires_grad
    one.unfreeze("l", "a")
    assert one.level_modules["l"]["a"].up.weight.requires_grad
    assert not shared.up.weight.requires_grad


def test_frozen_members_of_stacks_stay_frozen():
    model = build(is_stacked=True)
    model.freeze("language", "ru")
    one = model.subset({"language": ["ru", "uk"]})
    assert [one.level_modules["language"][name].up.weight.requires_grad for name in ("ru", "uk")] == [False, True]
    one.unfreeze("language")
    assert one.level_modules["language"]["ru"].up.weight.requires_grad
    assert celmoe.stack_experts(one).classes


@pytest.mark.parametrize("seed", range(20))
def test_a_random_subset_computes_the_same(seed):
    draw = random.Random(seed)
    model = build(is_stacked=bool(seed % 2))
    for number in range(2):
        model.add_expert("language", f"x{number}", ExpertConfig("x"))
    names = draw.sample([*model.levels[1].experts], draw.randint(1, 5))
    one = model.subset({"language": names})
    routes = {"language": draw.choices(names, k=6)}
    hidden = torch.randn(6, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(one(hidden, routes).fused_hidden, model(hidden, routes).fused_hidden, rtol=0, atol=1e-12)
    again = HierarchicalCELMoE(one.config, factory, engine="looped").double()
    again.load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("experts", "kind", "words"),
    [
        ({}, ConfigTypeError, "'experts' must map levels to names of experts, at least one (got {})"),
        (["it"], ConfigTypeError, "'experts' must map"),
        ({"languages": ["it"]}, UnknownLevelError, "(got 'languages'; nearest: 'language')"),
        ({"language": []}, ConfigTypeError, "\"experts['language']\" must be names of experts, at least one (got [])"),
        ({"language": 3}, ConfigTypeError, "must be names of experts"),
        ({"language": ["itt"]}, UnknownExpertError, "(got 'itt'; nearest: 'it'"),
        ({"language": ["it", 3]}, InputTypeError, "'pattern' must be a string (got 3)"),
    ],
)
def test_what_is_refused(experts, kind, words):
    with pytest.raises(kind) as error:
        build(is_stacked=False).subset(experts)
    assert words in str(error.value)


def test_a_level_without_experts_is_refused():
    levels = [
        HierarchyLevelConfig("top", {"t": ExpertConfig("t"), "u": ExpertConfig("u")}),
        HierarchyLevelConfig("low", {"x": ExpertConfig("x", parent="t")}),
    ]
    model = HierarchicalCELMoE(CELMoEConfig(WIDTH, levels), factory)
    with pytest.raises(ConfigError, match=r"'experts' must leave an expert to each level \(got none for 'low'"):
        model.subset({"top": ["u"]})
