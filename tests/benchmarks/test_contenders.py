"""*Stack* and *dense* compute the results that they claim."""

import itertools

import pytest
import torch

import celmoe
from benchmarks.contenders import stack as stacks
from benchmarks.contenders.dense import Dense
from benchmarks.contenders.layouts import Padded, Ragged
from benchmarks.contenders.stack import HAND_STACKED, Stack, fastest_stack
from benchmarks.harness.interleaved import Timings
from benchmarks.harness.steps import ROUTINGS, routings_of, string_routed
from benchmarks.workloads.bodies import EXPERTS
from benchmarks.workloads.workload import Workload
from tests.features import needs_grouped_mm


def away_from_start(model):
    """Scales of one and shifts of zero would hide that another expert's were taken."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def stacked_gradients(model, names):
    """By the stack's name of a parameter, the gradients of the model's experts, zeros for the absent."""
    found = {}
    for index, level in enumerate(model.levels):
        bodies = [model.level_modules[level.name][name].body for name in level.experts]
        for stacked, plain in names.items():
            parameters = [body.get_parameter(plain) for body in bodies]
            grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
            is_weight = stacked.endswith("weight")
            found[f"levels.{index}.{stacked}"] = torch.stack([grad.T if is_weight else grad for grad in grads])
    return found | {f"fusion.{name}": each.grad for name, each in model.fusion.named_parameters()}


NAMES = {
    "linear": {"weight": "weight", "bias": "bias"},
    "mlp": {
        "scale": "norm.weight",
        "shift": "norm.bias",
        **{name: name for name in ("up.weight", "up.bias", "down.weight", "down.bias")},
    },
}


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(kinds, marks=needs_grouped_mm if Ragged in kinds else ())
        for kinds in itertools.product((Ragged, Padded), repeat=2)
    ],
)
@pytest.mark.parametrize("routes", ["uniform", "zipf"])
@pytest.mark.parametrize("expert", HAND_STACKED)
def test_stack_is_the_model(expert, routes, kinds):
    # Fewer samples than experts: some are absent.
    workload = Workload(expert, 8, 20, 24, routes)
    model = away_from_start(workload.build(celmoe, engine="looped"))
    stack = Stack(model)
    stack.kinds = kinds
    forwards = string_routed(model, workload), stack.routed(routings_of(workload))
    seeded = torch.Generator().manual_seed(7)
    for _ in range(ROUTINGS + 1):
        hiddens = [workload.hidden().requires_grad_() for _ in forwards]
        fused = [forward(hidden) for forward, hidden in zip(forwards, hiddens, strict=True)]
        torch.testing.assert_close(fused[1], fused[0], rtol=1e-5, atol=1e-5)
        push = torch.randn(fused[0].shape, generator=seeded)
        model.zero_grad()
        stack.zero_grad()
        for each in fused:
            each.backward(push)
        torch.testing.assert_close(hiddens[1].grad, hiddens[0].grad, rtol=1e-5, atol=1e-5)
        wanted = stacked_gradients(model, NAMES[expert])
        assert wanted.keys() == dict(stack.named_parameters()).keys()
        for name, parameter in stack.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-5, atol=1e-5, msg=name)


@needs_grouped_mm
def test_a_stack_that_would_mostly_pad_is_not_tried():
    # A fifth of the samples are the first expert's, of 64: nobody would pad that.
    skewed = Workload("linear", 8, 400, 64, "zipf")
    assert fastest_stack(skewed.build(celmoe), skewed).kinds[1] is Ragged


@pytest.mark.parametrize("expert", EXPERTS)
def test_dense_is_the_model_of_one_expert_a_level(expert):
    workload = Workload(expert, 8, 11, 6)
    model = Workload(expert, 8, 11, 1).build(celmoe, engine="looped")
    dense = Dense(workload)
    routing = {"universal": "core", "family": "family-00", "language": "language-000"}
    fused = model(workload.hidden(), routing, mask=workload.mask()).fused_hidden
    assert torch.equal(dense.unrouted(workload)(workload.hidden()), fused)
    assert len(dense.experts) == 3
    assert all(each.grad_fn is None and each.requires_grad for each in dense.parameters())


@needs_grouped_mm
@pytest.mark.parametrize("best", [(Ragged, Padded), (Padded, Ragged), (Padded, Padded)])
def test_the_fastest_stack_is_the_rival(best, monkeypatch):
    """By its median: one lucky round decides nothing."""
    workload = Workload("linear", 8, 40, 9)
    model = workload.build(celmoe)
    seen = []

    def interleave(steps, seconds):
        found = {}
        for name, step in steps.items():
            seen.clear()
            step()
            kinds = tuple(seen)
            found[name] = [1.0, 1.0, 9.0] if kinds == best else [0.1, 2.0, 2.0]
        return Timings(found)

    right = Stack.run_level

    def run_level(self, index, hidden, plan):
        if index:
            seen.append(self.kinds[index - 1])
        return right(self, index, hidden, plan)

    monkeypatch.setattr(stacks, "interleave", interleave)
    monkeypatch.setattr(Stack, "run_level", run_level)
    assert fastest_stack(model, workload).kinds == best
