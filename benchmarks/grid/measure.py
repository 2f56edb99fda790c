"""What is timed: training steps of both libraries on one workload, and the planning of a large batch.

Axes: B samples, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import ModuleType
from typing import cast

import torch
from torch import nn

import celmoe
from benchmarks.contenders.contender import AUTO, LOOK_UPS, Contender, claim_of
from benchmarks.contenders.planning import look_ups, planners, routing_pass
from benchmarks.harness.equality import require_all_equal, training_evidence
from benchmarks.harness.interleaved import Timings, interleave
from benchmarks.harness.steps import Routes, TrainingStep, cycled, nudge, routed, routings_of, string_routed
from benchmarks.workloads.workload import Workload

OURS, PEER, BARE = "celmoe", "celmoe-vp", "bare loop"
PLAN, OUR_ROUTING, PEER_ROUTING = "plan", "routing of celmoe", "routing of celmoe-vp"


@dataclass(frozen=True)
class StepTiming:
    """One workload's line.

    Attributes:
        workload: The workload that was run.
        ours_ms: Median milliseconds of our step.
        peer_ms: The same of the peer's.
        bare_ms: The same of the experts and the fusion alone.
        ratio: Median of the peer's step by ours within a round; above 1 ours is faster.
        low: First quartile of the ratio.
        high: Third quartile.
        bound: Median of the peer's step by the bare one. The bound is the speed of an engine that loops over the
                experts, and routes and moves rows in no time.
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
    """The times of planning one batch.

    Attributes:
        experts: Experts of each level.
        plan_ms: Median milliseconds of our compiler.
        look_ups_ms: Median milliseconds of ``list(map(table.__getitem__, routes))`` for each level.
        ours_ms: The same of our looped pass over one column with experts that return it: planning, moving and calls.
        peer_ms: The same of the peer's pass.
        by_look_ups: Median ratio of our planning to the look-ups.
        by_plan: Median ratio of the peer's pass, which is the least that holds its routing, to our planning.
        by_pass: Median ratio of the peer's pass to ours.
    """

    experts: tuple[int, ...]
    plan_ms: float
    look_ups_ms: float
    ours_ms: float
    peer_ms: float
    by_look_ups: float
    by_plan: float
    by_pass: float


def time_step(workload: Workload, peer: ModuleType, engine: str, seconds: float) -> StepTiming:
    """Forward with string routing, a loss, backward and the clearing of gradients, in both libraries.

    Raises:
        UnequalError: A contender computes something else than it must; checked before anything is timed.
    """
    ours = cast(celmoe.HierarchicalCELMoE, workload.build(celmoe, engine=engine))
    theirs = workload.build(peer)
    contenders = {OURS: _named(ours, workload), PEER: _named(theirs, workload), BARE: _bare(ours, workload)}
    steps = {name: TrainingStep(each.forward, each.module.parameters(), workload) for name, each in contenders.items()}
    move_weights = nudge([ours, theirs])
    for step in steps.values():
        step()
    # The second call must not use results that the first call kept.
    move_weights()
    gather = partial(training_evidence, workload=workload)
    require_all_equal({name: claim_of(each, gather) for name, each in contenders.items()}, OURS)
    timings = interleave(steps, seconds, move_weights)
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
    """Planning of a batch of names, against bare look-ups; and both libraries' passes: see `contenders.planning`.

    Raises:
        UnequalError: A contender routes a sample elsewhere; checked before anything is timed.
    """
    tasks = {
        PLAN: planners(workload)[AUTO](),
        LOOK_UPS: look_ups(workload),
        OUR_ROUTING: routing_pass(celmoe, workload),
        PEER_ROUTING: routing_pass(peer, workload),
    }
    require_all_equal(tasks, PLAN)
    timings = interleave({name: task.step for name, task in tasks.items()}, seconds)
    return PlanTiming(
        tuple(len(names) for names in workload.levels().values()),
        _ms(timings, PLAN),
        _ms(timings, LOOK_UPS),
        _ms(timings, OUR_ROUTING),
        _ms(timings, PEER_ROUTING),
        timings.ratio(PLAN, LOOK_UPS),
        timings.ratio(PEER_ROUTING, PLAN),
        timings.ratio(PEER_ROUTING, OUR_ROUTING),
    )


def _named(model: nn.Module, workload: Workload) -> Contender:
    return Contender(model, string_routed(model, workload), dict(model.named_parameters()))


def _bare(model: celmoe.HierarchicalCELMoE, workload: Workload) -> Contender:
    """As many rows for each expert, but cut in place: nothing is routed, gathered, copied or checked.

    It must equal the model given a batch whose samples stand in the order of each level's experts.
    """
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
        return Contender(model, routed(model, workload, [names]), named)

    return Contender(model, cycled(call, plans), named, expected)


def _repeated(name: str, count: int) -> list[str]:
    return [name] * count


def _ms(timings: Timings, name: str) -> float:
    return 1e3 * timings.median(name)
