"""*Dense*: the same rows through one expert of each level with the same fusion; nothing is routed, nothing moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

import celmoe
from benchmarks.contenders.contender import Contender, Terms
from benchmarks.harness.steps import HOST, Forward, mask_on, routed
from benchmarks.workloads.hierarchies import ONE_LEVEL, TREE
from benchmarks.workloads.workload import Workload


class Dense(nn.Module):
    """The workload's hierarchy with a single expert a level.

    Args:
        workload: Its number of experts is not looked at.
    """

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        model = _of_one_expert_a_level(workload)
        self.experts = nn.ModuleList([next(iter(level.values())) for level in model.level_modules.values()])  # type: ignore[operator]  # mappings
        self.fusion = model.fusion
        own = {parameter: name for name, parameter in self.named_parameters()}
        self._own_names = {name: own[parameter] for name, parameter in model.named_parameters()}

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
        mask = mask_on(device, workload)

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            fused: torch.Tensor = self(hidden, mask)
            return fused

        return forward

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        """Its parameters by the names that they have in a model of one expert a level."""
        return {name: self.get_parameter(own) for name, own in self._own_names.items()}


def make_dense(terms: Terms) -> Contender:
    """The floor, which must equal our looped model of one expert a level."""
    workload, device = terms.workload, terms.device
    dense = Dense(workload).to(device).train(terms.is_training)

    def expected() -> Contender:
        model = _of_one_expert_a_level(workload).to(device).train(terms.is_training)
        # The current weights: weights move between two steps.
        model.load_state_dict(dense.weights)
        routing = {level.name: next(iter(level.experts)) for level in model.levels}
        return Contender(model, routed(model, workload, [routing], device), dict(model.named_parameters()))

    return Contender(dense, dense.unrouted(workload, device), dense.weights, expected)


def _of_one_expert_a_level(workload: Workload) -> celmoe.HierarchicalCELMoE:
    hierarchy = ONE_LEVEL if workload.hierarchy == ONE_LEVEL else TREE
    model = replace(workload, num_experts=1, hierarchy=hierarchy).build(celmoe, engine="looped")
    assert isinstance(model, celmoe.HierarchicalCELMoE)
    return model
