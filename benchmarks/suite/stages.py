"""The stages of a pass that are timed apart, and who is timed in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from benchmarks.contenders.contender import (
    OURS,
    PEFT,
    AbsentError,
    Contender,
    Maker,
    Task,
    TaskMaker,
    Terms,
    claim_of,
    nothing,
)
from benchmarks.contenders.models import MODELS
from benchmarks.contenders.moving import MOVERS
from benchmarks.contenders.planning import planners, routing_passes
from benchmarks.contenders.products import PRODUCTS
from benchmarks.harness.devices import CPU, finish
from benchmarks.harness.equality import Evidence, Weights, inference_evidence, training_evidence
from benchmarks.harness.steps import BackwardPass, Forward, ForwardPass, Passes, TrainingStep, inference_step, nudge
from benchmarks.workloads.bodies import PRODUCT
from benchmarks.workloads.workload import Workload

PLAN, ROUTING, DISPATCH, EXPERTS = "plan", "routing", "dispatch", "experts"
WHOLE_STEP, FORWARD, BACKWARD = "whole_step", "forward", "backward"
INFERENCE, MEMORY = "inference", "memory"
STAGES = (PLAN, ROUTING, DISPATCH, EXPERTS, WHOLE_STEP, FORWARD, BACKWARD, INFERENCE, MEMORY)


def tasks_of(stage: str, workload: Workload, device: torch.device) -> Mapping[str, TaskMaker]:
    """The contenders of a stage by name."""
    if stage == PLAN:
        return planners(workload, device)
    if stage == ROUTING:
        return routing_passes(workload, device)
    terms = Terms(workload, device, is_training=stage != INFERENCE)
    makers: Mapping[str, Maker] = {name: make for name, make in MODELS.items() if stage == INFERENCE or name != PEFT}
    if stage == DISPATCH:
        makers = MOVERS
    elif stage == EXPERTS and workload.expert == PRODUCT:
        makers = PRODUCTS
    return {name: partial(_task, stage, name, make, terms) for name, make in makers.items()}


def _task(stage: str, name: str, make: Maker, terms: Terms) -> Task:
    if terms.device.type == CPU:
        return _made(stage, make, terms)
    try:
        task = _made(stage, make, terms)
        task.step()
    except RuntimeError as error:
        if name in OURS or isinstance(error, AbsentError):
            raise
        # On accelerators other ways to run experts may lack a kernel, and say so in many lines.
        raise AbsentError(f"it fails on {terms.device.type}: {str(error).splitlines()[0]}") from None
    return task


def _made(stage: str, make: Maker, terms: Terms) -> Task:
    contender = make(terms)
    step, move_weights = _step(stage, contender, terms), nudge([contender.module])

    def step_to_its_end() -> None:
        step()
        finish(terms.device)

    def between() -> None:
        move_weights()
        if isinstance(step, Passes):
            step.prepare()
        finish(terms.device)

    weights = sum(each.nbytes for each in contender.module.parameters())
    claim = claim_of(contender, partial(_evidence, terms))
    clear = step.clear if isinstance(step, Passes) else nothing
    return Task(
        claim.evidence, claim.expected, step=step_to_its_end, between=between, weight_bytes=weights, clear=clear
    )


def _step(stage: str, contender: Contender, terms: Terms) -> Callable[[], None]:
    if stage == INFERENCE:
        return inference_step(contender.forward, terms.workload, terms.device)
    given = contender.forward, contender.module.parameters(), terms.workload, terms.device
    kinds: dict[str, type[Passes]] = {WHOLE_STEP: TrainingStep, FORWARD: ForwardPass, BACKWARD: BackwardPass}
    return kinds.get(stage, Passes)(*given)


def _evidence(terms: Terms, forward: Forward, weights: Weights) -> Evidence:
    if not terms.is_training:
        return inference_evidence(forward, terms.workload, terms.device)
    return training_evidence(forward, weights, terms.workload, terms.device)
