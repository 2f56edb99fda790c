"""A plan belongs to a config: which changes of the config a plan outlives, and how others are told."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celmoe import CELMoEConfig, ExpertConfig, HierarchyLevelConfig, PlanError, RoutingCompiler, reference
from celmoe.routing.layout import Layout, LevelLayout
from tests.refusals import WIDTH, build, rows
from tests.strategies import cases, examples

ROUTES = {"area": ["west", "east"], "family": ["slavic", "romance"], "language": ["ru", "fr"]}


def three_levels(*, middle=True, **parents):
    """Areas, families (enabled or not) and languages; keywords give parents other than the usual ones."""
    usual = {"slavic": "east", "romance": "west", "ru": "slavic", "fr": "romance"} | parents
    levels = {"area": ("east", "west"), "family": ("slavic", "romance"), "language": ("ru", "fr")}
    return CELMoEConfig(
        WIDTH,
        [
            HierarchyLevelConfig(
                name,
                {each: ExpertConfig(each, parent=usual.get(each)) for each in experts},
                enabled=middle or name != "family",
            )
            for name, experts in levels.items()
        ],
    )


def reversed_experts(config):
    config.levels[2].experts = dict(reversed(config.levels[2].experts.items()))


def without_level(config):
    del config.levels[0]
    for expert in config.levels[0].experts.values():
        expert.parent = None


# A change of the config, with the first difference and the plan's value in words.
CHANGES = {
    "a parent": (
        lambda config: setattr(config.levels[2].experts["fr"], "parent", "slavic"),
        "parent 'slavic' for expert 'fr' of level 'language' (got one with 'romance')",
    ),
    "no parent": (
        lambda config: setattr(config.levels[1].experts["slavic"], "parent", None),
        "parent None for expert 'slavic' of level 'family' (got one with 'east')",
    ),
    "a fallback": (
        lambda config: setattr(config.levels[0], "fallback_expert", "west"),
        "fallback_expert 'west' in level 'area' (got one with None)",
    ),
    "a level disabled": (
        lambda config: setattr(config.levels[1], "enabled", False),
        "levels 'area', 'language' (got one with 'area', 'family', 'language')",
    ),
    "a level gone": (
        without_level,
        "levels 'family', 'language' (got one with 'area', 'family', 'language')",
    ),
    "a level renamed": (
        lambda config: setattr(config.levels[2], "name", "tongue"),
        "levels 'area', 'family', 'tongue' (got one with 'area', 'family', 'language')",
    ),
    "order of experts": (
        reversed_experts,
        "expert 'fr' at position 0 of level 'language' (got one with 'ru')",
    ),
    "an expert more": (
        lambda config: config.levels[2].experts.update(it=ExpertConfig("it")),
        "3 experts in level 'language' (got one with 2; only there: none; missing there: 'it')",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_plan_of_another_config_is_refused(change):
    alter, words = CHANGES[change]
    plan = RoutingCompiler(three_levels())(ROUTES)
    config = three_levels()
    alter(config)
    model = build(config)
    message = f"'routing' must be a plan of a config with {words}; compile the routing again"
    for each in (plan, pickle.loads(pickle.dumps(plan)), plan.to("meta")):
        for call in (model.compile_routing, RoutingCompiler(config), lambda plan: model(rows(2), plan), model.explain):
            with pytest.raises(PlanError) as caught:
                call(each)
            assert str(caught.value) == message
    with pytest.raises(ValueError, match="the plan is for"):
        reference.reference_forward(model, rows(2), plan)


def test_parents_count_through_disabled_levels():
    plan = RoutingCompiler(three_levels(middle=False))({"language": ["ru", "fr"]})
    assert plan.routes("area") == ["east", "west"]
    for changed in ({"slavic": "west"}, {"ru": "romance"}):
        model = build(three_levels(middle=False, **changed))
        with pytest.raises(PlanError, match="parent 'west' for expert 'ru' of level 'language'"):
            model(rows(2), plan)
    same = three_levels(middle=False, slavic="west", romance="east", ru="romance", fr="slavic")
    assert build(same).compile_routing(plan) is plan


def test_flags_and_metadata_are_no_part_of_a_plan():
    config = three_levels()
    plan = RoutingCompiler(config)(ROUTES)
    for level in config.levels:
        for expert in level.experts.values():
            expert.stop_gradient_from_parent, expert.loss_weight, expert.metadata = True, 2.0, {"any": "thing"}
            expert.name = "another label"
    assert build(config)(rows(2), plan).levels["language"].routes == ["ru", "fr"]


def test_a_plan_from_before_a_fallback_was_set_is_refused_until_it_is_set_back():
    config = three_levels()
    model = build(config)
    before = model.compile_routing(ROUTES)
    config.levels[2].fallback_expert = "ru"
    with pytest.raises(PlanError, match=r"fallback_expert 'ru' in level 'language' \(got one with None\)"):
        model(rows(2), before)
    after = model.compile_routing(ROUTES)
    assert model.compile_routing(after) is after
    config.levels[2].fallback_expert = None
    assert model.compile_routing(before) is before
    with pytest.raises(PlanError, match=r"fallback_expert None in level 'language' \(got one with 'ru'\)"):
        model(rows(2), after)


def test_a_compiler_that_was_sent_away_keeps_the_fallback_of_then():
    config = three_levels()
    model, sent = build(config), pickle.loads(pickle.dumps(RoutingCompiler(config)))
    config.levels[0].fallback_expert = "west"
    with pytest.raises(PlanError, match="fallback_expert 'west'"):
        model(rows(2), sent(ROUTES))


def test_a_copied_model_takes_the_plans_of_the_first():
    model = build(three_levels())
    plan = model.compile_routing(ROUTES)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.compile_routing(plan) is plan
        twin.levels[0].fallback_expert = "west"
        with pytest.raises(PlanError):
            twin.compile_routing(plan)
    assert model.compile_routing(plan) is plan


names = st.text(min_size=1, max_size=4)
maybe = st.none() | names


@st.composite
def level_layouts(draw):
    experts = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    return LevelLayout(draw(names), tuple(experts), tuple(draw(maybe) for _ in experts), draw(maybe))


layouts = st.lists(level_layouts(), min_size=1, max_size=3, unique_by=lambda level: level.name)


@given(layouts, layouts)
def test_layouts_are_equal_where_their_levels_are(one, other):
    assert Layout(one).levels == tuple(one)
    assert pickle.loads(pickle.dumps(Layout(one))) == Layout(one)
    assert (Layout(one) == Layout(other)) == (one == other)
    assert (Layout(one).difference(Layout(other)) is None) == (one == other)
    assert hash(Layout(one)) == hash(Layout(copy.deepcopy(one)))


@pytest.mark.parametrize("name", ["\ud83d\ude00", "\U0001f600", "\udc80", "\\u0041", "A", "é", "e\u0301", '"', "null"])
def test_names_that_look_alike_are_others(name):
    alike = ["\ud83d\ude00", "\U0001f600", "\udc80", "\\u0041", "A", "é", "e\u0301", '"', "null"]
    mine = Layout([LevelLayout("l", (name,), (None,), None)])
    assert [other for other in alike if mine == Layout([LevelLayout("l", (other,), (None,), None)])] == [name]
    assert mine.levels[0].experts == (name,)
    assert mine != Layout([LevelLayout("l", (name,), (name,), None)])


def test_a_plan_is_small():
    experts = {f"expert{number}": ExpertConfig("e", parent="a") for number in range(2_000)}
    config = CELMoEConfig(
        WIDTH, [HierarchyLevelConfig("up", {"a": ExpertConfig("a")}), HierarchyLevelConfig("l", experts)]
    )
    plan = RoutingCompiler(config)({"l": [0] * 8})
    assert len(pickle.dumps(plan)) < 20 * len(experts)


@examples(50)
@given(case=cases())
def test_any_plan_fits_its_config_made_anew(case):
    plan = RoutingCompiler(case.config())(case.routes(case.batch_size), case.batch_size)
    compiler = RoutingCompiler(case.config())
    assert compiler(pickle.loads(pickle.dumps(plan))).batch_size == plan.batch_size
    assert [level.name for level in plan.layout.levels] == list(plan.levels)
