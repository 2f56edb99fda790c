"""explain(): a table for people, a dict for programs, and no expert run for either."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from celmoe import Explanation, LevelExplanation, UnknownExpertError
from tests.refusals import GOOD, WIDTH, Counting, assert_like_fresh, build, level, rows, two_levels

EXPERT = WIDTH * WIDTH + WIDTH


def test_it_runs_nothing():
    model = build()
    Counting.calls = 0
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for explanation in (model.explain(), model.explain(GOOD), model.explain(model.compile_routing(GOOD))):
        assert isinstance(explanation, Explanation)
        assert str(explanation)
        assert explanation.as_dict()
    assert Counting.calls == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert_like_fresh(model)


def test_figures_of_a_routing():
    model = build(engine="looped")
    routing = {"family": ["slavic"] * 4, "language": ["ru", "pl", "ru", "ru"]}
    family, language = model.explain(routing).levels
    assert isinstance(family, LevelExplanation)
    assert (family.level, family.engine, family.num_experts, family.num_present) == ("family", "looped", 3, 1)
    assert (family.rows_per_expert, family.num_parameters) == ((4, 4.0, 4), 3 * EXPERT)
    assert (language.num_experts, language.num_present, language.rows_per_expert) == (4, 2, (1, 2.0, 3))
    assert (language.num_parameters, language.parameter_bytes) == (4 * EXPERT, 2 * EXPERT * 4)


def test_a_plan_and_its_routing_say_the_same():
    model = build()
    assert model.explain(GOOD) == model.explain(model.compile_routing(GOOD))
    assert model.explain({"family": "slavic", "language": "ru"}, 7).levels[0].rows_per_expert == (7, 7.0, 7)


def test_without_a_routing_there_are_no_rows():
    for line in build().explain().levels:
        assert line.num_present is line.rows_per_expert is None
        assert line.parameter_bytes == line.num_experts * EXPERT * 4


def test_an_empty_batch():
    explanation = build().explain({"family": [], "language": []})
    assert [line.num_present for line in explanation.levels] == [0, 0]
    assert str(explanation)


def test_the_words_on_copies_that_a_plan_saves():
    def words(family, language):
        return [line.why for line in build().explain({"family": family, "language": language}).levels]

    assert "one gather each way" in words(["slavic", "romance", "slavic"], ["ru", "pl", "fr"])[0]
    assert "already in expert order" in words(["romance", "slavic"], ["fr", "ru"])[0]
    assert "one expert present" in words("slavic", ["ru", "pl"])[0]
    assert "same order as the level above" in words(["slavic", "romance"], ["ru", "fr"])[1]


def test_shared_modules_are_counted_once():
    model = build()
    shared = Counting()
    for name in ("ru", "pl"):
        model.level_modules["language"][name] = shared
    line = model.explain({"family": "slavic", "language": ["ru", "pl"]}).levels[1]
    assert line.num_parameters == 3 * EXPERT
    assert line.parameter_bytes == EXPERT * 4
    model.half()
    assert model.explain({"family": "slavic", "language": ["ru", "pl"]}).levels[1].parameter_bytes == EXPERT * 2


def test_experts_without_parameters():
    model = build()
    model.level_modules["language"]["ru"] = nn.Identity()
    assert model.explain(GOOD).levels[1].num_parameters == 3 * EXPERT


def test_the_dict_is_plain_data():
    plain = build(engine="looped").explain(GOOD).as_dict()
    assert list(plain) == ["family", "language"]
    assert json.loads(json.dumps(plain))["language"]["num_present"] == 3
    assert plain["language"]["engine"] == "looped"


def test_the_table():
    config = two_levels()
    config.levels.append(level("a rather long level's name", ("x",)))
    explanation = build(config, engine="looped").explain({**GOOD, "a rather long level's name": "x"})
    lines = str(explanation).splitlines()
    assert len(lines) == 2 + 3
    assert lines[0].startswith("level ")
    assert set(lines[1]) == {"-"}
    assert [line.split("  ")[0] for line in lines[2:]] == ["family", "language", "a rather long level's name"]
    starts = {line.index(each.engine, 20) for line, each in zip(lines[2:], explanation.levels, strict=True)}
    assert starts == {lines[0].index("engine")}
    assert not any(line.endswith(" ") for line in lines)


def test_a_name_with_a_line_break_does_not_break_the_table():
    explanation = build(two_levels_named("a\nb"), engine="looped").explain()
    assert len(str(explanation).splitlines()) == 3


def two_levels_named(name):
    config = two_levels()
    config.levels[:] = [level(name)]
    return config


def test_the_model_s_repr_tells_the_engine():
    model = build(engine="looped")
    assert "engine='looped'" in repr(model)
    assert "rows" not in repr(model(rows(), GOOD).levels["family"].name)


def test_a_lazy_expert_has_no_parameters_yet():
    model = build()
    model.level_modules["language"]["fr"] = nn.LazyLinear(WIDTH)
    assert model.explain(plan_or_routing=GOOD).levels[1].num_parameters == 3 * EXPERT


def test_a_removed_expert_is_refused_as_in_a_forward_pass():
    model = build()
    del model.level_modules["language"]["fr"]
    with pytest.raises(UnknownExpertError, match="got no 'fr'"):
        model.explain(GOOD)


def test_classes_below_the_table():
    model = build(engine="grouped")
    before = model.explain(GOOD)
    assert [each.engine for each in before.levels[1].classes] == ["grouped"]
    assert "once captured" in str(before)
    lines = str(build(two_levels_named("a\nb"), engine="grouped").explain()).splitlines()
    assert len(lines) == 3 + 2
    assert lines[-1].startswith("'a\\nb': 2 Counting ")
    assert json.loads(json.dumps(before.as_dict()))["language"]["classes"][0]["operations_looped"] == {}
