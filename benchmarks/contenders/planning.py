"""The contenders of planning: each sorts a batch of names by expert.

Peers and the oracle can't plan apart from their forward passes, so they are no contenders of ours in planning alone. A
whole pass over one column of hidden states, with experts that return it and no fusion, is the least that holds their
routing. Both libraries run that pass, and so its times hold the same: planning, moving the column, calling experts.

Axes: B samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

import celmoe
from benchmarks.contenders.contender import AUTO, LOOK_UPS, PEER, PEERS, Task, TaskMaker, load_present
from benchmarks.harness.devices import finish
from benchmarks.harness.equality import Evidence
from benchmarks.harness.steps import HOST, ROUTINGS, routings_of, turns
from benchmarks.workloads.workload import Last, Workload


def planners(workload: Workload, device: torch.device = HOST) -> dict[str, TaskMaker]:
    """The contenders by name; the look-ups are a bound: every name looked up in a dict, once a level."""
    return {AUTO: lambda: _ours(workload, device), LOOK_UPS: lambda: look_ups(workload)}


def routing_passes(workload: Workload, device: torch.device = HOST) -> dict[str, TaskMaker]:
    """Both libraries' passes over one column, by name."""
    return {
        AUTO: lambda: routing_pass(celmoe, workload, device),
        PEER: lambda: routing_pass(load_present(PEERS[PEER]), workload, device),
    }


def _ours(workload: Workload, device: torch.device) -> Task:
    compiler = celmoe.RoutingCompiler(_config(celmoe, workload))
    routings, turn = routings_of(workload), turns(ROUTINGS)

    def plan(routing: Mapping[str, Any]) -> celmoe.RoutingPlan:
        made = compiler(routing).to(device)
        finish(device)
        return made

    def evidence() -> Evidence:
        return {name: level.expert_ids.cpu() for name, level in plan(routings[0]).levels.items()}

    return Task(evidence, step=lambda: plan(routings[turn()]))


def look_ups(workload: Workload) -> Task:
    """``list(map(table.__getitem__, routes))`` for each level."""
    tables = {level: {name: index for index, name in enumerate(names)} for level, names in workload.levels().items()}
    routings, turn = routings_of(workload), turns(ROUTINGS)

    def look_up(routing: Mapping[str, Any]) -> dict[str, list[int]]:
        return {level: list(map(tables[level].__getitem__, routes)) for level, routes in routing.items()}

    def evidence() -> Evidence:
        return {level: torch.tensor(ids) for level, ids in look_up(routings[0]).items()}

    return Task(evidence, step=lambda: look_up(routings[turn()]))


def routing_pass(package: ModuleType, workload: Workload, device: torch.device = HOST) -> Task:
    """The forward pass of a package, ours or a peer's, over one column."""
    run, stamp = (_model(package, workload, stamps) for stamps in (False, True))
    column = torch.zeros(workload.batch_size, 1, device=device)
    routings, turn = routings_of(workload), turns(ROUTINGS)

    def step() -> None:
        with torch.no_grad():
            run(column, routings[turn()])
        finish(device)

    def evidence() -> Evidence:
        with torch.no_grad():
            levels = stamp(column, routings[0]).levels
        return {name: level.hidden.cpu().flatten().long() for name, level in levels.items()}

    return Task(evidence, step=step)


def _config(package: ModuleType, workload: Workload) -> celmoe.CELMoEConfig:
    levels = [
        package.HierarchyLevelConfig(level, {name: package.ExpertConfig(name) for name in names})
        for level, names in workload.levels().items()
    ]
    config: celmoe.CELMoEConfig = package.CELMoEConfig(1, levels)
    return config


def _model(package: ModuleType, workload: Workload, stamps: bool) -> nn.Module:
    """Experts that return their rows, or that fill them with their place among the level's experts."""
    places = {level: {name: place for place, name in enumerate(names)} for level, names in workload.levels().items()}

    class Stamp(package.ExpertModule):  # type: ignore[misc, name-defined]  # the package is a run-time choice
        def __init__(self, place: int) -> None:
            super().__init__()
            self.place = place

        def forward(self, batch: celmoe.ExpertBatch) -> object:
            return package.ExpertResult(torch.full_like(batch.hidden, self.place) if stamps else batch.hidden)

    def factory(level: str, name: str, _metadata: object) -> nn.Module:
        module: nn.Module = Stamp(places[level][name])
        return module

    model: nn.Module = package.HierarchicalCELMoE(_config(package, workload), factory, Last())
    return model
