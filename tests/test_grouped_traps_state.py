"""Experts with something beside their registered weights: state that they read or write, and tensors kept elsewhere.

Run once for several experts, each of these would read or write one expert's state, once, instead of each one's.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import random
import types

import numpy as np
import pytest
import torch
from torch import nn

from celmoe import ExpertResult
from tests.traps import WIDTH, Traps

BATCH = Traps()


@BATCH.add("aux", method="spring")
def gives_aux(self, batch):
    rows = self.linear(batch.hidden)
    return ExpertResult(rows, aux={"norms": rows.norm(dim=-1)})


@BATCH.add("aux", method="spring")
def gives_aux_without_a_tensor(self, batch):
    return ExpertResult(self.linear(batch.hidden), aux={"kind": "linear"})


@BATCH.add("state")
def reads_its_name(self, rows, batch):
    return rows + ord(batch.state["expert"][0])


@BATCH.add("state")
def reads_its_level(self, rows, batch):
    return rows + len(batch.state.get("level", ""))


@BATCH.add("state")
def copies_its_state(self, rows, batch):
    return rows * len(dict(**batch.state)["expert"])


@BATCH.add("state")
def looks_for_its_name(self, rows, batch):
    return rows * 2 if "b" in batch.state.values() else rows


@BATCH.add("state")
def writes_its_state(self, rows, batch):
    batch.state["expert"] = "somebody"
    return rows


@BATCH.add(r"in.?place|mul_|input|hidden", method="spring")
def writes_into_hidden(self, batch):
    batch.hidden.mul_(2)
    return ExpertResult(self.linear(batch.hidden))


@BATCH.add(r"in.?place|setitem|copy_|fill_|input|hidden", method="spring")
def sets_items_of_hidden(self, batch):
    batch.hidden[..., 0] = 0
    return ExpertResult(self.linear(batch.hidden))


@BATCH.add(r"in.?place|relu_|out|input|hidden", method="spring")
def writes_into_a_view_of_hidden(self, batch):
    batch.hidden.view(-1, 2, WIDTH // 2)[:, 0].relu_()
    return ExpertResult(self.linear(batch.hidden))


@BATCH.add(r"in.?place|masked_fill_|mask|input")
def writes_into_the_mask(self, rows, batch):
    batch.mask.logical_not_()
    return rows * batch.mask.unsqueeze(1)


@BATCH.add(r"in.?place|add_|context|input")
def writes_into_the_context(self, rows, batch):
    batch.context["lengths"].add_(1)
    return rows * batch.context["lengths"].unsqueeze(1)


@BATCH.add(r"in.?place|add_|context|input|shared")
def writes_into_what_all_share(self, rows, batch):
    batch.context["table"].add_(1)
    return rows + batch.context["table"][0]


for _name in BATCH:
    if _name.startswith(("writes_into_hidden", "sets_items", "writes_into_a_view", "writes_into_the", "writes_its")):
        # The engine may give the experts memory of their own: then nothing is wrong.
        BATCH.may_run.add(_name)

WRITES = Traps()
ATTRIBUTE = r"attribute|writ|state|set"


@WRITES.add(rf"{ATTRIBUTE}|calls")
def counts_its_calls(self, rows, batch):
    self.calls = getattr(self, "calls", 0) + 1
    return rows * self.calls


@WRITES.add(rf"{ATTRIBUTE}|last")
def keeps_its_last_rows(self, rows, batch):
    last, self.last = getattr(self, "last", None), rows.detach()
    return rows if last is None else rows + last.mean()


@WRITES.add(rf"{ATTRIBUTE}|table|cache")
def makes_a_table_at_first(self, rows, batch):
    if not hasattr(self, "table"):
        self.table = self.linear.bias.detach().clone()
    return rows + self.table


@WRITES.add(rf"{ATTRIBUTE}|seen")
def grows_a_list(self, rows, batch):
    self.seen.append(1)
    return rows * len(self.seen)


@WRITES.add(rf"{ATTRIBUTE}|seen")
def fills_a_dict(self, rows, batch):
    self.seen["calls"] = self.seen.get("calls", 0) + 1
    return rows * self.seen["calls"]


@WRITES.add(rf"{ATTRIBUTE}|seen")
def grows_a_queue(self, rows, batch):
    self.seen.append(rows.detach().sum().reshape(()))
    return rows + sum(self.seen)


@WRITES.add(rf"{ATTRIBUTE}|numbers|iterator|unregistered|count")
def takes_the_next_number(self, rows, batch):
    return rows * next(self.numbers)


@WRITES.add(rf"{ATTRIBUTE}|numbers|generator|count|closure")
def calls_a_closure_that_counts(self, rows, batch):
    return rows * self.numbers()


@WRITES.add(rf"{ATTRIBUTE}|settings|step")
def writes_into_an_object_of_its_own(self, rows, batch):
    self.settings.step += 1
    return rows * self.settings.step


@WRITES.add(rf"{ATTRIBUTE}|linear|calls")
def writes_to_a_layer(self, rows, batch):
    self.linear.calls = getattr(self.linear, "calls", 0) + 1
    return rows * self.linear.calls


@WRITES.add(rf"{ATTRIBUTE}|calls|__dict__")
def writes_past_setattr(self, rows, batch):
    self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
    return rows * self.calls


@WRITES.add(rf"{ATTRIBUTE}|calls|array|numpy")
def counts_in_an_array(self, rows, batch):
    self.counter += 1
    return rows * float(self.counter[0])


@WRITES.add(rf"{ATTRIBUTE}|mode|train")
def changes_its_mode(self, rows, batch):
    self.train(not self.training)
    return rows * 2 if self.training else rows


@WRITES.add(rf"{ATTRIBUTE}|requires_grad|froz")
def freezes_itself(self, rows, batch):
    self.linear.bias.requires_grad_(False)
    return rows


@WRITES.add(rf"{ATTRIBUTE}|buffer|calls|add_|in.?place")
def counts_in_a_buffer(self, rows, batch):
    self.calls.add_(1)
    return rows * self.calls


@WRITES.add(rf"{ATTRIBUTE}|buffer|calls")
def replaces_a_buffer(self, rows, batch):
    self.calls = self.calls + 1
    return rows * self.calls


@WRITES.add(rf"{ATTRIBUTE}|buffer|calls|in.?place|data")
def counts_in_a_buffers_data(self, rows, batch):
    self.calls.data += len(self.__class__.__mro__)
    return rows * self.calls


@WRITES.add(rf"{ATTRIBUTE}|buffer|calls|lerp_|copy_|in.?place")
def keeps_a_running_mean(self, rows, batch):
    with torch.no_grad():
        self.calls.lerp_(rows.abs().amax(), 0.1)
    return rows + self.calls


@WRITES.add(rf"{ATTRIBUTE}|buffer|calls|in.?place")
def writes_a_buffer_and_does_not_read_it(self, rows, batch):
    """Only the checkpoint shows it."""
    self.calls.add_(1)
    return rows


@WRITES.add(rf"{ATTRIBUTE}|buffer|parameter|weight|clamp_|in.?place|data")
def clamps_its_weight(self, rows, batch):
    self.linear.weight.data.clamp_(-0.05, 0.05)
    return rows


@WRITES.add(rf"{ATTRIBUTE}|buffer|parameter|weight|mul_|in.?place", method="spring")
def decays_its_weight(self, batch):
    with torch.no_grad():
        self.linear.weight.mul_(0.5)
    return ExpertResult(self.linear(batch.hidden))


@WRITES.add(rf"{ATTRIBUTE}|buffer|register|module")
def makes_a_layer_on_the_way(self, rows, batch):
    if not hasattr(self, "late"):
        self.late = nn.Linear(WIDTH, WIDTH)
        nn.init.constant_(self.late.weight, float(self.linear.weight[0, 0].detach()))
    return self.late(rows)


def _counting_closure():
    calls = 0

    def count():
        nonlocal calls
        calls += 1
        return calls

    return count


def _prepare(**made):
    """A `prepare` that sets attributes, each made anew for its expert."""

    def prepare(self):
        for name, make in made.items():
            setattr(self, name, make())

    return prepare


def _register_calls(self):
    self.register_buffer("calls", torch.ones(()))


WRITES.classes["grows_a_list"].prepare = _prepare(seen=list)
WRITES.classes["fills_a_dict"].prepare = _prepare(seen=dict)
WRITES.classes["grows_a_queue"].prepare = _prepare(seen=lambda: collections.deque(maxlen=2))
WRITES.classes["takes_the_next_number"].prepare = _prepare(numbers=lambda: itertools.count(1))
WRITES.classes["calls_a_closure_that_counts"].prepare = _prepare(numbers=_counting_closure)
WRITES.classes["writes_into_an_object_of_its_own"].prepare = _prepare(settings=lambda: types.SimpleNamespace(step=0))
WRITES.classes["counts_in_an_array"].prepare = _prepare(counter=lambda: np.ones(1))
for _name in WRITES:
    if "buffer" in _name or _name == "keeps_a_running_mean":
        WRITES.classes[_name].prepare = _register_calls

HIDDEN = Traps()
UNREGISTERED = r"register|attribute|closure|global|tensor|module"


@dataclasses.dataclass
class Settings:
    table: torch.Tensor


class Slots:
    __slots__ = ("table",)

    def __init__(self, table):
        self.table = table


def _table():
    """Another one for each expert: from the stream that `build` seeds."""
    return torch.randn(WIDTH)


def _adding(table):
    return lambda rows: rows + table


def _adding_default(table):
    return lambda rows, given=table: rows + given


def hide(reason=UNREGISTERED, **made):
    """Add a trap that hides its tensors in attributes.

    Hidden tensors of unlike content may part the experts into classes of one, which are looped.
    """

    def add(function):
        return HIDDEN.add(reason, may_run=True, prepare=_prepare(**made))(function)

    return add


@hide(table=_table)
def a_plain_attribute(self, rows, batch):
    return rows + self.table


@hide(tables=lambda: [_table()])
def a_list(self, rows, batch):
    return rows + self.tables[0]


@hide(tables=lambda: {"one": (_table(), "label")})
def a_tuple_in_a_dict(self, rows, batch):
    return rows + self.tables["one"][0]


@hide(settings=lambda: Settings(_table()))
def a_dataclass(self, rows, batch):
    return rows + self.settings.table


@hide(settings=lambda: types.SimpleNamespace(inner=types.SimpleNamespace(table=_table())))
def an_object_in_an_object(self, rows, batch):
    return rows + self.settings.inner.table


@hide(settings=lambda: Slots(_table()))
def an_object_with_slots(self, rows, batch):
    return rows + self.settings.table


@hide(layers=lambda: [nn.Linear(WIDTH, WIDTH)])
def a_layer_in_a_list(self, rows, batch):
    return self.layers[0](rows)


@hide(layer=lambda: nn.Linear(WIDTH, WIDTH).forward)
def a_bound_method_of_a_layer(self, rows, batch):
    return self.layer(rows)


@hide(add=lambda: functools.partial(torch.add, _table()))
def a_partial(self, rows, batch):
    return self.add(rows)


@hide(add=lambda: _adding(_table()))
def a_closure(self, rows, batch):
    return self.add(rows)


@hide(add=lambda: _adding_default(_table()))
def a_default_of_a_function(self, rows, batch):
    return self.add(rows)


@hide(array=lambda: _table().numpy())
def a_numpy_array(self, rows, batch):
    return rows + torch.from_numpy(self.array)


@hide(numbers=lambda: _table().tolist())
def a_list_of_numbers(self, rows, batch):
    return rows + torch.tensor(self.numbers)


@hide(number=lambda: float(_table()[0]))
def a_number(self, rows, batch):
    return rows * self.number


@hide(number=lambda: {"inner": [{float(_table()[0])}]})
def a_number_deep_down(self, rows, batch):
    return rows * next(iter(self.number["inner"][0]))


@hide(act=lambda: [torch.tanh, torch.sin, torch.sigmoid][int(_table()[0] * 10) % 3])
def a_function_of_torchs(self, rows, batch):
    return self.act(rows)


class AlwaysEqual:
    """Its class claims that all of its objects are equal, and they are not."""

    def __init__(self):
        self.number = float(_table()[0])

    def __eq__(self, other):
        return True

    __hash__ = None


@hide(number=AlwaysEqual)
def an_object_that_equals_all(self, rows, batch):
    return rows * self.number.number


TABLES: dict[int, torch.Tensor] = {}
GLOBAL = torch.linspace(0.5, 1.5, WIDTH)
EVERYBODYS = types.SimpleNamespace(table=torch.linspace(-1, 1, WIDTH))


@HIDDEN.add(rf"{UNREGISTERED}|id", may_run=True)
def a_table_by_id(self, rows, batch):
    return rows + TABLES.setdefault(id(self), self.linear.bias.detach().clone())


def _table_by_id(self):
    TABLES[id(self)] = _table()


HIDDEN.classes["a_table_by_id"].prepare = _table_by_id


@HIDDEN.add(UNREGISTERED, may_run=True)
def a_global(self, rows, batch):
    return rows * GLOBAL


@hide(settings=lambda: EVERYBODYS)
def an_object_that_all_share(self, rows, batch):
    return rows * self.settings.table


@HIDDEN.add(UNREGISTERED, may_run=True, table=torch.linspace(2, 3, WIDTH))
def a_class_attribute(self, rows, batch):
    return rows * self.table


RANDOM = Traps()
STREAM = r"random|rng|generator|stream|attribute|number"


@RANDOM.add(STREAM)
def pythons_stream(self, rows, batch):
    return rows * random.random()


@RANDOM.add(STREAM)
def numpys_stream(self, rows, batch):
    return rows * float(np.random.rand())  # noqa: NPY002  # the global one is the trap


@RANDOM.add(STREAM, may_run=True)
def a_generator_of_numpys(self, rows, batch):
    return rows * float(self.generator.random())


@RANDOM.add(STREAM, may_run=True)
def a_generator_of_pythons(self, rows, batch):
    return rows * self.generator.random()


@RANDOM.add(STREAM, may_run=True)
def a_generator_of_torchs(self, rows, batch):
    return rows * torch.rand((), generator=self.generator)


RANDOM.classes["a_generator_of_numpys"].prepare = _prepare(generator=lambda: np.random.default_rng(0))
RANDOM.classes["a_generator_of_pythons"].prepare = _prepare(generator=lambda: random.Random(0))
RANDOM.classes["a_generator_of_torchs"].prepare = _prepare(generator=lambda: torch.Generator().manual_seed(0))

ALL = {
    f"{kind}: {name}": (traps, name)
    for kind, traps in {"batch": BATCH, "writes": WRITES, "hidden": HIDDEN, "random": RANDOM}.items()
    for name in traps
}


@pytest.mark.parametrize("trap", ALL)
def test_grouped_refuses_and_says_why(trap: str):
    traps, name = ALL[trap]
    traps.check_refusal(name)


@pytest.mark.parametrize("trap", ALL)
def test_armed_after_a_grouped_call(trap: str):
    traps, name = ALL[trap]
    traps.check_arming(name)
