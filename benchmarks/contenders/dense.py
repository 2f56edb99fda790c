"""*Dense*: the same rows through one expert of each level with the same fusion; nothing is routed, nothing moves."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import celmoe
from benchmarks.hierarchies import ONE_LEVEL, TREE
from benchmarks.steps import HOST, Forward
from benchmarks.workloads import Workload


class Dense(nn.Module):
    """The workload's hierarchy with a single expert a level.

    Args:
        workload: Its number of experts is not looked at.
    """

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        hierarchy = ONE_LEVEL if workload.hierarchy == ONE_LEVEL else TREE
        model = replace(workload, num_experts=1, hierarchy=hierarchy).build(celmoe)
        assert isinstance(model, celmoe.HierarchicalCELMoE)
        self.experts = nn.ModuleList([next(iter(level.values())) for level in model.level_modules.values()])  # type: ignore[operator]  # mappings
        self.fusion = model.fusion

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """``[B, H]`` or ``[B, S, H]`` to the fused hidden states of the same shape."""
        level_hiddens = []
        for expert in self.experts:
            hidden = expert(celmoe.ExpertBatch(hidden, mask=mask)).hidden
            level_hiddens.append(hidden)
        fused: torch.Tensor = self.fusion(level_hiddens)
        return fused

    def unrouted(self, workload: Workload, device: torch.device = HOST) -> Forward:
        """The forward pass with the workload's mask."""
        mask = workload.mask()
        mask = mask if mask is None else mask.to(device)

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            fused: torch.Tensor = self(hidden, mask)
            return fused

        return forward
