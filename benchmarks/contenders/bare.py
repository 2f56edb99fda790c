"""*Bare loop*, a floor: experts one after another on rows that are cut in place; nothing is routed, moved or checked.

Its speed is the bound of any engine that loops: such an engine does all this, and routes and moves rows besides.
"""

from __future__ import annotations

import torch

import celmoe
from benchmarks.contenders.contender import AbsentError, Contender, Terms
from benchmarks.harness.steps import Routes, cycled, routed, routings_of


def make_bare(terms: Terms) -> Contender:
    """As many rows for each expert as the routing gives it.

    It must equal our looped model given a batch whose samples stand in the order of each level's experts.
    """
    if terms.workload.mask() is not None:
        raise AbsentError("it cuts no masks")
    workload, device = terms.workload, terms.device
    model, other = terms.model("looped"), terms.model("looped")
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
        names = {
            level.name: [name for name, count in zip(level.present, level.counts, strict=True) for _ in range(count)]
            for level in levels
        }
        # The current weights: weights move between two steps.
        other.load_state_dict(model.state_dict())
        return Contender(other, routed(other, workload, [names], device), dict(other.named_parameters()))

    return Contender(model, cycled(call, plans), named, expected)
