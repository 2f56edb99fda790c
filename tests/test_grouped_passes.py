"""Backward passes of one forward pass: side by side, one within another, one through another's graph, or cut short.

One pass changes nothing for another: members that a pass does not reach have no gradient from it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from torch.autograd import Function

from tests.traps import (
    GROUPED,
    LEVEL,
    Batch,
    Losing,
    assert_ran_grouped,
    assert_same,
    build,
    oracle_of,
    with_an_empty_mask,
)


def squares(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    return rows.square().mean()


def root(self: Any, rows: torch.Tensor, batch: Any) -> torch.Tensor:
    """Its derivative is infinite if the mask is empty."""
    return (rows * batch.mask.unsqueeze(1)).square().sum().sqrt()


class _Stop(Function):
    """Sends no gradient back."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        return None


def loss_of(output: Any, name: str) -> torch.Tensor:
    return output.losses[f"{LEVEL}.{name}.loss"]


def within_another(output: Any, hidden: torch.Tensor) -> None:
    def look(grad: torch.Tensor) -> None:
        torch.autograd.grad(loss_of(output, "b"), [hidden], retain_graph=True)

    loss_of(output, "c").register_hook(look)
    (loss_of(output, "c") + loss_of(output, "a")).backward(retain_graph=True)


def with_a_graph_that_is_dropped(output: Any, hidden: torch.Tensor) -> None:
    torch.autograd.grad(loss_of(output, "b"), hidden, create_graph=True)
    loss_of(output, "a").backward()


def through_the_graph_of_another(output: Any, hidden: torch.Tensor) -> None:
    (slope,) = torch.autograd.grad(loss_of(output, "a"), hidden, create_graph=True)
    (slope.square().sum() + loss_of(output, "c")).backward()


def through_the_graph_of_one_through_another(output: Any, hidden: torch.Tensor) -> None:
    (slope,) = torch.autograd.grad(loss_of(output, "a").pow(2), hidden, create_graph=True)
    (bend,) = torch.autograd.grad(slope.pow(2).sum(), hidden, create_graph=True)
    (bend.square().sum() + loss_of(output, "c")).backward()


def through_two_where_each_goes_its_way(output: Any, hidden: torch.Tensor) -> None:
    slopes = torch.autograd.grad(loss_of(output, "a") + loss_of(output, "c"), hidden, create_graph=True)[0]
    (slopes * torch.arange(1.0, len(slopes) + 1, dtype=slopes.dtype).unsqueeze(1)).square().sum().backward()


def weighed_by_what_is_learned(output: Any, hidden: torch.Tensor) -> None:
    """The gradient of a gradient leaves by the weight of a loss, and comes back by that."""
    weight = torch.ones((), dtype=hidden.dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(weight * loss_of(output, "a"), hidden, create_graph=True)
    (change,) = torch.autograd.grad(slope.sum(), weight, create_graph=True)
    (change.square() + loss_of(output, "c")).backward()


def many_within_one(output: Any, hidden: torch.Tensor) -> None:
    def look(grad: torch.Tensor) -> None:
        for _ in range(80):
            torch.autograd.grad(loss_of(output, "e"), [hidden], retain_graph=True)

    loss_of(output, "c").register_hook(look)
    (loss_of(output, "c") + loss_of(output, "a")).backward()


def with_many_after_a_graph(output: Any, hidden: torch.Tensor) -> None:
    (slope,) = torch.autograd.grad(loss_of(output, "a"), hidden, create_graph=True)
    for _ in range(80):
        torch.autograd.grad(loss_of(output, "e"), hidden, retain_graph=True)
    (slope.square().sum() + loss_of(output, "c")).backward()


def stopped_at_a_loss(output: Any, hidden: torch.Tensor) -> None:
    (_Stop.apply(loss_of(output, "a")) + loss_of(output, "c")).backward()


def stopped_at_the_rows(output: Any, hidden: torch.Tensor) -> None:
    (_Stop.apply(output.fused_hidden).sum() + loss_of(output, "c")).backward()


PASSES = [
    within_another,
    with_a_graph_that_is_dropped,
    through_the_graph_of_another,
    through_the_graph_of_one_through_another,
    through_two_where_each_goes_its_way,
    weighed_by_what_is_learned,
    many_within_one,
    with_many_after_a_graph,
    stopped_at_a_loss,
    stopped_at_the_rows,
]


@pytest.mark.parametrize("function", [squares, root])
@pytest.mark.parametrize("go_back", PASSES)
def test_what_a_pass_does_not_reach(go_back: Callable[[Any, torch.Tensor], None], function: Any):
    model = build(lambda: Losing(function), dtype=torch.float64)
    Batch(dtype=torch.float64)(model)
    found = []
    for forward in (model, oracle_of(model)):
        model.zero_grad()
        # The one within another asks for the gradient of this very loss.
        batch = Batch(dtype=torch.float64) if go_back is within_another else with_an_empty_mask()
        go_back(batch(forward), batch.leaves["hidden"])
        leaves = {**dict(model.named_parameters()), **batch.leaves}
        # Gradients of the batch from aborted passes are not compared.
        found.append({f"gradient of {name}": each.grad for name, each in leaves.items()})
    assert_ran_grouped(model, Batch())
    if go_back is with_a_graph_that_is_dropped and function is root:
        assert all(bool(each.isfinite().all()) for each in found[1].values() if each is not None)
    assert_same(*found)


def test_passes_side_by_side():
    model = build(lambda: Losing(squares), GROUPED, dtype=torch.float64)
    Batch(dtype=torch.float64)(model)
    output = Batch(dtype=torch.float64)(model)
    parameters = list(model.parameters())
    faults: list[str] = []

    def go_back(first: str, second: str) -> None:
        wanted = {f"level_modules.{LEVEL}.{name}.linear.bias" for name in (first, second)}
        for _ in range(40):
            loss = loss_of(output, first) + loss_of(output, second)
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            names = [name for name, _ in model.named_parameters()]
            got = {name for name, grad in zip(names, grads, strict=True) if grad is not None and "linear.bias" in name}
            if got != wanted:
                faults.append(f"{first} and {second} gave gradients to {sorted(got)}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [Thread(target=go_back, args=pair) for pair in ("ab", "cd", "ea", "bd")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not faults


def test_nothing_of_a_forward_pass_is_kept():
    model = build(lambda: Losing(squares), dtype=torch.float64)
    output = Batch(dtype=torch.float64)(model)
    for _ in range(3):
        torch.autograd.grad(loss_of(output, "a"), list(model.parameters()), retain_graph=True, allow_unused=True)
    node = loss_of(output, "a").grad_fn
    while not hasattr(node, "way"):
        node = node.next_functions[0][0]
    kept = weakref.ref(node)
    del node, output
    assert kept() is None
