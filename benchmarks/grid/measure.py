"""What is timed: training steps of both libraries on one workload, and the planning of a large batch.

Axes: B samples, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import torch

import celmoe
from benchmarks.contenders.contender import AUTO, LOOK_UPS
from benchmarks.contenders.planning import look_ups, peer_routing, planners
from benchmarks.interleaved import Timings, interleave
from benchmarks.steps import ROUTINGS, TrainingStep, nudge, string_routed, turns
from benchmarks.workloads import Workload

OURS, PEER, BARE = "celmoe", "celmoe-vp", "bare loop"
PLAN, PEER_ROUTING = "plan", "routing of celmoe-vp"


@dataclass(frozen=True)
class StepTiming:
    """One workload's line.

    Attributes:
        workload: What was run.
        ours_ms: Median milliseconds of our step.
        peer_ms: The same of the peer's.
        bare_ms: The same of the experts and the fusion alone.
        ratio: Median of the peer's step by ours within a round; above 1 ours is faster.
        low: First quartile of that.
        high: Third quartile.
        bound: Median of the peer's step by the bare one: what an engine would reach that loops over the experts, and
            routes and moves rows in no time at all.
        rounds: Rounds measured.
    """

    workload: Workload
    ours_ms: float
    peer_ms: float
    bare_ms: float
    ratio: float
    low: float
    high: float
    bound: float
    rounds: int


@dataclass(frozen=True)
class PlanTiming:
    """What planning one batch takes.

    Attributes:
        experts: Experts of each level.
        plan_ms: Median milliseconds of our compiler.
        look_ups_ms: Of ``list(map(table.__getitem__, routes))`` for each level.
        peer_ms: Of the peer's forward pass with experts that do nothing to one column.
        by_look_ups: Median ratio of our planning to the look-ups.
        by_peer: Median ratio of the peer's routing to our planning.
    """

    experts: tuple[int, ...]
    plan_ms: float
    look_ups_ms: float
    peer_ms: float
    by_look_ups: float
    by_peer: float


def time_step(workload: Workload, peer: ModuleType, engine: str, seconds: float) -> StepTiming:
    """Forward with string routing, a loss, backward and the clearing of gradients, in both libraries."""
    ours = cast(celmoe.HierarchicalCELMoE, workload.build(celmoe, engine=engine))
    models = {OURS: ours, PEER: workload.build(peer)}
    steps: dict[str, Callable[[], None]] = {
        name: TrainingStep(string_routed(model, workload), model.parameters(), workload)
        for name, model in models.items()
    }
    steps[BARE] = _bare_step(ours, workload)
    timings = interleave(steps, seconds, nudge(models.values()))
    low, high = timings.quartiles(PEER, OURS)
    return StepTiming(
        workload,
        _ms(timings, OURS),
        _ms(timings, PEER),
        _ms(timings, BARE),
        timings.ratio(PEER, OURS),
        low,
        high,
        timings.ratio(PEER, BARE),
        timings.rounds,
    )


def time_planning(workload: Workload, peer: ModuleType, seconds: float) -> PlanTiming:
    """Planning of a batch of names, against bare look-ups and against the peer's routing.

    The peer routes within its forward pass: see `contenders.planning`.
    """
    steps = {
        PLAN: planners(workload)[AUTO]().step,
        LOOK_UPS: look_ups(workload).step,
        PEER_ROUTING: peer_routing(peer, workload).step,
    }
    timings = interleave(steps, seconds)
    return PlanTiming(
        tuple(len(names) for names in workload.levels().values()),
        _ms(timings, PLAN),
        _ms(timings, LOOK_UPS),
        _ms(timings, PEER_ROUTING),
        timings.ratio(PLAN, LOOK_UPS),
        timings.ratio(PEER_ROUTING, PLAN),
    )


def _bare_step(model: celmoe.HierarchicalCELMoE, workload: Workload) -> Callable[[], None]:
    """As many rows for each expert, but cut where they stand: nothing is routed, gathered, copied or checked."""
    plans = [model.compile_routing(workload.routing(seed)) for seed in range(ROUTINGS)]
    turn = turns(len(plans))

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        level_hiddens = []
        for level in plans[turn()].levels.values():
            experts = [model.level_modules[level.name][name] for name in level.present]  # type: ignore[index]  # nested mappings
            blocks = hidden.split(list(level.counts))
            results = [expert(celmoe.ExpertBatch(block)) for expert, block in zip(experts, blocks, strict=True)]
            hidden = torch.cat([result.hidden for result in results])
            level_hiddens.append(hidden)
        fused: torch.Tensor = model.fusion(level_hiddens)
        return fused

    return TrainingStep(forward, model.parameters(), workload)


def _ms(timings: Timings, name: str) -> float:
    return 1e3 * timings.median(name)
