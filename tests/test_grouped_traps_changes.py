"""Users' changes to experts between calls: a first call is grouped, then comes a change, and the next call is right.

Nothing that the engine keeps of a call (classes, proofs, stacks) may outlive the objects it was made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from celmoe import EngineRefusedError, ExpertResult
from tests.changes import CHANGES, Rich, UsesClosure, UsesGlobals, UsesHelper, change, set_closure_factor
from tests.changes_of_code import other_forward
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
        (UsesGlobals, lambda patch: patch.setattr(f"{UsesGlobals.__module__}.FACTOR", 5.0)),
        (UsesHelper, lambda patch: patch.setattr(f"{UsesHelper.__module__}.helper", lambda rows: rows.sin())),
        (UsesHelper, lambda patch: patch.setattr(f"{UsesHelper.__module__}.helper", lambda rows: rows - rows.mean(0))),
        (Rich, lambda patch: patch.setattr(Rich, "forward", other_forward)),
        (Rich, lambda patch: patch.setattr(Rich, "class_factor", 3.0)),
        (Plain, lambda patch: patch.setattr(Trapped, "forward", other_forward)),
        (Plain, lambda patch: patch.setattr(nn.Linear, "forward", lambda self, rows: F.linear(rows, self.weight))),
        (Plain, lambda patch: patch.setattr(F, "linear", lambda rows, weight, bias: rows @ weight.T)),
        (Plain, lambda patch: patch.setattr(torch, "tanh", torch.sin)),
        (Plain, lambda patch: patch.setattr(Plain, "__call__", other_forward, raising=False)),
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
