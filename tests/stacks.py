"""Stacked models and their ordinary twins."""

from __future__ import annotations

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
)

WIDTH = 8
NAMES = [f"e{number}" for number in range(6)]
ROUTES = ["e0", "e2", "e2", "e5", "e0", "e3"]


class MLP(ExpertModule):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 16)
        self.down = nn.Linear(16, WIDTH, bias=False)

    def forward(self, batch):
        return ExpertResult(batch.hidden + self.down(torch.relu(self.up(self.norm(batch.hidden)))))


class Recurrent(ExpertModule):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, batch):
        return ExpertResult(self.gru(batch.hidden.unsqueeze(1))[0].squeeze(1))


ENGINES = ["looped", "grouped", "auto"]


def build(kind: type[nn.Module] = MLP, engine: str = "grouped", seed: int = 0) -> HierarchicalCELMoE:
    torch.manual_seed(seed)
    level = HierarchyLevelConfig("language", {name: ExpertConfig(name) for name in NAMES})
    return HierarchicalCELMoE(CELMoEConfig(WIDTH, [level]), lambda *_: kind(), engine=engine).eval()


def stacked(kind: type[nn.Module] = MLP, engine: str = "grouped", seed: int = 0) -> HierarchicalCELMoE:
    model = build(kind, engine, seed)
    celmoe.stack_experts(model)
    return model


def expert_of(model: HierarchicalCELMoE, name: str):
    return model.level_modules["language"][name]


def by_expert(model: HierarchicalCELMoE) -> dict[str, torch.Tensor]:
    return {f"{name}.{path}": tensor for name in NAMES for path, tensor in expert_of(model, name).named_parameters()}


def run(model: HierarchicalCELMoE, routes=ROUTES, dtype=torch.float32):
    hidden = torch.randn(len(routes), WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    model.zero_grad()
    output = model(hidden, {"language": routes})
    (output.fused_hidden.square().sum() + sum(output.losses.values())).backward()
    return output.fused_hidden.detach(), hidden.grad


def assert_alike(plain: HierarchicalCELMoE, model: HierarchicalCELMoE, routes=ROUTES) -> None:
    """The same results and gradients; absent experts of a stack have gradients of zero."""
    for found, expected in zip(run(model, routes), run(plain, routes), strict=True):
        torch.testing.assert_close(found, expected)
    theirs = by_expert(plain)
    for name, tensor in by_expert(model).items():
        grad = theirs[name].grad
        if tensor.grad is None and type(tensor) is nn.Parameter:
            assert grad is None
            continue
        torch.testing.assert_close(tensor.grad, torch.zeros_like(tensor) if grad is None else grad)


def assert_same_state(one: HierarchicalCELMoE, other: HierarchicalCELMoE) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right)
    assert left._metadata == right._metadata
    assert all(torch.equal(left[key], right[key]) for key in left)
