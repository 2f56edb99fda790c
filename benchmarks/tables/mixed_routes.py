"""Times training steps in which some samples have several experts, or none, beside the same steps without."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

import celmoe
from benchmarks.harness.interleaved import Timings, interleave
from benchmarks.harness.one_table import REFUSED, ask
from benchmarks.harness.steps import ROUTINGS, TrainingStep, turns
from benchmarks.harness.tables import workload_columns, write_rows
from benchmarks.harness.wording import ms_words, workload_words
from benchmarks.workloads.workload import Workload

ORDINARY, MIXED = "ordinary", "mixed"
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure.

    Returns:
        0; 2 if an argument was refused.
    """
    asked = ask(
        "mixed-routes",
        __doc__,
        arguments,
        amount="seconds",
        default="10",
        meaning="about how long each line goes on",
    )
    if asked is None:
        return REFUSED
    console, report = asked.console, asked.report
    seconds = asked.amount
    table = Table(title=f"A whole step with {SHARE:.0%} of the samples mixed, beside one without")
    for heading in ("workload", "experts", f"{ORDINARY}, ms", f"{MIXED}, ms", "times as long (middle half)"):
        table.add_column(heading)
    rows = []
    for workload, is_stacked in track([(each, way) for each in WORKLOADS for way in (False, True)], console=console):
        timings = measure(workload, seconds, is_stacked=is_stacked)
        low, high = timings.quartiles(MIXED, ORDINARY)
        found = {"ratio": timings.ratio(MIXED, ORDINARY), "first_quartile": low, "third_quartile": high}
        way = "stacked" if is_stacked else "plain"
        ms = [1e3 * timings.median(name) for name in (ORDINARY, MIXED)]
        table.add_row(
            workload_words(workload), way, *map(ms_words, ms), f"{found['ratio']:.3f} ({low:.3f} to {high:.3f})"
        )
        rows.append(
            {
                **workload_columns(workload),
                "experts_are": way,
                **{f"{name}_ms": f"{each:.4f}" for name, each in zip((ORDINARY, MIXED), ms, strict=True)},
                **{name: f"{value:.3f}" for name, value in found.items()},
                "rounds": timings.rounds,
            }
        )
        write_rows(report / "mixed_routes.csv", rows)
    console.print(table)
    return 0
