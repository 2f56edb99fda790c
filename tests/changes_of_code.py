"""Changes of modes, attributes, structure and code between two calls."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from celmoe import ExpertResult
from tests.changes import Subclass, change
from tests.traps import (
    LEVEL,
    WIDTH,
    experts_of,
    second,
)


@change()
def eval_mode(model):
    model.eval()


@change()
def one_expert_in_eval_mode(model):
    second(model).eval()


@change()
def one_layer_in_eval_mode(model):
    second(model).dropout.eval()


@change()
def an_attribute_changed(model):
    second(model).factor = 5.0


@change()
def an_attribute_changed_everywhere(model):
    for expert in experts_of(model):
        expert.factor = 5.0


@change()
def an_attribute_changed_in_place(model):
    second(model).sizes["list"][1] = 7.0


@change()
def an_attributes_attribute_changed(model):
    second(model).settings.factor = 7.0


@change()
def an_attributes_attribute_changed_deep_down(model):
    second(model).settings.nested["steps"][0] = 7.0


@change()
def an_attribute_becomes_a_tensor(model):
    second(model).factor = torch.tensor(3.0)


@change()
def all_attributes_become_tensors(model):
    for number, expert in enumerate(experts_of(model)):
        expert.factor = torch.tensor(1.0 + number)


@change()
def an_attribute_of_a_new_kind(model):
    for number, expert in enumerate(experts_of(model)):
        expert.factor = 2 if number % 2 else 2.5


@change()
def an_attribute_past_setattr(model):
    second(model).__dict__["factor"] = 5.0


@change()
def a_class_attribute_shadowed(model):
    second(model).class_factor = 3.0


@change()
def a_buffer_registered(model):
    second(model).register_buffer("more", torch.ones(WIDTH))


@change()
def a_buffer_replaced(model):
    second(model).shift = torch.ones(WIDTH)


@change()
def a_buffer_edited(model):
    second(model).shift.add_(1)


@change()
def a_buffer_becomes_a_parameter(model):
    shift = second(model).shift
    del second(model).shift
    second(model).shift = nn.Parameter(shift)


@change()
def a_parameter_registered(model):
    second(model).register_parameter("more", nn.Parameter(torch.ones(WIDTH)))


@change()
def a_module_registered(model):
    second(model).add_module("more", nn.Linear(WIDTH, WIDTH))


@change()
def tied_inside_one(model):
    second(model).out[0].weight = second(model).linear.weight


@change()
def tied_inside_all(model):
    for expert in experts_of(model):
        expert.out[0].weight = expert.linear.weight


@change()
def tied_across_two(model):
    experts_of(model)[0].linear.weight = second(model).linear.weight


@change()
def tied_across_all(model):
    for expert in experts_of(model):
        expert.linear = second(model).linear


@change()
def tied_to_an_absent_expert(model):
    second(model).linear.weight = experts_of(model)[-1].linear.weight


@change()
def a_shared_buffer(model):
    experts_of(model)[0].shift = second(model).shift


@change()
def weight_norm_on_one(model):
    weight_norm(second(model).linear)


@change()
def weight_norm_on_all(model):
    for expert in experts_of(model):
        weight_norm(expert.linear)


@change()
def spectral_norm_on_all(model):
    for expert in experts_of(model):
        spectral_norm(expert.linear)


class Doubling(nn.Module):
    def forward(self, weight):
        return weight * 2


@change()
def parametrized_one(model):
    parametrize.register_parametrization(second(model).linear, "weight", Doubling())


@change()
def parametrized_all(model):
    for expert in experts_of(model):
        parametrize.register_parametrization(expert.linear, "weight", Doubling())


@change()
def parametrized_and_back(model):
    parametrize.register_parametrization(second(model).linear, "weight", Doubling())
    parametrize.remove_parametrizations(second(model).linear, "weight")


@change()
def pruned_one(model):
    prune.random_unstructured(second(model).linear, "weight", amount=0.5)


@change()
def pruned_all(model):
    for expert in experts_of(model):
        prune.random_unstructured(expert.linear, "weight", amount=0.5)


@change()
def pruned_for_good(model):
    prune.l1_unstructured(second(model).linear, "weight", amount=0.5)
    prune.remove(second(model).linear, "weight")


@change()
def deep_copied(model):
    return copy.deepcopy(model)


@change()
def one_expert_deep_copied(model):
    model.level_modules[LEVEL]["b"] = copy.deepcopy(experts_of(model)[0])


@change()
def the_original_edited_after_a_copy(model):
    copied = copy.deepcopy(model)
    with torch.no_grad():
        second(model).linear.weight.zero_()
    return copied


@change()
def pickled(model):
    return pickle.loads(pickle.dumps(model))


@change()
def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@change()
def there_and_back_in_dtype(model):
    model.to(torch.bfloat16).to(torch.float32)


@change()
def moved_where_it_is(model):
    model.to("cpu").float()


@change()
def shared_memory(model):
    model.share_memory()


@change()
def applied(model):
    model.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Linear) else None)


@change()
def memory_transposed(model):
    weight = second(model).linear.weight
    weight.data = weight.data.T.contiguous().T


@change()
def a_forward_of_its_own(model):
    expert = second(model)
    expert.forward = partial(other_forward, expert)


@change()
def forwards_of_their_own(model):
    for expert in experts_of(model):
        expert.forward = partial(other_forward, expert)


def other_forward(expert, batch):
    return ExpertResult(torch.sin(expert.linear(batch.hidden)))


@change()
def a_layers_forward_of_its_own(model):
    layer = second(model).linear
    layer.forward = lambda rows: F.linear(rows, layer.weight)


@change()
def another_class(model):
    second(model).__class__ = Subclass


@change()
def all_of_another_class(model):
    for expert in experts_of(model):
        expert.__class__ = Subclass


@change()
def gradients_left_behind(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


@change()
def a_refused_call(model):
    with pytest.raises(KeyError):
        model(torch.randn(2, WIDTH), {LEVEL: ["a", "nobody"]})
