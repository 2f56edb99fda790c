"""A step that is timed is the same step every time: nothing of the one before is left in it."""

import pytest
import torch
from torch import nn

from benchmarks.hierarchies import ONE_LEVEL
from benchmarks.steps import TrainingStep
from benchmarks.workloads import Workload

WORKLOAD = Workload("linear", 8, 16, 4, hierarchy=ONE_LEVEL)


@pytest.fixture
def step_and_leaves():
    """A step of one layer, and what gets gradients in it: the layer's parameters and the hidden states."""
    layer, seen = nn.Linear(8, 8), []

    def forward(hidden):
        seen[:] = [hidden, *layer.parameters()]
        return layer(hidden)

    return TrainingStep(forward, layer.parameters(), WORKLOAD), seen


def test_gradients_do_not_add_up_over_steps(step_and_leaves):
    step, leaves = step_and_leaves
    step()
    first = [leaf.grad.clone() for leaf in leaves]
    assert all(bool(gradient.any()) for gradient in first)
    for _ in range(3):
        step()
    for leaf, gradient in zip(leaves, first, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_clearing_lets_go_of_all_gradients(step_and_leaves):
    step, leaves = step_and_leaves
    step()
    step.clear()
    assert [leaf.grad for leaf in leaves] == [None] * 3
