"""Models to compile, and the comparison with eager calls."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from celmoe import (
    CELMoEConfig,
    CELMoEOutput,
    ExpertBatch,
    ExpertConfig,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    RoutingPlan,
)

WIDTH = 8


class Dense(nn.Module):
    """A layer and a norm, with a number that may be changed."""

    def __init__(self, width: int = WIDTH, inner: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.norm = nn.LayerNorm(inner)
        self.down = nn.Linear(inner, width)
        self.factor = 1.0

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        inner = self.norm(torch.relu(self.up(batch.hidden))) * self.factor
        return ExpertResult(batch.hidden + self.down(inner))


def built(
    factory: Callable[[str], nn.Module],
    chosen: Sequence[str] = ("universal", "language"),
    universal: Callable[[], nn.Module] = Dense,
) -> HierarchicalCELMoE:
    torch.manual_seed(0)
    # Names that sort in another order than they stand in.
    names = {"universal": ["all"], "family": ["z", "a", "m"], "language": [f"e{place}" for place in (4, 1, 0, 5, 3, 2)]}
    levels = [
        HierarchyLevelConfig(level, {name: ExpertConfig(name) for name in experts})
        for level, experts in names.items()
        if level in chosen
    ]
    model = HierarchicalCELMoE(
        CELMoEConfig(WIDTH, levels, fusion_dropout=0.0),
        lambda level, name, _: universal() if level == "universal" else factory(name),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    # Sums in another order round otherwise.
    return model.double()


def routed(model: HierarchicalCELMoE, size: int, seed: int = 0) -> RoutingPlan:
    draw = random.Random(seed)
    routing = {
        level.name: [draw.choice(list(level.experts)[: 1 + seed % 7]) for _ in range(size)] for level in model.levels
    }
    return model.compile_routing(routing)


class Backend:
    """Counts the graphs that it compiles."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: Any, inputs: Any) -> Any:
        from torch._dynamo import lookup_backend

        self.graphs += 1
        return lookup_backend("aot_eager")(module, inputs)


Step = tuple[CELMoEOutput, torch.Tensor, dict[str, torch.Tensor | None]]


def stepped(model: nn.Module, call: Any, hidden: torch.Tensor, *arguments: Any) -> Step:
    """Run forward and backward, and give output, gradient of the input, and gradients of the parameters."""
    model.zero_grad()
    given = hidden.clone().requires_grad_()
    output = call(given, *arguments)
    total = output.fused_hidden.square().sum()
    for level in output.levels.values():
        total = total + level.hidden.square().sum()
    total.backward()
    assert given.grad is not None
    return output, given.grad, {name: each.grad for name, each in model.named_parameters()}


def assert_same(found: Step, wanted: Step) -> None:
    for level, output in wanted[0].levels.items():
        torch.testing.assert_close(found[0].levels[level].hidden, output.hidden)
        assert found[0].levels[level].routes == output.routes
    torch.testing.assert_close(found[0].fused_hidden, wanted[0].fused_hidden)
    torch.testing.assert_close(found[1], wanted[1])
    assert found[2].keys() == wanted[2].keys()
    for name, grad in wanted[2].items():
        assert (found[2][name] is None) == (grad is None), name
        torch.testing.assert_close(found[2][name], grad, msg=lambda text, name=name: f"{name}: {text}")


def compared(model: HierarchicalCELMoE, compiled: Any, size: int = 16, seed: int = 0, **others: Any) -> None:
    hidden = torch.randn(size, WIDTH, dtype=torch.float64)
    plan = routed(model, size, seed)
    found = stepped(model, lambda given: compiled(given, plan, **others), hidden)
    assert_same(found, looped(model, hidden, plan, **others))


def looped(model: HierarchicalCELMoE, hidden: torch.Tensor, *arguments: Any, **others: Any) -> Step:
    """The step of a loop over the experts, which is right after any change."""
    model.engine = "looped"
    found = stepped(model, lambda given: model(given, *arguments, **others), hidden)
    model.engine = "auto"
    return found


@pytest.fixture(autouse=True)
def _unlimited() -> Iterator[None]:
    # All models share the code of one forward pass. Starting anew for each test would capture all experts again.
    with torch._dynamo.config.patch(recompile_limit=1 << 10, accumulated_recompile_limit=1 << 10):
        yield
