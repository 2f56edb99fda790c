"""A load tracker's state, what it refuses, and its figures."""

from __future__ import annotations

import copy
import csv
import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from celmoe import (
    CELMoEConfig,
    CheckpointError,
    ConfigError,
    ConfigTypeError,
    InputError,
    InputTypeError,
    LoadTracker,
    PackageMissingError,
    PlanError,
    RoutingCompiler,
    RoutingPlan,
    UnknownExpertError,
    UnknownLevelError,
)
from tests.loads import plan_of, tracked

# --- ranks and restarts -----------------------------------------------------------------------------------------------


def test_merging_leaves_the_ranks_trackers_alone() -> None:
    first, second = tracked(("ru", "ru"), ("it",)), tracked(("pl",), ("pl",))
    before = first.state_dict(), second.state_dict()
    joint = LoadTracker.merged(each for each in (first, second))
    assert joint.load()["language"].samples == {"ru": 2, "pl": 2, "it": 1}
    assert joint.recent()["language"].samples == {"ru": 1.0, "pl": 1.5, "it": 1.0}
    assert joint.absent()["language"] == {"ru": 1, "pl": 0, "it": 0}
    joint.update(plan_of("ru"))
    joint.rename("language", "ru", "x")
    assert (first.state_dict(), second.state_dict()) == before
    assert LoadTracker.merged([first]).state_dict() == first.state_dict()


def test_a_state_is_plain_and_stays_when_the_tracker_goes_on(tmp_path: Path) -> None:
    tracker = tracked(("ru",), ("it",))
    state = tracker.state_dict()
    text = json.dumps(state)
    torch.save(state, tmp_path / "state.pt")
    tracker.update(plan_of("ru"))
    assert json.dumps(state) == text
    for found in (json.loads(text), torch.load(tmp_path / "state.pt", weights_only=True)):
        other = LoadTracker(7.0)
        other.update(plan_of("pl"))
        other.load_state_dict(found)
        assert other.half_life == 1.0
        other.update(plan_of("ru"))
        assert other.state_dict() == tracker.state_dict()


def test_copies_part() -> None:
    tracker = tracked(("ru",))
    others = [copy.deepcopy(tracker), pickle.loads(pickle.dumps(tracker))]
    for each in others:
        each.update(plan_of("it"))
        each.rename("language", "pl", "x")
    assert tracker.steps == 1
    assert tracker.load()["language"].samples == {"ru": 1, "pl": 0, "it": 0}
    assert others[0].state_dict() == others[1].state_dict()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("half_life", "kind"),
    [
        *((each, ConfigError) for each in (0, -1.0, float("nan"), float("inf"))),
        *((each, ConfigTypeError) for each in (True, "10", None)),
    ],
)
def test_half_lives_that_are_refused(half_life: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^'half_life' must be "):
        LoadTracker(half_life)


OTHER = {"slavic": ["ru"], "romance": ["it"]}
CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "no plan": (lambda tracker: tracker.update(), InputError, "'plans' must hold the plan of the step (got none)"),
    "a routing": (
        lambda tracker: tracker.update({"language": ["ru"]}),
        InputTypeError,
        "'plans[0]' must be a RoutingPlan (got dict; call model.compile_routing on a routing)",
    ),
    "a list of plans": (
        lambda tracker: tracker.update([plan_of("ru")]),
        InputTypeError,
        "'plans[0]' must be a RoutingPlan (got list; call model.compile_routing on a routing)",
    ),
    "a plan and none": (
        lambda tracker: tracker.update(plan_of("ru"), None),
        InputTypeError,
        "'plans[1]' must be a RoutingPlan (got NoneType; call model.compile_routing on a routing)",
    ),
    "plans of two configs": (
        lambda tracker: tracker.update(plan_of("ru"), plan_of("ru", tree=OTHER)),
        PlanError,
        (
            "'plans[1]' must be a plan of a config with 3 experts in level 'language' (got one with 2; only there: "
            "none; missing there: 'pl'); compile the routing again"
        ),
    ),
    "a plan of tensors on meta": (
        lambda tracker: tracker.update(
            plan_of("ru"), RoutingPlan.of_indices(plan_of("ru").layout, plan_of("ru").to("meta").indices)
        ),
        PlanError,
        "'plan' must lie where its ids can be read (got a plan on meta)",
    ),
    "an unknown level": (
        lambda tracker: tracker.rename("lang", "ru", "x"),
        UnknownLevelError,
        "'level' must be a level of the plans so far (got 'lang'; nearest: 'language')",
    ),
    "an unknown expert": (
        lambda tracker: tracker.rename("language", "rux", "x"),
        UnknownExpertError,
        "'name' must be an expert of the plans so far at level 'language' (got 'rux'; nearest: 'ru')",
    ),
    "a name that is taken": (
        lambda tracker: tracker.rename("language", "ru", "pl"),
        InputError,
        (
            "'new_name' must be no expert of the plans so far at level 'language' (got 'pl'; rename before the first "
            "plan that has the new name)"
        ),
    ),
    "its own name": (
        lambda tracker: tracker.rename("language", "ru", "ru"),
        InputError,
        (
            "'new_name' must be no expert of the plans so far at level 'language' (got 'ru'; rename before the first "
            "plan that has the new name)"
        ),
    ),
    "no name": (
        lambda tracker: tracker.rename("language", "ru", ""),
        InputTypeError,
        "'new_name' must be a non-empty string (got '')",
    ),
    "nothing to merge": (
        lambda tracker: LoadTracker.merged([]),
        InputError,
        "'trackers' must hold at least one tracker (got none)",
    ),
    "a state to merge": (
        lambda tracker: LoadTracker.merged([tracker, tracker.state_dict()]),
        InputTypeError,
        "'trackers[1]' must be a LoadTracker (got dict)",
    ),
    "other steps": (
        lambda tracker: LoadTracker.merged([tracker, tracked(("ru",))]),
        InputError,
        "'trackers[1]' must have steps 2, as the first tracker (got 1)",
    ),
    "another half-life": (
        lambda tracker: LoadTracker.merged([tracker, tracked(("ru",), ("ru",), half_life=2.0)]),
        InputError,
        "'trackers[1]' must have half_life 1.0, as the first tracker (got 2.0)",
    ),
    "other experts": (
        lambda tracker: LoadTracker.merged([tracker, _of_other_experts()]),
        InputError,
        "'trackers[1]' must have experts 'ru', 'pl', 'it' at level 'language', as the first tracker (got 'ru', 'it')",
    ),
}


def _of_other_experts() -> LoadTracker:
    tracker = LoadTracker(1.0)
    for _ in range(2):
        tracker.update(plan_of("ru", tree=OTHER))
    return tracker


@pytest.mark.parametrize("case", CALLS)
def test_a_refused_call_changes_nothing(case: str) -> None:
    call, kind, message = CALLS[case]
    tracker = tracked(("ru", "it"), ("it",))
    before = json.dumps(tracker.state_dict())
    with pytest.raises(kind) as error:
        call(tracker)
    assert type(error.value) is kind
    assert str(error.value) == message
    assert json.dumps(tracker.state_dict()) == before


def _state(**changes: Any) -> Any:
    state = tracked(("ru", "it"), ("it",)).state_dict()
    return {**state, **changes}


def _with_count(value: Any) -> Any:
    state = _state()
    state["counts"]["language"]["ru"] = value
    return state


STATES: dict[str, tuple[Any, str]] = {
    "a list": ([], '"state" must be a mapping by name'),
    "nothing": (None, '"state" must be a mapping by name'),
    "a tracker": (LoadTracker(), '"state" must be a mapping by name'),
    "a field lost": (
        {"steps": 1},
        "'state' must be a LoadTracker's, with 'half_life', 'steps', 'experts', 'counts' (got",
    ),
    "a field too many": (_state(more=1), "'state' must be a LoadTracker's"),
    "no half-life": (_state(half_life=0), "\"state['half_life']\" must be positive"),
    "half-life NaN": (_state(half_life=float("nan")), "\"state['half_life']\" must hold finite numbers"),
    "half-life a word": (_state(half_life="1"), "\"state['half_life']\" must hold finite numbers"),
    "steps not whole": (_state(steps=1.5), "\"state['steps']\" must hold a whole number"),
    "steps negative": (_state(steps=-1), "\"state['steps']\" must hold a whole number"),
    "steps true": (_state(steps=True), "\"state['steps']\" must hold a whole number"),
    "fewer steps than counted": (_state(steps=1), "\"state['counts']['family']['romance']\" must have a step up to 1"),
    "counts a list": (_state(counts=[]), "\"state['counts']\" must be a mapping by name"),
    "counts of a level a list": (_state(counts={"language": []}), "\"state['counts']['language']\" must be a mapping"),
    "names that are none": (_state(counts={1: {}}), "\"state['counts']\" must be a mapping by name"),
    "a count too short": (_with_count([1, 2.0]), "\"state['counts']['language']['ru']\" must be rows, recent rows"),
    "a count that is a number": (_with_count(3), "\"state['counts']['language']['ru']\" must be rows, recent rows"),
    "rows negative": (_with_count([-1, 2.0, 1]), "\"state['counts']['language']['ru']\" must hold finite numbers"),
    "rows infinite": (_with_count([1, float("inf"), 1]), "\"state['counts']['language']['ru']\" must hold finite"),
    "rows beyond any": (_with_count([1, 10**400, 1]), "\"state['counts']['language']['ru']\" must hold finite numbers"),
    "rows a tensor": (_with_count([torch.tensor(1), 1.0, 1]), "\"state['counts']['language']['ru']\" must hold finite"),
    "experts without counts": (_state(experts={"language": ["x"]}), "\"state['experts']['language']\" must list"),
    "experts of no level": (_state(experts={"x": ["ru"]}), "\"state['experts']['x']\" must list experts"),
    "experts twice": (_state(experts={"language": ["ru", "ru"]}), "\"state['experts']['language']\" must list"),
    "experts unhashable": (_state(experts={"language": [["ru"]]}), "\"state['experts']['language']\" must list"),
    "experts a word": (_state(experts={"language": "ru"}), "\"state['experts']['language']\" must list experts"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_damaged_state_is_refused_and_changes_nothing(case: str) -> None:
    state, message = STATES[case]
    tracker = tracked(("pl",))
    before = json.dumps(tracker.state_dict())
    with pytest.raises(CheckpointError) as error:
        tracker.load_state_dict(state)
    assert str(error.value).startswith(message)
    assert json.dumps(tracker.state_dict()) == before
    tracker.update(plan_of("pl"))
    assert tracker.load()["language"].samples["pl"] == 2


def test_numbers_of_numpy_are_taken_from_a_state() -> None:
    state = _state(half_life=np.float32(1.0), steps=np.int64(2))
    tracker = LoadTracker()
    tracker.load_state_dict(state)
    assert json.dumps(tracker.state_dict()) == json.dumps(_state())


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "SVG", "pdf"])
def test_a_figure_and_its_numbers(ending: str, tmp_path: Path) -> None:
    tracker = tracked(("ru", "ru", "ru", "it"), ("it", "it"), ("ru",))
    path = tmp_path / f"load.{ending}"
    beside = tracker.save_figure(str(path))
    assert beside == tmp_path / "load.csv"
    assert {each.name for each in tmp_path.iterdir()} == {path.name, "load.csv"}
    assert path.stat().st_size > 1000
    rows = list(csv.DictReader(io.StringIO(beside.read_text(encoding="utf-8"))))
    assert list(rows[0]) == ["level", "expert", "rows", "share", "recent_share", "steps_absent"]
    found = {(row["level"], row["expert"]): row for row in rows}
    assert list(found) == [
        *(("family", name) for name in ("slavic", "romance")),
        *(("language", name) for name in ("ru", "pl", "it")),
    ]
    scalars = tracker.scalars()
    for (level, name), row in found.items():
        assert float(row["share"]) == scalars[f"load_run/{level}/{name}"]
        assert float(row["recent_share"]) == scalars[f"load/{level}/{name}"]
        assert float(row["steps_absent"]) == scalars[f"load_absent/{level}/{name}"]
    assert found["language", "ru"]["rows"] == "4"


def test_names_that_mean_something_to_a_figure(tmp_path: Path) -> None:
    import matplotlib as mpl

    odd = ["$x^", "a_b", "%", "\\alpha", "a\nb", 'a"b,c', "\udc80", "=1+1", "zh.Hant", "$\\frac{1}{2}$"]
    tree = {"$f^": odd[:5], "__": odd[5:]}
    config = CELMoEConfig.from_tree(tree, ("$level", "la\tguage"), 4)
    tracker = LoadTracker()
    tracker.update(RoutingCompiler(config)({"la\tguage": odd}))
    with mpl.rc_context({"text.usetex": True}):
        beside = tracker.save_figure(tmp_path / "load.png")
        assert mpl.rcParams["text.usetex"] is True
    text = beside.read_bytes().decode("utf-8", "surrogatepass")
    assert [row["expert"] for row in csv.DictReader(io.StringIO(text, newline=""))][2:] == odd


def test_many_experts_and_levels(tmp_path: Path) -> None:
    names = [f"e{place}" for place in range(300)]
    config = CELMoEConfig.from_tree({"a": {"b": {"c": names}}}, ("one", "two", "three", "four"), 4)
    tracker = LoadTracker()
    tracker.update(RoutingCompiler(config)({"four": names[:7]}))
    assert len(tracker.save_figure(tmp_path / "load.svg").read_text().splitlines()) == 1 + 3 + 300


def test_a_figure_needs_no_window(tmp_path: Path) -> None:
    before = set(sys.modules)
    tracked(("ru",)).save_figure(tmp_path / "load.png")
    assert "matplotlib.pyplot" not in set(sys.modules) - before


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in sys.modules if each.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    tracker = tracked(("ru",))
    with pytest.raises(PackageMissingError) as error:
        tracker.save_figure(tmp_path / "load.png")
    assert str(error.value) == (
        "'matplotlib' must be installed for figures (got no such package; pip install 'celmoe[bench]')"
    )
    assert not list(tmp_path.iterdir())
    assert tracker.scalars()["load_run/language/ru"] == 1.0


@pytest.mark.parametrize("name", ["load", "load.csv", "load.docx", "load."])
def test_a_format_that_nobody_writes(name: str, tmp_path: Path) -> None:
    tracker = tracked(("ru",))
    with pytest.raises(InputError, match=r"^'path' must end in one of .*png.* \(got "):
        tracker.save_figure(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_figure_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        LoadTracker().save_figure(tmp_path / "load.png")
    assert str(error.value) == "'save_figure' must be called after a step (got no call of 'update' yet)"
    LoadTracker.merged([tracked(())]).save_figure(tmp_path / "load.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tracked(("ru",)).save_figure(tmp_path / "none" / "load.png")
    assert not list(tmp_path.iterdir())
