"""A capture leaves nothing behind: no marks or hooks on tensors, nothing alive of models and classes that are gone."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from celmoe import EngineRefusedError, ExpertModule, ExpertResult
from tests import traps
from tests.traps import LEVEL, WIDTH, Batch


def expert(forward: Callable[..., torch.Tensor], part: Callable[[], nn.Module] = nn.Identity) -> type[ExpertModule]:
    """A class of experts of its own."""

    class Expert(ExpertModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(WIDTH))
            self.part = part()

        def forward(self, batch):
            return ExpertResult(forward(self, batch, batch.hidden * self.weight))

    return Expert


def run(make: Callable[[], nn.Module]) -> Any:
    """A model after a call, grouped or refused."""
    model = traps.build(make)
    with contextlib.suppress(EngineRefusedError):
        Batch()(model)
    return model


def on_one_side(self: Any, batch: Any, rows: torch.Tensor) -> torch.Tensor:
    return rows * 2 if batch.hidden.shape[0] > 3 else rows


def read(self: Any, batch: Any, rows: torch.Tensor) -> torch.Tensor:
    return rows * float(rows.sum())


def parted(self: Any, batch: Any, rows: torch.Tensor) -> torch.Tensor:
    return self.part(rows)


def hooked_inside(self: Any, batch: Any, rows: torch.Tensor) -> torch.Tensor:
    rows.register_hook(lambda grad: grad * 2)
    return rows


def weight_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))


def orthogonal() -> nn.Module:
    return nn.utils.parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))


KINDS = {
    "plain": expert(parted),
    "linear": expert(parted, lambda: nn.Linear(WIDTH, WIDTH)),
    "number of rows": expert(on_one_side),
    "value": expert(read),
    "weight norm": expert(parted, weight_norm),
    "orthogonal": expert(parted, orthogonal),
    "hooks": expert(hooked_inside),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_model_that_is_gone_is_gone(name: str):
    model = run(KINDS[name])
    alive = [weakref.ref(each) for each in (*model.modules(), *model.parameters())]
    del model
    gc.collect()
    assert not any(each() is not None for each in alive)


@pytest.mark.parametrize(
    ("forward", "part"),
    [
        (parted, nn.Identity),
        (parted, weight_norm),
        (on_one_side, nn.Identity),
        (read, nn.Identity),
        (hooked_inside, nn.Identity),
    ],
)
def test_a_class_that_is_gone_is_gone(forward: Callable[..., torch.Tensor], part: Callable[[], nn.Module]):
    """A notebook defines classes anew, over and over."""
    made = expert(forward, part)
    run(made)
    alive = weakref.ref(made)
    del made
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("name", KINDS)
def test_tensors_are_left_as_they_were(name: str):
    model = traps.build(KINDS[name])
    before = {key: set(vars(each)) for key, each in [*model.named_parameters(), *model.named_buffers()]}
    with contextlib.suppress(EngineRefusedError):
        Batch()(model)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert {key: set(vars(each)) for key, each in tensors} == before
    assert not any(each._backward_hooks for _, each in tensors)


def on_rows(self: Any, batch: Any, rows: torch.Tensor) -> torch.Tensor:
    batch.hidden.register_hook(lambda grad: grad * 2)
    return batch.hidden * self.weight


def on_weights(self: Any, batch: Any, rows: torch.Tensor) -> torch.Tensor:
    if not self.weight._backward_hooks:
        self.weight.register_hook(lambda grad: grad * 2)
    return rows


def on_context(self: Any, batch: Any, rows: torch.Tensor) -> torch.Tensor:
    batch.context["scale"].register_hook(lambda grad: grad * 2)
    return rows * batch.context["scale"][:, :1]


def doubled_after(weight: torch.Tensor) -> None:
    weight.grad.mul_(2)


def after_accumulation(self: Any, batch: Any, rows: torch.Tensor) -> torch.Tensor:
    if not self.weight._post_accumulate_grad_hooks:
        self.weight.register_post_accumulate_grad_hook(doubled_after)
    return rows


@pytest.mark.parametrize("forward", [hooked_inside, on_rows, on_weights, on_context, after_accumulation])
def test_hooks_that_experts_put_on_tensors_work(forward: Callable[..., torch.Tensor]):
    """The tracer's graph does not hold those on its inputs."""
    make = expert(forward)
    traps.check_auto(make)
    with pytest.raises(EngineRefusedError, match=r"hook|not known"):
        traps.assert_like_oracle(traps.build(make), traps.build(make), Batch)


def replaced_static(kind: type) -> None:
    kind.static = staticmethod(torch.cos)


def replaced_classmethod(kind: type) -> None:
    kind.of_class = classmethod(lambda cls, rows: rows * 3)


def replaced_property(kind: type) -> None:
    kind.factor = property(lambda self: 7.0)


def replaced_by_a_method(kind: type) -> None:
    kind.static = lambda self, rows: rows * 5


def rewritten(kind: type) -> None:
    kind.factor.fget.__code__ = (lambda self: 9.0).__code__


@pytest.mark.parametrize(
    "change", [replaced_static, replaced_classmethod, replaced_property, replaced_by_a_method, rewritten]
)
def test_replaced_parts_of_a_class_are_seen(change: Callable[[type], None]):
    class Parts(ExpertModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        @staticmethod
        def static(rows):
            return torch.sin(rows)

        @classmethod
        def of_class(cls, rows):
            return rows * 2

        @property
        def factor(self):
            return 0.5

        def forward(self, batch):
            return ExpertResult(self.static(self.of_class(self.linear(batch.hidden))) * self.factor)

    subject, twin = traps.build(Parts), traps.build(Parts)
    traps.assert_like_oracle(subject, twin, Batch)
    traps.assert_ran_grouped(subject, Batch())
    assert len(subject.level_modules[LEVEL]) > 1
    change(Parts)
    traps.assert_like_oracle(subject, twin, Batch)


class Spoiling(ExpertModule):
    """Draws, and writes over a tensor that its backward pass needs."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.factor = 2.0 if number == 0 else 0.5
        self.dropout = nn.Dropout(0.5)

    def forward(self, batch):
        rows = batch.hidden * 1
        rows *= rows.detach()
        return ExpertResult(self.dropout(rows * self.factor))


def test_a_refused_call_draws_no_random_numbers():
    """Nor do the experts that would have run before the class that is refused."""
    numbers = itertools.count()
    model = traps.build(lambda: Spoiling(next(numbers)))
    before = torch.get_rng_state()
    with pytest.raises(EngineRefusedError, match="raise RuntimeError in a backward pass on a few rows"):
        Batch()(model)
    assert torch.equal(torch.get_rng_state(), before)
