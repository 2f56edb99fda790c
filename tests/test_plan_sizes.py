"""At the edges of bytes, in samples and in experts, small batches are planned as large ones are."""

import numpy as np
import pytest

import celmoe.routing.planner
from celmoe import CELMoEConfig, ExpertConfig, HierarchyLevelConfig, RoutingCompiler


def compiler_of(num_experts):
    # In an order of its own: an id is no code.
    names = [f"e{number:03d}" for number in range(num_experts)][::-1]
    return RoutingCompiler(
        CELMoEConfig(4, [HierarchyLevelConfig("l", {name: ExpertConfig(name) for name in names})])
    ), names


@pytest.mark.parametrize("num_experts", [1, 2, 256, 257])
@pytest.mark.parametrize("batch_size", [1, 2, 254, 255, 256])
@pytest.mark.parametrize("kind", ["names", "ids", "one"])
def test_both_ways_plan_alike(batch_size, num_experts, kind, monkeypatch):
    compiler, names = compiler_of(num_experts)
    ids = np.random.default_rng(batch_size).integers(0, num_experts, batch_size)
    ids[-1] = num_experts - 1
    routes = {"names": [names[each] for each in ids], "ids": ids, "one": names[-1]}[kind]
    found = compiler({"l": routes}, batch_size)
    monkeypatch.setattr(celmoe.routing.planner, "FEW_SAMPLES", 0)
    expected = compiler({"l": routes}, batch_size)
    for mine, theirs in zip(found.levels.values(), expected.levels.values(), strict=True):
        assert (mine.present, mine.counts, mine.is_sorted) == (theirs.present, theirs.counts, theirs.is_sorted)
    for mine, theirs in zip(found.indices[0], expected.indices[0], strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.equal(theirs)
