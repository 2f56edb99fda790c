"""Contexts that are refused before any expert runs, to the letter: nothing whose rows can't be told is passed whole."""

from __future__ import annotations

import array
import collections
import dataclasses
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from celmoe import CELMoEError, InputError, InputTypeError, Rows, Shared
from tests.refusals import GOOD, assert_refused, build, rows

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CS")

B = 3


def run(context: Any) -> None:
    """One call of a model with 3 samples."""
    build()(rows(), GOOD, context)


def assert_refused_in_words(context: Any, kind: type[CELMoEError], builtin: type[Exception], message: str) -> None:
    model = build()
    assert_refused(model, lambda: model(rows(), GOOD, context), kind, builtin, message)


class Lazy(Mapping[str, Any]):
    """Makes its items when asked, as a lazily formatted data set does."""

    def __init__(self, **numbers: int) -> None:
        self.numbers = numbers

    def __getitem__(self, key: str) -> Any:
        return torch.zeros(self.numbers[key])

    def __iter__(self) -> Any:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


class Series:
    """A column of another library."""

    def __init__(self, *items: Any) -> None:
        self.items = {"values": items}

    def __len__(self) -> int:
        return len(self.items["values"])

    def __getitem__(self, index: int) -> Any:
        return self.items["values"][index]

    def __repr__(self) -> str:
        return "Series()"


class Array:
    """An array of another library, whose inside is nobody's to cut."""

    dtype = float

    def __init__(self, *shape: int) -> None:
        self.shape_ = shape
        self.data = np.zeros(B)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shape_

    def __repr__(self) -> str:
        return "Array()"


@dataclasses.dataclass(repr=False)
class Sized:
    """Knows the shape of its batch beside its rows, as distributions do."""

    x: Any
    batch_shape: Any

    def __repr__(self) -> str:
        return "Sized()"


class OwnError(Exception):
    """An object with memory of its own behind its attributes."""


def made_error(x: Any) -> OwnError:
    error = OwnError("text")
    error.x = x  # type: ignore[attr-defined]
    return error


ROWS_ = torch.zeros(B)
TABLE = torch.zeros(7)


def marked(where: str, kind: str, of: str = "Tensor") -> str:
    return (
        f"{where} must be marked, for its 3 items may be the 3 samples' (got {kind} with {of}s in it; celmoe.Rows cuts "
        "it by item, celmoe.Shared keeps it whole, and a dict's values are looked at one by one)"
    )


def refused(rule: str, got: str, where: str = "\"context['x']\"") -> str:
    return f"{where} must {rule} (got {got}; celmoe.Shared keeps it whole)"


AT_X = "\"context['x']\""
SEQUENCE = "be a tensor, NumPy array, list or tuple"
HOLDS = "that holds batch-aligned rows"
LAYOUT = "be dense, sparse COO or nested with its second axis ragged"


def ragged_later() -> torch.Tensor:
    ragged = torch.nested.nested_tensor([torch.zeros(n, 2) for n in (1, 2, 3)], layout=torch.jagged)
    return ragged.transpose(1, 2)


# By content, the makers of contexts: functions, since some layouts warn.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    # Either one item a sample, or a container of shared tensors.
    "ragged tensors": (lambda: {"x": [torch.zeros(2), torch.zeros(5), torch.zeros(4)]}, marked(AT_X, "list")),
    "ragged tensors, one as long as the batch": (
        lambda: [torch.zeros(2), ROWS_, torch.zeros(4)],
        marked("'context'", "list"),
    ),
    "rows beside a table": (lambda: {"x": (ROWS_, TABLE, 1)}, marked(AT_X, "tuple")),
    "records": (lambda: {"x": [{"boxes": torch.zeros(n, 4)} for n in (1, 2, 4)]}, marked(AT_X, "list")),
    "objects": (lambda: [SimpleNamespace(x=TABLE), 0, 0], marked("'context'", "list")),
    "ragged arrays": (
        lambda: {"a": SimpleNamespace(x=[np.zeros(2), 0, 0])},
        marked("\"context['a'].x\"", "list", "ndarray"),
    ),
    # Ordered, as long as the batch, and of no kind that is cut.
    "deque": (lambda: {"x": collections.deque("abc")}, refused(SEQUENCE, "deque of 3 items, as many as samples")),
    "range": (lambda: [range(3), 0], refused(SEQUENCE, "range of 3 items, as many as samples", "'context[0]'")),
    "dict's values": (
        lambda: {"x": {1: 2, 3: 4, 5: 6}.values()},
        refused(SEQUENCE, "dict_values of 3 items, as many as samples"),
    ),
    "array of Python's": (
        lambda: {"x": array.array("d", [1, 2, 3])},
        refused(SEQUENCE, "array of 3 items, as many as samples"),
    ),
    "another library's column": (
        lambda: {"x": Series(1, 2, 3)},
        refused(SEQUENCE, "Series of 3 items, as many as samples"),
    ),
    "another library's array": (lambda: {"x": Array(3, 2)}, refused(SEQUENCE, "Array of shape (3, 2)")),
    # Containers that can't be cut may hold neither rows nor marked values.
    "set": (lambda: {"x": {ROWS_}}, refused("be a list", f"set {HOLDS}")),
    "frozenset": (lambda: [frozenset([(ROWS_, 1)])], refused("be a list", f"frozenset {HOLDS}", "'context[0]'")),
    "deque of rows": (lambda: {"x": collections.deque([ROWS_])}, refused("be a list", f"deque {HOLDS}")),
    "mark in a set": (lambda: {"x": {Shared("table")}}, refused("be a list", f"set {HOLDS}")),
    "array of tensors": (
        lambda: {"x": np.array([{"y": ROWS_}, None], dtype=object)},
        refused("be a list", f"array {HOLDS}"),
    ),
    "made when asked": (lambda: {"x": Lazy(a=2, b=3)}, refused("be a dict", "Lazy, which makes ['b'] when asked")),
    "made when asked, outermost": (
        lambda: Lazy(b=3),
        refused("be a dict", "Lazy, which makes ['b'] when asked", "'context'"),
    ),
    "memory of its own": (
        lambda: {"x": made_error(ROWS_)},
        refused("be a container that can be copied", "OwnError around batch-aligned rows"),
    ),
    "knows the batch's shape": (
        lambda: {"x": Sized(ROWS_, torch.Size([3, 2]))},
        refused("hold no batch size beside its rows", "Sized with torch.Size([3, 2]) in .batch_shape"),
    ),
    "distribution": (
        lambda: {"x": torch.distributions.Normal(torch.zeros(3), torch.ones(3))},
        refused("hold no batch size beside its rows", "Normal with torch.Size([3]) in ._batch_shape"),
    ),
    "packed sequence": (
        lambda: {"x": pack_sequence([torch.zeros(4), torch.zeros(2), torch.zeros(1)])},
        refused("be padded rows and their lengths", "PackedSequence of the batch"),
    ),
    "CSR": (lambda: {"x": torch.eye(3).to_sparse_csr()}, refused(LAYOUT, "torch.sparse_csr")),
    "CSC": (lambda: [torch.eye(3).to_sparse_csc()], refused(LAYOUT, "torch.sparse_csc", "'context[0]'")),
    "ragged at a later axis": (
        lambda: {"x": ragged_later()},
        refused(LAYOUT, "a nested tensor ragged at a later axis"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_mix_rows_up_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    context = make()
    assert_refused_in_words(context, InputError, ValueError, message)


@pytest.mark.parametrize("case", REFUSED)
def test_shared_lets_it_through(case: str) -> None:
    context = REFUSED[case][0]()
    run(Shared(context))
    if isinstance(context, dict):
        run({key: Shared(value) for key, value in context.items()})


@pytest.mark.parametrize("case", ["ragged tensors", "rows beside a table", "records"])
def test_rows_lets_it_through_where_it_has_one_item_a_sample(case: str) -> None:
    run({"x": Rows(REFUSED[case][0]()["x"])})


def test_a_mark_within_says_that_it_is_a_container() -> None:
    run({"x": (Rows(ROWS_), TABLE, 1), "y": [Shared(TABLE), TABLE, TABLE]})


def wrong_length(where: str, got: object) -> str:
    return f"{where} must have one row for each of the 3 samples, as celmoe.Rows says (got {got})"


def wrong_kind(where: str, got: str) -> str:
    return (
        f"{where} must be a tensor, NumPy array, list or tuple for celmoe.Rows to mark (got {got}; mark what is in it)"
    )


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (Rows(torch.zeros(4, 3)), wrong_length("'context'", 4)),
        ({"x": Rows(torch.zeros(()))}, wrong_length(AT_X, "none, a number")),
        ([0, Rows(np.zeros((2, 3)))], wrong_length("'context[1]'", 2)),
        ({"x": Rows(["a"])}, wrong_length(AT_X, 1)),
        ({"a": SimpleNamespace(b=(Rows([]),))}, wrong_length("\"context['a'].b[0]\"", 0)),
    ],
)
def test_rows_of_another_number(context: Any, message: str) -> None:
    assert_refused_in_words(context, InputError, ValueError, message)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"x": Rows({"y": ROWS_})}, wrong_kind(AT_X, "dict")),
        (Rows("abc"), wrong_kind("'context'", "str")),
        ([Rows(Shared(ROWS_))], wrong_kind("'context[0]'", "Shared")),
        ({"x": Rows(range(3))}, wrong_kind(AT_X, "range")),
    ],
)
def test_rows_of_what_has_none(context: Any, message: str) -> None:
    assert_refused_in_words(context, InputTypeError, TypeError, message)


def test_what_has_no_rows_of_the_batch_is_shared() -> None:
    """The same kinds are shared if nothing in them could be the samples'."""
    run(
        {
            "ragged": [torch.zeros(2), torch.zeros(5)],
            "deque": collections.deque("ab"),
            "range": range(4),
            "series": Series(1, 2),
            "array": Array(2, 3),
            "set": {TABLE},
            "lazy": Lazy(a=2, b=4),
            "error": made_error(TABLE),
            "sized": Sized(TABLE, torch.Size([3, 2])),
            "normal": torch.distributions.Normal(torch.zeros(4), torch.ones(4)),
            "packed": pack_sequence([torch.zeros(4), torch.zeros(2)]),
            "csr": torch.eye(4).to_sparse_csr(),
            "module": nn.Linear(3, 3),
        }
    )


@pytest.mark.parametrize("one", [collections.deque("a"), range(1), {"k": 0}.keys(), Series(1)], ids=repr)
def test_of_a_batch_of_one_sample_nothing_of_one_item_is_taken_for_rows(one: Any) -> None:
    """One item is no sign of a row for each sample: a setting of one entry is as likely."""
    build()(rows(1), {level: routes[:1] for level, routes in GOOD.items()}, {"x": one})


def test_a_mapping_that_can_t_be_copied_is_shared_where_it_holds_no_rows() -> None:
    run(Lazy(a=2))
