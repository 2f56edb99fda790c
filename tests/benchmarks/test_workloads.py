"""The workloads are as their names say."""

from collections import Counter

import pytest
import torch
from torch import nn

import celmoe
from benchmarks.harness.steps import string_routed
from benchmarks.workloads.bodies import EXPERTS
from benchmarks.workloads.points import looped_grid
from benchmarks.workloads.workload import POSITIONS, Workload
from tests.peer import FIRST, peer


def test_the_looped_grid_is_what_its_figures_are_of():
    assert Counter(each.expert for each in looped_grid()) == {"linear": 30, "mlp": 24, "block": 24, "gru": 24}
    assert len(set(looped_grid())) == 102


@pytest.mark.parametrize("expert", EXPERTS)
def test_parameters_are_counted_as_they_are_made(expert):
    workload = Workload(expert, 8, 3, 5)
    model = workload.build(celmoe)
    assert workload.parameters_of_experts() == sum(each.numel() for each in model.level_modules.parameters())


@pytest.mark.parametrize("expert", EXPERTS)
def test_both_libraries_run_it_alike(expert):
    workload = Workload(expert, 8, 13, 5, "zipf")
    ours, theirs = (
        string_routed(model, workload)
        for model in (workload.build(celmoe, engine="looped"), workload.build(peer(FIRST)))
    )
    assert torch.equal(ours(workload.hidden()), theirs(workload.hidden()))


def test_zipf_routes_are_skewed():
    counts = Counter(Workload("linear", 8, 20_000, 50, "zipf").routing()["language"])
    assert counts["language-000"] / counts["language-001"] == pytest.approx(2, rel=0.1)
    assert counts["language-000"] / counts["language-009"] == pytest.approx(10, rel=0.25)
    uniform = Counter(Workload("linear", 8, 20_000, 50).routing()["language"])
    assert max(uniform.values()) < 1.3 * min(uniform.values())


def test_no_row_is_all_padding():
    mask = Workload("masked-block", 8, 500, 4).mask()
    assert mask.shape == (500, POSITIONS)
    assert mask.dtype == torch.bool
    assert not mask[:, 0].any()
    assert set(mask.sum(1).tolist()) == set(range(POSITIONS))
    assert Workload("block", 8, 500, 4).mask() is None


def test_the_mask_reaches_the_experts():
    workload = Workload("masked-block", 8, 30, 4)
    model = workload.build(celmoe)
    hidden, mask = workload.hidden(), workload.mask()
    changed = torch.where(mask.unsqueeze(-1), hidden + 1, hidden)
    first, second = (model(each, workload.routing(), mask=mask).fused_hidden for each in (hidden, changed))
    assert not torch.equal(first, second)
    torch.testing.assert_close(first[~mask], second[~mask])
    forward = string_routed(model, workload)
    assert torch.equal(forward(hidden), first)


def test_two_widths_alternate_in_each_level():
    model = Workload("two-widths", 8, 3, 9).build(celmoe)
    for level, experts in model.level_modules.items():
        inner = [module.out_features for module in experts.modules() if isinstance(module, nn.Linear)][::2]
        assert inner == [16 if place % 2 == 0 else 32 for place in range(len(experts))], level
