"""Models whose experts are about to change."""

from __future__ import annotations

import pytest
import torch

import celmoe
from celmoe import (
    HierarchicalCELMoE,
)
from tests.lifecycle import WIDTH, build

BOTH = pytest.mark.parametrize("is_stacked", [False, True])


def trained(*, is_stacked: bool) -> tuple[HierarchicalCELMoE, torch.optim.Optimizer]:
    model = build(is_stacked=is_stacked)
    optimizer = celmoe.optim.AdamW(model.parameters(), lr=0.01)
    run(model, ["ru", "pl", "it"])
    optimizer.step()
    run(model, ["uk", "it", "fi"])
    return model, optimizer


def run(model: HierarchicalCELMoE, names: list[str]) -> torch.Tensor:
    hidden = torch.ones(len(names), WIDTH, dtype=torch.float64).cumsum(0)
    model.zero_grad()
    fused = model(hidden, {"language": names}).fused_hidden
    fused.square().sum().backward()
    return fused.detach()
