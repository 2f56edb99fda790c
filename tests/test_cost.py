"""The engine that `auto` takes: by structure and counts alone, the same after any runs, and told by explain."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from celmoe import CELMoEConfig, ExpertConfig, HierarchicalCELMoE, HierarchyLevelConfig
from celmoe.engines.cost import Cost, estimate
from celmoe.grouped.classes import Layout, layout_of
from celmoe.reference import reference_forward
from tests.architectures import Recurrence
from tests.experts import Linear


def model_of(number: int, make: Any = None, width: int = 8) -> HierarchicalCELMoE:
    names = [f"expert {place}" for place in range(number)]
    level = HierarchyLevelConfig("level", {name: ExpertConfig(name) for name in names})
    return HierarchicalCELMoE(
        CELMoEConfig(width, [level], use_learned_fusion=False), lambda *_: make() if make else Linear(width)
    )


def layout_of_one(model: HierarchicalCELMoE) -> Layout:
    return layout_of(next(iter(model.level_modules["level"].values())))


def cost_of(model: HierarchicalCELMoE, *, has_backward: bool = True) -> Cost:
    return estimate(layout_of_one(model), len(model.level_modules["level"]), has_backward=has_backward)


def has_run_as_one(model: HierarchicalCELMoE) -> bool:
    classes = model._levels[0].choice.classes
    return all(classes.known(name, expert) is not None for name, expert in model.level_modules["level"].items())


def classes_of(model: HierarchicalCELMoE, routing):
    return [each.engine for each in model.explain(routing).levels[0].classes]


def test_many_small_experts_run_as_one_and_few_in_a_loop():
    few, many = model_of(3), model_of(100)
    for model, engine in ((few, "looped"), (many, "grouped")):
        names = list(model.level_modules["level"])
        assert classes_of(model, {"level": names * 2}) == [engine]


@pytest.mark.parametrize(("number", "engine"), [(49, "looped"), (50, "grouped")])
def test_calls_decide_whatever_the_width_and_the_number_of_rows(number, engine):
    """A Linear has two tensors, so 50 of them make 100 calls."""
    for width, copies in ((8, 1), (8, 50), (256, 1)):
        model = model_of(number, partial(Linear, width), width)
        assert classes_of(model, {"level": list(model.level_modules["level"]) * copies}) == [engine]


def test_the_reason_has_the_figures():
    model = model_of(49)
    expected = "are few (about 98 calls one by one; running as one pays from 100 on)"
    assert expected in str(model.explain({"level": list(model.level_modules["level"])}))


def test_recurrent_experts_are_few_later():
    assert not cost_of(model_of(8)).pays
    assert cost_of(model_of(8, partial(Recurrence, 8, nn.GRU))).pays


@pytest.mark.parametrize("number", [3, 100])
def test_the_estimate_is_what_it_was_before_the_call(number):
    model = model_of(number)
    routing = {"level": list(model.level_modules["level"]) * 2}
    before = cost_of(model), classes_of(model, routing)
    model(torch.randn(2 * number, 8), routing).fused_hidden.sum().backward()
    assert (cost_of(model), classes_of(model, routing)) == before


def test_a_loop_has_less_to_save_in_evaluation():
    """The mode of the experts decides, not whether gradients are recorded: a checkpoint computes with and without."""
    model = model_of(55)
    names = list(model.level_modules["level"])
    with torch.no_grad():
        model(torch.randn(55, 8), {"level": names})
        assert classes_of(model, {"level": names}) == ["grouped"]
    model(torch.randn(55, 8), {"level": names})
    assert classes_of(model, {"level": names}) == ["grouped"]
    model.eval()
    model(torch.randn(55, 8), {"level": names})
    assert classes_of(model, {"level": names}) == ["looped"]


def test_experts_that_are_too_few_are_never_captured():
    model = model_of(3)
    names = list(model.level_modules["level"])
    for _ in range(2):
        model(torch.randn(3, 8), {"level": names})
        assert not has_run_as_one(model)
        model.level_modules["level"][names[1]] = Linear(8)
        model.explain({"level": names})


def test_a_call_that_does_not_pay_asks_nothing():
    """A loop over a few experts asks nothing, though all of them are worth grouping: it is right after any change."""
    model = model_of(100)
    names = list(model.level_modules["level"])
    model(torch.randn(100, 8), {"level": names})
    looks = []
    classes = model._levels[0].choice.classes
    right = classes.units
    classes.units = lambda *args, **options: looks.append(args) or right(*args, **options)
    model.level_modules["level"][names[1]].linear.weight.data *= 2
    model.level_modules["level"][names[2]].linear = nn.Linear(8, 8, bias=False)
    for few in (names[:3], names[1:4]):
        hidden = torch.randn(3, 8)
        expected = reference_forward(model, hidden, {"level": few}).fused_hidden
        torch.testing.assert_close(model(hidden, {"level": few}).fused_hidden, expected)
    assert not looks
    hidden = torch.randn(100, 8)
    expected = reference_forward(model, hidden, {"level": names}).fused_hidden
    torch.testing.assert_close(model(hidden, {"level": names}).fused_hidden, expected)
    assert len(looks) == 1
    assert classes_of(model, {"level": names}) == ["grouped", "looped"]


def test_what_does_not_pay_in_training_pays_for_no_fewer_experts_and_not_in_evaluation():
    for make in (partial(Linear, 8), partial(Recurrence, 8, nn.GRU)):
        layout = layout_of_one(model_of(2, make))
        for members in (2, 5, 30, 300):
            if not estimate(layout, members, has_backward=True).pays:
                for fewer in range(1, members + 1):
                    for has_backward in (True, False):
                        assert not estimate(layout, fewer, has_backward=has_backward).pays


def test_explain_says_what_runs():
    for number in (3, 100):
        model = model_of(number)
        routing = {"level": list(model.level_modules["level"]) * 2}
        model(torch.randn(2 * number, 8), routing)
        (found,) = model.explain(routing).levels[0].classes
        assert has_run_as_one(model) == (found.engine == "grouped")
        assert "calls one by one" in found.reason
