"""Values of one item a sample are cut like tensors, in containers of every kind."""

from __future__ import annotations

import collections
import enum
import functools
from types import SimpleNamespace

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
from celmoe.reference import reference_forward
from tests.context_kinds import (
    NESTINGS,
    ORACLE,
    ROUTES,
    ROWS,
    TEXTS,
    WAYS,
    B,
    Fields,
    Plain,
    Watching,
    aligned,
    seen,
)
from tests.refusals import level

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
