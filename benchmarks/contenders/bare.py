"""*Bare loop*, a floor: experts one after another on rows that are cut in place; nothing is routed, moved or checked.

Its speed is the bound of any engine that loops: such an engine does all this, and routes and moves rows besides.
"""

from __future__ import annotations

from itertools import chain
from typing import cast

import torch

import celmoe
from benchmarks.contenders.contender import Contender
from benchmarks.harness.steps import HOST, Routes, cycled, routed, routings_of
from benchmarks.workloads.workload import Workload


def make_bare(workload: Workload, device: torch.device = HOST, *, is_training: bool = True) -> Contender:
    """As many rows for each expert as the routing gives it.

    It must equal our looped model given a batch whose samples stand in the order of each level's experts.
    """
    model, other = (_looped(workload).to(device).train(is_training) for _ in range(2))
    plans = [model.compile_routing(routing) for routing in routings_of(workload)]
    named = dict(model.named_parameters())
    last = plans[0]

    def call(hidden: torch.Tensor, plan: Routes) -> torch.Tensor:
        nonlocal last
        assert isinstance(plan, celmoe.RoutingPlan)
        last = plan
        level_hiddens = []
        for level in plan.levels.values():
            experts = [model.level_modules[level.name][name] for name in level.present]  # type: ignore[index]  # nested mappings
            blocks = hidden.split(list(level.counts))
            results = [expert(celmoe.ExpertBatch(block)) for expert, block in zip(experts, blocks, strict=True)]
            hidden = torch.cat([result.hidden for result in results])
            level_hiddens.append(hidden)
        fused: torch.Tensor = model.fusion(level_hiddens)
        return fused

    def expected() -> Contender:
        levels = last.levels.values()
        names = {level.name: [*chain(*map(_repeated, level.present, level.counts))] for level in levels}
        # The current weights: weights move between two steps.
        other.load_state_dict(model.state_dict())
        return Contender(other, routed(other, workload, [names], device), dict(other.named_parameters()))

    return Contender(model, cycled(call, plans), named, expected)


def _looped(workload: Workload) -> celmoe.HierarchicalCELMoE:
    return cast(celmoe.HierarchicalCELMoE, workload.build(celmoe, engine="looped"))


def _repeated(name: str, count: int) -> list[str]:
    return [name] * count
