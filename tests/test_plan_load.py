"""The samples of each expert in a plan."""

from __future__ import annotations

import pickle
import random
from collections import Counter

import pytest

from celmoe import CELMoEConfig, LevelLoad, RoutingCompiler

TREE = {"slavic": ["ru", "pl"], "romance": ["it"], "none": []}
CONFIG = CELMoEConfig.from_tree(TREE, ("family", "language"), 4)


def test_a_load_by_hand():
    plan = RoutingCompiler(CONFIG)({"language": ["it", "ru", "it", "it"]})
    load = plan.load()
    assert load == {
        "family": LevelLoad("family", {"slavic": 1, "romance": 3, "none": 0}),
        "language": LevelLoad("language", {"ru": 1, "pl": 0, "it": 3}),
    }
    assert load["language"].absent == ("pl",)
    assert load["language"].imbalance == 3 / (4 / 3)
    assert str(load["language"]) == "language: 4 samples, imbalance 2.25, 1 of 3 experts absent"
    assert pickle.loads(pickle.dumps(plan)).load() == load


def test_a_batch_without_samples():
    load = RoutingCompiler(CONFIG)({"language": [], "family": []}).load()
    assert load["family"].imbalance == 0.0
    assert load["language"].absent == ("ru", "pl", "it")


@pytest.mark.parametrize("size", [1, 7, 64, 65, 300])
def test_loads_count_routes(size):
    names = random.Random(size).choices(["ru", "pl", "it"], weights=[1, 0, 2], k=size)
    found = RoutingCompiler(CONFIG)({"language": names}).load()["language"]
    assert found.samples == {name: Counter(names)[name] for name in ("ru", "pl", "it")}
    assert [*found.samples] == ["ru", "pl", "it"]
    assert found.imbalance == pytest.approx(max(found.samples.values()) / (size / 3))
