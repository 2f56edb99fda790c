"""Stacked experts when something changes, and those that can't be stacked."""

from __future__ import annotations

import collections
import sys
import weakref
from typing import ClassVar

import pytest
import torch
from torch import nn

import celmoe
from celmoe import (
    CELMoEConfig,
    ExpertConfig,
    ExpertModule,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    StackedError,
    UnknownLevelError,
)
from tests.features import needs_distributed
from tests.stacks import (
    ENGINES,
    MLP,
    NAMES,
    ROUTES,
    WIDTH,
    Recurrent,
    assert_alike,
    assert_same_state,
    build,
    expert_of,
    run,
    stacked,
)


class Gated(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def forward(self, batch):
        return ExpertResult(super().forward(batch).hidden * self.factor)


class Listed(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.factors = [1.0]

    def forward(self, batch):
        return ExpertResult(super().forward(batch).hidden * self.factors[0])


class Acting(MLP):
    """Gets a module without parameters after stacking."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Identity()

    def forward(self, batch):
        return ExpertResult(self.act(super().forward(batch).hidden))


CHANGES = {
    "an attribute": lambda model: setattr(expert_of(model, "e2"), "factor", 3.0),
    "a module": lambda model: setattr(expert_of(model, "e2"), "norm", nn.Identity()),
    "a hook": lambda model: expert_of(model, "e2").up.register_forward_hook(lambda _m, _a, out: out * 2),
    "an instance's method": lambda model: setattr(
        expert_of(model, "e2"), "forward", lambda batch: ExpertResult(batch.hidden * 5)
    ),
    "an expert": lambda model: model.level_modules["language"].__setitem__("e2", _another()),
    "values": lambda model: _doubled(expert_of(model, "e2")),
}


def _doubling(_module, _given, out):
    return out * 2


def _another() -> nn.Module:
    torch.manual_seed(9)
    return Gated()


def _doubled(expert: nn.Module) -> None:
    with torch.no_grad():
        expert.up.weight.mul_(2.0)


@pytest.mark.parametrize("engine", ["auto", "looped"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_one_expert_is_seen(change, engine):
    plain, model = build(Gated, "looped"), stacked(Gated, engine)
    for each in (plain, model):
        # The first call finds the classes, the second runs them.
        run(each), run(each)
        CHANGES[change](each)
    for _ in range(2):
        for found, expected in zip(run(model), run(plain), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("hooked", [["e2"], NAMES])
def test_a_hook_that_is_removed_is_seen(hooked):
    plain, model = build(Gated, "looped"), stacked(Gated, "auto")
    handles = [
        [expert_of(each, name).up.register_forward_hook(_doubling) for name in hooked] for each in (plain, model)
    ]
    run(model), run(model)
    for of_model in handles:
        of_model[0 if len(hooked) == 1 else 2].remove()
    assert_alike(plain, model)


def test_a_list_that_changes_is_seen():
    plain, model = build(Listed, "looped"), stacked(Listed, "auto")
    run(model), run(model)
    for each in (plain, model):
        expert_of(each, "e2").factors[0] = 3.0
    assert_alike(plain, model)


def test_a_module_that_comes_later_is_watched():
    plain, model = build(Acting, "looped"), stacked(Acting, "auto")
    for each in (plain, model):
        for name in NAMES:
            expert_of(each, name).act = nn.LeakyReLU(0.5)
    run(model), run(model)
    for each in (plain, model):
        expert_of(each, "e2").act.negative_slope = 0.1
    assert_alike(plain, model)


@pytest.mark.parametrize("engine", ["looped", "auto"])
@pytest.mark.parametrize("names", [["e2"], NAMES])
def test_parts_that_are_replaced_are_read(names, engine):
    plain, model = build(MLP, "looped"), stacked(MLP, engine)
    for each in (plain, model):
        run(each)
        torch.manual_seed(5)
        for name in names:
            expert_of(each, name).up = nn.Linear(WIDTH, 16)
    for found, expected in zip(run(model), run(plain), strict=True):
        torch.testing.assert_close(found, expected)
    for name in names:
        torch.testing.assert_close(expert_of(model, name).up.weight.grad, expert_of(plain, name).up.weight.grad)


@pytest.mark.parametrize("engine", ["looped", "auto"])
def test_one_module_under_two_names_is_looped(engine):
    plain, model = build(MLP, "looped"), stacked(MLP, engine)
    for each in (plain, model):
        run(each), run(each)
        each.level_modules["language"]["e0"] = expert_of(each, "e2")
    for found, expected in zip(run(model), run(plain), strict=True):
        torch.testing.assert_close(found, expected)


def test_parts_that_are_not_where_they_were_are_refused_by_grouped():
    model = stacked()
    expert_of(model, "e2").up = nn.Linear(WIDTH, 16)
    with pytest.raises(celmoe.EngineRefusedError, match="not where they were stacked"):
        run(model)
    assert "not where they were stacked" in str(model.explain({"language": ROUTES}))


def test_a_part_of_another_stack_is_refused():
    model, other = stacked(), stacked(seed=1)
    with pytest.raises(StackedError, match=r"'e0' must be .* another level's stack"):
        model.level_modules["language"]["e0"] = expert_of(other, "e1")


def test_own_memory_is_set_in_place():
    plain, model = build(engine="looped"), stacked()
    for each in (plain, model):
        run(each)
        weight = expert_of(each, "e2").up.weight
        weight.data *= 2.0
        weight.grad *= 3.0
        with torch.no_grad():
            expert_of(each, "e2").up.bias *= 0.5
    torch.testing.assert_close(expert_of(model, "e2").up.weight.grad, expert_of(plain, "e2").up.weight.grad)
    assert_alike(plain, model)


def test_a_class_keeps_its_own_names_and_makes_its_own_modules():
    class Named(MLP):
        type = "scaled"

        def half(self) -> float:
            return 0.5

    model = stacked(Named)
    expert = expert_of(model, "e1")
    assert (expert.type, expert.half()) == ("scaled", 0.5)
    assert isinstance(expert, Named)
    assert type(type(expert)()) is Named


def test_a_subclass_hook_does_not_see_stacked_classes():
    made = []

    class Registered(MLP):
        def __init_subclass__(cls) -> None:
            made.append(cls)

    stacked(Registered)
    assert not made


@pytest.mark.parametrize("engine", ENGINES)
def test_stacking_within_inference_mode_gives_trainable_parameters(engine):
    plain, model = build(engine="looped"), build(engine=engine)
    with torch.inference_mode():
        celmoe.stack_experts(model)
    assert_alike(plain, model)
    with torch.inference_mode():
        celmoe.unstack_experts(model)
    assert_alike(plain, model)


def test_a_part_that_was_taken_out_is_unstacked_too():
    model = stacked()
    taken = expert_of(model, "e1").up
    expert_of(model, "e1").up = nn.Linear(WIDTH, 16)
    celmoe.unstack_experts(model)
    assert type(taken.weight) is nn.Parameter


def test_unstacking_under_an_optimizer_warns():
    model = stacked()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="an optimizer holds the stacked parameters"):
        celmoe.unstack_experts(model)
    del optimizer


def test_members_that_come_later_are_asked():
    plain, model = build(Gated, "looped"), stacked(Gated, "auto")
    for each in (plain, model):
        expert_of(each, "e4").factor = 3.0
    for routes in (["e0", "e1", "e0"], ["e0", "e1", "e4"], ["e0", "e1", "e4"]):
        assert_alike(plain, model, routes)


class WithShared(MLP):
    shared = nn.Linear(WIDTH, WIDTH)

    def __init__(self) -> None:
        super().__init__()
        self.common = WithShared.shared


class WithTied(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(WIDTH, 16)
        self.again.weight = self.up.weight


class WithHidden(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.up.weight]


class WithClosure(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.call = lambda rows: self.up(rows) + 1


class WithDeque(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.kept = collections.deque([self.up.weight])


class WithReference(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.kept = weakref.ref(self.up.weight)


class WithMemory(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("same", self.up.weight.detach())


class WithAnothers(MLP):
    first: ClassVar[list[nn.Parameter]] = []

    def __init__(self) -> None:
        super().__init__()
        WithAnothers.first.append(self.up.weight)
        self.kept = (None, {"first": WithAnothers.first})


class WithHook(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.up.weight.register_hook(lambda grad: grad * 2)


class WithMark(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.up.weight.is_special = True


class WithLazy(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.lazy = nn.LazyLinear(WIDTH)


class WithNone(ExpertModule):
    def forward(self, batch):
        return ExpertResult(batch.hidden)


UNFIT = {
    WithShared: "another place",
    WithTied: "share a parameter",
    WithHidden: "in kept, too",
    WithClosure: "in call, too",
    WithDeque: "in kept, too",
    WithReference: "in kept, too",
    WithMemory: "memory is another tensor's",
    WithAnothers: "in kept, too",
    WithHook: "hook on a parameter",
    WithMark: "attributes of its own, is_special",
    WithLazy: "without a shape yet",
    WithNone: "have no parameters",
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("kind", UNFIT)
def test_experts_that_can_not_be_stacked_stay_as_they_are(kind):
    model = build(kind)
    before = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    report = celmoe.stack_experts(model)
    (found,) = report.classes
    assert UNFIT[kind] in found.reason
    assert not found.parameters
    assert UNFIT[kind] in str(report)
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == before


def test_the_report_tells_classes_apart():
    model = build()
    model.level_modules["language"]["e1"] = Recurrent()
    model.level_modules["language"]["e3"].up.weight.requires_grad_(False)
    model.level_modules["language"]["e4"].up.weight.requires_grad_(False)
    lines = str(celmoe.stack_experts(model)).splitlines()
    assert lines == [
        "language: 1 Recurrent not stacked, for its experts have no others like them ('e1')",
        "language: 3 MLP stacked, 5 parameters in place of 15",
        "language: 2 MLP stacked, 5 parameters in place of 10",
    ]
    again = celmoe.stack_experts(model).classes
    assert {each.reason for each in again} == {"are stacked already", "have no others like them"}
    assert {parameter.requires_grad for parameter in expert_of(model, "e3").parameters()} == {True, False}


def test_stacking_after_the_optimizer_is_refused():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [id(parameter) for parameter in model.parameters()]
    with pytest.raises(StackedError, match="must be stacked before its optimizer is made"):
        celmoe.stack_experts(model)
    assert [id(parameter) for parameter in model.parameters()] == before
    del optimizer


@needs_distributed
def test_a_checkpoint_of_a_stacked_model_is_the_experts(tmp_path):
    from celmoe import distributed

    plain, model = build(seed=1), stacked()
    distributed.save_checkpoint(tmp_path / "plain", plain)
    distributed.load_checkpoint(tmp_path / "plain", model)
    assert_same_state(plain, model)
    distributed.save_checkpoint(tmp_path / "stacked", model)
    other = build()
    distributed.load_checkpoint(tmp_path / "stacked", other)
    assert_same_state(plain, other)


def test_unknown_levels_and_other_modules_are_refused():
    with pytest.raises(UnknownLevelError, match=r"'levels' must be .* nearest: 'language'"):
        celmoe.stack_experts(build(), ["langage"])
    with pytest.raises(celmoe.InputTypeError, match="'model' must be a HierarchicalCELMoE"):
        celmoe.unstack_experts(nn.Linear(1, 1))


@pytest.mark.parametrize("present", [6, 60])
def test_host_work_does_not_grow_with_the_number_of_experts(present):
    """Counted in calls of Python functions, not in time."""

    def calls_with(number: int) -> int:
        names = [f"e{each}" for each in range(number)]
        level = HierarchyLevelConfig("language", {name: ExpertConfig(name) for name in names})
        model = HierarchicalCELMoE(CELMoEConfig(WIDTH, [level]), lambda *_: MLP())
        celmoe.stack_experts(model)
        # PyTorch's own walk over modules is no part of a step.
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.1, foreach=True)
        hidden, routes = torch.randn(240, WIDTH), [names[each % number] for each in range(240)]

        def step() -> None:
            optimizer.zero_grad()
            model(hidden, {"language": routes}).fused_hidden.square().sum().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        for _ in range(3):
            step()
        counted = 0

        def count(_frame, event, _argument) -> None:
            nonlocal counted
            counted += event == "call"

        sys.setprofile(count)
        try:
            step()
        finally:
            sys.setprofile(None)
        return counted

    assert calls_with(present) <= 1.05 * calls_with(4)


def test_one_experts_file_holds_one_expert():
    """Members of a stack share its memory, and a storage is saved whole."""
    model = build()
    celmoe.stack_experts(model)
    state = model.state_dict()
    assert all(each.untyped_storage().nbytes() == each.nbytes for each in state.values())
    key = "level_modules.language.e3.up.weight"
    with torch.no_grad():
        state[key].fill_(7.0)
    assert expert_of(model, "e3").up.weight.eq(7.0).all()
    assert not expert_of(model, "e2").up.weight.eq(7.0).any()
