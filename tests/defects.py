"""Defects of celmoe-vp: of speed, of losses, of contexts. Each is a check that ours passes."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.peer import FIRST, THIRD

WIDTH = 4
CHECKS = []


def defect(*, fails=AssertionError, versions=(FIRST, THIRD)):
    """Register a check. ``fails`` is the peer's error in it: mostly the check's own assertion, else its crash."""

    def register(check):
        CHECKS.append(pytest.param(check, fails, versions, id=check.__name__))
        return check

    return register


def expert_of(lib, function):
    class Calling(lib.ExpertModule):
        def forward(self, batch):
            result = function(batch)
            return result if isinstance(result, lib.ExpertResult) else lib.ExpertResult(result)

    return Calling()


def level_of(lib, *experts, name="l", **rest):
    return lib.HierarchyLevelConfig(name, {each: lib.ExpertConfig(each) for each in experts}, **rest)


def model_of(lib, function, *levels, **config):
    made = lib.CELMoEConfig(WIDTH, list(levels), **{"fusion_dropout": 0.0, **config})
    return lib.HierarchicalCELMoE(made, lambda *_: expert_of(lib, function))


def identity(batch):
    return batch.hidden


def ones(batch_size):
    return torch.ones(batch_size, WIDTH)


def error_of(call):
    """The error that a call raises, or ``None``."""
    try:
        call()
    except Exception as error:  # noqa: BLE001  # the caller says which it wants
        return error
    return None


# --- costs -----------------------------------------------------------------------------------------------------------


class Counted(str):
    """A name that counts how often it is compared."""

    __slots__ = ()
    comparisons = 0

    def __eq__(self, other):
        Counted.comparisons += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def comparisons_of(lib, num_experts, batch_size=256):
    names = [f"e{index:03}" for index in range(num_experts)]
    model = model_of(lib, identity, level_of(lib, *names))
    routes = [Counted(names[index % num_experts]) for index in range(batch_size)]
    Counted.comparisons = 0
    model(ones(batch_size), {"l": routes})
    return Counted.comparisons


@defect()
def routing_costs_the_same_for_many_experts(lib):
    few, many = comparisons_of(lib, 4), comparisons_of(lib, 128)
    assert many <= 2 * few + 256


class NumbersWritten(TorchDispatchMode):
    """Counts the numbers in all results of all operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            results = result if isinstance(result, tuple | list) else [result]
            self.count += sum(each.numel() for each in results if isinstance(each, torch.Tensor))
        return result


def backward_work_of(lib, num_experts, rows=1024):
    names = [f"e{index:03}" for index in range(num_experts)]
    model = model_of(lib, lambda batch: batch.hidden * 1.5, level_of(lib, *names))
    hidden = torch.ones(rows, WIDTH, requires_grad=True)
    loss = model(hidden, {"l": [names[index % num_experts] for index in range(rows)]}).levels["l"].hidden.sum()
    with NumbersWritten() as written:
        loss.backward()
    assert written.count >= rows * WIDTH, "the counter saw nothing"
    return written.count


@defect()
def a_backward_costs_the_same_for_many_experts(lib):
    few, many = backward_work_of(lib, 4), backward_work_of(lib, 128)
    assert many <= 2 * few


class Reads(TorchFunctionMode):
    """Counts operations that make the host wait for a device."""

    names = frozenset({"cpu", "item", "tolist", "numpy", "__float__", "__int__", "__bool__"})

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in self.names
        return func(*args, **(kwargs or {}))


@defect()
def all_losses_are_read_at_once(lib):
    bundle = lib.LossBundle()
    for index in range(20):
        bundle.add(f"loss {index}", torch.tensor(float(index)))
    with Reads() as reads:
        shown = bundle.as_dict()
    assert shown == {f"loss {index}": float(index) for index in range(20)}
    assert reads.count <= 1


# --- config that nobody read -----------------------------------------------------------------------------------------


@defect()
def loss_weight_weighs_an_experts_losses(lib):
    level = level_of(lib, "a", "b")
    level.experts["a"].loss_weight = 5.0
    model = model_of(lib, lambda batch: lib.ExpertResult(batch.hidden, {"size": batch.hidden.sum()}), level)
    output = model(ones(3), {"l": ["a", "b", "b"]})
    bundle = lib.CELMoELossAPI().compute(output)
    assert bundle.total.item() == 5.0 * WIDTH + 2.0 * WIDTH
    # The values themselves stay raw.
    assert bundle.as_dict() == {"l.a.size": 1.0 * WIDTH, "l.b.size": 2.0 * WIDTH}
    assert output.losses["l.a.size"].item() == WIDTH
    assert output.loss_weights == output.levels["l"].loss_weights == {"l.a.size": 5.0, "l.b.size": 1.0}


@defect()
def without_learned_fusion_the_levels_are_averaged(lib):
    levels = [level_of(lib, "a", name="l"), level_of(lib, "a", name="m")]
    model = model_of(lib, lambda batch: batch.hidden * 3, *levels, use_learned_fusion=False, fusion_dropout=0.5)
    assert not [key for key in model.state_dict() if key.startswith("fusion")]
    assert model(ones(2)).fused_hidden.tolist() == [[6.0] * WIDTH] * 2


@defect(versions=[THIRD])
def stop_gradient_from_parent_is_honoured(lib):
    level = level_of(lib, "a")
    level.experts["a"].stop_gradient_from_parent = True
    hidden = ones(2).requires_grad_()
    output = model_of(lib, lambda batch: batch.hidden * 2, level)(hidden)
    assert not output.levels["l"].hidden.requires_grad


# --- context ---------------------------------------------------------------------------------------------------------


def contexts_of(lib, context, routes, hidden=None):
    """The context of each expert's call."""
    seen = {}

    def expert(batch):
        seen[batch.state["expert"]] = batch.context
        return batch.hidden

    model_of(lib, expert, level_of(lib, *sorted(set(routes))))(ones(len(routes)), {"l": routes}, context)
    return seen


ROUTES = ["b", "a", "b", "c", "b"]
ROWS = {"a": [1], "b": [0, 2, 4], "c": [3]}


@defect()
def a_table_longer_than_the_batch_is_shared(lib):
    """The peer picks rows of it, by their numbers in the batch."""
    table = torch.arange(9.0)
    for name, given in contexts_of(lib, {"table": table}, ROUTES).items():
        assert torch.equal(given["table"], table), name


@defect(fails=(IndexError, RuntimeError))
def a_table_as_long_as_one_group_is_shared(lib):
    """The peer hands it whole to the expert with that many samples, and looks for rows in it for the others."""
    table = torch.arange(3.0)
    for name, given in contexts_of(lib, {"table": table}, ROUTES).items():
        assert torch.equal(given["table"], table), name


class Pair(NamedTuple):
    rows: torch.Tensor
    word: str


@dataclasses.dataclass
class Record:
    rows: torch.Tensor
    word: str


@defect()
def batch_aligned_tensors_are_selected_at_any_depth(lib):
    rows = torch.arange(5)
    context = {
        "dict": {"rows": rows, "word": "w"},
        "list": [rows, "w"],
        "tuple": ("w", (rows,)),
        "named": Pair(rows, "w"),
        "record": Record(rows, "w"),
    }
    for name, given in contexts_of(lib, context, ROUTES).items():
        assert given["dict"]["rows"].tolist() == ROWS[name]
        assert given["dict"]["word"] == "w"
        assert given["list"][0].tolist() == ROWS[name]
        assert given["tuple"][1][0].tolist() == ROWS[name]
        assert isinstance(given["named"], Pair)
        assert given["named"].rows.tolist() == ROWS[name]
        assert isinstance(given["record"], Record)
        assert given["record"].rows.tolist() == ROWS[name]
    assert context["record"].rows is rows


@defect(fails=AttributeError)
def shared_keeps_a_tensor_whole_where_lengths_agree_by_chance(lib):
    """The peer has no way to say so."""
    table = torch.arange(5)
    for given in contexts_of(lib, {"table": lib.Shared(table), "rows": table}, ROUTES).values():
        assert given["table"] is table
        assert len(given["rows"]) < 5


@defect(fails=IndexError)
def a_tensor_without_axes_in_the_context_is_shared(lib):
    scalar = torch.tensor(2.0)
    for given in contexts_of(lib, {"scalar": scalar}, ROUTES).values():
        assert given["scalar"] is scalar


@defect(fails=IndexError)
def a_bare_tensor_without_axes_is_shared(lib):
    scalar = torch.tensor(2.0)
    assert all(given is scalar for given in contexts_of(lib, scalar, ROUTES).values())


@defect(fails=AttributeError)
def a_list_for_a_context_is_selected(lib):
    for name, given in contexts_of(lib, [torch.arange(5), "word"], ROUTES).items():
        assert given[0].tolist() == ROWS[name]
        assert given[1] == "word"


@defect(fails=AttributeError)
def a_record_for_a_context_is_selected(lib):
    for name, given in contexts_of(lib, Record(torch.arange(5), "word"), ROUTES).items():
        assert given.rows.tolist() == ROWS[name]


@defect(fails=AttributeError)
def any_other_object_for_a_context_is_shared(lib):
    anything = object()
    assert all(given is anything for given in contexts_of(lib, anything, ROUTES).values())


# --- dtypes ----------------------------------------------------------------------------------------------------------


def linear_model(lib):
    made = lib.CELMoEConfig(WIDTH, [level_of(lib, "a", "b")], fusion_dropout=0.0)

    class Linear(lib.ExpertModule):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(WIDTH, WIDTH)

        def forward(self, batch):
            return lib.ExpertResult(self.body(batch.hidden))

    return lib.HierarchicalCELMoE(made, lambda *_: Linear())
