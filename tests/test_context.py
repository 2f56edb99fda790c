"""The context's rule at every nesting: batch-aligned tensors by their rows, everything else as it is.

`tests.test_context_kinds` has other batch-aligned values, and containers of all kinds.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections import OrderedDict
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from celmoe import CELMoEConfig, ExpertModule, ExpertResult, HierarchicalCELMoE, Shared
from celmoe.rows.context import ContextRows
from tests.refusals import level

pytestmark = pytest.mark.usefixtures("_as_few_and_as_many")

B = 4
ROUTES = ["b", "a", "b", "b"]
ROWS = {"a": [1], "b": [0, 2, 3]}


class Pair(NamedTuple):
    left: Any
    right: Any = None


@dataclasses.dataclass
class Box:
    item: Any
    label: str = "box"


@dataclasses.dataclass(frozen=True)
class FrozenBox:
    item: Any
    label: str = "box"


@dataclasses.dataclass(slots=True)
class SlotsBox:
    item: Any
    label: str = "box"


@dataclasses.dataclass(frozen=True, slots=True)
class HardBox:
    item: Any
    label: str = "box"


@dataclasses.dataclass
class Strict:
    """Its constructor asks for more than its fields, and counts its calls."""

    item: Any
    made: int = dataclasses.field(init=False, default=0)
    _: dataclasses.KW_ONLY
    seed: dataclasses.InitVar[int]

    def __post_init__(self, seed):
        self.made += seed


@dataclasses.dataclass
class Late:
    """A field that is set only later."""

    item: Any
    later: Any = dataclasses.field(init=False)


class Watching(ExpertModule):
    """Keeps its batch."""

    def __init__(self):
        super().__init__()
        self.batch = None

    def forward(self, batch):
        self.batch = batch
        return ExpertResult(batch.hidden)


def watch(context=None, mask=None, routes=ROUTES, hidden=None):
    """The batch that each expert saw."""
    model = HierarchicalCELMoE(
        CELMoEConfig(2, [level("l", ("a", "b"))]), lambda *_: Watching(), fusion_module=nn.Identity()
    )
    model(torch.arange(len(routes) * 2.0).reshape(-1, 2) if hidden is None else hidden, {"l": routes}, context, mask)
    return {name: model.level_modules["l"][name].batch for name in sorted(set(routes))}


def aligned(*trailing):
    return torch.randn(B, *trailing)


WRAPPINGS = {
    "bare": (lambda tensor: tensor, lambda context: context),
    "dict": (lambda tensor: {"x": tensor, 1: "y"}, lambda context: context["x"]),
    "dict in dict": (lambda tensor: {"x": {"y": tensor}}, lambda context: context["x"]["y"]),
    "list": (lambda tensor: [0, tensor], lambda context: context[1]),
    "tuple": (lambda tensor: (tensor, "x"), lambda context: context[0]),
    "named tuple": (lambda tensor: Pair("x", tensor), lambda context: context.right),
    "dataclass": (Box, lambda context: context.item),
    "frozen dataclass": (FrozenBox, lambda context: context.item),
    "dataclass with slots": (SlotsBox, lambda context: context.item),
    "frozen dataclass with slots": (HardBox, lambda context: context.item),
    "dataclass with its own constructor": (lambda tensor: Strict(tensor, seed=3), lambda context: context.item),
    "dataclass with a field not set yet": (Late, lambda context: context.item),
    "deep": (
        lambda tensor: {"a": [Pair(Box(({"b": HardBox(tensor)},)))]},
        lambda context: context["a"][0].left.item[0]["b"].item,
    ),
    "read-only mapping": (lambda tensor: {"m": MappingProxyType({"x": tensor})}, lambda context: context["m"]["x"]),
}


@pytest.mark.parametrize("how", WRAPPINGS)
@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
def test_rows_are_selected_wherever_they_lie(how, trailing):
    wrap, unwrap = WRAPPINGS[how]
    tensor = aligned(*trailing)
    context = wrap(tensor)
    seen = watch(context)
    for name, rows in ROWS.items():
        assert torch.equal(unwrap(seen[name].context), tensor[rows])
        if not isinstance(context, torch.Tensor | dict):
            assert type(seen[name].context) is type(context)
    assert unwrap(context) is tensor


@pytest.mark.parametrize("how", WRAPPINGS)
def test_everything_else_is_shared_as_it_is(how):
    wrap, unwrap = WRAPPINGS[how]
    for value in (
        torch.randn(B - 1),
        torch.randn(3, B),
        torch.tensor(2.0),
        torch.zeros(0),
        "text",
        None,
        np.zeros(B - 1),
    ):
        context = wrap(value)
        for batch in watch(context).values():
            assert unwrap(batch.context) is value
            if not isinstance(context, dict):
                assert batch.context is context


@pytest.mark.parametrize("how", WRAPPINGS)
def test_shared_keeps_a_value_whole_and_bare(how):
    wrap, unwrap = WRAPPINGS[how]
    tensor, tree = aligned(2), [aligned(), {"x": aligned()}]
    for value in (tensor, tree):
        for batch in watch(wrap(Shared(value))).values():
            assert unwrap(batch.context) is value


def test_a_length_that_agrees_with_a_group_by_chance_changes_nothing():
    """celmoe-vp takes three rows of a context for those of an expert with three samples."""
    three = torch.randn(3, 2)
    for batch in watch({"x": three}).values():
        assert batch.context["x"] is three


def test_a_mapping_of_plain_values_is_told_at_once(monkeypatch):
    """A vocabulary in the context is not walked entry by entry at every call."""
    calls = []
    right = ContextRows._child
    monkeypatch.setattr(ContextRows, "_child", lambda *args: calls.append(1) or right(*args))
    vocabulary = {str(number): number for number in range(1000)}
    for batch in watch({"vocabulary": vocabulary}).values():
        assert batch.context["vocabulary"] is vocabulary
    assert len(calls) < 10


def test_torchs_own_tuples_keep_their_fields():
    largest = aligned(2).max(1)
    for name, batch in watch({"largest": largest}).items():
        assert torch.equal(batch.context["largest"].values, largest.values[ROWS[name]])
        assert torch.equal(batch.context["largest"].indices, largest.indices[ROWS[name]])


def test_a_users_tuple_keeps_its_class():
    class Point(tuple):
        __slots__ = ()

    point = Point([aligned(), 1])
    for name, batch in watch({"point": point}).items():
        assert type(batch.context["point"]) is Point
        assert torch.equal(batch.context["point"][0], point[0][ROWS[name]])


def test_a_container_that_holds_itself():
    tree = {"rows": aligned()}
    tree["self"] = tree
    for name, batch in watch(tree).items():
        assert torch.equal(batch.context["rows"], tree["rows"][ROWS[name]])
        assert batch.context["self"] is batch.context


def test_other_fields_of_a_dataclass_come_along():
    box = Strict(aligned(), seed=3)
    box.extra = "set later"
    for batch in watch(box).values():
        assert (batch.context.made, batch.context.extra) == (3, "set later")
    late = watch(Late(aligned()))["a"].context
    assert not hasattr(late, "later")


def test_the_same_tensor_twice_is_the_same_rows_twice():
    tensor = aligned()
    for batch in watch({"x": tensor, "y": [tensor]}).values():
        assert batch.context["x"] is batch.context["y"][0]


def test_subtrees_without_rows_are_the_caller_s_own():
    tree = {"deep": [1, (torch.randn(2), Box("x"))]}
    for batch in watch({"tree": tree, "rows": aligned()}).values():
        assert batch.context["tree"] is tree
    listed = [aligned(), tree]
    for batch in watch(listed).values():
        assert batch.context[1] is tree


def test_the_outermost_dict_is_each_expert_s_own():
    class Writing(ExpertModule):
        def forward(self, batch):
            assert "seen" not in batch.context
            batch.context["seen"] = batch.state["expert"]
            return ExpertResult(batch.hidden)

    config = CELMoEConfig(2, [level("l", ("a", "b")), level("m", ("a", "b"))])
    model = HierarchicalCELMoE(config, lambda *_: Writing(), fusion_module=nn.Identity())
    for context in ({}, {"x": 1}, {"x": aligned()}):
        before = dict(context)
        model(torch.zeros(B, 2), {"l": ROUTES, "m": ROUTES}, context)
        assert context == before


def test_rows_are_private():
    class InPlace(ExpertModule):
        def forward(self, batch):
            batch.context["x"].zero_()
            batch.mask.zero_()
            return ExpertResult(batch.hidden.zero_())

    model = HierarchicalCELMoE(
        CELMoEConfig(2, [level("l", ("a", "b"))]), lambda *_: InPlace(), fusion_module=nn.Identity()
    )
    for routes in (ROUTES, ["a", "a", "b", "b"], ["a"] * B):
        hidden, context, mask = torch.ones(B, 2), {"x": torch.ones(B, 3)}, torch.ones(B)
        model(hidden, {"l": routes}, context, mask)
        assert hidden.sum() == 2 * B
        assert context["x"].sum() == 3 * B
        assert mask.sum() == B


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.complex64, torch.uint8])
def test_contexts_and_masks_of_any_dtype(dtype):
    tensor = torch.ones(B, 3).to(dtype)
    for name, batch in watch(tensor, tensor).items():
        assert batch.context.dtype == batch.mask.dtype == dtype
        assert torch.equal(batch.context, tensor[ROWS[name]])


@pytest.mark.parametrize("routes", [ROUTES, ["a", "a", "b", "b"], ["b"] * B])
def test_masks_are_cut_like_hidden(routes):
    for trailing in ((), (5,), (1, 5, 5)):
        mask = torch.randn(B, *trailing)
        for name, batch in watch(mask=mask, routes=routes).items():
            chosen = [row for row, route in enumerate(routes) if route == name]
            assert torch.equal(batch.mask, mask[chosen])
            assert batch.hidden[:, 0].tolist() == [2.0 * row for row in chosen]
    assert watch()["a"].mask is None


def test_strides_do_not_matter():
    for tensor in (
        torch.randn(3, B).t(),
        torch.randn(2 * B, 3)[::2],
        torch.randn(1, 3).expand(B, 3),
        torch.randn(B, 3).flip(0),
    ):
        for name, batch in watch({"x": tensor}, tensor).items():
            assert torch.equal(batch.context["x"], tensor[ROWS[name]])
            assert torch.equal(batch.mask, tensor[ROWS[name]])


def test_sparse_rows_are_selected_too():
    sparse = torch.eye(B).to_sparse()
    for routes in (ROUTES, ["a", "a", "b", "b"], ["a"] * B):
        for name, batch in watch({"x": sparse}, routes=routes).items():
            chosen = [row for row, route in enumerate(routes) if route == name]
            assert torch.equal(batch.context["x"].to_dense(), torch.eye(B)[chosen])


def test_mappings_of_other_kinds_stay_what_they_are():
    for kind in (OrderedDict, lambda **items: collections.defaultdict(list, **items)):
        tree = kind(x=aligned(), y=1)
        for name, batch in watch({"tree": tree}).items():
            inner = batch.context["tree"]
            assert type(inner) is type(tree)
            assert torch.equal(inner["x"], tree["x"][ROWS[name]])

    class Words(list):
        pass

    words = Words([aligned(), "x"])
    for batch in watch(words).values():
        assert type(batch.context) is Words


@pytest.mark.parametrize("how", ["bare", "dict", "list", "deep"])
def test_other_rows_leave_the_context_that_they_stand_in_for(how):
    """Rows that came from other ranks are one level's; the next level reads the batch's."""
    wrap, unwrap = WRAPPINGS[how]
    tensor, others = aligned(2), torch.randn(B + 1, 2)
    context = ContextRows(wrap(tensor), B, tensor.device)
    changed = context.with_aligned([others])
    assert unwrap(changed.build(changed.aligned)) is others
    assert unwrap(context.build(context.aligned)) is tensor


def test_gradients_flow_into_context():
    class Adding(ExpertModule):
        def forward(self, batch):
            return ExpertResult(batch.hidden + batch.context["x"] * batch.context["scale"])

    model = HierarchicalCELMoE(
        CELMoEConfig(2, [level("l", ("a", "b"))]), lambda *_: Adding(), fusion_module=nn.Identity()
    )
    x, scale = torch.ones(B, 2, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    weight = torch.arange(B * 2.0).reshape(B, 2)
    output = model(torch.zeros(B, 2), {"l": ROUTES}, {"x": x, "scale": scale})
    (output.levels["l"].hidden * weight).sum().backward()
    assert torch.equal(x.grad, 3 * weight)
    assert scale.grad == weight.sum()


def test_big_host_data_costs_no_walk():
    """A list of strings or tokens beside the rows is the ordinary case; looking at each one would dominate the step."""
    samples = 20_000
    hidden, routes = torch.zeros(samples, 2), ["a", "b"] * (samples // 2)
    tokens = [[1] * 20 for _ in range(samples)]

    def seconds(context):
        start = time.perf_counter()
        watch(context, routes=routes, hidden=hidden)
        return time.perf_counter() - start

    plain = min(seconds({}) for _ in range(3))
    walked = min(seconds({"tokens": tokens, "words": ["word"] * samples}) for _ in range(3))
    assert walked < plain + 0.25


# Against a rule that is written down once more, recursively and without any thought of speed.


def trees():
    leaf = st.sampled_from(["aligned", "other", "scalar", "shared", "text", "same"])
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.text("xy", max_size=2), inner, max_size=3),
            st.builds(Pair, inner, inner),
            st.builds(FrozenBox, inner),
            st.lists(inner, max_size=3).map(tuple),
        ),
        max_leaves=8,
    )


def grown(tree, same):
    if isinstance(tree, str):
        leaves = {"aligned": aligned(2), "other": torch.randn(B + 1), "scalar": torch.tensor(1.0), "same": same}
        return leaves.get(tree, Shared(aligned()) if tree == "shared" else tree)
    return rebuilt(tree, lambda item: grown(item, same))


def rebuilt(tree, change):
    match tree:
        case dict():
            return {key: change(item) for key, item in tree.items()}
        case Pair():
            return Pair(*map(change, tree))
        case FrozenBox():
            return FrozenBox(change(tree.item), tree.label)
        case list() | tuple():
            return type(tree)(map(change, tree))
    raise AssertionError(tree)


def same_tree(found, value, rows):
    if isinstance(value, Shared):
        return found is value.value
    if isinstance(value, torch.Tensor):
        if value.dim() and value.shape[0] == B:
            return torch.equal(found, value[rows])
        return found is value
    if isinstance(value, str):
        return found is value
    if type(found) is not type(value):
        return False
    if isinstance(value, dict):
        return found.keys() == value.keys() and all(same_tree(found[key], value[key], rows) for key in value)
    if isinstance(value, FrozenBox):
        return found.label == value.label and same_tree(found.item, value.item, rows)
    return len(found) == len(value) and all(same_tree(*pair, rows) for pair in zip(found, value, strict=True))


@given(trees())
@settings(max_examples=100)
def test_any_tree(tree):
    context = grown(tree, aligned(3))
    for name, batch in watch(context).items():
        assert same_tree(batch.context, context, ROWS[name])


def test_the_tree_check_can_fail():
    tensor = aligned()
    assert not same_tree([tensor], [tensor], ROWS["a"])
    assert not same_tree([tensor[[0]]], [tensor], ROWS["a"])
    assert not same_tree((tensor[ROWS["a"]],), [tensor], ROWS["a"])
    assert same_tree([tensor[ROWS["a"]]], [tensor], ROWS["a"])
