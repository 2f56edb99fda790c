"""A step that is timed is the same step every time: nothing of the one before is left in it."""

import pytest
import torch
from torch import nn

from benchmarks.harness.steps import BackwardPass, ForwardPass, Passes, TrainingStep
from benchmarks.workloads.hierarchies import ONE_LEVEL
from benchmarks.workloads.workload import Workload

WORKLOAD = Workload("linear", 8, 16, 4, hierarchy=ONE_LEVEL)


@pytest.fixture(params=[Passes, TrainingStep, BackwardPass])
def step_and_leaves(request):
    """A step of one layer, and the leaves that get gradients in it: the layer's parameters and the hidden states."""
    layer, seen = nn.Linear(8, 8), []

    def forward(hidden):
        seen[:] = [hidden, *layer.parameters()]
        return layer(hidden)

    return request.param(forward, layer.parameters(), WORKLOAD), seen


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


def layer_and_step(kind, **options):
    layer = nn.Linear(8, 8)
    return layer, kind(layer, layer.parameters(), WORKLOAD, **options)


def test_a_whole_step_clips_and_lets_the_optimizer_step():
    layer, step = layer_and_step(TrainingStep, rate=1e-2)
    with torch.no_grad():
        layer.weight.mul_(1e3)
    before = layer.weight.detach().clone()
    step()
    norm = torch.linalg.vector_norm(torch.stack([each.grad.norm() for each in layer.parameters()]))
    assert float(norm) == pytest.approx(1.0, rel=1e-4)
    assert not torch.equal(layer.weight, before)
    assert {float(state["step"]) for state in step._optimizer.state.values()} == {1.0}


def test_without_a_rate_weights_stay_and_the_optimizer_works_all_the_same():
    layer, step = layer_and_step(TrainingStep)
    before = [each.detach().clone() for each in layer.parameters()]
    for _ in range(3):
        step()
    assert all(map(torch.equal, layer.parameters(), before))
    assert all(bool(state["exp_avg"].any()) for state in step._optimizer.state.values())


def test_each_pass_alone_is_that_pass(monkeypatch):
    ran = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: ran.append("backward") or backward(loss))
    layer = nn.Linear(8, 8)

    def forward(hidden):
        ran.append("forward")
        return layer(hidden)

    for kind, before, within in ((ForwardPass, [], ["forward"]), (BackwardPass, ["forward"], ["backward"])):
        step = kind(forward, layer.parameters(), WORKLOAD)
        step()
        for _ in range(2):
            ran.clear()
            step.prepare()
            assert ran == before
            step()
            assert ran[len(before) :] == within
