"""LoRA experts: a base that many share and that runs once, ranks and alphas by expert, and folding one away."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import celmoe
from celmoe import (
    EngineRefusedError,
    ExpertBatch,
    ExpertConfig,
    ExpertResult,
    HierarchicalCELMoE,
    zoo,
)
from celmoe.based import BasedExpert
from celmoe.reference import reference_forward
from tests.lora import BASES, LEVEL, NAMES, ROUTES, WIDTH, Given, base_of, built, classes_of, expert_of, on_base
from tests.traps import assert_same, auto_groups_all, observe


def program_of(model: HierarchicalCELMoE) -> Any:
    record = model._levels[0].choice.classes.known("a", expert_of(model))
    assert record is not None
    return record.first.program


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_a_shared_base_runs_grouped_and_like_the_oracle(kind: str, dtype: torch.dtype):
    subject = on_base(base_of(kind)).to(dtype)
    twin = copy.deepcopy(subject)
    for seed, routes in enumerate((ROUTES, ["a", "b", "b"], ["e", *ROUTES, "absent"])):
        mine = observe(subject, subject, Given(routes, seed, dtype))
        assert {engine for _, engine in classes_of(subject, routes)} == {"grouped"}
        theirs = observe(twin, partial(reference_forward, twin), Given(routes, seed, dtype))
        if dtype is torch.bfloat16:
            torch.testing.assert_close(mine["fused_hidden"], theirs["fused_hidden"], rtol=0.02, atol=0.05)
        else:
            assert_same(mine, theirs)


def test_a_shared_base_runs_once_in_the_grouped_program():
    """One product for the base, and two for the change; the base's parameters are everybody's."""
    model = on_base(base_of())
    Given()(model)
    program = program_of(model)
    assert program.operations.count("linear") == 3
    kinds = [kind for kind, _ in program.captured.inputs]
    assert kinds.count("base") == 2
    assert program.captured.names == ("down.weight", "scaling", "up.weight")
    assert "= base\n" in str(program)


class Counting(torch.overrides.TorchFunctionMode):
    """Notes the number of rows of each linear layer with a given weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.rows = weight, []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args[1] is self.weight:
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def test_a_shared_base_runs_once_on_all_rows_in_grouped():
    base = base_of()
    grouped, looped = on_base(base), on_base(base, "looped")
    batch = Given()
    batch(grouped)
    with Counting(base.weight) as of_grouped:
        batch(grouped)
    with Counting(base.weight) as of_looped:
        batch(looped)
    assert of_grouped.rows == [len(ROUTES)]
    assert sorted(of_looped.rows) == [1, 2, 2, 3, 3]


def test_the_base_is_frozen_and_none_of_the_experts_own():
    base = base_of()
    model = on_base(base, "looped")
    assert not any(parameter.requires_grad for parameter in base.parameters())
    ours = {
        f"level_modules.{LEVEL}.{name}.{path}" for name in NAMES for path in ("down.weight", "up.weight", "scaling")
    }
    assert set(model.state_dict()) == ours
    assert not {id(each) for each in base.parameters()} & {id(each) for each in model.parameters()}
    Given()(model).fused_hidden.sum().backward()
    assert base.weight.grad is None


def test_the_base_moves_with_the_experts():
    base = base_of()
    model = on_base(base, "looped")
    model.double()
    assert base.weight.dtype == torch.float64
    assert Given(dtype=torch.float64)(model).fused_hidden.dtype == torch.float64
    assert base.training
    model.eval()
    # It stays in its own mode: a pretrained base is put in evaluation by whoever has it.
    assert base.training


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_one_copy_of_the_base(copied: Callable[[Any], Any]):
    model = on_base(base_of(), "looped")
    other = copied(model)
    assert len({id(expert_of(each, name).base) for each in (model, other) for name in NAMES}) == 2
    assert torch.equal(Given()(other).fused_hidden, Given()(model).fused_hidden)
    part = model.subset({LEVEL: ["a", "b"]})
    assert expert_of(part, "a").base is expert_of(part, "b").base is not expert_of(model).base


def test_an_expert_comes_on_the_same_base_in_grouped():
    base = base_of()
    model = on_base(base)
    model.add_expert(LEVEL, "new", ExpertConfig("new"), warm_start="a")
    assert expert_of(model, "new").base is base
    routes = [*ROUTES, "new"]
    Given(routes)(model)
    assert classes_of(model, routes) == [(("a", "b", "c", "d", "e", "new"), "grouped")]


def test_a_changed_base_is_seen_in_grouped():
    """Values, another tensor, another module, and gradients: what ran before is never run again by mistake."""
    base = base_of()
    model = on_base(base, "auto")

    def compare() -> None:
        batch = Given()
        with auto_groups_all():
            found = batch(model).fused_hidden
        torch.testing.assert_close(found, batch(partial(reference_forward, model)).fused_hidden)

    compare()
    with torch.no_grad():
        base.weight.mul_(2)
    compare()
    base.weight = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)
    compare()
    base.bias = None
    compare()
    other = base_of("block")
    for name in NAMES:
        expert_of(model, name).base = other
    compare()
    expert_of(model, "c").base = base_of("block", seed=7)
    compare()
    with auto_groups_all():
        assert classes_of(model) == [(("a", "b", "d", "e"), "grouped"), (("c",), "looped")]
    other.requires_grad_()
    compare()
    for name in NAMES:
        expert_of(model, name).base = None
    assert len(classes_of(model)) == 1
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        compare()


def test_experts_on_two_bases_are_two_classes_in_grouped():
    bases = {name: base_of(seed=number % 2) for number, name in enumerate(NAMES[:2])}
    model = built(lambda name: zoo.LoRA(WIDTH, rank=2, base=bases["a" if name in "ace" else "b"]))
    batch = Given()
    for _ in range(2):
        torch.testing.assert_close(
            batch(model).fused_hidden, batch(partial(reference_forward, model)).fused_hidden, rtol=1e-5, atol=1e-5
        )
        assert classes_of(model) == [(("a", "c", "e"), "grouped"), (("b", "d"), "grouped")]
    report = celmoe.stack_experts(model)
    assert len(report.classes) == 1
    torch.testing.assert_close(
        batch(model).fused_hidden, batch(partial(reference_forward, model)).fused_hidden, rtol=1e-5, atol=1e-5
    )


def test_a_base_that_is_trained_is_refused_in_grouped():
    base = base_of()
    model = on_base(base)
    base.requires_grad_()
    with pytest.raises(EngineRefusedError, match=r"read a tensor that is not their own \(base\.weight\)"):
        Given()(model)
    model.engine = "auto"
    with auto_groups_all():
        Given()(model).fused_hidden.sum().backward()
    assert base.weight.grad is not None


class Attached(zoo.LoRA):
    """Holds a layer as a plain attribute, which is none of its own and no base."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__(WIDTH, rank=2, base=base_of())
        self.__dict__["other"] = other.requires_grad_(False)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(super().forward(batch).hidden + self.other(batch.hidden))


def test_other_tensors_that_are_not_their_own_stay_refused_in_grouped():
    other = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(EngineRefusedError, match=r"read a tensor that is not their own \(other\.weight\)"):
        Given()(built(lambda name: Attached(other)))


class Norm(BasedExpert):
    """Somebody's own expert on a base, with a loss."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.base = base

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        rows = self.base(batch.hidden) * self.gain
        return ExpertResult(rows, {"size": rows.square().mean()})


def test_somebody_s_own_expert_on_a_base_in_grouped():
    base = base_of("block")
    subject, twin = (built(lambda name: Norm(base)) for _ in range(2))
    for seed in range(2):
        mine = observe(subject, subject, Given(seed=seed))
        assert_same(mine, observe(twin, partial(reference_forward, twin), Given(seed=seed)))
    assert classes_of(subject) == [(tuple("abcde"), "grouped")]
