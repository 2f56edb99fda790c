"""Experts that ask for the identity of an object, or read a value that other experts have just written.

PyTorch's tracer compares objects by identity without a guard, so that an expert's graph may hold for another expert
only until the world changes.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from celmoe import EngineRefusedError, ExpertResult
from celmoe.grouped.identities import Identities
from celmoe.reference import reference_forward
from tests.traps import WIDTH, Batch, Trapped, assert_ran_grouped, auto_groups_all, build, experts_of

WORLD: Any = types.SimpleNamespace()
BEST: Any = None


@pytest.fixture(autouse=True)
def _a_new_world():
    globals()["WORLD"], globals()["BEST"] = types.SimpleNamespace(best=None, writes=[]), None


class Asking(Trapped):
    """A layer whose rows count double if a question is answered with true."""

    def __init__(self, ask: Callable[[Any], Any]) -> None:
        super().__init__()
        self.ask = ask
        self.key = types.SimpleNamespace()
        self.beside = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch):
        rows = self.linear(batch.hidden)
        return ExpertResult(rows * 2 if self.ask(self) else rows)


def keep(name: str) -> Callable[[list[Any], int], None]:
    """Sets up a world that has one expert's part under the name ``best``."""

    def set_up(experts: list[Any], odd: int) -> None:
        expert = experts[odd]
        parts = {"expert": expert, "module": expert.linear, "weight": expert.linear.weight, "key": expert.key}
        WORLD.best = parts[name]

    return set_up


def made(make: Callable[[list[Any], int], Any]) -> Callable[[list[Any], int], None]:
    """Sets up a world that has an object made of the experts under the name ``best``."""
    return lambda experts, odd: setattr(WORLD, "best", make(experts, odd))


def _global(experts: list[Any], odd: int) -> None:
    globals()["BEST"] = experts[odd]


def _of_class(experts: list[Any], odd: int) -> None:
    Asking.best = experts[odd]


def _of_each(experts: list[Any], odd: int) -> None:
    for expert in experts:
        vars(expert)["owner"] = WORLD
    WORLD.best = experts[odd]


def _tied(experts: list[Any], odd: int) -> None:
    for place, expert in enumerate(experts):
        expert.beside = expert.linear if place == odd else nn.Linear(WIDTH, WIDTH)


def _shared_key(experts: list[Any], odd: int) -> None:
    WORLD.best = types.SimpleNamespace()
    for place, expert in enumerate(experts):
        expert.key = WORLD.best if place == odd else types.SimpleNamespace()


def _turned(experts: list[Any], odd: int) -> list[Any]:
    return experts[odd:] + experts[:odd]


QUESTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[list[Any], int], None]]] = {
    "an attribute": (lambda self: self is WORLD.best, keep("expert")),
    "another than an attribute": (lambda self: self is not WORLD.best, keep("expert")),
    "an attribute that may be none": (
        lambda self: WORLD.best is not None and self is not WORLD.best,
        made(lambda experts, odd: None if odd == 4 else experts[odd]),
    ),
    "equal": (lambda self: self == WORLD.best, keep("expert")),
    "a global": (lambda self: self is BEST, _global),
    "a class's": (lambda self: self is type(self).best, _of_class),
    "an owner's": (lambda self: self is self.owner.best, _of_each),
    "its module": (lambda self: self.linear is WORLD.best, keep("module")),
    "its weight": (lambda self: self.linear.weight is WORLD.best, keep("weight")),
    "its object": (lambda self: self.key is WORLD.best, keep("key")),
    "one of its modules twice": (lambda self: self.linear is self.beside, _tied),
    "an object of everybody's": (lambda self: self.key is WORLD.best, _shared_key),
    "in a set": (lambda self: self in WORLD.best, made(lambda experts, odd: {experts[odd]})),
    "in a frozenset": (lambda self: self in WORLD.best, made(lambda experts, odd: frozenset([experts[odd]]))),
    "in a list": (lambda self: self in WORLD.best, made(lambda experts, odd: [experts[odd]])),
    "in a tuple": (lambda self: self in WORLD.best, made(lambda experts, odd: (experts[odd],))),
    "a key": (lambda self: self in WORLD.best, made(lambda experts, odd: {experts[odd]: 1.0})),
    "a part of a key": (lambda self: (self, 1) in WORLD.best, made(lambda experts, odd: {(experts[odd], 1): 1.0})),
    "a key by weak reference": (
        lambda self: self in WORLD.best,
        made(lambda experts, odd: weakref.WeakKeyDictionary({experts[odd]: 1.0})),
    ),
    "in a weak set": (lambda self: self in WORLD.best, made(lambda experts, odd: weakref.WeakSet([experts[odd]]))),
    "by weak reference": (lambda self: WORLD.best() is self, made(lambda experts, odd: weakref.ref(experts[odd]))),
    "first of a list": (lambda self: WORLD.best[0] is self, made(_turned)),
    "its place in a list": (lambda self: WORLD.best.index(self) == 1, made(_turned)),
    "its hash": (lambda self: hash(self) in WORLD.best, made(lambda experts, odd: {hash(experts[odd])})),
    "its id": (lambda self: id(self) in WORLD.best, made(lambda experts, odd: {id(experts[odd])})),
    "in a group of groups": (
        lambda self: any(self in group for group in WORLD.best.values()),
        made(lambda experts, odd: {"small": [experts[1]], "large": [experts[odd], experts[odd]]}),
    ),
}


@pytest.mark.parametrize("order", [(2, 2, 4, 0, 4, 2), (0, 0, 4, 2, 4, 0)], ids=["the third", "the first"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_who_is_asked_for_changes(question: str, order: tuple[int, ...]):
    ask, set_up = QUESTIONS[question]
    model = build(lambda: Asking(ask), "auto")
    for odd in order:
        set_up(experts_of(model), odd)
        expected = Batch()(lambda *args: reference_forward(model, *args)).fused_hidden
        with auto_groups_all():
            torch.testing.assert_close(Batch()(model).fused_hidden, expected)


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("question", ["an attribute", "in a set", "a key", "its weight", "an owner's", "a class's"])
def test_one_expert_does_more_than_its_rows_tell(question: str, place: int):
    """The others run as one; this one's writes are those of a loop."""
    ask, set_up = QUESTIONS[question]

    class Writing(Asking):
        def forward(self, batch):
            if ask(self):
                WORLD.writes.append(len(WORLD.writes))
            return ExpertResult(self.linear(batch.hidden))

    model = build(lambda: Writing(ask), "auto")
    set_up(experts_of(model), place)
    for step in range(1, 4):
        with auto_groups_all():
            Batch()(model)
        assert len(WORLD.writes) == step


def test_the_others_still_run_as_one():
    model = build(lambda: Asking(lambda self: self.key is WORLD.best), "auto")
    with auto_groups_all():
        assert_ran_grouped(model, Batch())


class Counting(Trapped):
    """Multiplies by how many experts were armed and ran; armed ones write."""

    def forward(self, batch):
        if self.armed:
            WORLD.writes.append(1)
        return ExpertResult(self.linear(batch.hidden) * len(WORLD.writes))


class OfAnOwner(Counting):
    def forward(self, batch):
        if self.armed:
            self.owner.writes.append(1)
        return ExpertResult(self.linear(batch.hidden) * len(self.owner.writes))


class OfAClass(Counting):
    writes: ClassVar[list[int]] = []

    def forward(self, batch):
        if self.armed:
            type(self).writes = [*type(self).writes, 1]
        return ExpertResult(self.linear(batch.hidden) * len(type(self).writes))


class OfTheContext(Counting):
    def forward(self, batch):
        writes = batch.context
        if self.armed:
            writes.append(1)
        return ExpertResult(self.linear(batch.hidden) * len(writes))


@pytest.mark.parametrize("armed", [(0,), (2,), (4,), (1, 3)])
@pytest.mark.parametrize("kind", [Counting, OfAnOwner, OfAClass, OfTheContext])
def test_experts_see_what_those_before_them_wrote(kind: type[Counting], armed: tuple[int, ...]):
    found = []
    for engine in ("auto", "looped"):
        model = build(kind, engine)
        WORLD.writes, OfAClass.writes = [], []
        for place, expert in enumerate(experts_of(model)):
            vars(expert)["owner"] = WORLD
            expert.armed = place in armed
        context: list[int] = []
        batch = Batch()
        with auto_groups_all():
            found.append([model(batch.leaves["hidden"], batch.routing, context).fused_hidden for _ in range(3)])
    torch.testing.assert_close(*found)


def test_a_refusal_tells_what_is_read():
    model = build(Counting)
    experts_of(model)[4].arm()
    with pytest.raises(EngineRefusedError, match=r"read what looped experts may change \(.*WORLD\)"):
        Batch()(model)
    assert not WORLD.writes


class Norming(Trapped):
    """Leaves its norm out for a single row, which changes nothing as long as the norm is new."""

    def __init__(self, make: Callable[[], nn.Module], read: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.norm = make()
        self.read = read

    def forward(self, batch):
        rows = batch.hidden
        return ExpertResult(self.linear(self.norm(rows) if self.read(rows) else rows))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH), requires_grad=False)

    def forward(self, rows):
        return rows * self.scale


@pytest.mark.parametrize("mode", ["gradients", "none"])
@pytest.mark.parametrize(
    "make", [lambda: nn.BatchNorm1d(WIDTH).eval(), Scale, nn.Identity], ids=["norm", "scale", "no"]
)
@pytest.mark.parametrize(
    "read", [lambda rows: rows.numel() > WIDTH, lambda rows: len(rows) > 1, lambda rows: rows.flatten().shape[0] > 4]
)
def test_one_row_is_another_program(read: Callable[[torch.Tensor], Any], make: Callable[[], nn.Module], mode: str):
    model = build(lambda: Norming(make, read), "auto").eval()
    for _ in range(2):
        with auto_groups_all(), torch.set_grad_enabled(mode == "gradients"):
            found = Batch()(model).fused_hidden
        torch.testing.assert_close(found, Batch()(lambda *args: reference_forward(model, *args)).fused_hidden)
        for expert in experts_of(model):
            for tensor in expert.norm.parameters():
                tensor.data += 3.0


@pytest.mark.parametrize(
    ("value", "is_searched"),
    [
        (dict.fromkeys(range(300), 1.0), False),
        ({"a": dict.fromkeys(range(300), 1.0), "b": 2.0}, False),
        ([[1.0] * 100] * 3, False),
        ([[1.0] * 100] * 2, True),
        ({"a": {}, "b": 2.0}, True),
        ([object()] * 300, True),
    ],
)
def test_large_containers_are_searched_at_every_call_only_if_they_hold_objects(value: Any, is_searched: bool):
    """A call must not take longer for a table of words."""
    arguments: dict[str, Any] = {"expert": nn.Linear(1, 1)}
    identities = Identities({"L['expert']": arguments["expert"], "G['TABLE']": value}, arguments, {"TABLE": value})
    assert len(identities.others(arguments)) == is_searched
