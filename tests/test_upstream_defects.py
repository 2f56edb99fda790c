"""Defects of celmoe-vp that ours does not have: each check is one text, which ours passes and the peer must fail.

A check that the peer passes as well shows nothing, so that is a failure too. Costs are counted (comparisons of names,
numbers written in a backward pass, reads of a device), never timed.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import celmoe
from tests import peer
from tests.peer import FIRST, THIRD

WIDTH = 4
CHECKS = []


def defect(*, fails=AssertionError, versions=(FIRST, THIRD)):
    """Register a check. ``fails`` is the peer's error in it: mostly the check's own assertion, else its crash."""

    def register(check):
        CHECKS.append(pytest.param(check, fails, versions, id=check.__name__))
        return check

    return register


def pytest_generate_tests(metafunc):
    if "check" in metafunc.fixturenames:
        metafunc.parametrize(("check", "fails", "versions"), CHECKS)


def test_ours_passes(check, fails, versions):
    check(celmoe)


def test_the_peer_fails(check, fails, versions):
    for version in versions:
        with pytest.raises(fails):
            check(peer.peer(version))


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


@defect(fails=RuntimeError)
def autocast_works_with_linear_experts(lib):
    model, hidden = linear_model(lib), ones(3).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(hidden, {"l": ["a", "b", "a"]})
    assert output.levels["l"].hidden.dtype == torch.bfloat16
    output.levels["l"].hidden.sum().backward()
    assert hidden.grad.dtype == torch.float32
    assert model.level_modules["l"]["a"].body.weight.grad.dtype == torch.float32


@defect(fails=RuntimeError)
def experts_of_different_dtypes_are_promoted(lib):
    def expert(batch):
        return batch.hidden.double() if batch.state["expert"] == "b" else batch.hidden.bfloat16()

    hidden = model_of(lib, expert, level_of(lib, "a", "b"), use_learned_fusion=False)(ones(2), {"l": ["a", "b"]})
    assert hidden.levels["l"].hidden.dtype == torch.float64


# --- names -----------------------------------------------------------------------------------------------------------

# Attributes of `nn.ModuleDict` and of `nn.Module`, a dot, and names that look like an escape.
HARD_NAMES = ["to", "pop", "keys", "values", "items", "type", "forward", "training", "_modules", "zh.Hant", ".", " "]
HARD_NAMES += ["zh%2EHant", "zh%252EHant", "%", "zh.Hant.", "weight", "日本語"]


@defect(fails=KeyError)
def any_name_names_an_expert_and_a_level(lib):
    names = HARD_NAMES

    class Scale(lib.ExpertModule):
        def __init__(self, factor):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(float(factor)))

        def forward(self, batch):
            return lib.ExpertResult(batch.hidden * self.factor, {"size": batch.hidden.sum()})

    def build(offset):
        levels = [level_of(lib, *names, name=name) for name in ("to", "zh.Hant", "plain")]
        config = lib.CELMoEConfig(WIDTH, levels, use_learned_fusion=False)
        return lib.HierarchicalCELMoE(config, lambda level, name, _: Scale(names.index(name) + offset))

    model = build(1)
    routing = {name: list(names) for name in ("to", "zh.Hant", "plain")}
    output = model(ones(len(names)), routing)
    expected = [(index + 1.0) ** 3 for index in range(len(names))]
    assert output.levels["plain"].hidden[:, 0].tolist() == expected
    assert output.levels["plain"].routes == names
    # One key each, in checkpoints and in losses.
    state = model.state_dict()
    assert len(state) == len(output.losses) == 3 * len(names)
    assert all(len(level.losses) == len(names) for level in output.levels.values())
    # The modules answer to the real names.
    assert sorted(model.level_modules["zh.Hant"]) == sorted(names)
    for index, name in enumerate(names):
        assert model.level_modules["to"][name].factor.item() == index + 1
    # And a checkpoint finds everything again.
    other = build(100)
    assert other.load_state_dict(state).missing_keys == []
    assert torch.equal(other(ones(len(names)), routing).fused_hidden, output.fused_hidden)


def accepts_name(name):
    def check(lib):
        model = model_of(lib, lambda batch: batch.hidden * 2, level_of(lib, name, "b", name="l"))
        output = model(ones(2), {"l": [name, "b"]})
        assert output.levels["l"].routes == [name, "b"]
        assert name in model.level_modules["l"]
        model = model_of(lib, lambda batch: batch.hidden * 2, level_of(lib, "b", name=name))
        assert list(model(ones(2), {name: ["b", "b"]}).levels) == [name]
        assert name in model.level_modules

    check.__name__ = f"{name}_is_a_name"
    return check


for _name in ("to", "pop", "keys", "type", "zh.Hant"):
    defect(fails=KeyError)(accepts_name(_name))


@defect()
def an_empty_name_is_refused_in_words(lib):
    """The peer's error is torch's, about a module's key."""
    error = error_of(lambda: model_of(lib, identity, level_of(lib, "")))
    assert isinstance(error, ValueError)
    assert "name" in str(error)
    assert isinstance(error_of(lambda: model_of(lib, identity, level_of(lib, "a", name=""))), ValueError)


# --- configs and routes that can't be meant --------------------------------------------------------------------------


@defect()
def routes_for_an_unknown_level_are_an_error(lib):
    model = model_of(lib, identity, level_of(lib, "a", name="family"))
    error = error_of(lambda: model(ones(1), {"famly": ["a"]}))
    assert isinstance(error, KeyError)
    assert "'famly'" in str(error)
    assert "'family'" in str(error)


@defect()
def two_levels_of_one_name_are_an_error(lib):
    error = error_of(lambda: model_of(lib, identity, level_of(lib, "a"), level_of(lib, "b")))
    assert isinstance(error, ValueError)
    assert "'l'" in str(error)


@defect()
def no_level_at_all_is_an_error_when_the_model_is_built(lib):
    config = lib.CELMoEConfig(WIDTH)

    def build():
        return lib.HierarchicalCELMoE(config, lambda *_: expert_of(lib, identity))

    assert isinstance(error_of(build), ValueError)
    config.levels.append(level_of(lib, "a", enabled=False))
    assert isinstance(error_of(build), ValueError)
    # An empty config may still be filled first.
    config.levels.append(level_of(lib, "a", name="m"))
    assert build()(ones(1)).levels.keys() == {"m"}


@defect()
def an_unknown_expert_is_found_before_anything_runs(lib):
    ran = []

    def expert(batch):
        ran.append(batch.state["expert"])
        return batch.hidden

    levels = [level_of(lib, "core", name="universal"), level_of(lib, "russian", "french", name="language")]
    model = model_of(lib, expert, *levels)
    error = error_of(lambda: model(ones(4), {"language": ["french", "rusian", "xx", "rusian"]}))
    assert isinstance(error, KeyError)
    assert ran == []
    message = str(error)
    # The level, the names, their number of samples, and the nearest name.
    for part in ("'language'", "'rusian'", "'xx'", "3 of 4", "'russian'"):
        assert part in message, part


@defect(fails=KeyError)
def ids_in_a_list_are_routes(lib):
    takes_routes(lib, [2, 0, 2])


@defect(fails=KeyError)
def ids_in_a_tensor_are_routes(lib):
    takes_routes(lib, torch.tensor([2, 0, 2]))


@defect(fails=KeyError)
def ids_in_an_array_are_routes(lib):
    takes_routes(lib, np.array([2, 0, 2], dtype=np.int16))


@defect(fails=ValueError)
def names_in_an_array_are_routes(lib):
    takes_routes(lib, np.array(["c", "x", "c"]))


def takes_routes(lib, routes):
    """Ids are positions in the level's experts as declared, not as sorted."""
    output = model_of(lib, identity, level_of(lib, "x", "b", "c"))(ones(3), {"l": routes})
    assert output.levels["l"].routes == ["c", "x", "c"]
    assert type(output.levels["l"].routes) is list
    assert all(type(each) is str for each in output.levels["l"].routes)


# --- experts that break their contract -------------------------------------------------------------------------------


def names_the_expert(error, expert):
    assert isinstance(error, ValueError)
    assert "'l'" in str(error)
    assert repr(expert) in str(error)


@defect()
def another_number_of_rows_is_an_error_that_names_the_expert(lib):
    model = model_of(lib, lambda batch: batch.hidden[:1], level_of(lib, "a", "b"))
    names_the_expert(error_of(lambda: model(ones(3), {"l": ["b", "a", "b"]})), "b")


@defect()
def two_wrong_numbers_of_rows_do_not_cancel(lib):
    def expert(batch):
        return torch.ones(3 if batch.state["expert"] == "a" else 1, WIDTH)

    model = model_of(lib, expert, level_of(lib, "a", "b"))
    names_the_expert(error_of(lambda: model(ones(4), {"l": ["a", "b", "a", "b"]})), "a")


@defect()
def another_trailing_shape_is_an_error_that_names_the_expert(lib):
    for wrong in (lambda hidden: hidden[:, :1], lambda hidden: hidden.unsqueeze(1), lambda hidden: hidden.sum(1)):
        model = model_of(lib, lambda batch, wrong=wrong: wrong(batch.hidden), level_of(lib, "a", "b"))
        names_the_expert(error_of(lambda model=model: model(ones(3), {"l": ["a", "b", "a"]})), "a")


def works_in_place(batch):
    for value in (batch.hidden, batch.mask, batch.context["rows"]):
        value.zero_()
    return batch.hidden


@defect()
def an_expert_that_works_in_place_never_reaches_the_caller(lib):
    """The peer hands out the caller's own context if one expert has the whole batch."""
    for routes in (["a", "a", "a"], ["a", "b", "a"], ["a", "a", "b"]):
        hidden, mask, rows = ones(3), ones(3), torch.arange(1.0, 4.0)
        model = model_of(lib, works_in_place, level_of(lib, "a", "b", name="l"), level_of(lib, "c", name="m"))
        model(hidden, {"l": routes}, {"rows": rows}, mask)
        assert hidden.eq(1).all()
        assert mask.eq(1).all()
        assert rows.tolist() == [1.0, 2.0, 3.0]


# --- fusion ----------------------------------------------------------------------------------------------------------


@defect(versions=[THIRD])
def position_aware_fusion_takes_a_batch_without_positions_for_one_position(lib):
    """The peer reads the hidden size for the number of positions."""
    torch.manual_seed(0)
    fusion = lib.PositionAwareFusion(WIDTH, 2, 8, 0.0)
    hiddens = [torch.randn(WIDTH, WIDTH), torch.randn(WIDTH, WIDTH)]
    one_position = fusion([hidden.unsqueeze(1) for hidden in hiddens]).squeeze(1)
    fused = fusion(hiddens)
    assert fused.shape == one_position.shape
    assert torch.allclose(fused, one_position, atol=1e-6)
