"""Containers of every kind keep their type around their rows, and values of one item a sample are cut like tensors.

Each kind is seen through each engine and through the oracle. `tests.test_context_refusals` has values that can't be
told apart, or copied.
"""

from __future__ import annotations

import collections
import dataclasses
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.context_kinds import MADE, NESTINGS, ROWS, TEXTS, WAYS, B, Fields, Plain, aligned, item, seen


class Encoding(collections.UserDict):
    """A copy of the tokenizers' type: items are attributes, too."""

    def __getattr__(self, name):
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class Output(collections.OrderedDict):
    """A copy of the type that transformers' models return: every field is an item and an attribute."""

    def __init__(self, **fields):
        MADE[Output] += 1
        super().__init__()
        for name, value in fields.items():
            self[name] = value

    def __setitem__(self, key, value):
        MADE[Output] += 1
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __delitem__(self, *_):
        raise TypeError("no field can be deleted")


@dataclasses.dataclass
class DataOutput(collections.OrderedDict):
    """The same as a dataclass."""

    x: Any
    texts: Any = None

    def __post_init__(self):
        MADE[DataOutput] += 1
        for field in dataclasses.fields(self):
            super().__setitem__(field.name, getattr(self, field.name))


class OwnAttributes(dict):
    """A dict that is its own ``__dict__``, as many a config class."""

    def __init__(self, **items):
        MADE[OwnAttributes] += 1
        super().__init__(items)
        self.__dict__ = self


class Attributed(dict):
    """Holds the same values in an attribute beside its items."""

    def __init__(self, **items):
        super().__init__(items)
        self.kept = items["x"]

    def __setitem__(self, *_):
        raise TypeError("read-only")


class Aside(dict):
    """Holds rows in attributes alone: its items are settings."""

    def __init__(self, x, texts):
        super().__init__(limit=7, name="a")
        self.x, self.texts = x, texts


class Tagged(list):
    tag: Any


class Point(tuple):  # noqa: SLOT001  # it is to have attributes
    tag: Any


class Base:
    __slots__ = ("__hidden", "x")

    def __init__(self, x):
        self.x = self.__hidden = x

    @property
    def hidden(self):
        return self.__hidden


class Slotted(Base):
    __slots__ = ("texts", "unset")

    def __init__(self, x, texts):
        super().__init__(x)
        self.texts = texts


class Model:
    """As pydantic's: fields in the ``__dict__``, the rest in slots."""

    __slots__ = ("__dict__", "__fields_set__", "__private__")
    model_fields = ("x", "texts")

    def __init__(self, **fields):
        MADE[Model] += 1
        object.__setattr__(self, "__dict__", fields)
        object.__setattr__(self, "__fields_set__", set(fields))
        object.__setattr__(self, "__private__", {"cache": fields["x"]})

    def __setattr__(self, *_):
        raise TypeError("frozen")


class Attrs:
    """A copy of a class made by attrs: frozen, with slots."""

    __slots__ = ("__weakref__", "texts", "x")
    __attrs_attrs__ = ()

    def __init__(self, x, texts):
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "texts", texts)

    def __setattr__(self, *_):
        raise AttributeError("frozen")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frozen:
    x: Any
    texts: Any
    seed: dataclasses.InitVar[int] = 0
    made: int = dataclasses.field(init=False, default=0)

    def __post_init__(self, seed):
        MADE[Frozen] += 1


@dataclasses.dataclass
class Shaped:
    """Has the attributes of an array, and is none."""

    x: Any
    texts: Any
    shape: tuple[int, ...] = (7,)
    dtype: Any = torch.float32


class Lists(collections.UserList):
    pass


def tagged(kind, x):
    value = kind([x, "tail", 0])
    value.tag = x
    return value


def default_dict(x, texts):
    return collections.defaultdict(list, x=x, texts=texts)


def moved(x, texts):
    ordered = collections.OrderedDict(texts=texts, x=x)
    ordered.move_to_end("texts")
    return ordered


def attribute(value):
    return value.x, value.texts


# By kind: its maker from rows and texts, and all the ways to read them.
KINDS = {
    "dict": (lambda x, t: {"x": x, "texts": t}, [item]),
    "OrderedDict": (moved, [item]),
    "defaultdict": (default_dict, [item]),
    "UserDict": (lambda x, t: collections.UserDict(x=x, texts=t), [item]),
    "encoding": (lambda x, t: Encoding(x=x, texts=t), [item, attribute]),
    "model output": (lambda x, t: Output(x=x, texts=t), [item, attribute]),
    "model output, a dataclass": (DataOutput, [item, attribute]),
    "its own attributes": (lambda x, t: OwnAttributes(x=x, texts=t), [item, attribute]),
    "attribute beside items": (lambda x, t: Attributed(x=x, texts=t), [item, lambda v: (v.kept, v["texts"])]),
    "attributes beside plain items": (Aside, [attribute]),
    "read-only": (lambda x, t: MappingProxyType({"x": x, "texts": t}), [item]),
    "chain": (lambda x, t: collections.ChainMap({"x": x}, {"x": 1, "texts": t}), [item]),
    "chain of as many as samples": (lambda x, t: collections.ChainMap({"x": x}, {"texts": t}, {}, {}), [item]),
    "namespace": (lambda x, t: SimpleNamespace(x=x, texts=t), [attribute]),
    "plain object": (Plain, [attribute, lambda v: (v.twice / 2, v.texts)]),
    "plain object with slots": (Slotted, [attribute, lambda v: (v.hidden, v.texts)]),
    "pydantic's": (lambda x, t: Model(x=x, texts=t), [attribute, lambda v: (v.__private__["cache"], v.texts)]),
    "attrs'": (Attrs, [attribute]),
    "frozen dataclass": (lambda x, t: Frozen(x=x, texts=t), [attribute]),
    "dataclass with a shape": (Shaped, [attribute]),
    "named tuple": (Fields, [attribute, tuple]),
    "tuple with an attribute": (
        lambda x, t: (tagged(Point, x), t),
        [lambda v: (v[0][0], v[1]), lambda v: (v[0].tag, v[1])],
    ),
    "list with an attribute": (
        lambda x, t: [tagged(Tagged, x), t],
        [lambda v: (v[0][0], v[1]), lambda v: (v[0].tag, v[1])],
    ),
    "UserList": (lambda x, t: Lists([x, t, 0]), [lambda v: (v[0], v[1])]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_containers_arrive_as_what_they_are(kind, nesting, way):
    make, readings = KINDS[kind]
    wrap, unwrap = NESTINGS[nesting]
    x, texts = aligned(2), list(TEXTS)
    container = make(x, texts)
    context = wrap(container)
    before = MADE.copy()
    contexts = seen(context, way)
    assert before == MADE, "the class's own code ran"
    for name, rows in ROWS.items():
        arrived = unwrap(contexts[name])
        assert type(arrived) is type(container)
        assert arrived is not container
        for read in readings:
            found, words = read(arrived)
            assert torch.equal(found, x[rows])
            assert words == [TEXTS[row] for row in rows]
            original, all_words = read(container)
            assert torch.equal(original, x)
            assert all_words is texts
    assert texts == TEXTS


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_containers_without_rows_are_the_caller_s_own(kind, way):
    container = KINDS[kind][0](torch.randn(B + 1), TEXTS[:3])
    for context in seen({"value": container, "rows": aligned()}, way).values():
        assert context["value"] is container


def test_what_only_the_kind_knows_comes_along():
    for context in seen({"d": default_dict(aligned(), TEXTS)}, "looped").values():
        assert context["d"]["new"] == []
    for context in seen({"d": moved(aligned(), TEXTS)}, "looped").values():
        assert list(context["d"]) == ["x", "texts"]
    for context in seen({"m": Model(x=aligned())}, "looped").values():
        assert context["m"].__fields_set__ == {"x"}
    for context in seen({"d": OwnAttributes(x=aligned(), n=1)}, "looped").values():
        context["d"].n = 2
        assert context["d"]["n"] == 2
    for context in seen({"s": Slotted(aligned(), 0), "p": Plain(aligned(), 0)}, "looped").values():
        assert not hasattr(context["s"], "unset")
        assert context["p"].limit == 7


@pytest.mark.parametrize("way", WAYS)
def test_a_container_that_occurs_twice_or_in_itself(way):
    """A copy refers to copies: nothing whole is left behind a second reference."""
    inner = {"x": aligned()}
    node = SimpleNamespace(x=aligned(), children=[SimpleNamespace(parent=None), 0])
    node.children[0].parent = node
    ring: Any = [aligned()]
    ring.append((ring, "tail"))
    for name, context in seen({"one": inner, "two": (inner, 0), "node": node, "ring": ring}, way).items():
        assert context["one"] is context["two"][0]
        assert context["node"].children[0].parent is context["node"]
        assert context["node"] is not node
        assert context["ring"][1][0] is context["ring"]
        assert torch.equal(context["ring"][0], ring[0][ROWS[name]])
    empty = SimpleNamespace(parent=None)
    empty.parent = empty
    for context in seen({"empty": empty, "x": aligned()}, way).values():
        assert context["empty"] is empty


@pytest.mark.parametrize("make", [Encoding, collections.ChainMap, collections.UserDict, OwnAttributes, Output])
@pytest.mark.parametrize("has_rows", [False, True])
def test_the_outermost_mapping_is_each_expert_s_own_whatever_its_kind(make, has_rows):
    items = {"x": aligned() if has_rows else 1}
    context = make(items) if make is collections.ChainMap else make(**items)
    for theirs in seen(context, "looped").values():
        assert type(theirs) is make
        assert "new" not in theirs
        theirs["new"] = 1
    assert list(context) == ["x"]
