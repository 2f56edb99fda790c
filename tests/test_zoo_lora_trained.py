"""LoRA experts in training, stacked, compiled and folded away."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import celmoe
from celmoe import (
    ChangedError,
    ExpertBatch,
    GraphError,
    HierarchicalCELMoE,
    InputError,
    zoo,
)
from celmoe.reference import reference_forward
from celmoe.traced import forward
from tests.lora import BASES, INPUT, LEVEL, NAMES, ROUTES, WIDTH, Given, base_of, built, classes_of, expert_of, on_base
from tests.traps import assert_same, observe

# By expert its rank and alpha.
RANKS = {"a": (2, 2.0), "b": (2, 4.0), "c": (3, 3.0), "d": (2, 5.0), "e": (3, 1.0), "absent": (2, 2.0)}


def by_rank(base: nn.Module | None) -> Callable[[str], nn.Module]:
    def make(name: str) -> nn.Module:
        rank, alpha = RANKS[name]
        features = (WIDTH,) if base is not None else (INPUT, WIDTH)
        return zoo.LoRA(*features, rank=rank, alpha=alpha, base=base)

    return make


@pytest.mark.parametrize("has_base", [True, False], ids=["base", "no base"])
def test_grouped_by_rank_whatever_the_alphas(has_base: bool):
    base = base_of() if has_base else None
    subject = built(by_rank(base))
    twin = copy.deepcopy(subject)
    for seed in range(2):
        mine = observe(subject, subject, Given(seed=seed))
        assert_same(mine, observe(twin, partial(reference_forward, twin), Given(seed=seed)))
    assert classes_of(subject) == [(("a", "b", "d"), "grouped"), (("c", "e"), "grouped")]
    report = celmoe.stack_experts(subject)
    assert sorted(len(each.experts) for each in report.classes if not each.reason) == [2, 4]
    batch = Given()
    torch.testing.assert_close(
        batch(subject).fused_hidden, batch(partial(reference_forward, twin)).fused_hidden, rtol=1e-5, atol=1e-5
    )
    assert classes_of(subject) == [(("a", "b", "d"), "grouped"), (("c", "e"), "grouped")]


def test_alphas_stay_through_training_stacking_and_checkpoints():
    model = built(by_rank(None), "looped")
    wanted = {name: alpha / rank for name, (rank, alpha) in RANKS.items()}

    def found(of: HierarchicalCELMoE) -> dict[str, float]:
        return {name: pytest.approx(expert_of(of, name).scaling.item()) for name in NAMES}

    celmoe.stack_experts(model)
    optimizer = celmoe.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for seed in range(3):
        optimizer.zero_grad()
        Given(seed=seed)(model).fused_hidden.sin().sum().backward()
        optimizer.step()
    assert wanted == found(model)
    other = built(lambda name: zoo.LoRA(INPUT, WIDTH, rank=RANKS[name][0]))
    other.load_state_dict(model.state_dict())
    assert wanted == found(other)
    del optimizer
    gc.collect()
    model.freeze(LEVEL, "a")
    model.unfreeze(LEVEL)
    celmoe.unstack_experts(model)
    assert wanted == found(model)
    assert not any(expert_of(model, name).scaling.requires_grad for name in NAMES)
    assert all(expert_of(model, name).up.weight.requires_grad for name in NAMES)


@pytest.mark.parametrize("has_base", [True, False], ids=["base", "no base"])
def test_stacked_trains_like_ordinary_experts_in_grouped(has_base: bool):
    def make(name: str) -> nn.Module:
        if has_base:
            return zoo.LoRA(WIDTH, rank=2, base=base)
        return zoo.LoRA(INPUT, WIDTH, rank=2)

    base = base_of().double()
    models = [built(make).double() for _ in range(2)]
    report = celmoe.stack_experts(models[1])
    assert len(report.classes) == 1
    assert not report.classes[0].reason
    (stack,) = models[1]._stacks[LEVEL]
    assert stack.is_fixed
    options = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}
    optimizers = [
        torch.optim.AdamW(models[0].parameters(), **options),
        celmoe.optim.AdamW(models[1].parameters(), **options),
    ]
    for seed, routes in enumerate((ROUTES, ["a", "b", "b"], ROUTES)):
        outputs = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(Given(routes, seed, torch.float64)(model).fused_hidden)
            assert {engine for _, engine in classes_of(model, routes)} == {"grouped"}
            outputs[-1].sin().sum().backward()
            optimizer.step()
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    wanted = models[0].state_dict()
    for key, value in models[1].state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-9, atol=1e-9)


def test_a_stack_s_settled_members_see_a_changed_base_in_grouped():
    """A call asks one member of a stack only: what all share must be asked of that one."""
    base = base_of()
    model = on_base(base)
    celmoe.stack_experts(model)

    def compare() -> None:
        batch = Given()
        torch.testing.assert_close(
            batch(model).fused_hidden, batch(partial(reference_forward, model)).fused_hidden, rtol=1e-5, atol=1e-5
        )

    for _ in range(3):
        compare()
    with torch.no_grad():
        base.weight.add_(1)
    compare()
    base.bias = None
    compare()
    expert_of(model, "c").base = base_of(seed=9)
    compare()
    compare()


def compare_compiled(model: HierarchicalCELMoE, compiled: Any, routes: list[str] = ROUTES) -> None:
    batch = Given(routes, dtype=torch.float64)
    batch.routing = model.compile_routing(batch.routing)
    wanted = batch(partial(reference_forward, model)).fused_hidden
    torch.testing.assert_close(batch(compiled).fused_hidden, wanted, rtol=1e-10, atol=1e-10)


@contextmanager
def operators() -> Iterator[mock.Mock]:
    """Sees the levels that are one operator of a graph."""
    with mock.patch("celmoe.traced.forward.run_opaque", wraps=forward.run_opaque) as seen:
        yield seen


@pytest.mark.parametrize("kind", ["linear", "block", "behind a layer"])
def test_grouped_compiles_as_the_graph_s_own_operations(kind: str):
    if kind in BASES:
        model = on_base(base_of(kind), "auto").double()
    else:
        model = built(lambda name: zoo.LoRA(INPUT, WIDTH, rank=2, alpha=ord(name[0])), "auto").double()
    celmoe.stack_experts(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with operators() as seen:
        for routes in (ROUTES, ["b"] * len(ROUTES)):
            compare_compiled(model, compiled, routes)
    assert not seen.called


def test_grouped_compiles_as_one_operator_on_several_bases():
    model = on_base(base_of(), "auto").double()
    celmoe.stack_experts(model)
    expert_of(model, "c").base = base_of(seed=9).double()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with operators() as seen:
        compare_compiled(model, compiled)
    assert seen.called


def test_a_compiled_graph_sees_a_changed_base_in_grouped():
    """Values are seen at once; another tensor or module once the graph has looked, as with what experts share."""
    base = base_of().double()
    model = on_base(base, "auto").double()
    celmoe.stack_experts(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compare_compiled(model, compiled)
    with torch.no_grad():
        base.weight.mul_(2)
    compare_compiled(model, compiled)
    base.weight = nn.Parameter(torch.randn_like(base.weight), requires_grad=False)
    with pytest.raises(ChangedError):
        compare_compiled(model, compiled)
    compare_compiled(model, compiled)
    other = base_of(seed=5).double()
    for name in NAMES:
        expert_of(model, name).base = other
    compare_compiled(model, compiled)


def test_grouped_is_exported_behind_a_layer_and_refused_on_a_base():
    batch = Given(dtype=torch.float64)
    hidden, context = batch.leaves["hidden"].detach(), {"input": batch.leaves["input"].detach()}
    behind = built(lambda name: zoo.LoRA(INPUT, WIDTH, rank=2), "auto").double()
    exported = torch.export.export(behind, (hidden, behind.compile_routing(batch.routing), context)).module()
    other = Given([*ROUTES[1:], "b"], seed=5, dtype=torch.float64)
    torch.testing.assert_close(
        exported(hidden, behind.compile_routing(other.routing), context).fused_hidden,
        reference_forward(behind, hidden, other.routing, context).fused_hidden,
    )
    model = on_base(base_of(), "auto").double()
    with pytest.raises(GraphError) as error:
        torch.export.export(model, (hidden, model.compile_routing(batch.routing)))
    assert str(error.value).startswith(
        "'model' must have experts of one class at level 'language' to be exported (got 'a', 'b', 'c', 'd', 'e', "
        "'absent', which read tensors of a base)"
    )


@pytest.mark.parametrize("bias", [True, False])
def test_folded_into_a_layer(bias: bool):
    """A layer whose weight is changed gives what the expert gives, behind a layer or on it."""
    torch.manual_seed(0)
    layer = nn.Linear(INPUT, WIDTH, bias=bias).double()
    expert = zoo.LoRA(INPUT, WIDTH, rank=2, alpha=5).double().eval()
    expert.up.weight.data.normal_()
    given = torch.randn(4, 3, INPUT, dtype=torch.float64)
    delta = expert.weight_delta()
    found = expert(ExpertBatch(layer(given), {"input": given})).hidden
    torch.testing.assert_close(F.linear(given, layer.weight + delta, layer.bias), found)
    assert delta.shape == layer.weight.shape
    assert not delta.requires_grad
    torch.testing.assert_close(delta, 5 / 2 * expert.up.weight @ expert.down.weight)


def test_it_says_if_it_reads_a_layer_s_input():
    assert zoo.LoRA(INPUT, WIDTH, rank=2).reads_input
    assert not zoo.LoRA(WIDTH, rank=2, base=base_of()).reads_input


@pytest.mark.parametrize("engine", ["looped", "grouped"])
@pytest.mark.parametrize("context", [None, {"inputs": 1}])
def test_without_a_layer_s_input(context: Any, engine: str):
    model = built(lambda name: zoo.LoRA(WIDTH, rank=2), engine)
    with pytest.raises(InputError) as error:
        model(torch.randn(len(ROUTES), WIDTH), {LEVEL: ROUTES}, context)
    assert str(error.value) == (
        "'context' must be a dict whose 'input' holds the inputs of the linear layer in front of a LoRA without a base "
        "(got none; celmoe.attach gives it, or build LoRA(..., base=layer))"
    )


def test_begins_as_the_base():
    base = base_of()
    model = built(lambda name: zoo.LoRA(WIDTH, rank=2, base=base), "looped", trained=False)
    batch = Given()
    torch.testing.assert_close(batch(model).fused_hidden, base(batch.leaves["hidden"]), rtol=0, atol=0)


def test_nothing_of_the_engine_keeps_a_base_or_its_experts_alive_in_grouped():
    base = base_of()
    model = on_base(base)
    Given()(model)
    gone = [weakref.ref(each) for each in (base, base.weight, expert_of(model))]
    del model, base
    gc.collect()
    assert [each() for each in gone] == [None] * 3
