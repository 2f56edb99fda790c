"""Exported models: a plan among the inputs, any batch size, and plans as trees of tensors."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import celmoe
from celmoe import HierarchicalCELMoE, RoutingPlan
from tests.compiled import WIDTH, Dense, built, routed
from tests.test_compiled import Masked
from tests.test_compiled_changes import Counting, Lossy

# More samples than any other axis has entries: a context's tensor of as many would be the samples'.
BATCH = torch.export.Dim("batch", min=WIDTH + 1, max=1 << 16)
POSITIONS = torch.export.Dim("positions", min=2, max=1 << 10)


def exported(model: HierarchicalCELMoE, hidden: torch.Tensor, plan: RoutingPlan, **others: Any) -> Any:
    """The exported program after a round trip through bytes."""
    axes = {0: BATCH, 1: POSITIONS} if hidden.dim() > 2 else {0: BATCH}
    shapes: dict[str, Any] = {"hidden": axes, "routing": [{0: BATCH}] * (3 * len(plan.levels))}
    shapes |= {
        name: {key: {0: BATCH} if key == "scales" else None for key in each} if isinstance(each, dict) else {0: BATCH}
        for name, each in others.items()
    }
    program = torch.export.export(model, (), {"hidden": hidden, "routing": plan, **others}, dynamic_shapes=shapes)
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    return torch.export.load(saved).module()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("is_stacked", [True, False])
@pytest.mark.parametrize("positions", [(), (5,)])
def test_other_batches_and_positions(is_stacked: bool, positions: tuple[int, ...]) -> None:
    model = built(lambda _: Dense())
    if is_stacked:
        celmoe.stack_experts(model)
    program = exported(model, random(16, *positions, WIDTH), routed(model, 16))
    for seed, size in enumerate((9, 33)):
        hidden, plan = random(size, *(each + seed for each in positions), WIDTH), routed(model, size, seed)
        found = program(hidden=hidden, routing=plan)
        for engine in ("looped", "grouped"):
            model.engine = engine
            wanted = model(hidden, plan)
            torch.testing.assert_close(found.fused_hidden, wanted.fused_hidden)
            for level, output in wanted.levels.items():
                torch.testing.assert_close(found.levels[level].hidden, output.hidden)


def test_masks_and_contexts() -> None:
    model = built(lambda _: Masked())
    context = {"scales": random(16), "shared": random(WIDTH), "number": 0.5}
    program = exported(model, random(16, WIDTH), routed(model, 16), context=context, mask=random(16))
    context, mask = context | {"scales": random(12)}, random(12)
    hidden, plan = random(12, WIDTH), routed(model, 12, 1)
    found = program(hidden=hidden, routing=plan, context=context, mask=mask)
    torch.testing.assert_close(found.fused_hidden, model(hidden, plan, context, mask).fused_hidden)


def test_the_model_works_as_before() -> None:
    model = built(lambda _: Dense())
    celmoe.stack_experts(model)
    hidden, plan = random(16, WIDTH), routed(model, 16)
    before = model(hidden, plan).fused_hidden
    exported(model, hidden, plan)
    torch.testing.assert_close(model(hidden, plan).fused_hidden, before)


@pytest.mark.parametrize("kind", ["ids", "names"])
def test_a_routing_is_refused(kind: str) -> None:
    model = built(lambda _: Dense())
    plan = routed(model, 16)
    routing: Any = {
        level: torch.tensor([list(each.experts).index(name) for name in plan.routes(level)])
        if kind == "ids"
        else plan.routes(level)
        for level, each in zip(plan.levels, model.levels, strict=True)
    }
    with pytest.raises(celmoe.GraphError, match=r"'routing' must be a RoutingPlan.*compile_routing"):
        torch.export.export(model, (random(16, WIDTH), routing))


@pytest.mark.parametrize("kind", ["two classes", "losses", "side effects"])
def test_experts_that_are_no_one_class_are_refused(kind: str) -> None:
    def factory(name: str) -> Dense:
        if kind == "two classes":
            return Dense(inner=2 * WIDTH if name == "e2" else WIDTH)
        return Lossy() if kind == "losses" else Counting()

    model = built(factory)
    with pytest.raises(celmoe.GraphError, match="'model' must have experts of one class at level"):
        torch.export.export(model, (random(16, WIDTH), routed(model, 16)))


class TestTrees:
    """PyTorch looks into plans and outputs for tensors."""

    def test_the_same_tensors_make_the_same_plan(self) -> None:
        plan = routed(built(lambda _: Dense()), 16)
        assert pytree.tree_map(lambda leaf: leaf, plan) is plan

    def test_other_tensors_make_an_equal_plan(self) -> None:
        model = built(lambda _: Dense())
        for seed in (0, 3):
            plan = routed(model, 16, seed)
            made = pytree.tree_map(torch.clone, plan)
            assert made is not plan
            assert made.batch_size == plan.batch_size
            assert made.device == plan.device
            for level, planned in plan.levels.items():
                assert made.routes(level) == plan.routes(level)
                assert (made.levels[level].present, made.levels[level].counts) == (planned.present, planned.counts)
            again = pickle.loads(pickle.dumps(pytree.tree_map(torch.clone, plan)))
            hidden = random(16, WIDTH)
            for other in (made, again, pytree.tree_map(torch.clone, plan).slice(0, 16)):
                torch.testing.assert_close(model(hidden, other).fused_hidden, model(hidden, plan).fused_hidden)

    def test_outputs_keep_all_that_they_hold(self) -> None:
        model = built(lambda _: Lossy())
        output = model(random(16, WIDTH), routed(model, 16))
        found = pytree.tree_map(lambda leaf: leaf, output)
        assert found.levels.keys() == output.levels.keys()
        assert found.losses.keys() == output.losses.keys()
        assert found.loss_weights == output.loss_weights
        for level, each in output.levels.items():
            assert found.levels[level].routes == each.routes
            assert found.levels[level].loss_weights == each.loss_weights
            assert found.levels[level].hidden is each.hidden

    def test_an_attribute_that_no_plan_has(self) -> None:
        plan = routed(built(lambda _: Dense()), 16)
        with pytest.raises(AttributeError, match="no attribute 'lvels'"):
            plan.lvels  # type: ignore[attr-defined]  # noqa: B018
