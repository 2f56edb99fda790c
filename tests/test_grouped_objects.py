"""Experts that hold objects, and containers within containers: a value read for all must be each expert's own."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import random
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from celmoe import ExpertResult, HierarchicalCELMoE
from tests.traps import (
    BATCHES,
    GROUPED,
    NAMES,
    Batch,
    Plain,
    assert_like_oracle,
    assert_ran_grouped,
    build,
    check_refusal,
    experts_of,
)


@dataclasses.dataclass
class Config:
    scale: float = 2.0


@dataclasses.dataclass(eq=False)
class Tree:
    config: Config


@dataclasses.dataclass(slots=True)
class SlottedConfig:
    scale: Any = 2.0


class HalfSlotted(SlottedConfig):
    """Slots of its base, and a ``__dict__`` beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.other = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    scale: float = 2.0
    widths: tuple[int, ...] = (1, 2)
    names: list[str] = dataclasses.field(default_factory=list)


class Pair(NamedTuple):
    scales: list[float]
    name: str = "pair"


class Numbers(list[float]):
    """A list of the user's own kind."""


# A maker of an object that an expert holds, and a function that finds the holder of its number.
OBJECTS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "namespace": (lambda: types.SimpleNamespace(scale=2.0), lambda held: held),
    "dataclass": (Config, lambda held: held),
    "object in an object": (lambda: Tree(Config()), lambda held: held.config),
    "frozen beside it": (lambda: types.SimpleNamespace(scale=2.0, sizes=Frozen()), lambda held: held),
    "slots": (SlottedConfig, lambda held: held),
    "slots and attributes": (HalfSlotted, lambda held: held),
    "object in a slot": (lambda: SlottedConfig(Config()), lambda held: held.scale),
    "object in a list": (lambda: [Config()], lambda held: held[0]),
    "object in a dict": (lambda: {"a": Config()}, lambda held: held["a"]),
    "object in an ordered dict": (lambda: collections.OrderedDict(a=Config()), lambda held: held["a"]),
    "object in a named tuple": (lambda: Pair([Config()]), lambda held: held.scales[0]),
}
LISTS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "list": (lambda: [2.0], lambda held: held),
    "list of the user's": (lambda: Numbers([2.0]), lambda held: held),
    "list in an object": (lambda: types.SimpleNamespace(scales=[2.0]), lambda held: held.scales),
    "list in a slot": (lambda: SlottedConfig([2.0]), lambda held: held.scale),
    "list in a dict": (lambda: {"a": [2.0]}, lambda held: held["a"]),
    "list in an ordered dict": (lambda: collections.OrderedDict(a=[2.0]), lambda held: held["a"]),
    "list in a default dict": (lambda: collections.defaultdict(list, a=[2.0]), lambda held: held["a"]),
    "list in a tuple": (lambda: ([2.0],), lambda held: held[0]),
    "list in a named tuple": (lambda: Pair([2.0]), lambda held: held.scales),
    "list in a list in an object": (lambda: types.SimpleNamespace(all=[[2.0]]), lambda held: held.all[0]),
    "list in a partial": (lambda: functools.partial(sum, [2.0]), lambda held: held.args[0]),
    "dict in a partial": (lambda: functools.partial(dict, numbers=[2.0]), lambda held: held.keywords["numbers"]),
}
HOLDERS = {**OBJECTS, **LISTS}


class Holding(Plain):
    """Multiplies its rows by a number that it holds somewhere, and may count it up first."""

    def __init__(self, holder: str, *, writes: bool = False) -> None:
        super().__init__()
        make, self.place = HOLDERS[holder]
        self.held = make()
        self.writes = writes


class HoldsObject(Holding):
    def forward(self, batch):
        place = self.place(self.held)
        if self.writes:
            place.scale += 1
        return ExpertResult(torch.tanh(self.linear(batch.hidden)) * place.scale)


class HoldsList(Holding):
    def forward(self, batch):
        place = self.place(self.held)
        if self.writes:
            place[0] += 1
        return ExpertResult(torch.tanh(self.linear(batch.hidden)) * place[0])


def holding(holder: str, **options: Any) -> Holding:
    return (HoldsObject if holder in OBJECTS else HoldsList)(holder, **options)


def set_number(model: HierarchicalCELMoE, expert: int, number: float) -> None:
    held = experts_of(model)[expert]
    place = held.place(held.held)
    if isinstance(held, HoldsObject):
        place.scale = number
    else:
        place[0] = number


@pytest.mark.parametrize("holder", HOLDERS)
def test_one_experts_number_changes_between_calls(holder: str):
    """Whichever it is: one of them has lent its attributes to the module that stands for all."""
    for expert, engine in [*((expert, GROUPED) for expert in range(5)), (0, "auto"), (3, "auto")]:
        subject, twin = (build(lambda: holding(holder), engine) for _ in range(2))
        assert_like_oracle(subject, twin, Batch)
        if engine == GROUPED:
            assert_ran_grouped(subject, Batch())
        for model in (subject, twin):
            set_number(model, expert, 5.0)
        for make_batch in (Batch, *BATCHES[1:3]):
            assert_like_oracle(subject, twin, make_batch)


@pytest.mark.parametrize("engine", [GROUPED, "auto"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_number_that_all_hold_changes_between_calls(holder: str, engine: str):
    """All experts hold the very same object, which changes for all of them at once."""
    subject, twin = (build(lambda: holding(holder), engine) for _ in range(2))
    for model in (subject, twin):
        for expert in experts_of(model)[1:]:
            expert.held = experts_of(model)[0].held
    assert_like_oracle(subject, twin, Batch)
    if engine == GROUPED:
        assert_ran_grouped(subject, Batch())
    for number in (5.0, 2.0):
        for model in (subject, twin):
            set_number(model, 0, number)
        assert_like_oracle(subject, twin, Batch)


@pytest.mark.parametrize("holder", HOLDERS)
def test_an_expert_that_counts_up_its_number(holder: str):
    def make() -> Holding:
        return holding(holder, writes=True)

    check_refusal(make, r"wrote|writ|compared")


class HoldsFrozen(Plain):
    """A config of numbers that can't be set, other than by force."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Frozen()

    def forward(self, batch):
        return ExpertResult(torch.tanh(self.linear(batch.hidden)) * self.config.scale / len(self.config.widths))


@pytest.mark.parametrize("engine", [GROUPED, "auto"])
@pytest.mark.parametrize("expert", [0, 1, 4])
def test_a_frozen_config_with_slots(expert: int, engine: str):
    """It is compared field by field, replaced, and set by force."""
    changes: list[Callable[[Any], None]] = [
        lambda held: setattr(held, "config", Frozen(3.0, (1,))),
        lambda held: object.__setattr__(held.config, "scale", 5.0),
        lambda held: object.__delattr__(held.config, "widths") or object.__setattr__(held.config, "widths", (1, 2, 3)),
        lambda held: setattr(held, "config", Frozen()),
    ]
    subject, twin = (build(HoldsFrozen, engine) for _ in range(2))
    assert_like_oracle(subject, twin, Batch)
    if engine == GROUPED:
        assert_ran_grouped(subject, Batch())
    for change in changes:
        for model in (subject, twin):
            change(experts_of(model)[expert])
        assert_like_oracle(subject, twin, Batch)


class HoldsUnset(Plain):
    """A slot that holds nothing yet."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SlottedConfig()
        del self.config.scale

    def forward(self, batch):
        rows = torch.tanh(self.linear(batch.hidden))
        return ExpertResult(rows * self.config.scale if hasattr(self.config, "scale") else rows)


@pytest.mark.parametrize("engine", [GROUPED, "auto"])
def test_a_slot_that_comes_to_hold_something(engine: str):
    subject, twin = (build(HoldsUnset, engine) for _ in range(2))
    for scale in (None, 3.0):
        if scale is not None:
            for model in (subject, twin):
                experts_of(model)[1].config.scale = scale
        assert_like_oracle(subject, twin, Batch)
        assert engine == "auto" or len(subject.explain(Batch().routing).levels[0].classes) == (
            1 if scale is None else 2
        )


class Told(Plain):
    """A number's sign and kind decide its operations."""

    def __init__(self, holder: Any) -> None:
        super().__init__()
        self.held = holder

    def forward(self, batch):
        number = self.held[0] if isinstance(self.held, list) else self.held.scale
        factor = math.copysign(2.0 if type(number) is float else 3.0, number)
        return ExpertResult(torch.tanh(self.linear(batch.hidden)) * factor)


@pytest.mark.parametrize(("before", "after"), [(0.0, -0.0), (-1, -1.0), (1.0, True)])
@pytest.mark.parametrize("holder", ["list", "namespace", "slots"])
def test_a_number_replaced_by_one_that_is_equal(holder: str, before: float, after: float):
    """They compare as equal, and are not the same."""

    def make() -> Any:
        match holder:
            case "list":
                return [before]
            case "namespace":
                return types.SimpleNamespace(scale=before)
            case _:
                return SlottedConfig(before)

    subject, twin = (build(lambda: Told(make())) for _ in range(2))
    assert_like_oracle(subject, twin, Batch)
    assert_ran_grouped(subject, Batch())
    for model in (subject, twin):
        held = experts_of(model)[1].held
        if isinstance(held, list):
            held[0] = after
        else:
            held.scale = after
    assert_like_oracle(subject, twin, Batch)


@pytest.mark.parametrize("whose", ["config", "expert", "layer"])
def test_all_attributes_replaced_at_once(whose: str):
    def make() -> Holding:
        return holding("namespace" if whose != "config" else "dataclass")

    subject, twin = build(make), build(make)
    assert_like_oracle(subject, twin, Batch)
    assert_ran_grouped(subject, Batch())
    for model in (subject, twin):
        first, second = experts_of(model)[:2]
        if whose == "config":
            second.held.__dict__ = {"scale": 5.0}
        elif whose == "expert":
            second.__dict__ = {**second.__dict__, "held": types.SimpleNamespace(scale=5.0)}
        else:
            own = {name: nn.Parameter(each * 2) for name, each in second.linear._parameters.items()}
            second.linear.__dict__ = {**second.linear.__dict__, "_parameters": own}
        assert first is not second
    assert_like_oracle(subject, twin, Batch)


class Activated(Plain):
    """Calls something that it holds."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, batch):
        return ExpertResult(self.function(self.linear(batch.hidden)))


class Slope:
    def __init__(self, slope: float) -> None:
        self.slope = slope

    def __call__(self, rows):
        return rows * self.slope

    def apply(self, rows):
        return rows * self.slope


class Slotted:
    __slots__ = ("slope",)

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def __call__(self, rows):
        return rows * self.slope


class Labelled(float):
    """A number with another one beside it."""

    def __new__(cls, slope):
        self = super().__new__(cls, 1.0)
        self.slope = slope
        return self

    def __call__(self, rows):
        return rows * self.slope


class Listed(list):
    """A list with a number beside it."""

    def __init__(self, slope):
        super().__init__([1.0])
        self.slope = slope

    def __call__(self, rows):
        return rows * self.slope


class CallableError(Exception):
    """Only C code sees its arguments."""

    def __call__(self, rows):
        return rows * self.args[0]


FUNCTIONS: dict[str, Callable[[float], Any]] = {
    "partial with a keyword": lambda slope: functools.partial(F.leaky_relu, negative_slope=slope),
    "partial with an argument": lambda slope: functools.partial(torch.mul, slope),
    "partial of an object": lambda slope: functools.partial(Slope(slope)),
    "bound method": lambda slope: Slope(slope).apply,
    "object that is called": Slope,
    "object with slots": Slotted,
    "number with an attribute": Labelled,
    "list with an attribute": Listed,
    "exception": CallableError,
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_expert_calls_something_else_than_its_siblings(function: str):
    """Whichever it is: a proof on two of them would show some."""
    for other in range(5):

        def make(other: int = other) -> HierarchicalCELMoE:
            slopes = iter([0.9 if number == other else 0.1 for number in range(len(NAMES))])
            return build(lambda: Activated(FUNCTIONS[function](next(slopes))), "auto")

        subject, twin = make(), make()
        for make_batch in BATCHES:
            assert_like_oracle(subject, twin, make_batch)


def test_equal_partials_run_as_one():
    subject, twin = (build(lambda: Activated(FUNCTIONS["partial with a keyword"](0.1))) for _ in range(2))
    for make_batch in BATCHES:
        assert_like_oracle(subject, twin, make_batch)
    assert_ran_grouped(subject, BATCHES[-1]())


class HoldsItself(Plain):
    def __init__(self, holder: Any) -> None:
        super().__init__()
        self.held = holder
        holder.append(holder) if isinstance(holder, list) else setattr(holder, "own", holder)


@pytest.mark.parametrize("holder", [list, types.SimpleNamespace])
def test_what_holds_itself(holder: Any):
    """Reading it comes to an end."""
    subject, twin = (build(lambda: HoldsItself(holder()), "auto") for _ in range(2))
    assert_like_oracle(subject, twin, Batch)


def test_one_object_held_twice_stays_one():
    """The module that stands for all has copies, and asks whether they are one as the expert would."""

    class Twice(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.config = Config()
            self.linear.config = self.config

        def forward(self, batch):
            rows = torch.tanh(self.linear(batch.hidden))
            return ExpertResult(rows * self.config.scale if self.linear.config is self.config else rows)

    subject, twin = build(Twice), build(Twice)
    assert_like_oracle(subject, twin, Batch)
    assert_ran_grouped(subject, Batch())


class Draws(Plain):
    """A stream of numbers that only its object's C code sees."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.stream = random.Random(seed)

    def forward(self, batch):
        return ExpertResult(torch.tanh(self.linear(batch.hidden)) * self.stream.random())


def test_an_objects_hidden_state():
    check_refusal(lambda: Draws(0), "compared|random|used|wrote into what outlives")
