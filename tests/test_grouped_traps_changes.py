"""Users' changes to experts between calls: a first call is grouped, then comes a change, and the next call is right.

Nothing that the engine keeps of a call (classes, proofs, stacks) may outlive the objects it was made of.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, parametrize, prune, vector_to_parameters
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from celmoe import EngineRefusedError, ExpertModule, ExpertResult
from tests.traps import (
    BATCHES,
    GROUPED,
    LEVEL,
    NAMES,
    WIDTH,
    Batch,
    Plain,
    Trapped,
    assert_like_oracle,
    assert_right_or_refused,
    build,
    changed,
    check_change,
    experts_of,
    observe,
    oracle_of,
    second,
    seed_all,
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
    expert.forward = partial(_other_forward, expert)


@change()
def forwards_of_their_own(model):
    for expert in experts_of(model):
        expert.forward = partial(_other_forward, expert)


def _other_forward(expert, batch):
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


@change()
def a_call_that_an_expert_breaks_off(model):
    second(model).factor = "no number"
    with pytest.raises((TypeError, RuntimeError)):
        Batch()(model)
    second(model).factor = 1.0


@pytest.mark.parametrize("name", CHANGES)
def test_after_a_grouped_call(name: str):
    make, function = CHANGES[name]
    check_change(make, function)


# Their outcome depends on gradients that other engines sum in another order: the test above has them.
NEEDS_GRADS = {"an_optimizers_steps", "a_foreach_optimizers_steps"}


@pytest.mark.parametrize(
    "name", [name for name in CHANGES if "refused" not in name and "breaks" not in name and name not in NEEDS_GRADS]
)
def test_after_several_grouped_calls(name: str):
    """All that is kept from call to call is kept by now, under gradients and without."""
    make, function = CHANGES[name]

    def warm_and_change(model):
        with torch.inference_mode():
            BATCHES[1]()(model)
        for make_batch in BATCHES:
            observe(model, model, make_batch())
        return changed(model, function)

    subject, twin = build(make), build(make)
    subject = warm_and_change(subject)
    for make_batch in (BATCHES[1], BATCHES[3]):
        observe(twin, oracle_of(twin), make_batch())
    twin = changed(twin, function)
    for engine in ("auto", GROUPED):
        subject.engine = engine
        assert_right_or_refused(subject, twin, BATCHES[:2])


@pytest.mark.parametrize("engine", [GROUPED, "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_one_expert_cast(dtype: torch.dtype, engine: str):
    """It takes rows of the others' dtype by itself, and gives its own."""
    models = [build(OwnDtype) for _ in range(2)]
    for model in models:
        for make_batch in BATCHES[:1]:
            observe(model, model, make_batch())
        second(model).to(dtype)
        model.engine = engine
    batches = Batch(), Batch()
    outputs = []
    for batch, forward in zip(batches, (models[0], oracle_of(models[1])), strict=True):
        try:
            outputs.append(batch(forward).fused_hidden)
        except EngineRefusedError:
            assert engine == GROUPED
            return
        outputs[-1].pow(2).sum().backward()
    torch.testing.assert_close(*outputs)
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


class OwnDtype(Plain):
    """Computes in the dtype of its weights, for rows of any dtype."""

    def forward(self, batch):
        return ExpertResult(torch.tanh(self.linear(batch.hidden.to(self.linear.weight.dtype))))


@pytest.mark.parametrize("engine", [GROUPED, "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_whole_model_cast(dtype: torch.dtype, engine: str):
    model = build(Rich)
    observe(model, model, Batch())
    model.zero_grad()
    model.to(dtype)
    model.engine = engine
    batch = Batch(dtype=dtype)
    output = batch(model).fused_hidden
    assert output.dtype == dtype
    output.pow(2).sum().backward()
    found = [output, batch.leaves["hidden"].grad, *(expert.linear.weight.grad for expert in experts_of(model)[:5])]
    model.zero_grad()
    batch = Batch(dtype=dtype)
    output = batch(oracle_of(model)).fused_hidden
    output.pow(2).sum().backward()
    expected = [output, batch.leaves["hidden"].grad, *(expert.linear.weight.grad for expert in experts_of(model)[:5])]
    loose = {} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        largest = theirs.abs().max()
        torch.testing.assert_close(mine / largest, theirs / largest, **loose)


@pytest.mark.parametrize(
    ("make", "patch"),
    [
        (UsesGlobals, lambda patch: patch.setattr(f"{__name__}.FACTOR", 5.0)),
        (UsesHelper, lambda patch: patch.setattr(f"{__name__}.helper", lambda rows: rows.sin())),
        (UsesHelper, lambda patch: patch.setattr(f"{__name__}.helper", lambda rows: rows - rows.mean(0))),
        (Rich, lambda patch: patch.setattr(Rich, "forward", _other_forward)),
        (Rich, lambda patch: patch.setattr(Rich, "class_factor", 3.0)),
        (Plain, lambda patch: patch.setattr(Trapped, "forward", _other_forward)),
        (Plain, lambda patch: patch.setattr(nn.Linear, "forward", lambda self, rows: F.linear(rows, self.weight))),
        (Plain, lambda patch: patch.setattr(F, "linear", lambda rows, weight, bias: rows @ weight.T)),
        (Plain, lambda patch: patch.setattr(torch, "tanh", torch.sin)),
        (Plain, lambda patch: patch.setattr(Plain, "__call__", _other_forward, raising=False)),
    ],
    ids=[
        *("global", "helper", "helper that mixes", "forward", "class attribute", "base's forward", "layer's forward"),
        *("torch's function", "torch's method", "call"),
    ],
)
def test_code_changed_from_outside(make, patch, monkeypatch: pytest.MonkeyPatch):
    """The same class, and other code behind it."""
    check_change(make, lambda model: patch(monkeypatch))


def test_a_closures_cell_changed():
    try:
        check_change(UsesClosure, lambda model: set_closure_factor(5.0), grouped_first=False)
    finally:
        set_closure_factor(2.0)


@pytest.mark.parametrize("engine", [GROUPED, "auto"])
def test_changes_one_after_another(engine: str):
    """All that leave a model of the same modules, in turn, on one model."""
    subject, twin = build(Rich, engine), build(Rich)
    for name, function in _harmless():
        subject, twin = changed(subject, function), changed(twin, function)
        try:
            assert_like_oracle(subject, twin, Batch)
        except EngineRefusedError:
            assert engine == GROUPED, name


def _harmless() -> Iterator[tuple[str, Any]]:
    names = ["an_attribute_changed", "data_edited", "one_parameter_frozen", "frozen_and_thawed", "an_expert_replaced"]
    names += [
        "two_experts_swapped",
        "edited_through_numpy",
        "a_state_dict_assigned",
        "eval_mode",
        "a_buffer_registered",
    ]
    for name in names:
        yield name, CHANGES[name][1]


def test_an_expert_removed_is_named():
    model = build(Plain)
    observe(model, model, Batch())
    del model.level_modules[LEVEL]["b"]
    with pytest.raises(KeyError, match="'b'"):
        Batch()(model)


def test_the_first_call_may_be_under_any_mode():
    """A class verified without gradients is verified for training, and the other way round."""
    for first in (torch.no_grad, torch.inference_mode):
        subject, twin = build(Rich), build(Rich)
        with first():
            seed_all()
            Batch()(subject)
        for make_batch in BATCHES:
            assert_like_oracle(subject, twin, make_batch)
        assert not any(value.is_inference() for value in subject.parameters())
    assert len(NAMES) > 2


class Typed(Plain):
    """Tells numbers apart that are equal."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, batch):
        return ExpertResult(self.linear(batch.hidden) * told_apart(self.value))


def told_apart(value: Any) -> float:
    value = value[0] if isinstance(value, tuple | list) else value
    if isinstance(value, complex):
        value = value.real
    if value is True:
        return 4.0
    return 2.0 if isinstance(value, float) and math.copysign(1.0, value) > 0 else 3.0


EQUALS = {
    "zeros": (0.0, -0.0),
    "in a list": ([0.0], [-0.0]),
    "in a tuple": ((0.0,), (-0.0,)),
    "of a complex number": (complex(0.0, 1.0), complex(-0.0, 1.0)),
    "a truth value in a tuple": ((1,), (True,)),
    "an integer in a tuple": ((1.0,), (1,)),
    "an integer in a list": ([1.0], [1]),
    "a tuple in a tuple": ((1.0, (2, [3])), (True, (2, [3]))),
}


@pytest.mark.parametrize("engine", ["auto", GROUPED])
@pytest.mark.parametrize("name", EQUALS)
def test_a_constant_replaced_by_an_equal_one(name: str, engine: str):
    before, after = EQUALS[name]
    subject, twin = (build(lambda: Typed(before), engine) for _ in range(2))
    assert_like_oracle(subject, twin, Batch)
    for model in (subject, twin):
        second(model).value = after
    assert_like_oracle(subject, twin, Batch)
    for model in (subject, twin):
        for expert in experts_of(model):
            expert.value = after
    assert_like_oracle(subject, twin, Batch)


class Tied(Plain):
    """Asks whether two of its tensors are one."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch):
        return ExpertResult(self.linear(batch.hidden) * (2.0 if self.other.weight is self.linear.weight else 1.0))


@pytest.mark.parametrize("engine", ["auto", GROUPED])
def test_tensors_that_become_one(engine: str):
    subject, twin = (build(Tied, engine) for _ in range(2))
    assert_like_oracle(subject, twin, Batch)
    for model in (subject, twin):
        second(model).other.weight = second(model).linear.weight
    assert_like_oracle(subject, twin, Batch)
