"""Containers of every kind keep their type around their rows, and values of one item a sample are cut like tensors.

Each kind is seen through each engine and through the oracle. `tests.test_context_refusals` has values that can't be
told apart, or copied.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from celmoe import (
    CELMoEConfig,
    EngineRefusedError,
    ExpertModule,
    ExpertResult,
    HierarchicalCELMoE,
    Rows,
    Shared,
)
from celmoe.engines.registry import ENGINES
from celmoe.reference import reference_forward
from tests.refusals import level

B = 4
ROUTES = ["b", "a", "b", "b"]
ROWS = {"a": [1], "b": [0, 2, 3]}
TEXTS = ["w", "x", "y", "z"]
ORACLE = "oracle"
WAYS = [*ENGINES, ORACLE]


class Watching(ExpertModule):
    """Keeps the context that it was given."""

    def __init__(self):
        super().__init__()
        self.context = None

    def forward(self, batch):
        self.context = batch.context
        return ExpertResult(batch.hidden)


class Other(Watching):
    """Belongs to another class, so that the two never run as one."""


def seen(context, way, batch_size=B, routes=ROUTES):
    """Each expert's context."""
    engine = "looped" if way == ORACLE else way
    config = CELMoEConfig(2, [level("l", ("a", "b"))])
    model = HierarchicalCELMoE(
        config, lambda _, name, __: (Watching if name == "a" else Other)(), nn.Identity(), engine=engine
    )
    run = functools.partial(reference_forward, model) if way == ORACLE else model
    run(torch.zeros(batch_size, 2), {"l": routes}, context)
    return {name: model.level_modules["l"][name].context for name in sorted(set(routes))}


def aligned(*trailing):
    return torch.randn(B, *trailing)


# --- containers ------------------------------------------------------------------------------------------------------

MADE = collections.Counter()


class Counted:
    """Counts how often its subclasses' own code runs that a copy has no need of."""

    def __new__(cls, *_, **__):
        MADE[cls] += 1
        return super().__new__(cls)


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


class Plain(Counted):
    def __init__(self, x, texts):
        MADE[Plain] += 1
        self.x, self.texts, self.limit = x, texts, 7

    def __setattr__(self, name, value):
        MADE[Plain] += 1
        super().__setattr__(name, value)

    @property
    def twice(self):
        return self.x * 2


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


class Fields(NamedTuple):
    x: Any
    texts: Any


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


def item(value):
    return value["x"], value["texts"]


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
NESTINGS = {
    "bare": (lambda value: value, lambda context: context),
    "in a dict": (lambda value: {"value": value, "n": 1}, lambda context: context["value"]),
    "deep": (
        lambda value: SimpleNamespace(a=[{"b": (value, "tail")}, 0]),
        lambda context: context.a[0]["b"][0],
    ),
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


# --- one item a sample -----------------------------------------------------------------------------------------------


class Sentence:
    def __init__(self, text):
        self.text = text


class Words(list):
    source = "a"

    def __getitem__(self, index):
        raise AssertionError("read by its class's own code")


SENTENCES = [Sentence(text) for text in TEXTS]
PER_SAMPLE = {
    "texts": TEXTS,
    "numbers": [1, 2.5, 3, True],
    "tuple": tuple(TEXTS),
    "with gaps": ["w", None, "y", None],
    "objects": SENTENCES,
    "records": [{"text": text, "n": 1} for text in TEXTS],
    "token lists": [[1], [2, 3], [], [4, 5, 6]],
    "token lists as long as the batch": [[1, 2, 3, 4], [5, 6, 7, 8], [9] * 4, [0] * 4],
    "tuples": [(1, 2), (3, 4), (5, 6), (7, 8)],
    "scalars": [torch.tensor(float(n)) for n in range(B)],
    "array": np.arange(B),
    "array of rows": np.arange(B * 6.0).reshape(B, 3, 2),
    "array of texts": np.array(TEXTS),
    "array of objects": np.array(SENTENCES, dtype=object),
    "structured array": np.array([(1, "a"), (2, "b"), (3, "c"), (4, "d")], dtype=[("n", int), ("t", "U1")]),
    "masked array": np.ma.masked_array(np.arange(B), mask=[0, 1, 0, 1]),
    "marked tensors": Rows([torch.randn(n) for n in (2, 5, 4, 1)]),
    "marked tensors, all as long as the batch": Rows([torch.randn(B, 2) for _ in range(B)]),
    "marked tuple of dicts": Rows(tuple({"boxes": torch.randn(n, 4)} for n in range(B))),
    "marked tensor": Rows(torch.arange(B)),
    "marked array": Rows(np.arange(B)),
}


def assert_cut(found, value, rows):
    value = value.value if isinstance(value, Rows) else value
    assert type(found) is type(value)
    if isinstance(value, list | tuple):
        assert len(found) == len(rows)
        assert all(item is value[row] for item, row in zip(found, rows, strict=True))
    elif isinstance(value, torch.Tensor):
        assert torch.equal(found, value[rows])
    else:
        np.testing.assert_array_equal(found, value[rows])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("what", PER_SAMPLE)
def test_what_has_one_item_a_sample_is_cut(what, nesting, way):
    value = PER_SAMPLE[what]
    wrap, unwrap = NESTINGS[nesting]
    for name, context in seen(wrap(value), way).items():
        assert_cut(unwrap(context), value, ROWS[name])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", PER_SAMPLE)
def test_shared_keeps_it_whole(what, way):
    value = PER_SAMPLE[what]
    value = value.value if isinstance(value, Rows) else value
    for context in seen({"value": Shared(value), "x": aligned()}, way).values():
        assert context["value"] is value


@pytest.mark.parametrize("way", WAYS)
def test_a_list_of_a_class_of_its_own_keeps_it(way):
    words = Words(TEXTS)
    words.source = "b"
    if way != ORACLE:
        for name, context in seen({"words": words}, way).items():
            assert type(context["words"]) is Words
            assert list(context["words"]) == [TEXTS[row] for row in ROWS[name]]
            assert context["words"].source == "b"
    pairs = Rows(Fields(1, 2))
    for context in seen({"pairs": pairs}, way, 2, ["a", "b"]).values():
        assert context["pairs"] in ((1,), (2,))
        assert type(context["pairs"]) is tuple


@pytest.mark.parametrize("way", WAYS)
def test_what_has_another_length_is_shared(way):
    for value in (
        TEXTS[:3],
        (*TEXTS, "v"),
        [],
        np.arange(B + 1),
        np.float64(2.0),
        np.array(1.0),
        np.zeros((2, B)),
        torch.Size([B, 2, 3, 4]),
        "wxyz",
        b"wxyz",
        dict.fromkeys(TEXTS, 1),
        Fields(1, 2),
        {1, 2, 3, 4},
        frozenset(TEXTS),
        collections.deque(TEXTS[:3]),
        range(3),
        {"a": 1, "b": 2}.values(),
    ):
        for context in seen({"value": value, "x": aligned()}, way).values():
            assert context["value"] is value


@pytest.mark.parametrize("way", WAYS)
def test_a_record_as_long_as_the_batch_is_no_list_of_samples(way):
    pair = (torch.randn(2, 3), torch.randn(2))
    largest = torch.randn(2, 3).max(1)
    contexts = seen({"pair": pair, "fields": Fields(1, 2), "largest": largest}, way, 2, ["a", "b"])
    for row, name in enumerate("ab"):
        context = contexts[name]
        assert torch.equal(context["pair"][0], pair[0][[row]])
        assert torch.equal(context["pair"][1], pair[1][[row]])
        assert context["fields"] == Fields(1, 2)
        assert torch.equal(context["largest"].indices, largest.indices[[row]])


@pytest.mark.parametrize("way", WAYS)
def test_one_sample_alone_has_nothing_to_mix(way):
    table = torch.randn(3)
    context = seen({"texts": ["w"], "table": [table], "array": np.zeros(1)}, way, 1, ["a"])["a"]
    assert context["texts"] == ["w"]
    assert context["table"][0] is table
    assert context["array"].shape == (1,)


@pytest.mark.parametrize("way", WAYS)
def test_an_object_s_own_lists_are_its_own_business(way):
    """A tokenizer's special words do not become one a sample in a batch of as many."""

    class Tokenizer:
        def __init__(self):
            self.special = list(TEXTS)

    tokenizer = Tokenizer()
    for context in seen({"tokenizer": tokenizer, "x": aligned()}, way).values():
        assert context["tokenizer"] is tokenizer


# --- values that stay closed -----------------------------------------------------------------------------------------


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(B, B))
        self.texts = list(TEXTS)


class Kind(enum.Enum):
    ROWS = "rows"


def closed_over(rows):
    return lambda: rows


def opaque():
    module = Weights()
    rows = aligned()
    return {
        "module": module,
        "modules": nn.ModuleList([nn.Linear(2, 2) for _ in range(B)]),
        "bound method": module.forward,
        "function": closed_over(rows),
        "partial": functools.partial(torch.add, rows),
        "class": Plain,
        "enum": Kind.ROWS,
        "optimizer": torch.optim.SGD(module.parameters(), 0.1),
        "generator": (each for each in [rows, rows]),
        "iterator": iter([rows, rows]),
        "Python's module": functools,
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", opaque())
def test_what_is_called_or_drawn_from_is_shared(what, way):
    value = opaque()[what]
    for context in seen({"value": value, "deep": [SimpleNamespace(value=value)]}, way).values():
        assert context["value"] is value
        assert context["deep"][0].value is value
    if what in ("generator", "iterator"):
        assert len(list(value)) == 2


# --- tensors of other layouts ----------------------------------------------------------------------------------------


class Scaled(ExpertModule):
    """Adds the sum of each row's part of a ragged tensor."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, batch):
        sums = torch.stack([part.sum() for part in batch.context["ragged"].unbind()])
        return ExpertResult(self.linear(batch.hidden) * sums.unsqueeze(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("marked", [False, True])
def test_nested_tensors_are_cut_by_samples(layout, marked):
    parts = [torch.randn(n, 3) for n in (2, 4, 1, 3)]
    hidden = torch.randn(B, 2)
    torch.manual_seed(0)
    model = HierarchicalCELMoE(CELMoEConfig(2, [level("l", ("a", "b"))]), lambda *_: Scaled(), nn.Identity())
    results = []
    for way in ("looped", "auto", ORACLE):
        leaves = [part.clone().requires_grad_() for part in parts]
        ragged = torch.nested.as_nested_tensor(leaves, layout=layout)
        model.engine = "looped" if way == ORACLE else way
        run = functools.partial(reference_forward, model) if way == ORACLE else model
        output = run(hidden, {"l": ROUTES}, {"ragged": Rows(ragged) if marked else ragged}).levels["l"].hidden
        (output * torch.arange(8.0).reshape(B, 2)).sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)
    wanted = torch.stack(
        [
            model.level_modules["l"][name].linear(row) * part.sum()
            for name, row, part in zip(ROUTES, hidden, parts, strict=True)
        ]
    )
    torch.testing.assert_close(results[0][0], wanted.detach())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["nested, jagged", "nested, strided", "sparse", "strided"])
def test_rows_keep_the_layout_of_their_tensor(layout, way):
    parts = [torch.randn(n, 3) for n in (2, 4, 1, 3)]
    tensor = {
        "nested, jagged": torch.nested.as_nested_tensor(parts, layout=torch.jagged),
        "nested, strided": torch.nested.as_nested_tensor(parts, layout=torch.strided),
        "sparse": torch.eye(B).to_sparse(),
        "strided": torch.eye(B),
    }[layout]
    for name, context in seen({"x": tensor}, way).items():
        rows = context["x"]
        assert (rows.layout, rows.is_nested, rows.size(0)) == (tensor.layout, tensor.is_nested, len(ROWS[name]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_a_nested_tensor_of_another_length_is_shared(layout):
    ragged = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)], layout=layout)
    for context in seen({"ragged": ragged}, "looped").values():
        assert context["ragged"] is ragged


# --- the engines -----------------------------------------------------------------------------------------------------


class Reading(ExpertModule):
    """Experts of one class that zip their rows with values of one item a sample."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, batch):
        scale = torch.tensor([float(len(word)) for word in batch.context["words"]])
        return ExpertResult(self.linear(batch.hidden) * scale.unsqueeze(1))


IRREGULAR = {
    "list": ["a", "bb", "ccc", "dddd"],
    "tuple": ("a", "bb", "ccc", "dddd"),
    "array": np.array(["a", "bb", "ccc", "dddd"]),
}


@pytest.mark.parametrize("what", IRREGULAR)
@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c")])
def test_auto_loops_experts_that_would_run_as_one(what, names):
    config = CELMoEConfig(2, [level("l", names), level("m", names)])
    model = HierarchicalCELMoE(config, lambda *_: Reading(), nn.Identity(), engine="auto")
    routing = {"l": ["b", "a", "b", "b"], "m": ["a", "a", "b", "a"]}
    hidden, context = torch.randn(B, 2), {"words": IRREGULAR[what], "deep": [{"x": aligned()}, 0]}
    output, wanted = model(hidden, routing, context), reference_forward(model, hidden, routing, context)
    for name in ("l", "m"):
        torch.testing.assert_close(output.levels[name].hidden, wanted.levels[name].hidden)


@pytest.mark.parametrize("what", IRREGULAR)
def test_grouped_says_why_it_does_not_run_them(what):
    model = HierarchicalCELMoE(
        CELMoEConfig(2, [level("l", ("a", "b"))]), lambda *_: Reading(), nn.Identity(), engine="grouped"
    )
    context = {"in": {"words": IRREGULAR[what]}, "words": Shared(["w"] * B)}
    with pytest.raises(EngineRefusedError) as caught:
        model(torch.randn(B, 2), {"l": ROUTES}, context)
    assert str(caught.value) == (
        "'engine' must be 'auto' or 'looped' for level 'l' (got 'grouped'; its experts 'a', 'b', Reading, are given "
        "\"context['in']['words']\", batch-aligned and no dense tensor)"
    )
    # One expert at a level runs alone.
    model(torch.randn(B, 2), {"l": ["a"] * B}, {"words": IRREGULAR[what]})


def test_many_texts_are_cut_in_time_that_grows_with_their_number():
    """Each item is read once a level, however many experts there are."""
    samples, names = 4096, tuple(map(str, range(64)))
    reads = collections.Counter()

    class Array(np.ndarray):
        def __getitem__(self, index):
            reads["items"] += len(index)
            return super().__getitem__(index)

    model = HierarchicalCELMoE(
        CELMoEConfig(2, [level("l", names)]), lambda *_: Watching(), nn.Identity(), engine="looped"
    )
    texts = [str(sample) for sample in range(samples)]
    routes = [names[sample % 64] for sample in range(samples)]
    model(torch.zeros(samples, 2), {"l": routes}, {"texts": texts, "array": np.arange(samples).view(Array)})
    assert reads["items"] == samples
    for number, name in enumerate(names):
        assert model.level_modules["l"][name].context["texts"] == texts[number::64]
