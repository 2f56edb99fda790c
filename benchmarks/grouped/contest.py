"""One workload's contenders: checked to be equal, then timed in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import cast

import celmoe
from benchmarks.contenders.contender import Contender, claim_of
from benchmarks.contenders.models import stacked_weights
from benchmarks.contenders.stack import fastest_stack
from benchmarks.harness.equality import Claimed, Weights, inference_evidence, require_all_equal, training_evidence
from benchmarks.harness.interleaved import Timings, interleave
from benchmarks.harness.steps import TrainingStep, inference_step, nudge, routings_of, string_routed
from benchmarks.workloads.workload import Workload

OURS, PEER, STACK = "celmoe", "celmoe-vp", "stack"
TRAINING, INFERENCE = "whole step", "forward in inference mode"
# A contender's step may take no longer, in seconds.
LONGEST_STEP = 20.0


class TooLongError(RuntimeError):
    """A contender's step takes too long to be measured."""


@dataclass(frozen=True)
class Compared:
    """Our time beside another contender's.

    Attributes:
        workload: What was run.
        measure: `TRAINING` or `INFERENCE`.
        against: The other contender.
        ours_ms: Median milliseconds of our step.
        other_ms: The same of the other's.
        ratio: Median of the other's by ours within a round; above 1 ours is faster.
        low: First quartile of that.
        high: Third quartile.
        rounds: Rounds measured.
    """

    workload: Workload
    measure: str
    against: str
    ours_ms: float
    other_ms: float
    ratio: float
    low: float
    high: float
    rounds: int


def compare(
    workload: Workload,
    peer: ModuleType,
    engine: str,
    seconds: float,
    rivals: Collection[str] = (PEER,),
    measures: Collection[str] = (TRAINING,),
    *,
    is_stacked: bool = False,
) -> list[Compared]:
    """Time our model against rivals, training first.

    Args:
        workload: What to run.
        peer: The peer's package.
        engine: Our engine.
        seconds: About how long each measure goes on.
        rivals: The contenders beside ours. In inference the peer alone is one.
        measures: The passes to time.
        is_stacked: True if our experts are stacked.

    Raises:
        UnequalError: A contender's evidence differs from the expected one; checked before anything is timed.
        TooLongError: A step of a contender takes more than `LONGEST_STEP`.
    """
    contenders = _make_contenders(workload, peer, engine, rivals, is_stacked=is_stacked)
    move_weights = nudge(each.module for each in contenders.values())
    steps = {name: TrainingStep(each.forward, each.module.parameters(), workload) for name, each in contenders.items()}
    for name, step in steps.items():
        started = time.perf_counter()
        step()
        if (took := time.perf_counter() - started) > LONGEST_STEP:
            raise TooLongError(f"a step of {name} takes {took:.0f} s")
    # The second call must not use results that the first call kept.
    move_weights()
    gather = partial(training_evidence, workload=workload)
    require_all_equal({name: claim_of(each, gather) for name, each in contenders.items()}, OURS)
    found: list[Compared] = []
    if TRAINING in measures:
        found += _compared(workload, TRAINING, interleave(steps, seconds, move_weights), rivals)
    if INFERENCE in measures:
        both = {name: contenders[name] for name in (OURS, PEER)}
        for each in both.values():
            each.module.eval()
        claims = {name: Claimed(partial(inference_evidence, each.forward, workload)) for name, each in both.items()}
        require_all_equal(claims, OURS)
        passes = {name: inference_step(each.forward, workload) for name, each in both.items()}
        found += _compared(workload, INFERENCE, interleave(passes, seconds, move_weights), (PEER,))
    return found


def _make_contenders(
    workload: Workload, peer: ModuleType, engine: str, rivals: Collection[str], *, is_stacked: bool
) -> dict[str, Contender]:
    # Models hold themselves in cycles, and the last workload's may be large.
    gc.collect()
    ours = cast(celmoe.HierarchicalCELMoE, workload.build(celmoe, engine=engine))
    contenders = {}
    if STACK in rivals:
        stack = fastest_stack(ours, workload)
        contenders[STACK] = Contender(stack, stack.routed(routings_of(workload)), stack.weights_of(ours))
    weights: Weights = dict(ours.named_parameters())
    if is_stacked:
        weights = stacked_weights(ours, celmoe.stack_experts(ours))
    contenders[OURS] = Contender(ours, string_routed(ours, workload), weights)
    if PEER in rivals:
        theirs = workload.build(peer)
        contenders[PEER] = Contender(theirs, string_routed(theirs, workload), dict(theirs.named_parameters()))
    return contenders


def _compared(workload: Workload, measure: str, timings: Timings, rivals: Collection[str]) -> Sequence[Compared]:
    return [
        Compared(
            workload,
            measure,
            rival,
            1e3 * timings.median(OURS),
            1e3 * timings.median(rival),
            timings.ratio(rival, OURS),
            *timings.quartiles(rival, OURS),
            timings.rounds,
        )
        for rival in rivals
    ]
