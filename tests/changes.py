"""Changes of parameters between two calls: each takes a model whose first call was grouped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from celmoe import ExpertModule, ExpertResult
from tests.traps import (
    LEVEL,
    WIDTH,
    Plain,
    experts_of,
    second,
)

FACTOR = 2.0


def _scaled_by_closure() -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[float], None]]:
    factor = 2.0

    def scale(rows: torch.Tensor) -> torch.Tensor:
        return rows * factor

    def set_factor(value: float) -> None:
        nonlocal factor
        factor = value

    return scale, set_factor


scale_by_closure, set_closure_factor = _scaled_by_closure()


class Settings:
    """An object that experts hold, of numbers."""

    def __init__(self) -> None:
        self.factor = 2.0
        self.nested = {"steps": [1.0, 2.0]}


class Rich(ExpertModule):
    """An expert with everything in it that may change: layers, buffers, numbers in many places, dropout that is off."""

    bias: torch.Tensor
    class_factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(0.0)
        self.out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.1))
        self.register_buffer("shift", torch.randn(WIDTH))
        self.factor = 1.0
        self.sizes = {"list": [1.0, 2.0]}
        self.settings = Settings()

    def forward(self, batch):
        rows = self.dropout(torch.tanh(self.linear(self.norm(batch.hidden)))) + self.shift
        rows = self.out(rows) * self.factor * self.sizes["list"][1] * self.settings.nested["steps"][0]
        return ExpertResult(rows * self.class_factor * self.settings.factor + batch.hidden)


class UsesGlobals(Plain):
    """A global variable decides its result."""

    def forward(self, batch):
        return ExpertResult(self.linear(batch.hidden) * FACTOR)


class UsesClosure(Plain):
    def forward(self, batch):
        return ExpertResult(scale_by_closure(self.linear(batch.hidden)))


def helper(rows):
    return rows * 2


class UsesHelper(Plain):
    def forward(self, batch):
        return ExpertResult(helper(self.linear(batch.hidden)))


class Subclass(Rich):
    def forward(self, batch):
        return ExpertResult(super().forward(batch).hidden * 2)


CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {}


def change(make=Rich):
    """Add the function's change to a model of such experts."""

    def add(function):
        CHANGES[function.__name__] = (make, function)
        return function

    return add


@change()
def nothing(model):
    """The next batches alone, with other experts present."""


@change()
def an_expert_replaced(model):
    model.level_modules[LEVEL]["b"] = Rich()


@change()
def an_expert_replaced_by_a_subclass(model):
    model.level_modules[LEVEL]["b"] = Subclass()


@change()
def an_expert_replaced_by_another_kind(model):
    model.level_modules[LEVEL]["b"] = Plain()


class Gated(Plain):
    """With a parameter of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(1))
        self.fill = 0.0

    def forward(self, batch):
        return ExpertResult(self.linear(batch.hidden) * self.gate + torch.copysign(batch.hidden, self.fill))


@change(Gated)
def a_parameter_replaced_by_an_equal_one(model):
    """Its gradient is to be its own."""
    second(model).gate = nn.Parameter(torch.ones(1))


@change(Gated)
def a_number_replaced_by_an_equal_one(model):
    second(model).fill = -0.0


@change()
def two_experts_swapped(model):
    modules = model.level_modules[LEVEL]
    modules["a"], modules["b"] = modules["b"], modules["a"]


@change()
def one_module_for_two_experts(model):
    model.level_modules[LEVEL]["b"] = model.level_modules[LEVEL]["a"]


@change()
def a_layer_replaced(model):
    second(model).linear = nn.Linear(WIDTH, WIDTH)


@change()
def a_layer_replaced_by_a_function(model):
    second(model).out[1] = nn.Tanh()


@change()
def a_layer_appended(model):
    second(model).out.append(nn.Tanh())


@change()
def a_layers_number_changed(model):
    second(model).out[1].negative_slope = 0.7


@change()
def an_epsilon_changed(model):
    second(model).norm.eps = 0.5


@change()
def a_parameter_replaced(model):
    second(model).linear.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))


@change()
def a_parameter_taken_away(model):
    second(model).linear.bias = None


@change()
def every_parameter_replaced(model):
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(value.detach() * 2))


@change()
def data_set(model):
    second(model).linear.weight.data = torch.randn(WIDTH, WIDTH)


@change()
def data_edited(model):
    for parameter in second(model).parameters():
        parameter.data.mul_(3)


@change()
def edited_through_numpy(model):
    second(model).linear.weight.detach().numpy()[:] += 1
    second(model).shift.numpy()[:] -= 1


@change()
def edited_without_gradients(model):
    with torch.no_grad():
        second(model).linear.weight.mul_(2)
        experts_of(model)[0].linear.bias.normal_()


@change()
def vector_to_all_parameters(model):
    vector_to_parameters(parameters_to_vector(model.parameters()).detach() * 1.5, model.parameters())


@change()
def edited_in_a_state_dict(model):
    second(model).state_dict()["linear.weight"].mul_(2)


@change()
def an_optimizers_steps(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.step()


@change()
def a_foreach_optimizers_steps(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.grad is None else parameter.grad
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True).step()


@change()
def parameters_initialized_anew(model):
    second(model).linear.reset_parameters()


@change()
def a_state_dict_loaded(model):
    model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})


@change()
def a_state_dict_assigned(model):
    model.load_state_dict({name: value.clone() * 0.5 for name, value in model.state_dict().items()}, assign=True)


@change()
def a_state_dict_assigned_to_one(model):
    second(model).load_state_dict(copy.deepcopy(experts_of(model)[0].state_dict()), assign=True)


@change()
def a_state_dict_of_another_dtype_assigned(model):
    """Its dtype is the checkpoint's afterwards."""
    expert = second(model)
    expert.load_state_dict({name: value.double() for name, value in expert.state_dict().items()}, assign=True)
    expert.forward = partial(_in_double, expert)


def _in_double(expert, batch):
    rows = expert.linear(batch.hidden.double()) + expert.shift
    return ExpertResult(rows.to(batch.hidden.dtype))


@change()
def one_expert_frozen(model):
    second(model).requires_grad_(False)


@change()
def one_parameter_frozen(model):
    second(model).linear.weight.requires_grad_(False)


@change()
def all_experts_frozen(model):
    model.requires_grad_(False)


@change()
def frozen_and_thawed(model):
    model.requires_grad_(False)
    model(torch.randn(3, WIDTH), {LEVEL: ["a", "b", "c"]})
    model.requires_grad_(True)
