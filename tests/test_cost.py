"""Which engine `auto` takes: by structure and counts alone, the same whatever was run before, and told by explain."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from celmoe.grouping import _MOST_FROM_MEMORY
from torch import nn

from celmoe import CELMoEConfig, ExpertConfig, ExpertModule, ExpertResult, HierarchicalCELMoE, HierarchyLevelConfig
from celmoe.cost import estimate, judged, never_pays
from celmoe.reference import reference_forward
from tests.architectures import Recurrence


class Wide(ExpertModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, batch):
        return ExpertResult(self.linear(batch.hidden))


def model_of(number: int, make: Any = None, width: int = 8) -> HierarchicalCELMoE:
    names = [f"expert {place}" for place in range(number)]
    level = HierarchyLevelConfig("level", {name: ExpertConfig(name) for name in names})
    return HierarchicalCELMoE(
        CELMoEConfig(width, [level], use_learned_fusion=False), lambda *_: make() if make else Wide(width)
    )


def unit_of(model: HierarchicalCELMoE):
    modules = model.level_modules["level"]
    (unit,) = model._levels[0].classes.units(list(modules), list(modules.values()), [1.0] * len(modules))
    return unit


def classes_of(model: HierarchicalCELMoE, routing):
    return [each.engine for each in model.explain(routing).levels[0].classes]


def test_many_small_experts_run_as_one_and_few_in_a_loop():
    few, many = model_of(3), model_of(100)
    for model, engine in ((few, "looped"), (many, "grouped")):
        names = list(model.level_modules["level"])
        assert classes_of(model, {"level": names * 2}) == [engine]


def test_large_weights_and_many_rows_speak_for_the_loop_on_a_cpu():
    small, large = unit_of(model_of(100)), unit_of(model_of(100, partial(Wide, 512), 512))
    assert judged(small, 200).fault is None
    assert "are few or large" in judged(large, 200).fault
    assert "are few or large" in judged(small, 10_000_000).fault


def test_elsewhere_calls_alone_count():
    unit = unit_of(model_of(100).to("meta"))
    assert estimate(unit, 10, has_backward=True) == estimate(unit, 10_000_000, has_backward=True)
    assert judged(unit, 10_000_000).fault is None


def test_recurrent_experts_are_few_later():
    assert judged(unit_of(model_of(8)), 64).fault is not None
    assert judged(unit_of(model_of(8, partial(Recurrence, 8, nn.GRU))), 64).fault is None


@pytest.mark.parametrize("number", [3, 100])
def test_the_estimate_is_what_it_was_before_the_call(number):
    model = model_of(number)
    routing = {"level": list(model.level_modules["level"]) * 2}
    before = estimate(unit_of(model), 2 * number, has_backward=True), classes_of(model, routing)
    model(torch.randn(2 * number, 8), routing).fused_hidden.sum().backward()
    assert (estimate(unit_of(model), 2 * number, has_backward=True), classes_of(model, routing)) == before


def test_without_gradients_a_loop_has_less_to_save():
    """What is chosen for training stays open to it after a call without gradients."""
    model = model_of(45)
    names = list(model.level_modules["level"])
    with torch.no_grad():
        model(torch.randn(45, 8), {"level": names})
        assert classes_of(model, {"level": names}) == ["looped"]
    model(torch.randn(45, 8), {"level": names})
    assert unit_of(model).record.programs
    assert classes_of(model, {"level": names}) == ["grouped"]


def test_experts_that_are_too_few_are_asked_once():
    """And again once one of them has been replaced, or explain is asked."""
    model = model_of(3)
    names = list(model.level_modules["level"])
    classes = model._levels[0].classes
    looks = []
    right = classes.units
    classes.units = lambda *args: looks.append(args) or right(*args)
    for _ in range(3):
        model(torch.randn(3, 8), {"level": names})
    assert len(looks) == 1
    model.level_modules["level"][names[1]] = Wide(8)
    model(torch.randn(3, 8), {"level": names})
    assert len(looks) == 2
    model.explain({"level": names})
    model(torch.randn(3, 8), {"level": names})
    assert len(looks) == 3


def test_a_call_that_does_not_pay_asks_nothing():
    """Experts that together would pay: a loop over a few is right whatever has become of them."""
    model = model_of(100)
    names = list(model.level_modules["level"])
    model(torch.randn(100, 8), {"level": names})
    looks = []
    classes = model._levels[0].classes
    right = classes.units
    classes.units = lambda *args: looks.append(args) or right(*args)
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


def test_what_is_remembered_of_experts_is_not_remembered_for_good():
    """Two classes that would not pay become one that does: it is found out without anyone asking."""
    model = model_of(60)
    names, experts = zip(*model.level_modules["level"].items(), strict=True)
    for expert in experts[::2]:
        expert.requires_grad_(False)
    hidden, routing = torch.randn(60, 8), {"level": list(names)}
    model(hidden, routing)
    for expert in experts[::2]:
        expert.requires_grad_(True)
    for _ in range(_MOST_FROM_MEMORY + 1):
        model(hidden, routing)
    (unit,) = model._levels[0].classes.remembered(names, experts, [1.0] * 60)
    assert unit.record.programs


def test_what_never_pays_pays_for_no_fewer_experts_and_no_more_rows():
    for make in (partial(Wide, 8), partial(Wide, 300), partial(Recurrence, 8, nn.GRU)):
        unit = unit_of(model_of(2, make))
        for members in (2, 5, 30, 300):
            if never_pays(unit, members):
                for fewer in range(1, members + 1):
                    for rows in (0, 1, 1000):
                        for has_backward in (True, False):
                            cost = estimate(unit, rows, has_backward=has_backward, members=fewer)
                            assert cost.looped <= cost.grouped


def test_explain_says_what_runs():
    for number in (3, 100):
        model = model_of(number)
        routing = {"level": list(model.level_modules["level"]) * 2}
        model(torch.randn(2 * number, 8), routing)
        (found,) = model.explain(routing).levels[0].classes
        assert bool(unit_of(model).record.programs) == (found.engine == "grouped")
        assert "µs" in found.reason
