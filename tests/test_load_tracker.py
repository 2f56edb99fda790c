"""Loads over training steps: whole run and recent, absence, experts that come and go, ranks, restarts, and figures."""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from torch import nn

import celmoe
from celmoe import (
    CELMoEConfig,
    ExpertConfig,
    ExpertResult,
    HierarchicalCELMoE,
    LoadTracker,
    RoutingCompiler,
    RoutingPlan,
)
from celmoe.names import path_key
from tests.loads import TREE, config_of, plan_of, tracked
from tests.strategies import NAMES

# --- by hand ----------------------------------------------------------------------------------------------------------


def test_counts_by_hand() -> None:
    tracker = tracked(("ru", "ru", "ru", "it"), ("it", "it"), ("ru",))
    assert (tracker.steps, tracker.half_life) == (3, 1.0)
    assert {level: dict(load.samples) for level, load in tracker.load().items()} == {
        "family": {"slavic": 4, "romance": 3},
        "language": {"ru": 4, "pl": 0, "it": 3},
    }
    assert tracker.load()["language"].absent == ("pl",)
    assert tracker.load()["language"].imbalance == 4 / (7 / 3)
    assert str(tracker.load()["language"]) == "language: 7 samples, imbalance 1.71, 1 of 3 experts absent"
    assert tracker.recent()["language"].samples == {"ru": 3 / 4 + 1, "pl": 0.0, "it": 1 / 4 + 2 / 2}
    assert tracker.absent() == {"family": {"slavic": 0, "romance": 1}, "language": {"ru": 0, "pl": 3, "it": 1}}
    found = tracker.scalars()
    assert {key: value for key, value in found.items() if "family" not in key} == {
        "load/language/ru": 1.75 / 3,
        "load_run/language/ru": 4 / 7,
        "load_absent/language/ru": 0.0,
        "load/language/pl": 0.0,
        "load_run/language/pl": 0.0,
        "load_absent/language/pl": 3.0,
        "load/language/it": 1.25 / 3,
        "load_run/language/it": 3 / 7,
        "load_absent/language/it": 1.0,
        "load_imbalance/language": pytest.approx(3 * 1.75 / 3),
        "load_imbalance_run/language": pytest.approx(3 * 4 / 7),
        "load_rows/language": 7.0,
    }
    assert all(type(value) is float for value in found.values())
    assert repr(tracker) == (
        "LoadTracker(3 steps; family: 7 samples, imbalance 1.14, 0 of 2 experts absent; language: 7 samples, imbalance "
        "1.71, 1 of 3 experts absent)"
    )


def test_recent_load_is_told_from_the_whole_run_s() -> None:
    tracker = LoadTracker(half_life=10)
    russian, italian = plan_of("ru"), plan_of("it")
    for _ in range(1000):
        tracker.update(russian)
    for _ in range(100):
        tracker.update(italian)
    found = tracker.scalars()
    assert found["load_run/language/ru"] == 1000 / 1100
    assert found["load/language/ru"] < 0.001 < 0.999 < found["load/language/it"]
    assert found["load_absent/language/ru"] == 100


def test_nothing_yet_and_no_samples() -> None:
    tracker = LoadTracker()
    assert (tracker.load(), tracker.recent(), tracker.absent(), tracker.scalars()) == ({}, {}, {}, {})
    tracker.update(plan_of())
    assert tracker.steps == 1
    assert set(tracker.scalars().values()) == {0.0, 1.0}
    assert tracker.absent()["language"] == {"ru": 1, "pl": 1, "it": 1}
    assert tracker.load()["language"].imbalance == 0.0


def test_the_plans_of_micro_batches_are_one_step() -> None:
    tracker = LoadTracker(1.0)
    tracker.update(plan_of("ru"), plan_of("ru", "it"), plan_of())
    assert tracker.steps == 1
    assert tracker.recent()["language"].samples == tracker.load()["language"].samples == {"ru": 2, "pl": 0, "it": 1}


def test_a_plan_from_another_process_and_on_another_device() -> None:
    plan = plan_of("ru", "it")
    tracker = LoadTracker(1.0)
    for each in (plan, pickle.loads(pickle.dumps(plan)), plan.to("meta"), plan.slice(0, 2)):
        tracker.update(each)
    assert tracker.load()["language"].samples == {"ru": 4, "pl": 0, "it": 4}


def test_a_long_absence_underflows_to_nothing() -> None:
    tracker = LoadTracker(0.001)
    tracker.update(plan_of("ru"))
    for _ in range(3):
        tracker.update(plan_of("it"))
    assert tracker.recent()["language"].samples == {"ru": 0.0, "pl": 0.0, "it": 1.0}


def test_a_step_takes_as_many_numbers_as_experts_are_present(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"e{place}" for place in range(500)]
    plans = [plan_of("e3", "e7", "e7", tree={"all": names}) for _ in range(3)]
    tracker = LoadTracker()
    tracker.update(plans[0])
    calls = Counter[str]()
    right = LoadTracker._aged
    monkeypatch.setattr(LoadTracker, "_aged", lambda self, *rest: calls.update(["aged"]) or right(self, *rest))
    monkeypatch.setattr(LoadTracker, "_meet", lambda *_: calls.update(["met"]))
    for plan in plans[1:]:
        tracker.update(plan)
    assert calls == {"aged": 2 * 3}


def test_inside_a_compiled_function_nothing_is_compiled_by_batch() -> None:
    torch._dynamo.reset()
    compiled = Counter[str]()

    def backend(module: Any, _: Any) -> Any:
        compiled.update(["graph"])
        return module.forward

    tracker = LoadTracker()

    @torch.compile(backend=backend)
    def step(hidden: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
        tracker.update(plan)
        return hidden * 2

    seen = []
    for languages in (["ru"], ["it", "ru"], ["pl"] * 3, ["ru", "it", "pl"], ["it"]):
        step(torch.ones(2), plan_of(*languages))
        seen.append(compiled["graph"])
    assert tracker.steps == 5
    assert tracker.load()["language"].samples == {"ru": 3, "pl": 4, "it": 3}
    assert len(set(seen[1:])) == 1


# --- keys -------------------------------------------------------------------------------------------------------------


def test_no_two_experts_share_a_key() -> None:
    names = [*NAMES, "a/b", "b", "a", "a/b/c", ".a%2Fb", "a%2Fb", "/", "//", "%2F", ".", "load", "language"]
    levels = list(dict.fromkeys(names))
    tree = [f"{each}" for each in levels]
    seen: dict[str, Any] = {}
    for level in levels:
        config = CELMoEConfig.from_tree(tree, (level,), 4)
        tracker = LoadTracker()
        tracker.update(RoutingCompiler(config)({level: tree[0]}, 1))
        for key in tracker.scalars():
            assert key not in seen, (key, level, seen[key])
            seen[key] = level
    assert len(seen) == len(levels) * (3 * len(tree) + 3)


@pytest.mark.parametrize("name", ["de", "zh_Hant", "a b", "é", "a-b", "a->b", "%2E"])
def test_plain_names_are_plain_keys(name: str) -> None:
    assert path_key("language", name) == f"language/{name}"


@pytest.mark.parametrize("name", ["a/b", "zh.Hant", "to", "a/b.c%2F", "/", "."])
def test_names_come_back_from_keys(name: str) -> None:
    level, key = path_key("language", name).split("/")
    assert level == "language"
    assert key.startswith(".")
    assert unquote(key[1:]) == name


# --- experts come and go ----------------------------------------------------------------------------------------------


class Expert(celmoe.ExpertModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, batch: celmoe.ExpertBatch) -> ExpertResult:
        return ExpertResult(self.layer(batch.hidden))


@pytest.mark.parametrize("is_stacked", [False, True])
def test_beside_a_model_s_changes(is_stacked: bool) -> None:
    model = HierarchicalCELMoE(config_of(TREE), lambda *_: Expert())
    if is_stacked:
        celmoe.stack_experts(model)
    tracker = LoadTracker(1.0)
    tracker.update(model.compile_routing({"language": ["ru", "ru", "pl", "it"]}))
    model.add_expert("language", "es", ExpertConfig("es", parent="romance"))
    tracker.update(model.compile_routing({"language": ["es"]}))
    assert tracker.absent()["language"] == {"ru": 1, "pl": 1, "it": 1, "es": 0}
    model.add_expert("language", "pt", ExpertConfig("pt", parent="romance"))
    tracker.update(model.compile_routing({"language": ["it"]}))
    assert tracker.absent()["language"] == {"ru": 2, "pl": 2, "it": 0, "es": 1, "pt": 1}
    model.rename_expert("language", "pl", "polish")
    tracker.rename("language", "pl", "polish")
    assert tracker.load()["language"].samples == {"ru": 2, "polish": 1, "it": 2, "es": 1, "pt": 0}
    model.remove_expert("language", "ru")
    tracker.update(model.compile_routing({"language": ["polish", "polish"]}))
    # All ids after the removed one are less by one; shares are of those that are there.
    assert tracker.load()["language"].samples == {"polish": 3, "it": 2, "es": 1, "pt": 0}
    assert tracker.scalars()["load_run/language/polish"] == 3 / 6
    assert not any("/ru" in key or "/pl" in key for key in tracker.scalars() if not key.endswith("polish"))


def test_a_removed_expert_keeps_its_counts_for_its_return() -> None:
    """A smaller model may be looked at in between; a tracker that forgot the rest would be silently wrong."""
    tracker = tracked(("ru", "ru", "it"))
    tracker.update(plan_of("it", tree={"romance": ["it"]}))
    assert dict(tracker.load()["language"].samples) == {"it": 2}
    tracker.update(plan_of("it"))
    assert tracker.load()["language"].samples == {"ru": 2, "pl": 0, "it": 3}
    assert tracker.absent()["language"] == {"ru": 2, "pl": 3, "it": 0}


def test_a_level_may_go_and_come() -> None:
    tracker = tracked(("ru",))
    config = CELMoEConfig.from_tree(["ru"], ("language",), 4)
    tracker.update(RoutingCompiler(config)({"language": "ru"}, 2))
    assert list(tracker.load()) == ["language"]
    tracker.update(plan_of("ru"))
    assert tracker.load()["family"].samples == {"slavic": 2, "romance": 0}


def test_an_expert_that_only_the_tracker_renamed() -> None:
    tracker = tracked(("ru", "ru"))
    tracker.rename("language", "ru", "russian")
    tracker.update(plan_of("ru"))
    assert tracker.load()["language"].samples == {"ru": 1, "pl": 0, "it": 0}


def test_a_state_of_other_experts() -> None:
    state = tracked(("ru", "ru")).state_dict()
    tree, tracker = {"slavic": ["cs"], "baltic": ["lt"]}, LoadTracker()
    plan = plan_of("cs", "lt", tree=tree)
    tracker.update(plan)
    tracker.load_state_dict(state)
    assert tracker.load()["language"].samples == {"ru": 2, "pl": 0, "it": 0}
    tracker.update(plan)
    assert tracker.load()["language"].samples == {"cs": 1, "lt": 1}
    assert tracker.load()["family"].samples == {"slavic": 3, "baltic": 1}


@dataclass
class Naive:
    """All steps kept, and counted anew whenever somebody asks."""

    half_life: float
    steps: list[dict[str, Counter[str]]] = field(default_factory=list)
    known: dict[tuple[str, str], int] = field(default_factory=dict)
    experts: dict[str, list[str]] = field(default_factory=dict)

    def update(self, plans: list[RoutingPlan]) -> None:
        self.experts = {level.name: list(level.experts) for level in plans[0].layout.levels}
        for level, names in self.experts.items():
            for name in names:
                self.known.setdefault((level, name), len(self.steps))
        self.steps.append(
            {level: Counter(each for plan in plans for each in plan.routes(level)) for level in self.experts}
        )

    def rename(self, level: str, name: str, new_name: str) -> None:
        for step in self.steps:
            if level in step and name in step[level]:
                step[level][new_name] = step[level].pop(name)
        self.known[level, new_name] = self.known.pop((level, name))
        self.experts[level] = [new_name if each == name else each for each in self.experts.get(level, [])]

    def facts(self) -> dict[tuple[str, str], tuple[float, float, int]]:
        """By level and expert its rows, its recent rows, and the steps since its last row."""
        now = len(self.steps)
        found = {}
        for level, names in self.experts.items():
            for name in names:
                rows = [step.get(level, Counter())[name] for step in self.steps]
                recent = sum(count * 0.5 ** ((now - 1 - place) / self.half_life) for place, count in enumerate(rows))
                last = max((place + 1 for place, count in enumerate(rows) if count), default=self.known[level, name])
                found[level, name] = (sum(rows), recent, now - last)
        return found


def assert_as_naive(tracker: LoadTracker, naive: Naive) -> None:
    load, recent, absent = tracker.load(), tracker.recent(), tracker.absent()
    assert {level: list(each.samples) for level, each in load.items()} == naive.experts
    facts, scalars = naive.facts(), tracker.scalars()
    assert len(scalars) == 3 * len(facts) + 3 * len(naive.experts)
    for (level, name), (rows, recent_rows, steps) in facts.items():
        assert load[level].samples[name] == rows
        assert recent[level].samples[name] == pytest.approx(recent_rows, rel=1e-12)
        assert absent[level][name] == scalars[f"load_absent/{path_key(level, name)}"] == steps
        for key, place in (("load_run", 0), ("load", 1)):
            total = sum(each[place] for (other, _), each in facts.items() if other == level)
            share = facts[level, name][place] / total if total else 0.0
            assert scalars[f"{key}/{path_key(level, name)}"] == pytest.approx(share, rel=1e-12)
    for level in naive.experts:
        for key, place in (("load_imbalance_run", 0), ("load_imbalance", 1)):
            loads = [each[place] for (other, _), each in facts.items() if other == level]
            wanted = max(loads) / (sum(loads) / len(loads)) if sum(loads) else 0.0
            assert scalars[f"{key}/{path_key(level)}"] == pytest.approx(wanted, rel=1e-12)


class Life:
    """A random life of ranks' trackers, beside one that keeps all steps."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.tree: dict[str, list[str]] = {"one": ["ru", "pl"], "two": ["it"]}
        half_life = self.draw.choice([0.5, 3.0, 50.0])
        self.naive = Naive(half_life)
        self.trackers = [LoadTracker(half_life) for _ in range(self.draw.choice([1, 1, 2, 3]))]

    @property
    def there(self) -> list[str]:
        return [name for own in self.tree.values() for name in own]

    def step(self) -> None:
        own = []
        for tracker in self.trackers:
            plans = [self._plan() for _ in range(self.draw.choice([1, 1, 2]))]
            tracker.update(*plans)
            own += plans
        self.naive.update(own)

    def _plan(self) -> RoutingPlan:
        return plan_of(*self.draw.choices(self.there, k=self.draw.randrange(7)), tree=self.tree)

    def add(self) -> None:
        free = [name for name in [*NAMES, "a/b"] if name not in self.there]
        # Known experts come back as often as new ones come.
        back = [name for name in free if ("language", name) in self.naive.known]
        free = back if back and self.draw.random() < 0.5 else free
        self.tree[self.draw.choice(list(self.tree))].append(self.draw.choice(free))

    def remove(self) -> None:
        if large := [family for family, own in self.tree.items() if len(own) > 1]:
            family = self.draw.choice(large)
            self.tree[family].remove(self.draw.choice(self.tree[family]))

    def rename(self) -> None:
        names = [name for name in self.naive.experts.get("language", []) if name in self.there]
        free = [name for name in NAMES if ("language", name) not in self.naive.known and name not in self.there]
        if names and free:
            name, new_name = self.draw.choice(names), self.draw.choice(free)
            for own in self.tree.values():
                own[:] = [new_name if each == name else each for each in own]
            for tracker in self.trackers:
                tracker.rename("language", name, new_name)
            self.naive.rename("language", name, new_name)

    def restart(self) -> None:
        states = [json.loads(json.dumps(tracker.state_dict())) for tracker in self.trackers]
        self.trackers = [LoadTracker() for _ in states]
        for tracker, state in zip(self.trackers, states, strict=True):
            tracker.load_state_dict(state)

    def copy(self) -> None:
        self.trackers = [pickle.loads(pickle.dumps(copy.deepcopy(tracker))) for tracker in self.trackers]

    def merge(self) -> None:
        self.trackers = [LoadTracker.merged(self.trackers)]


def live(seed: int) -> None:
    life = Life(seed)
    for _ in range(25):
        life.draw.choice([*[life.step] * 6, life.add, life.remove, life.rename, life.restart, life.copy, life.merge])()
        assert_as_naive(LoadTracker.merged(life.trackers), life.naive)
        if len(life.trackers) == 1:
            assert_as_naive(life.trackers[0], life.naive)


@pytest.mark.parametrize("seed", range(40))
def test_random_lives(seed: int) -> None:
    live(seed)
