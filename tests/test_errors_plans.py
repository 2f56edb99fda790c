"""Refused plans, batch sizes and routings of levels, to the letter."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from types import MappingProxyType

import numpy as np
import pytest
import torch

from celmoe import (
    CELMoEConfig,
    ExpertConfig,
    HierarchyLevelConfig,
    MissingRouteError,
    PlanError,
    RouteLengthError,
    RouteTypeError,
    RoutingCompiler,
    UnknownExpertError,
    UnknownLevelError,
    merge_routing,
    routing_constant,
    validate_routing_length,
)
from celmoe.errors import nearest
from tests.refusals import (
    FAMILIES,
    GOOD,
    LANGUAGE,
    LANGUAGES,
    WIDTH,
    assert_error,
    assert_refused,
    build,
    level,
    rows,
    two_levels,
)

FAMILY = "\"routing['family']\""


# The whole routing -> the error, the builtin, and the message.
ROUTINGS = {
    "unknown level": (
        {**GOOD, "langauge": ["ru"] * 3},
        (UnknownLevelError, KeyError),
        "'routing' must have levels of the config for keys (got 'langauge'; nearest: 'language')",
    ),
    "unknown level, nothing near": (
        {**GOOD, "customer": "x"},
        (UnknownLevelError, KeyError),
        "'routing' must have levels of the config for keys (got 'customer'; known: 'family', 'language')",
    ),
    "several unknown levels": (
        {**GOOD, "langauge": ["ru"] * 3, "customer": "x", "famly": "x"},
        (UnknownLevelError, KeyError),
        (
            "'routing' must have levels of the config for keys (got 'langauge', 'customer', 'famly'; nearest to "
            "'langauge': 'language'; nearest to 'famly': 'family'; known: 'family', 'language')"
        ),
    ),
    "level by number": (
        {0: ["slavic"] * 3, 1: ["ru"] * 3},
        (UnknownLevelError, KeyError),
        "'routing' must have levels of the config for keys (got 0, 1; known: 'family', 'language')",
    ),
    "list": (
        [["slavic"] * 3, ["ru"] * 3],
        (RouteTypeError, TypeError),
        "'routing' must be a mapping of levels to routes, a RoutingPlan or None (got list)",
    ),
    "str": (
        "ru",
        (RouteTypeError, TypeError),
        "'routing' must be a mapping of levels to routes, a RoutingPlan or None (got str)",
    ),
    "tensor": (
        torch.zeros(3, dtype=torch.long),
        (RouteTypeError, TypeError),
        "'routing' must be a mapping of levels to routes, a RoutingPlan or None (got Tensor)",
    ),
    "missing upper level, no parents": (
        {"language": ["ru", "de", "ru"]},
        (MissingRouteError, KeyError),
        (
            "'routing' must have a key for level 'family', which has no fallback, or these experts of level 'language' "
            "must have a parent: 'de', 'ru'"
        ),
    ),
    "missing lowest level": (
        {"family": GOOD["family"]},
        (MissingRouteError, KeyError),
        (
            "'routing' must have a key for level 'language', which has 4 experts and no fallback "
            "(known: 'ru', 'pl', 'fr', 'de')"
        ),
    ),
    "None": (
        None,
        (MissingRouteError, KeyError),
        (
            "'routing' must have a key for level 'language', which has 4 experts and no fallback "
            "(known: 'ru', 'pl', 'fr', 'de')"
        ),
    ),
    "empty": (
        {},
        (MissingRouteError, KeyError),
        (
            "'routing' must have a key for level 'language', which has 4 experts and no fallback "
            "(known: 'ru', 'pl', 'fr', 'de')"
        ),
    ),
    "lengths that differ": (
        {"family": ["slavic"] * 3, "language": ["ru"] * 2},
        (RouteLengthError, ValueError),
        f"{LANGUAGE} must have one route for each of the 3 samples of 'hidden' (got 2)",
    ),
    "both too long": (
        {"family": ["slavic"] * 4, "language": ["ru"] * 4},
        (RouteLengthError, ValueError),
        f"{FAMILY} must have one route for each of the 3 samples of 'hidden' (got 4)",
    ),
}


@pytest.mark.parametrize("case", ROUTINGS)
def test_routings_that_are_refused(case):
    routing, (kind, builtin), message = ROUTINGS[case]
    model = build()
    assert_refused(model, lambda: model(rows(), routing), kind, builtin, message, routing)


def test_lengths_that_differ_name_each_other_where_nothing_else_tells_the_size():
    with pytest.raises(RouteLengthError) as caught:
        build().compile_routing({"family": ["slavic"] * 3, "language": ["ru"] * 2})
    message = f"{LANGUAGE} must have one route for each of the 3 samples of {FAMILY} (got 2)"
    assert_error(caught.value, RouteLengthError, ValueError, message)


@pytest.mark.parametrize("mapping", [OrderedDict, MappingProxyType, dict])
def test_any_mapping_is_a_routing(mapping):
    routing = mapping(dict(GOOD))
    assert build().compile_routing(routing).routes("language") == GOOD["language"]


@pytest.mark.parametrize(
    ("batch_size", "kind", "builtin", "message"),
    [
        (None, RouteLengthError, ValueError, "'batch_size' must be given where no routes have a length (got None)"),
        (True, RouteTypeError, TypeError, "'batch_size' must be an integer (got True)"),
        (3.0, RouteTypeError, TypeError, "'batch_size' must be an integer (got 3.0)"),
        ("3", RouteTypeError, TypeError, "'batch_size' must be an integer (got '3')"),
        (-1, RouteLengthError, ValueError, "'batch_size' must be at least 0 (got -1)"),
    ],
)
def test_batch_sizes_that_are_refused(batch_size, kind, builtin, message):
    model = build()
    broadcast = {"family": "slavic", "language": "ru"}
    for call in (model.compile_routing, RoutingCompiler(model.config), model.explain):
        if batch_size is None and call == model.explain:
            continue
        assert_refused(model, lambda call=call: call(broadcast, batch_size), kind, builtin, message)
    if batch_size is not None:
        assert_refused(model, lambda: model.compile_routing(GOOD, batch_size), kind, builtin, message)


def test_integers_of_any_kind_are_batch_sizes():
    for batch_size in (3, np.int64(3)):
        plan = build().compile_routing({"family": "slavic", "language": "ru"}, batch_size)
        assert plan.batch_size == 3
        assert type(plan.batch_size) is int


# Plans


def plan_of(levels, routing=None):
    return RoutingCompiler(CELMoEConfig(WIDTH, levels))(routing or GOOD, None if routing is None else 3)


PLAN_WITH = "'routing' must be a plan of a config with"
AGAIN = "compile the routing again"
PLANS = {
    "other levels": (
        plan_of([level("family", FAMILIES), level("dialect", LANGUAGES)], {"family": "slavic", "dialect": "ru"}),
        f"{PLAN_WITH} levels 'family', 'language' (got one with 'family', 'dialect'); {AGAIN}",
    ),
    "levels in another order": (
        plan_of([level("language", LANGUAGES), level("family", FAMILIES)]),
        f"{PLAN_WITH} levels 'family', 'language' (got one with 'language', 'family'); {AGAIN}",
    ),
    "fewer levels": (
        plan_of([level("language", LANGUAGES)], {"language": "ru"}),
        f"{PLAN_WITH} levels 'family', 'language' (got one with 'language'); {AGAIN}",
    ),
    "other experts": (
        plan_of([level("family", FAMILIES), level("language", ("ru", "fr", "de", "es", "it"))]),
        (
            f"{PLAN_WITH} 4 experts in level 'language' (got one with 5; only there: 'es', 'it'; missing there: "
            f"'pl'); {AGAIN}"
        ),
    ),
    "experts in another order": (
        plan_of([level("family", FAMILIES), level("language", tuple(reversed(LANGUAGES)))]),
        (f"{PLAN_WITH} expert 'ru' at position 0 of level 'language' (got one with 'de'); {AGAIN}"),
    ),
    "another batch size": (
        plan_of([level("family", FAMILIES), level("language", LANGUAGES)], {"family": "slavic", "language": "ru"}),
        None,
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_plans_of_another_model_are_refused(case):
    plan, message = PLANS[case]
    model = build()
    hidden = rows()
    if message is None:
        hidden = rows(5)
        message = "'routing' must be a plan for the 5 samples of 'hidden' (got one for 3)"
    for each in (plan, pickle.loads(pickle.dumps(plan))):
        assert_refused(model, lambda each=each: model(hidden, each), PlanError, ValueError, message)
    if case != "another batch size":
        for call in (model.compile_routing, model.explain, RoutingCompiler(model.config)):
            assert_refused(model, lambda call=call: call(plan), PlanError, ValueError, message)


def test_a_plan_and_another_batch_size():
    model = build()
    plan = model.compile_routing(GOOD)
    message = "'routing' must be a plan for the 4 samples of 'batch_size' (got one for 3)"
    assert_refused(model, lambda: model.compile_routing(plan, 4), PlanError, ValueError, message)
    # No samples are another number of samples, too.
    none = "'routing' must be a plan for the 0 samples of {} (got one for 3)"
    assert_refused(model, lambda: model.compile_routing(plan, 0), PlanError, ValueError, none.format("'batch_size'"))
    assert_refused(model, lambda: model(rows(0), plan), PlanError, ValueError, none.format("'hidden'"))
    assert model.compile_routing(plan, 3) is plan
    assert model.compile_routing(plan) is plan


def test_routes_of_a_level_that_the_plan_does_not_have():
    plan = build().compile_routing(GOOD)
    with pytest.raises(UnknownLevelError) as caught:
        plan.routes("familly")
    message = "'level' must be a level of the plan (got 'familly'; nearest: 'family')"
    assert_error(caught.value, UnknownLevelError, KeyError, message)


# Missing routes, parents and fallbacks


def family_tree(fallback=None, **parents):
    experts = {name: ExpertConfig(name, parent=parents.get(name)) for name in LANGUAGES}
    return CELMoEConfig(
        WIDTH, [level("family", FAMILIES, fallback_expert=fallback), HierarchyLevelConfig("language", experts)]
    )


def test_only_the_experts_present_without_a_parent_are_named():
    model = build(family_tree(ru="slavic", fr="romance"))
    message = (
        "'routing' must have a key for level 'family', which has no fallback, or these experts of level 'language' "
        "must have a parent: 'de'"
    )
    routing = {"language": ["ru", "de", "fr"]}
    assert_refused(model, lambda: model(rows(), routing), MissingRouteError, KeyError, message, routing)
    assert_refused(model, lambda: model(rows(), {"language": "de"}), MissingRouteError, KeyError, message)
    assert model.compile_routing({"language": ["ru", "fr"]}).routes("family") == ["slavic", "romance"]


def test_a_long_list_of_orphans_is_cut():
    names = tuple(f"l{number:02}" for number in range(20))
    model = build(CELMoEConfig(WIDTH, [level("family", FAMILIES), level("language", names)]))
    with pytest.raises(MissingRouteError) as caught:
        model.compile_routing({"language": list(range(20))})
    shown = ", ".join(repr(name) for name in names[:8])
    assert str(caught.value).endswith(f"must have a parent: {shown}, … (20 in all)")


def test_unknown_fallback():
    model = build(family_tree(fallback="slawic"))
    message = "'fallback_expert' of level 'family' must be one of its experts (got 'slawic'; nearest: 'slavic')"
    routing = {"language": ["ru", "de", "fr"]}
    assert_refused(model, lambda: model(rows(), routing), UnknownExpertError, KeyError, message, routing)
    # The fallback is read at every call, and only if a sample needs it.
    model.config.levels[0].fallback_expert = "germanic"
    assert model.compile_routing(routing).routes("family") == ["germanic"] * 3


def test_an_unknown_fallback_that_nobody_needs():
    model = build(family_tree(fallback="slawic", ru="slavic", fr="romance"))
    assert model.compile_routing({"language": ["ru", "fr"]}).routes("family") == ["slavic", "romance"]
    assert model.compile_routing(GOOD).routes("family") == GOOD["family"]


def test_a_disabled_level_may_be_routed_and_is_ignored():
    config = two_levels()
    config.levels[0].enabled = False
    plan = build(config).compile_routing({"family": ["nonsense"], "language": ["ru", "de"]})
    assert list(plan.levels) == ["language"]


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("dE", ["De", "de"], "nearest: 'De', 'de'"),
        ("dE", ["de", "DE", "De", "ru"], "nearest: 'de', 'DE', 'De'"),
        ("strasse", ["Straße", "STRASSE"], "nearest: 'Straße', 'STRASSE'"),
        (["frr", "zz"], ["FR", "Fr", "ru"], "nearest to 'frr': 'FR', 'Fr'; known: 'FR', 'Fr', 'ru'"),
    ],
)
def test_near_names_that_differ_by_case_are_all_told(name, known, near):
    assert nearest(name, known) == near


# The helpers of celmoe-vp


def test_helpers():
    assert routing_constant("ru", 3) == ["ru", "ru", "ru"]
    assert routing_constant("ru", 0) == []
    validate_routing_length("language", ["ru"], 1)
    base = {"family": ["slavic"]}
    extra = {"language": ["ru"], "family": ["romance"]}
    assert merge_routing(base, extra) == {"family": ["romance"], "language": ["ru"]}
    assert base == {"family": ["slavic"]}
    assert merge_routing(None, extra) == extra
    with pytest.raises(RouteLengthError) as caught:
        validate_routing_length("language", ["ru"], 2)
    message = f"{LANGUAGE} must have one route for each of the 2 samples (got 1)"
    assert_error(caught.value, RouteLengthError, ValueError, message)
