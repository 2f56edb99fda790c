"""The norms of the experts' gradients beside those of each expert's parameters one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import celmoe
from celmoe import (
    CELMoEConfig,
    ExpertConfig,
    ExpertModule,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    InputTypeError,
)
from tests.stacks import MLP, NAMES, WIDTH, Recurrent, build, expert_of, run, stacked
from tests.test_stacked import Buffered, Losing


def one_by_one(model: HierarchicalCELMoE) -> dict[str, float]:
    """The norms of ordinary experts' gradients."""
    found = {}
    for name, expert in model.level_modules["language"].items():
        grads = [each.grad.to_dense().double().flatten() for each in expert.parameters() if each.grad is not None]
        if grads:
            found[name] = torch.cat(grads).norm().item()
    return found


@pytest.mark.parametrize("routes", [["e0", "e2", "e2"], NAMES, ["e5"]])
@pytest.mark.parametrize("is_stacked", [True, False])
@pytest.mark.parametrize("kind", [MLP, Buffered, Recurrent, Losing])
def test_each_present_expert_has_its_norm(kind, is_stacked, routes):
    plain, model = build(kind, "looped"), (stacked if is_stacked else build)(kind, "looped")
    assert celmoe.gradient_norms(model) == {"language": {}}
    run(plain, routes), run(model, routes)
    expected, found = one_by_one(plain), celmoe.gradient_norms(model)
    assert list(found) == ["language"]
    assert list(found["language"]) == list(expected) == sorted(set(routes))
    assert found["language"] == pytest.approx(expected, rel=1e-6)
    assert all(type(value) is float for value in found["language"].values())


@pytest.mark.parametrize("engine", ["looped", "grouped"])
def test_frozen_experts_and_cleared_gradients_have_none(engine):
    plain, model = build(MLP, "looped").double(), stacked(MLP, engine).double()
    for each in (plain, model):
        each.freeze("language", "e[02]")
        run(each, NAMES, torch.float64)
    assert list(celmoe.gradient_norms(model)["language"]) == ["e1", "e3", "e4", "e5"]
    assert celmoe.gradient_norms(model)["language"] == pytest.approx(one_by_one(plain), rel=1e-9)
    model.zero_grad()
    assert celmoe.gradient_norms(model) == {"language": {}}
    for each in (plain, model):
        each.freeze("language")
        run(each, NAMES, torch.float64)
    assert celmoe.gradient_norms(model) == celmoe.gradient_norms(plain) == {"language": {}}


def test_gradients_that_someone_sets_are_of_all_experts():
    model = stacked()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    size = sum(each.numel() for each in expert_of(model, "e0").parameters())
    assert celmoe.gradient_norms(model) == {"language": dict.fromkeys(NAMES, pytest.approx(math.sqrt(size)))}


def test_a_shared_parameter_counts_for_each_expert():
    model = build(engine="looped")
    expert_of(model, "e1").up = expert_of(model, "e4").up
    run(model, ["e1", "e2"])
    expected = one_by_one(model)
    assert list(expected) == ["e1", "e2", "e4"]
    assert celmoe.gradient_norms(model)["language"] == pytest.approx(expected, rel=1e-6)


class Scalar(ExpertModule):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(()))
        self.table = nn.Embedding(4, WIDTH, sparse=True)

    def forward(self, batch):
        ids = torch.tensor([1, 1, 3])
        return ExpertResult(batch.hidden * self.factor + self.table(ids).sum(0))


def test_scalars_and_sparse_gradients():
    model = build(Scalar, "looped")
    run(model, ["e1", "e2"])
    assert expert_of(model, "e1").table.weight.grad.is_sparse
    assert celmoe.gradient_norms(model)["language"] == pytest.approx(one_by_one(model), rel=1e-6)


@pytest.mark.parametrize("is_stacked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_dtypes(dtype, is_stacked):
    model = build(engine="looped").to(dtype)
    if is_stacked:
        celmoe.stack_experts(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 60000.0)
    size = sum(each.numel() for each in expert_of(model, "e0").parameters())
    value = torch.tensor(60000.0).to(dtype).abs().item()
    assert celmoe.gradient_norms(model)["language"]["e3"] == pytest.approx(value * math.sqrt(size), rel=1e-5)


def test_what_is_no_number_stays_with_its_expert():
    model = stacked(engine="looped")
    run(model, NAMES)
    with torch.no_grad():
        expert_of(model, "e2").up.weight.grad[0, 0] = float("nan")
        expert_of(model, "e3").up.weight.grad[0, 0] = float("inf")
    found = celmoe.gradient_norms(model)["language"]
    assert math.isnan(found["e2"])
    assert math.isinf(found["e3"])
    assert all(math.isfinite(value) for name, value in found.items() if name not in ("e2", "e3"))


def test_experts_with_replaced_parts_are_read_one_by_one():
    plain, model = build(engine="looped"), stacked(engine="looped")
    for each in (plain, model):
        torch.manual_seed(4)
        expert_of(each, "e2").up = nn.Linear(WIDTH, 16)
        torch.manual_seed(5)
        each.level_modules["language"]["e4"] = MLP()
        run(each, NAMES)
    assert celmoe.gradient_norms(model)["language"] == pytest.approx(one_by_one(plain), rel=1e-6)


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _operations(num_experts: int) -> list[str]:
    names = [f"e{number}" for number in range(num_experts)]
    level = HierarchyLevelConfig("language", {name: ExpertConfig(name) for name in names})
    model = HierarchicalCELMoE(CELMoEConfig(WIDTH, [level]), lambda *_: MLP(), engine="looped")
    celmoe.stack_experts(model)
    run(model, names)
    with Counting() as counted:
        assert len(celmoe.gradient_norms(model)["language"]) == num_experts
    return counted.names


def test_operations_do_not_grow_with_the_number_of_stacked_experts():
    few, many = _operations(3), _operations(48)
    assert few == many
    assert sum("linalg_vector_norm" in name for name in few) == 5


def test_a_wrong_kind_is_refused():
    with pytest.raises(InputTypeError, match="must be a HierarchicalCELMoE"):
        celmoe.gradient_norms(nn.Linear(1, 1))
