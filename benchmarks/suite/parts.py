"""The time of a whole step, by part.

Each part is timed on its own, in turn with the others; the experts' time is the rest of a forward pass. Nothing is
hooked into the model, since an engine may run hooked experts another way.
"""

from __future__ import annotations

from typing import cast

import celmoe
from benchmarks.harness.interleaved import interleave
from benchmarks.harness.steps import ROUTINGS, Passes, TrainingStep, nudge, string_routed, turns
from benchmarks.workloads.workload import Workload

PLANNING, MOVING, EXPERTS_RUN, FUSION, BACKWARD = "planning", "moving rows", "experts", "fusion", "backward"
OPTIMIZER = "clip and step"
_FORWARD, _PASSES, _STEP = "forward", "passes", "step"


def time_parts(workload: Workload, engine: str, seconds: float) -> dict[str, float]:
    """Time the parts of our step for about so many seconds in all.

    Returns:
        Milliseconds. `PLANNING`: names to plans. `MOVING`: two gathers for each level whose rows are not in order yet,
        forward. `EXPERTS_RUN`: the rest of the forward pass, checks and bookkeeping included. `FUSION`: forward.
        `BACKWARD`: of all, with the clearing of gradients. `OPTIMIZER`: clipping of gradients, and AdamW.
    """
    model = cast(celmoe.HierarchicalCELMoE, workload.build(celmoe, engine=engine))
    routings = [workload.routing(seed) for seed in range(ROUTINGS)]
    plans = [model.compile_routing(routing) for routing in routings]
    planned, moved = turns(ROUTINGS), turns(ROUTINGS)
    hidden = workload.hidden().requires_grad_()
    level_hiddens = [workload.hidden(seed).requires_grad_() for seed in range(len(model.levels))]
    forward = string_routed(model, workload)

    def move() -> None:
        for level in plans[moved()].levels.values():
            if not level.is_sorted:
                hidden.index_select(0, level.order).index_select(0, level.inverse)

    timings = interleave(
        {
            _STEP: TrainingStep(string_routed(model, workload), model.parameters(), workload),
            _PASSES: Passes(string_routed(model, workload), model.parameters(), workload),
            _FORWARD: lambda: forward(hidden),
            PLANNING: lambda: model.compile_routing(routings[planned()]),
            MOVING: move,
            FUSION: lambda: model.fusion(level_hiddens),
        },
        seconds,
        nudge([model]),
    )
    ms = {name: 1e3 * timings.median(name) for name in timings.seconds}
    rest = ms[_FORWARD] - ms[PLANNING] - ms[MOVING] - ms[FUSION]
    return {
        **{name: ms[name] for name in (PLANNING, MOVING)},
        EXPERTS_RUN: max(rest, 0.0),
        FUSION: ms[FUSION],
        BACKWARD: max(ms[_PASSES] - ms[_FORWARD], 0.0),
        OPTIMIZER: max(ms[_STEP] - ms[_PASSES], 0.0),
    }
