"""One workload's contenders: checked to be equal, then timed in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import cast

from torch import nn

import celmoe
from benchmarks.contenders.dense import Dense
from benchmarks.contenders.stack import STACKED, fastest_stack
from benchmarks.equality import Evidence, inference_evidence, require_equal, training_evidence
from benchmarks.interleaved import Timings, interleave
from benchmarks.steps import Forward, TrainingStep, inference_step, nudge, routings_of, string_routed
from benchmarks.workloads import Workload

OURS, PEER, DENSE, STACK = "celmoe", "celmoe-vp", "dense", "stack"
TRAINING, INFERENCE = "training step", "forward in inference mode"
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


@dataclass(frozen=True)
class _Contender:
    model: nn.Module
    forward: Forward


def rivals_of(workload: Workload) -> list[str]:
    """All that the workload's training step can be timed against."""
    return [PEER, DENSE, *([STACK] if workload.expert in STACKED else [])]


def compare(
    workload: Workload,
    peer: ModuleType,
    engine: str,
    seconds: float,
    rivals: Collection[str] = (PEER,),
    measures: Collection[str] = (TRAINING,),
) -> list[Compared]:
    """Time our model against rivals, training first.

    Args:
        workload: What to run.
        peer: The peer's package.
        engine: Our engine.
        seconds: About how long each measure goes on.
        rivals: The contenders beside ours. In inference the peer alone is one.
        measures: What to time.

    Raises:
        UnequalError: The peer or the stack computes something else; checked before anything is timed.
        TooLongError: A step of a contender takes more than `LONGEST_STEP`.
    """
    contenders = _make_contenders(workload, peer, engine, rivals)
    move_weights = nudge(each.model for each in contenders.values())
    steps = {name: TrainingStep(each.forward, each.model.parameters(), workload) for name, each in contenders.items()}
    for name, step in steps.items():
        started = time.perf_counter()
        step()
        if (took := time.perf_counter() - started) > LONGEST_STEP:
            raise TooLongError(f"a step of {name} takes {took:.0f} s")
    # What a first call kept, the second must not use.
    move_weights()
    _check(contenders, lambda name, each: training_evidence(each.forward, _named_parameters(name, each), workload))
    found: list[Compared] = []
    if TRAINING in measures:
        found += _compared(workload, TRAINING, interleave(steps, seconds, move_weights), rivals)
    if INFERENCE in measures:
        both = {name: contenders[name] for name in (OURS, PEER)}
        for each in both.values():
            each.model.eval()
        _check(both, lambda _, each: inference_evidence(each.forward, workload))
        passes = {name: inference_step(each.forward, workload) for name, each in both.items()}
        found += _compared(workload, INFERENCE, interleave(passes, seconds, move_weights), (PEER,))
    return found


def _make_contenders(
    workload: Workload, peer: ModuleType, engine: str, rivals: Collection[str]
) -> dict[str, _Contender]:
    # Models hold themselves in cycles, and the last workload's may be large.
    gc.collect()
    ours = cast(celmoe.HierarchicalCELMoE, workload.build(celmoe, engine=engine))
    contenders = {OURS: _Contender(ours, string_routed(ours, workload))}
    if PEER in rivals:
        theirs = workload.build(peer)
        contenders[PEER] = _Contender(theirs, string_routed(theirs, workload))
    if DENSE in rivals:
        dense = Dense(workload)
        contenders[DENSE] = _Contender(dense, dense.unrouted(workload))
    if STACK in rivals:
        stack = fastest_stack(ours, workload)
        contenders[STACK] = _Contender(stack, stack.routed(routings_of(workload)))
    return contenders


def _named_parameters(name: str, contender: _Contender) -> Mapping[str, nn.Parameter]:
    # The stack's have other names and shapes; its tests compare them, and here its output and input gradient do.
    return {} if name == STACK else dict(contender.model.named_parameters())


def _check(contenders: Mapping[str, _Contender], gather: Callable[[str, _Contender], Evidence]) -> None:
    evidence = {name: gather(name, each) for name, each in contenders.items() if name != DENSE}
    for name, theirs in evidence.items():
        if name == PEER:
            assert theirs.keys() == evidence[OURS].keys()
        require_equal(evidence[OURS], theirs)


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
