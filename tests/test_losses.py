"""Losses: names, weights, order, the differentiable total, and one read of a device."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from celmoe import (
    CELMoEConfig,
    CELMoELossAPI,
    CELMoEOutput,
    ExpertConfig,
    ExpertModule,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    LevelOutput,
    LossBundle,
    LossTerm,
)
from tests.refusals import GOOD, WIDTH, build, rows, two_levels


class Costly(ExpertModule):
    """Two losses an expert, known by hand: its samples, and the sum of their squares."""

    def forward(self, batch):
        count = batch.hidden.new_tensor(float(len(batch.hidden)))
        return ExpertResult(batch.hidden, {"count": count, "square": batch.hidden.pow(2).sum()})


class Reads(TorchDispatchMode):
    """Counts operations that make the host wait for a device: reads of a value, and copies off a device."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name()
        if name in ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"):
            self.names[name] += 1
        if name == "aten::_to_copy" and "device" in (keywords or {}):
            self.names[name] += 1
        return function(*arguments, **(keywords or {}))


def costly(**fields):
    model = build(two_levels(**fields))
    for experts in model.level_modules.values():
        for name in list(experts):
            experts[name] = Costly()
    return model


def test_expert_losses_and_their_weights():
    model = costly()
    model.config.levels[1].experts["ru"].loss_weight = 0.5
    model.config.levels[1].experts["fr"].loss_weight = -2
    routing = {"family": "slavic", "language": ["ru", "fr", "ru"]}
    output = model(rows(), routing)
    names = [f"family.slavic.{loss}" for loss in ("count", "square")]
    names += [f"language.{expert}.{loss}" for expert in ("fr", "ru") for loss in ("count", "square")]
    assert list(output.losses) == list(output.loss_weights) == names
    assert list(output.loss_weights.values()) == [1.0, 1.0, -2, -2, 0.5, 0.5]
    assert output.levels["language"].losses == {name: output.losses[name] for name in names[2:]}
    assert output.levels["language"].loss_weights == {name: output.loss_weights[name] for name in names[2:]}
    # The losses stay raw.
    assert output.losses["language.ru.count"] == 2
    assert output.losses["language.ru.square"].item() == pytest.approx(rows()[[0, 2]].pow(2).sum().item())
    bundle = CELMoELossAPI().compute(output)
    assert [term.scope for term in bundle.terms] == ["expert"] * 6
    assert bundle.as_dict() == {name: value.item() for name, value in output.losses.items()}
    squares = rows().double().pow(2).sum(1)
    expected = 3 + squares.sum() - 2 * (1 + squares[1]) + 0.5 * (2 + squares[0] + squares[2])
    assert bundle.total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_weights_are_read_at_every_call():
    model = costly()
    for weight in (1.0, 0.0, 3.0):
        for each in model.config.levels[1].experts.values():
            each.loss_weight = weight
        assert set(model(rows(), GOOD).levels["language"].loss_weights.values()) == {weight}


def test_a_weight_of_zero_takes_no_part_and_still_gives_a_gradient_of_zero():
    model = costly()
    for each in model.config.levels:
        for expert in each.experts.values():
            expert.loss_weight = 0.0
    hidden = rows().requires_grad_()
    bundle = CELMoELossAPI().compute(model(hidden, GOOD))
    bundle.total.backward()
    assert bundle.total == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_all_scopes_in_order_with_their_arguments():
    output = costly()(rows(), GOOD)
    targets, context = object(), {"x": 1}
    seen = []

    def loss(value):
        def called(*arguments):
            seen.append(arguments)
            return torch.tensor(value)

        return called

    api = CELMoELossAPI()
    api.add_bridge("family", "language", "tie", loss(5.0), 0.1)
    api.add_level("language", "size", loss(3.0), 2.0)
    api.add_level("family", "size", loss(4.0))
    api.add_level("language", "again", loss(3.5), 0)
    api.add_global("all", loss(2.0), weight=10)
    bundle = api.compute(output, targets, context)
    added = bundle.terms[len(output.losses) :]
    assert [(term.name, term.scope, term.weight, term.value.item()) for term in added] == [
        ("global.all", "global", 10, 2.0),
        ("language.size", "language", 2.0, 3.0),
        ("language.again", "language", 0, 3.5),
        ("family.size", "family", 1.0, 4.0),
        ("family->language.tie", "family->language", 0.1, 5.0),
    ]
    family, language = output.levels.values()
    assert seen == [
        (output, targets, context),
        (language, output, targets, context),
        (language, output, targets, context),
        (family, output, targets, context),
        (family, language, output, targets, context),
    ]
    assert all(
        mine is theirs for mine, theirs in zip(seen[4], (family, language, output, targets, context), strict=True)
    )
    quiet = LossBundle(added).total.item()
    assert quiet == pytest.approx(20 + 6 + 4 + 0.5)


def test_a_mapping_is_one_term_an_item():
    api = CELMoELossAPI()
    parts = OrderedDict(near=torch.tensor(1.0), far=torch.tensor(2.0))
    api.add_global("parts", lambda *_: parts, 3.0)
    api.add_level("family", "parts", lambda *_: parts)
    api.add_bridge("family", "language", "parts", lambda *_: parts)
    api.add_global("nothing", lambda *_: {})
    output = build()(rows(), GOOD)
    output.losses.clear()
    bundle = api.compute(output)
    assert [(term.name, term.scope, term.weight) for term in bundle.terms] == [
        ("global.parts.near", "global", 3.0),
        ("global.parts.far", "global", 3.0),
        ("family.parts.near", "family", 1.0),
        ("family.parts.far", "family", 1.0),
        ("family->language.parts.near", "family->language", 1.0),
        ("family->language.parts.far", "family->language", 1.0),
    ]
    assert bundle.total == 15


def test_of_equal_names_the_later_is_shown_and_both_count():
    bundle = LossBundle([LossTerm("x", torch.tensor(1.0))])
    bundle.add("y", torch.tensor(10.0), 2.0, "mine")
    bundle.add("x", torch.tensor(2.0))
    assert bundle.as_dict() == {"x": 2.0, "y": 10.0}
    assert list(bundle.as_dict()) == ["x", "y"]
    assert bundle.total == 23
    assert bundle.terms[1] == LossTerm("y", bundle.terms[1].value, 2.0, "mine")


def test_terms_given_to_a_bundle_are_copied_as_a_list():
    terms = [LossTerm("x", torch.tensor(1.0))]
    bundle = LossBundle(terms)
    bundle.add("y", torch.tensor(1.0))
    assert len(terms) == 1


def test_the_total_is_differentiable_and_a_tensor_may_be_a_weight():
    values = [torch.tensor(float(value), requires_grad=True) for value in (2, 3, 4)]
    weight = torch.tensor(5.0, requires_grad=True)
    bundle = LossBundle()
    for value, each in zip(values, (1.0, weight, 0.5), strict=True):
        bundle.add("x", value, each)
    bundle.total.backward()
    assert bundle.total == 2 + 15 + 2
    assert [value.grad.item() for value in values] == [1.0, 5.0, 0.5]
    assert weight.grad == 3
    # Double backward, for a loss that is a gradient penalty.
    x = torch.tensor(3.0, requires_grad=True)
    (slope,) = torch.autograd.grad(x**3, x, create_graph=True)
    penalty = LossBundle([LossTerm("penalty", slope**2)])
    (second,) = torch.autograd.grad(penalty.total, x)
    assert second == 4 * 27 * 27 / 3


def test_the_total_is_made_anew_and_changes_no_value():
    bundle = LossBundle([LossTerm("x", torch.tensor(1.0))])
    total = bundle.total
    total += 5
    assert bundle.total == 1
    assert bundle.as_dict() == {"x": 1.0}


@pytest.mark.parametrize(
    "dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float64), (torch.int64,), (torch.bool,)]
)
def test_values_of_any_dtype(dtypes):
    bundle = LossBundle()
    for number, dtype in enumerate(dtypes):
        bundle.add(str(number), torch.tensor(1, dtype=dtype))
    found = bundle.as_dict()
    assert found == {str(number): 1.0 for number in range(len(dtypes))}
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_value_that_needs_double_precision_keeps_it_wherever_it_stands(place):
    terms = [LossTerm("small", torch.tensor(0.5)), LossTerm("half", torch.tensor(2.0, dtype=torch.float16))]
    terms.insert(place, LossTerm("big", torch.tensor(1e300, dtype=torch.float64)))
    assert LossBundle(terms).as_dict() == {"big": 1e300, "small": 0.5, "half": 2.0}


def test_nan_and_infinity_stay_with_their_terms():
    bundle = LossBundle([LossTerm("bad", torch.tensor(float("nan"))), LossTerm("good", torch.tensor(1.0))])
    assert bundle.as_dict()["good"] == 1.0
    assert bundle.as_dict()["bad"] != bundle.as_dict()["bad"]


def test_reading_all_values_waits_for_the_device_once():
    output = costly()(rows(), GOOD)
    api = CELMoELossAPI()
    for number in range(20):
        api.add_global(str(number), lambda *_: torch.tensor(1.0))
    bundle = api.compute(output)
    with Reads() as reads:
        bundle.as_dict()
    assert sum(reads.names.values()) <= 1
    with Reads() as reads:
        _ = bundle.total
    assert not reads.names


def test_the_counter_of_reads_can_count():
    values = [torch.tensor(1.0) for _ in range(5)]
    with Reads() as reads:
        _ = [float(value) for value in values]
    assert reads.names.total() == 5


def test_making_a_bundle_reads_nothing():
    model = costly()
    plan = model.compile_routing(GOOD)
    api = CELMoELossAPI()
    api.add_global("x", lambda output, *_: output.fused_hidden.mean())
    hidden = rows()
    with Reads() as reads:
        api.compute(model(hidden, plan), weight_tensor())
    assert not reads.names


def weight_tensor():
    return torch.tensor(1.0)


def test_an_output_made_by_hand_needs_no_weights():
    one = torch.tensor(2.0)
    level = LevelOutput("family", torch.zeros(1, WIDTH), ["slavic"], {"family.slavic.x": one})
    output = CELMoEOutput({"family": level}, torch.zeros(1, WIDTH), {"family.slavic.x": one})
    assert CELMoELossAPI().compute(output).total == 2


def test_registered_losses_are_public_lists():
    api = CELMoELossAPI()
    api.add_global("g", print, 2.0)
    api.add_level("family", "l", print)
    api.add_bridge("family", "language", "b", print, 3.0)
    assert api.global_losses == [("g", 2.0, print)]
    assert api.level_losses == {"family": [("l", 1.0, print)]}
    assert api.bridge_losses == [("family", "language", "b", 3.0, print)]


def test_output_losses_are_the_caller_s_to_change():
    model = costly()
    output = model(rows(), GOOD)
    output.losses["mine"] = torch.tensor(1.0)
    assert "mine" not in output.levels["language"].losses
    assert CELMoELossAPI().compute(output).as_dict()["mine"] == 1.0
    assert "mine" not in model(rows(), GOOD).losses


# Names of terms: no two scopes share one.


def api_over(levels, register):
    """The terms of losses over a model with these levels, each returning its own number."""
    config = CELMoEConfig(4, [HierarchyLevelConfig(level, {"e": ExpertConfig("e")}) for level in levels])
    model = HierarchicalCELMoE(config, lambda *_: ExpertWithoutLoss())
    api = CELMoELossAPI()
    register(api, itertools.count(1))
    return api.compute(model(torch.zeros(2, 4), dict.fromkeys(levels, "e")))


class ExpertWithoutLoss(ExpertModule):
    def forward(self, batch):
        return ExpertResult(batch.hidden)


def number(numbers, *items):
    """A loss that returns the next number, or a mapping of items to it."""
    value = torch.tensor(float(next(numbers)))
    return lambda *_: dict.fromkeys(items, value) if items else value


LIKE = {
    "a dot in the level's or the loss's name": (
        ("a", "a.b"),
        lambda api, n: (api.add_level("a", "b.n", number(n)), api.add_level("a.b", "n", number(n))),
        ["a.b.n", ".a%2Eb.n"],
    ),
    "an encoded name's look-alike": (
        ("a%2Eb", "a.b"),
        lambda api, n: (api.add_level("a%2Eb", "n", number(n)), api.add_level("a.b", "n", number(n))),
        ["a%2Eb.n", ".a%2Eb.n"],
    ),
    "items": (
        ("a", "a.b"),
        lambda api, n: (api.add_level("a", "b", number(n, "n.i")), api.add_level("a.b", "n", number(n, "i"))),
        ["a.b.n.i", ".a%2Eb.n.i"],
    ),
    "bridges of dotted names": (
        ("a", "b", "b.c"),
        lambda api, n: (api.add_bridge("a", "b", "c.n", number(n)), api.add_bridge("a", "b.c", "n", number(n))),
        ["a->b.c.n", "a->.b%2Ec.n"],
    ),
    "bridges of dotted parents": (
        ("a", "a.b", "b->c", "c"),
        lambda api, n: (api.add_bridge("a.b", "c", "n", number(n)), api.add_level("a", "b->c.n", number(n))),
        [".a%2Eb->c.n", "a.b->c.n"],
    ),
    "a level's name with an arrow": (
        ("a->b", "a", "b"),
        lambda api, n: (api.add_level("a->b", "n", number(n)), api.add_bridge("a", "b", "n", number(n, "i", "j"))),
        [".a-%3Eb.n", "a->b.n.i", "a->b.n.j"],
    ),
    "bridges of names with arrows": (
        ("a->b", "c", "a", "b->c"),
        lambda api, n: (api.add_bridge("a->b", "c", "n", number(n)), api.add_bridge("a", "b->c", "n", number(n))),
        [".a-%3Eb->c.n", "a->.b-%3Ec.n"],
    ),
    "a level called global": (
        ("global",),
        lambda api, n: (
            api.add_global("n", number(n)),
            api.add_level("global", "n", number(n)),
            api.add_level("global", "m", number(n)),
        ),
        ["global.n", ".%67lobal.n", "global.m"],
    ),
}


@pytest.mark.parametrize("case", LIKE)
def test_losses_of_two_scopes_never_share_a_name(case):
    levels, register, names = LIKE[case]
    bundle = api_over(levels, register)
    assert sorted(bundle.as_dict()) == sorted(names)
    assert len(bundle.terms) == len(names)


def test_scopes_are_real_names():
    bundle = api_over(
        ("a.b", "c->d"),
        lambda api, n: (api.add_level("a.b", "n", number(n)), api.add_bridge("a.b", "c->d", "n", number(n))),
    )
    assert [term.scope for term in bundle.terms] == ["a.b", "a.b->c->d"]


@pytest.mark.parametrize("name", ["level", "zh_Hant", "a b", "é", "a-b", "a>b", "%2E", "global"])
def test_names_that_celmoe_vp_takes_keep_its_keys(name):
    bundle = api_over(
        (name, "other"),
        lambda api, n: (
            api.add_level(name, "n.m", number(n)),
            api.add_bridge(name, "other", "n", number(n, "i")),
            api.add_bridge("other", name, "n", number(n)),
        ),
    )
    assert [term.name for term in bundle.terms] == [f"{name}.n.m", f"{name}->other.n.i", f"other->{name}.n"]
