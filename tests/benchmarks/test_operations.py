"""The operations that count as launching work."""

import pytest
import torch

import celmoe.grouped.kernels.product
from benchmarks.suite.operations import (
    ACCELERATOR,
    CPU,
    FEW_EXPERTS,
    MANY_EXPERTS,
    OperationCount,
    count_growth,
    count_operations,
)


def test_views_and_bare_memory_are_not_counted():
    rows = torch.randn(6, 4)

    def look():
        first, second = rows.t().reshape(4, 2, 3).chunk(2)
        first.transpose(0, 1).unsqueeze(0).expand(5, -1, -1, -1).detach()
        rows.split([2, 4])
        torch.unsafe_split_with_sizes(rows, [1, 5])
        second.unbind()
        rows[2:, 1].view(4)
        torch.empty(3)
        rows.new_empty(3)

    assert count_operations(look) == {}


def test_work_is_counted_forward_and_backward():
    rows, weight = torch.randn(6, 4), torch.randn(3, 4, requires_grad=True)

    def step():
        torch.nn.functional.linear(rows, weight).relu().sum().backward()

    forward = {"aten.mm": 1, "aten.relu": 1, "aten.sum": 1}
    backward = {"aten.ones_like": 1, "aten.threshold_backward": 1, "aten.mm": 1}
    assert count_operations(step) == {name: forward.get(name, 0) + backward.get(name, 0) for name in forward | backward}


def test_operations_in_place_and_copies_are_counted():
    rows = torch.randn(6, 4)
    assert count_operations(lambda: rows.add_(1)) == {"aten.add_": 1}
    assert count_operations(lambda: rows.t().contiguous()) == {"aten.clone": 1}


def test_a_loop_over_experts_grows_with_them():
    looped = count_growth("linear", "uniform", CPU, "looped")
    experts = MANY_EXPERTS + 16 - FEW_EXPERTS - 2
    assert looped.many - looped.few == sum(more for _, more in looped.grown)
    assert dict(looped.grown)["aten.addmm"] == experts
    assert looped.ratio > 10
    again = count_growth("linear", "uniform", CPU, "looped")
    assert again == looped


def test_one_call_for_many_members_where_calls_are_dear():
    there, here = (count_growth("linear", "uniform", arrangement) for arrangement in (ACCELERATOR, CPU))
    assert there.ratio < 1.2 < here.ratio
    assert celmoe.grouped.kernels.product.backend_for("cpu", torch.float32, (4,)) == "runs"


def test_the_ratio():
    assert OperationCount("linear", "uniform", CPU, 40, 50, [("aten.mm", 10)]).ratio == pytest.approx(1.25)
