"""Times training steps in which some samples have several experts, or none, beside the same steps without."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

import celmoe
from benchmarks.harness.interleaved import Timings, interleave
from benchmarks.harness.one_table import Lines, amount, ask, ratio_words, refusing
from benchmarks.harness.steps import ROUTINGS, TrainingStep, turns
from benchmarks.harness.tables import ratio_columns, workload_columns
from benchmarks.harness.wording import ms_words, workload_words
from benchmarks.workloads.workload import Workload

ORDINARY, MIXED = "ordinary", "mixed"
PLAIN, STACKED = "plain", "stacked"
# Of the samples: two thirds of these have two experts at the family level and below, one third has none.
SHARE = 0.05
WEIGHTS = (0.7, 0.3)
WORKLOADS = (
    Workload("linear", 64, 512, 256),
    Workload("linear", 64, 4096, 256),
    Workload("mlp", 64, 4096, 256),
    Workload("mlp", 128, 4096, 128),
    Workload("block", 64, 64, 32),
)
SECONDS = amount("seconds", "10", "about how long each line goes on")


def mixed(routing: Mapping[str, Sequence[str]], share: float, seed: int) -> dict[str, Sequence[Any]]:
    """The routing, of which a share of the samples have two experts or none at every level but the first."""
    draw = random.Random(seed)
    size = len(next(iter(routing.values())))
    odd = draw.sample(range(size), round(share * size))
    found: dict[str, Sequence[Any]] = {}
    for place, (level, names) in enumerate(routing.items()):
        routes: list[Any] = list(names)
        for count, sample in enumerate(odd if place else ()):
            other = names[odd[count - 1]]
            both = {names[sample]: WEIGHTS[0], other: WEIGHTS[1]} if other != names[sample] else names[sample]
            routes[sample] = None if count % 3 == 0 else both
        found[level] = routes
    return found


def measure(workload: Workload, seconds: float, *, is_stacked: bool) -> Timings:
    """Time whole steps from names, with ordinary and with mixed routes, in turn.

    One model takes both: two models lie in memory differently, which moves a step's time by up to a fifth.
    """
    model = workload.build(celmoe)
    if is_stacked:
        assert isinstance(model, celmoe.HierarchicalCELMoE)
        celmoe.stack_experts(model)
    ordinary = [workload.routing(seed) for seed in range(ROUTINGS)]
    routings: dict[str, Sequence[Any]] = {
        ORDINARY: ordinary,
        MIXED: [mixed(each, SHARE, seed) for seed, each in enumerate(ordinary)],
    }
    taken = [ORDINARY]
    turn = turns(ROUTINGS)

    def call(hidden: torch.Tensor) -> torch.Tensor:
        fused: torch.Tensor = model(hidden, routings[taken[0]][turn()]).fused_hidden
        return fused

    step = TrainingStep(call, model.parameters(), workload, rate=1e-3)

    def take(name: str) -> None:
        taken[0] = name
        step()

    return interleave({name: partial(take, name) for name in routings}, seconds)


@refusing
def main(arguments: Sequence[str]) -> int:
    """Measure; returns the exit code."""
    asked = ask("mixed-routes", __doc__, arguments, SECONDS)
    asked.start()
    title = f"A whole step with {SHARE:.0%} of the samples mixed, beside one without"
    headings = ("workload", "experts", f"{ORDINARY}, ms", f"{MIXED}, ms", "times as long (middle half)")
    lines = Lines(asked, "mixed_routes", title, headings)
    for workload, way in lines.over([(each, way) for each in WORKLOADS for way in (PLAIN, STACKED)]):
        timings = measure(workload, asked[SECONDS], is_stacked=way == STACKED)
        ms = {name: 1e3 * timings.median(name) for name in (ORDINARY, MIXED)}
        ratio = ratio_columns(timings, MIXED, ORDINARY)
        columns = {**workload_columns(workload), "experts_are": way}
        columns |= {f"{name}_ms": f"{each:.4f}" for name, each in ms.items()}
        cells = workload_words(workload), way, *map(ms_words, ms.values()), ratio_words(ratio)
        lines.add({**columns, **ratio, "rounds": timings.rounds}, *cells)
    return 0
