"""The command: measures the grid, writes its tables and its figure, and prints the results."""

from __future__ import annotations

import sys

from benchmarks.extras import missing_extra

if __name__ == "__main__" and (missing := missing_extra("bench")):
    sys.exit(missing)

import argparse
from pathlib import Path

from rich.progress import track

from benchmarks.grid.measure import PlanTiming, StepTiming, time_planning, time_step
from benchmarks.grid.report import draw_steps, plan_line, plan_name, summary, write_plans, write_steps
from benchmarks.harness.setting import make_console, prepare
from benchmarks.workloads.bodies import LOOPED_EXPERTS
from benchmarks.workloads.points import PLANNED, looped_grid
from celmoe.engines.registry import ENGINES

# Limits on the planning of three levels of 256 experts.
MOST_BY_LOOK_UPS, LEAST_BY_PEER = 2.5, 100


def main() -> int:
    """Measure; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grid", description=__doc__)
    parser.add_argument("--engine", choices=list(ENGINES), default="looped", help="our engine")
    parser.add_argument("--experts", choices=LOOPED_EXPERTS, nargs="+", default=LOOPED_EXPERTS, help="kinds to measure")
    parser.add_argument("--most-samples", type=int, default=65_536, help="leave larger batches out")
    parser.add_argument("--seconds", type=float, default=3.0, help="about how long each workload is measured")
    parser.add_argument("--report", type=Path, default=Path("celmoe-report-grid"), help="where the results go")
    options = parser.parse_args()
    workloads = [
        each for each in looped_grid() if each.expert in options.experts and each.batch_size <= options.most_samples
    ]
    if not workloads:
        parser.error(f"'--most-samples' must be at least 16 (got {options.most_samples})")
    console = make_console()
    peer = prepare(options.report, console)
    if peer is None:
        return 1
    plans: list[PlanTiming] = []
    for planned in PLANNED:
        plans.append(time_planning(planned, peer, options.seconds))
        console.print(plan_line(plans[-1]), markup=False)
        write_plans(options.report / "plans.csv", plans)
    steps: list[StepTiming] = []
    for workload in track(workloads, "training steps", console=console):
        steps.append(time_step(workload, peer, options.engine, options.seconds))
        found = steps[-1]
        console.print(
            f"{workload!s:38} {found.ratio:6.3f} ({found.low:.3f} to {found.high:.3f}), {found.ours_ms:.2f} ms against "
            f"{found.peer_ms:.2f} ms, {found.rounds} rounds",
            markup=False,
        )
        write_steps(options.report / "steps.csv", steps)
    draw_steps(options.report / "steps.png", steps)
    console.print(summary(steps), markup=False)
    if plans[0].by_look_ups > MOST_BY_LOOK_UPS or plans[0].by_plan < LEAST_BY_PEER:
        console.print(
            f"planning {plan_name(plans[0])} must take at most {MOST_BY_LOOK_UPS} times the bare look-ups, and the "
            f"peer's routing {LEAST_BY_PEER} times as long (got {plans[0].by_look_ups:.2f}, {plans[0].by_plan:.0f})",
            markup=False,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
