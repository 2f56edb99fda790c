"""Changed values that pass for the same object, or for an equal one: after a grouped call, the next call is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import nn

from celmoe import ExpertResult, HierarchicalCELMoE
from tests.traps import (
    LEVEL,
    WIDTH,
    Batch,
    Trapped,
    assert_ran_grouped,
    auto_groups_all,
    build,
    check_change,
    oracle_of,
    second,
)

Change = Callable[[HierarchicalCELMoE], None]


class Narrowed(Trapped):
    """Broadcasts its layer's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, batch):
        return ExpertResult(torch.tanh(self.linear(batch.hidden)) + batch.hidden + self.bias)


def data_of_another_shape(model: HierarchicalCELMoE) -> None:
    linear = second(model).linear
    linear.weight.data, linear.bias.data = linear.weight.data[:1].clone(), linear.bias.data[:1].clone()


class Alike(Trapped):
    """Equal to any other of its class."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alike)

    __hash__ = nn.Module.__hash__


def an_equal_module(model: HierarchicalCELMoE) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        model.level_modules[LEVEL]["b"] = Alike()


class Doubling:
    def of(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * 2


class Tripling(Doubling):
    def of(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * 3


class Slotted(float):
    __slots__ = ("factor",)


def scaled(rows: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    return rows * factor


class Holding(Trapped):
    """Holds an object, a number that holds another, and a function with an argument."""

    def __init__(self, *, has_number: bool = False) -> None:
        super().__init__()
        self.doubling = Doubling()
        self.number: float = 1.0
        if has_number:
            self.number = Slotted(1.0)
            self.number.factor = 2.0
        self.scaled = partial(scaled, factor=2.0)

    def forward(self, batch):
        rows = self.scaled(self.doubling.of(torch.tanh(self.linear(batch.hidden))))
        return ExpertResult(rows * (self.number.factor if isinstance(self.number, Slotted) else 1.0))


def another_class(model: HierarchicalCELMoE) -> None:
    second(model).doubling.__class__ = Tripling


def another_number(model: HierarchicalCELMoE) -> None:
    second(model).number.factor = 5.0


def another_argument(model: HierarchicalCELMoE) -> None:
    second(model).scaled.__setstate__((scaled, (), {"factor": 7.0}, {}))


CHANGES: dict[str, tuple[Callable[[], nn.Module], Change, bool]] = {
    "data of another shape": (Narrowed, data_of_another_shape, True),
    "a module that is equal": (Alike, an_equal_module, True),
    "the class of an object": (Holding, another_class, True),
    "what a number holds": (partial(Holding, has_number=True), another_number, False),
    "the state of a partial": (Holding, another_argument, True),
}


# The warning as an error would end a call that a user's program survives.
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("name", CHANGES)
def test_one_is_changed(name: str):
    make, change, is_grouped = CHANGES[name]
    with auto_groups_all():
        check_change(make, change, grouped_first=is_grouped)


COUNTED = [0]


def called(rows: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
    return rows * factor


def counting(rows: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
    COUNTED[0] += 1
    return rows * COUNTED[0]


class Number:
    """Another one at each use."""

    uses = 0

    def __rmul__(self, rows: torch.Tensor) -> torch.Tensor:
        self.uses += 1
        return rows * self.uses

    __torch_function__ = None


class Calling(Trapped):
    def forward(self, batch):
        return ExpertResult(called(torch.tanh(self.linear(batch.hidden))))


@pytest.fixture
def restored() -> Iterator[None]:
    body = called.__code__, called.__defaults__
    COUNTED[0] = 0
    yield
    called.__code__, called.__defaults__ = body


def another_code() -> None:
    called.__code__ = counting.__code__
    COUNTED[0] = 0


def another_default() -> None:
    called.__defaults__ = (Number(),)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("change", [another_code, another_default])
def test_a_function_is_the_same_and_its_body_is_not(change: Callable[[], None]):
    model = build(Calling, "auto")
    with auto_groups_all():
        Batch()(model)
        assert_ran_grouped(model, Batch())
        change()
        found = Batch()(model).fused_hidden
    change()
    torch.testing.assert_close(found, Batch()(oracle_of(model)).fused_hidden)
