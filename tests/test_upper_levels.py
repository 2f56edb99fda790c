"""The routes of a level that the routing leaves out: parents, the only expert, the fallback; against a small model.

For each sample, in this order: the route that was given; the parent of its expert in the level below, climbed through
disabled levels by their experts' own parents; the only expert; the fallback; else an error.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from celmoe import CELMoEConfig, ExpertConfig, HierarchyLevelConfig, MissingRouteError, RoutingCompiler, reference
from tests.refusals import WIDTH, build, rows

pytestmark = pytest.mark.usefixtures("_as_few_and_as_many")


def level(name, parents, **fields):
    """A level from its experts' parents."""
    experts = {expert: ExpertConfig(expert, parent=parent) for expert, parent in parents.items()}
    return HierarchyLevelConfig(name, experts, **fields)


def compiler(*levels):
    return RoutingCompiler(CELMoEConfig(WIDTH, list(levels)))


ROOT = {"core": None}
FAMILY = {"slavic": "core", "romance": "core", "germanic": "core"}
LANGUAGE = {"ru": "slavic", "pl": "slavic", "fr": "romance", "de": None}


def test_parents_sample_by_sample():
    plan = compiler(level("root", ROOT), level("family", FAMILY), level("language", LANGUAGE))(
        {"language": ["fr", "ru", "pl", "fr"]}
    )
    assert plan.routes("family") == ["romance", "slavic", "slavic", "romance"]
    assert plan.routes("root") == ["core"] * 4


def test_parents_of_parents():
    roots = {"indo": None, "other": None}
    family = {"slavic": "indo", "romance": "indo", "turkic": "other"}
    language = {"ru": "slavic", "fr": "romance", "tr": "turkic"}
    plan = compiler(level("root", roots), level("family", family), level("language", language))(
        {"language": ["tr", "ru", "fr"]}
    )
    assert plan.routes("family") == ["turkic", "slavic", "romance"]
    assert plan.routes("root") == ["other", "indo", "indo"]


def test_explicit_routes_win_even_against_parents():
    compile_ = compiler(level("family", dict.fromkeys(FAMILY)), level("language", LANGUAGE))
    routing = {"family": ["germanic", "germanic"], "language": ["ru", "fr"]}
    assert compile_(routing).routes("family") == ["germanic", "germanic"]
    assert compile_({**routing, "family": "romance"}).routes("family") == ["romance"] * 2
    assert compile_({**routing, "family": [0, 2]}).routes("family") == ["slavic", "germanic"]


def test_the_fallback_is_only_for_samples_without_a_parent():
    family = level("family", dict.fromkeys(FAMILY), fallback_expert="germanic")
    plan = compiler(family, level("language", LANGUAGE))({"language": ["de", "ru", "de", "fr"]})
    assert plan.routes("family") == ["germanic", "slavic", "germanic", "romance"]
    assert plan.levels["family"].counts == (2, 1, 1)
    assert plan.levels["family"].present == ("germanic", "romance", "slavic")


def test_the_only_expert_comes_before_the_fallback():
    alone = level("family", {"slavic": None}, fallback_expert="nonsense")
    assert (
        compiler(alone, level("language", {"ru": "slavic", "de": None}))({"language": ["de", "ru"]}).routes("family")
        == ["slavic"] * 2
    )


def test_disabled_levels_are_climbed():
    roots = level("root", {"indo": None, "other": None})
    family = level("family", {"slavic": "indo", "turkic": "other", "lost": None}, enabled=False)
    language = level("language", {"ru": "slavic", "tr": "turkic", "xx": "lost", "yy": None})
    plan = compiler(roots, family, language)({"language": ["tr", "ru"]})
    assert list(plan.levels) == ["root", "language"]
    assert plan.routes("root") == ["other", "indo"]
    with pytest.raises(MissingRouteError, match=r"must have a parent: 'xx', 'yy'$"):
        compiler(roots, family, language)({"language": ["yy", "ru", "xx"]})
    two = level("group", {"east": "slavic", "oghuz": "turkic"}, enabled=False)
    language = level("language", {"ru": "east", "tr": "oghuz"})
    assert compiler(roots, family, two, language)({"language": ["tr", "ru"]}).routes("root") == ["other", "indo"]


def test_a_disabled_level_s_own_routes_do_not_count():
    roots = level("root", {"indo": None, "other": None})
    family = level("family", {"slavic": "indo", "turkic": "other"}, enabled=False)
    language = level("language", {"ru": "slavic", "tr": "turkic"})
    plan = compiler(roots, family, language)({"family": ["turkic", "turkic"], "language": ["ru", "ru"]})
    assert plan.routes("root") == ["indo", "indo"]


def test_a_broadcast_level_infers_the_one_above_it():
    compile_ = compiler(level("family", dict.fromkeys(FAMILY)), level("language", LANGUAGE))
    plan = compile_({"language": "fr"}, 3)
    assert plan.routes("family") == ["romance"] * 3
    fallback = level("language", LANGUAGE, fallback_expert="pl")
    assert compiler(level("family", dict.fromkeys(FAMILY)), fallback)(None, 2).routes("family") == ["slavic"] * 2
    only = level("language", {"ru": "romance"})
    assert compiler(level("family", dict.fromkeys(FAMILY)), only)(None, 2).routes("family") == ["romance"] * 2


def test_inference_needs_nothing_from_the_levels_further_down():
    """A gap in the middle is filled from the level right below it, whose own routes may come from anywhere."""
    compile_ = compiler(
        level("root", {"indo": None, "other": None}),
        level("family", {"slavic": "indo", "turkic": "other"}),
        level("language", {"ru": "slavic", "tr": "turkic"}),
    )
    plan = compile_({"family": ["turkic", "slavic"], "language": ["ru", "ru"]})
    assert plan.routes("root") == ["other", "indo"]


def test_an_empty_batch_infers_nothing():
    compile_ = compiler(level("family", dict.fromkeys(FAMILY)), level("language", dict.fromkeys(LANGUAGE)))
    assert compile_({"language": []}).routes("family") == []


def test_the_fallback_is_read_at_every_call():
    family = level("family", dict.fromkeys(FAMILY), fallback_expert="germanic")
    compile_ = compiler(family, level("language", LANGUAGE))
    assert compile_({"language": ["de"]}).routes("family") == ["germanic"]
    family.fallback_expert = "slavic"
    assert compile_({"language": ["de"]}).routes("family") == ["slavic"]
    family.fallback_expert = None
    with pytest.raises(MissingRouteError):
        compile_({"language": ["de"]})


def test_parents_are_read_when_the_compiler_is_made():
    config = CELMoEConfig(WIDTH, [level("family", dict.fromkeys(FAMILY)), level("language", LANGUAGE)])
    compile_ = RoutingCompiler(config)
    config.levels[1].experts["ru"].parent = "germanic"
    assert compile_({"language": ["ru"]}).routes("family") == ["slavic"]
    assert RoutingCompiler(config)({"language": ["ru"]}).routes("family") == ["germanic"]


def test_copies_infer_alike():
    compile_ = compiler(level("family", dict.fromkeys(FAMILY)), level("language", LANGUAGE))
    routing = {"language": ["ru", "fr"]}
    for each in (pickle.loads(pickle.dumps(compile_)), copy.deepcopy(compile_)):
        plan = pickle.loads(pickle.dumps(each(routing)))
        assert plan.routes("family") == ["slavic", "romance"]
        assert torch.equal(plan.levels["family"].order, compile_(routing).levels["family"].order)


# Against a model of the rule, sample by sample.


@dataclasses.dataclass
class Case:
    config: CELMoEConfig
    routing: dict
    batch_size: int


@st.composite
def cases(draw):
    batch_size = draw(st.integers(0, 6))
    levels, routing, above = [], {}, []
    for number in range(draw(st.integers(1, 4))):
        names = [f"{number}{letter}" for letter in "abcd"[: draw(st.integers(1, 4))]]
        parents = {name: draw(st.sampled_from([None, *above])) for name in names}
        fallback = draw(st.sampled_from([None, None, *names]))
        enabled = draw(st.sampled_from([True, True, False]))
        levels.append(level(f"level{number}", parents, fallback_expert=fallback, enabled=enabled))
        match draw(st.sampled_from(["left out", "left out", "list", "one"])):
            case "list":
                chosen = draw(st.lists(st.sampled_from(names), min_size=batch_size, max_size=batch_size))
                routing[f"level{number}"] = chosen
            case "one":
                routing[f"level{number}"] = draw(st.sampled_from(names))
        above = names
    levels[draw(st.integers(0, len(levels) - 1))].enabled = True
    return Case(CELMoEConfig(WIDTH, levels), routing, batch_size)


def expected_route(case, position, sample):
    """The expert of one sample at one level, or None if nothing tells; asks only downwards."""
    levels = case.config.levels
    here = levels[position]
    given_ = case.routing.get(here.name)
    if given_ is not None:
        return given_ if isinstance(given_, str) else given_[sample]
    below = next((each for each in range(position + 1, len(levels)) if levels[each].enabled), None)
    name = None if below is None else expected_route(case, below, sample)
    for each in range(below or position, position, -1):
        name = name and levels[each].experts[name].parent
    if name:
        return name
    return next(iter(here.experts)) if len(here.experts) == 1 else here.fallback_expert


@given(cases())
@settings(max_examples=60)
def test_any_hierarchy(case):
    enabled = [position for position, each in enumerate(case.config.levels) if each.enabled]
    expected = {
        case.config.levels[position].name: [expected_route(case, position, sample) for sample in range(case.batch_size)]
        for position in enabled
    }
    compile_ = RoutingCompiler(case.config)
    before = copy.deepcopy(case.routing)
    if any(None in routes for routes in expected.values()):
        with pytest.raises(MissingRouteError):
            compile_(case.routing, case.batch_size)
    elif case.batch_size or all(name in case.routing for name in expected):
        plan = compile_(case.routing, case.batch_size)
        assert {name: plan.routes(name) for name in plan.levels} == expected
    assert case.routing == before


@given(cases())
@settings(max_examples=25)
def test_models_and_the_oracle_infer_alike(case):
    if not case.batch_size:
        case.batch_size = 1
        case.routing = {}
    model = build(case.config).eval()
    try:
        output = model(rows(case.batch_size), case.routing)
    except MissingRouteError:
        with pytest.raises(KeyError):
            reference.reference_forward(model, rows(case.batch_size), case.routing)
        return
    found = reference.reference_forward(model, rows(case.batch_size), case.routing)
    assert {name: each.routes for name, each in output.levels.items()} == {
        name: each.routes for name, each in found.levels.items()
    }
    torch.testing.assert_close(output.fused_hidden, found.fused_hidden)


def test_the_oracle_knows_the_levels_that_the_model_was_built_with():
    middle = level("middle", {"m": "a"}, enabled=False)
    upper = level("upper", {"a": None, "b": None})
    lower = level("lower", {"x": "m", "y": "m"})
    model = build(CELMoEConfig(WIDTH, [upper, middle, lower]))
    middle.enabled = True
    output = reference.reference_forward(model, rows(2), {"lower": ["x", "y"]})
    assert output.levels["upper"].routes == model(rows(2), {"lower": ["x", "y"]}).levels["upper"].routes == ["a", "a"]
