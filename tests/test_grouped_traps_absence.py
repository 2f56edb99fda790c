"""Names that an expert looks for and does not find: once they are there, it is another expert.

PyTorch's tracer guards the names that were found. Each trap springs when a name appears, and nothing else changes.
"""

from __future__ import annotations

import abc
import collections
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from celmoe import EngineRefusedError, ExpertResult
from tests.traps import (
    WIDTH,
    Batch,
    Trapped,
    assert_like_oracle,
    assert_ran_grouped,
    auto_groups_all,
    build,
    check_refusal,
    experts_of,
)


class World:
    """All that experts look into, made anew for every test."""

    def __init__(self) -> None:
        self.table: dict[str, float] = {}
        self.wrapped = types.SimpleNamespace(table={})
        self.record = types.SimpleNamespace()
        self.module = types.ModuleType("settings")
        self.kind: Any = type("Kind", (), {})
        self.base: Any = type("Base", (), {})
        self.derived: Any = type("Derived", (self.base,), {})
        self.abstract: Any = abc.ABCMeta("Abstract", (), {})
        self.user = collections.UserDict[str, float]()

        def function() -> None: ...

        self.function: Any = function


WORLD = World()


@pytest.fixture(autouse=True)
def _a_new_world():
    globals()["WORLD"] = World()


def caught(read: Callable[[], Any], *errors: type[BaseException]) -> Any:
    try:
        return read()
    except errors:
        return 1.0


NAME = "CELMOE_TEST_SCALE"
GLOBAL: dict[str, tuple[Callable[[Any], Any], Callable[[], None]]] = {
    "a key": (lambda _: caught(lambda: WORLD.table["scale"], KeyError), lambda: WORLD.table.update(scale=3.0)),
    "a key of a table inside": (
        lambda _: caught(lambda: WORLD.wrapped.table["scale"], KeyError),
        lambda: WORLD.wrapped.table.update(scale=3.0),
    ),
    "a key of a user's dict": (lambda _: WORLD.user.get("scale", 1.0), lambda: WORLD.user.update(scale=3.0)),
    "an attribute": (
        lambda _: caught(lambda: WORLD.record.scale, AttributeError),
        lambda: setattr(WORLD.record, "scale", 3.0),
    ),
    "an attribute by vars": (
        lambda _: vars(WORLD.record).get("scale", 1.0),
        lambda: setattr(WORLD.record, "scale", 3.0),
    ),
    "an attribute of a module": (
        lambda _: getattr(WORLD.module, "scale", 1.0),
        lambda: setattr(WORLD.module, "scale", 3.0),
    ),
    "whether a module has one": (
        lambda _: 2.0 if hasattr(WORLD.module, "scale") else 1.0,
        lambda: setattr(WORLD.module, "scale", 3.0),
    ),
    "an attribute of a function": (
        lambda _: getattr(WORLD.function, "scale", 1.0),
        lambda: setattr(WORLD.function, "scale", 3.0),
    ),
    "an annotation": (
        lambda _: 1.0 + len(WORLD.function.__annotations__),
        lambda: WORLD.function.__annotations__.update(scale=float),
    ),
    "an attribute of a class": (lambda _: getattr(WORLD.kind, "scale", 1.0), lambda: setattr(WORLD.kind, "scale", 3.0)),
    "an attribute of a base": (
        lambda _: getattr(WORLD.derived, "scale", 1.0),
        lambda: setattr(WORLD.base, "scale", 3.0),
    ),
    "names of a class": (lambda _: float(len(dir(WORLD.kind))), lambda: setattr(WORLD.kind, "scale", 3.0)),
    "a registered class": (
        lambda _: 2.0 if isinstance(WORLD.record, WORLD.abstract) else 1.0,
        lambda: WORLD.abstract.register(types.SimpleNamespace),
    ),
    "a variable of the environment": (
        lambda _: float(os.environ.get(NAME, "1")),
        lambda: os.environ.update({NAME: "3"}),
    ),
    "whether there is one": (lambda _: 2.0 if NAME in os.environ else 1.0, lambda: os.environ.update({NAME: "3"})),
    "one by getenv": (lambda _: float(os.getenv(NAME, "1")), lambda: os.environ.update({NAME: "3"})),
    "the depth of calls": (
        lambda _: sys.getrecursionlimit() / 1000,
        lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 500),
    ),
}
OWN: dict[str, tuple[Callable[[Any], Any], Callable[[Any], None]]] = {
    "an attribute": (lambda s: caught(lambda: s.scale, AttributeError), lambda s: setattr(s, "scale", 3.0)),
    "an attribute by vars": (lambda s: vars(s).get("scale", 1.0), lambda s: setattr(s, "scale", 3.0)),
    "an attribute of a part": (
        lambda s: caught(lambda: s.linear.scale, AttributeError),
        lambda s: setattr(s.linear, "scale", 3.0),
    ),
    "an attribute in place of another": (
        lambda s: caught(lambda: s.scale, AttributeError),
        lambda s: (delattr(s, "unread"), setattr(s, "scale", 3.0)),
    ),
    "a buffer": (
        lambda s: caught(lambda: s.scale, AttributeError),
        lambda s: s.register_buffer("scale", torch.tensor(3.0)),
    ),
    "a part": (
        lambda s: caught(lambda: 0.0 if s.part is None else 3.0, AttributeError),
        lambda s: s.add_module("part", torch.nn.Identity()),
    ),
    "an attribute of a parameter": (
        lambda s: caught(lambda: s.linear.bias.scale, AttributeError),
        lambda s: setattr(s.linear.bias, "scale", 3.0),
    ),
    "an attribute of a parameter of the same name": (
        lambda s: (
            caught(lambda: s.last.bias.scale, AttributeError) + caught(lambda: s.linear.bias.scale, AttributeError)
        ),
        lambda s: setattr(s.last.bias, "scale", 3.0),
    ),
    "an attribute of the first such parameter": (
        lambda s: (
            caught(lambda: s.linear.bias.scale, AttributeError) + caught(lambda: s.last.bias.scale, AttributeError)
        ),
        lambda s: setattr(s.linear.bias, "scale", 3.0),
    ),
    "an attribute of a buffer": (
        lambda s: caught(lambda: s.factor.scale, AttributeError) * s.factor,
        lambda s: setattr(s.factor, "scale", 3.0),
    ),
    "a key": (lambda s: caught(lambda: s.table["scale"], KeyError), lambda s: s.table.update(scale=3.0)),
    "an attribute of a record": (
        lambda s: caught(lambda: s.record.scale, AttributeError),
        lambda s: setattr(s.record, "scale", 3.0),
    ),
}


class Looking(Trapped):
    """Scales its rows by a number that it finds."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        super().__init__()
        self.read = read
        self.unread = 0
        self.table: dict[str, float] = {}
        self.record = types.SimpleNamespace()
        self.last = torch.nn.Linear(WIDTH, WIDTH)
        self.register_buffer("factor", torch.ones(WIDTH))

    def forward(self, batch):
        return ExpertResult(self.last(self.linear(batch.hidden) * self.read(self)))


@pytest.fixture
def _surroundings_kept(monkeypatch):
    monkeypatch.setenv(NAME, "1")
    monkeypatch.delenv(NAME)
    limit = sys.getrecursionlimit()
    yield
    os.environ.pop(NAME, None)
    sys.setrecursionlimit(limit)


@pytest.mark.usefixtures("_surroundings_kept")
@pytest.mark.parametrize("engine", ["auto", "grouped"])
@pytest.mark.parametrize("name", GLOBAL)
def test_a_name_that_appears_around_experts(name: str, engine: str):
    read, change = GLOBAL[name]
    subject, twin = (build(lambda: Looking(read), engine) for _ in range(2))
    assert_like_oracle(subject, twin, Batch)
    with auto_groups_all():
        assert_ran_grouped(subject, Batch())
    change()
    assert_like_oracle(subject, twin, Batch)


@pytest.mark.parametrize("engine", ["auto", "grouped"])
@pytest.mark.parametrize("which", ["all", "the third"])
@pytest.mark.parametrize("name", OWN)
def test_a_name_that_appears_in_experts(name: str, which: str, engine: str):
    read, change = OWN[name]
    subject, twin = (build(lambda: Looking(read), engine) for _ in range(2))
    assert_like_oracle(subject, twin, Batch)
    with auto_groups_all():
        assert_ran_grouped(subject, Batch())
    for model in (subject, twin):
        for expert in experts_of(model) if which == "all" else experts_of(model)[2:3]:
            change(expert)
    assert_like_oracle(subject, twin, Batch)


def test_a_name_that_appears_in_the_context():
    subject, twin = (build(InContext, "auto") for _ in range(2))
    for extra in ({}, {"factor": 3.0}, {}, {"factor": 2.0}):

        def make_batch(extra: dict[str, float] = extra) -> Batch:
            batch = Batch()
            batch.context |= extra
            return batch

        assert_like_oracle(subject, twin, make_batch)


class InContext(Trapped):
    def forward(self, batch):
        return ExpertResult(self.linear(batch.hidden) * caught(lambda: batch.context["factor"], KeyError))


class Answering(type):
    """Answers for its classes."""

    scale = 1.0

    def __instancecheck__(cls, instance: object) -> bool:
        return True


class Answered(metaclass=Answering):
    pass


@pytest.mark.parametrize(
    "read",
    [lambda _: Answered.scale, lambda _: 2.0 if isinstance(WORLD, Answered) else 1.0],
    ids=["attribute", "check"],
)
def test_a_class_that_another_answers_for(read: Callable[[Any], Any]):
    check_refusal(lambda: Looking(read), "use the class Answered, for which Answering may answer anything")


def test_a_refusal_says_so():
    model = build(lambda: Looking(lambda _: Answered.scale))
    with pytest.raises(EngineRefusedError, match="use the class Answered"):
        Batch()(model)
