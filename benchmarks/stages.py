"""The stages of a pass that are timed apart, and who is timed in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from benchmarks.bodies import PRODUCT
from benchmarks.contenders.contender import OURS, PEFT, AbsentError, Maker, Task, TaskMaker, Terms, claim_of, nothing
from benchmarks.contenders.models import MODELS
from benchmarks.contenders.moving import MOVERS
from benchmarks.contenders.planning import planners
from benchmarks.contenders.products import PRODUCTS
from benchmarks.devices import CPU, finish
from benchmarks.equality import Evidence, Weights, inference_evidence, training_evidence
from benchmarks.steps import Forward, TrainingStep, inference_step, nudge
from benchmarks.workloads import Workload

PLAN, DISPATCH, EXPERTS = "plan", "dispatch", "experts"
TRAINING_STEP, INFERENCE, MEMORY = "training_step", "inference", "memory"
STAGES = (PLAN, DISPATCH, EXPERTS, TRAINING_STEP, INFERENCE, MEMORY)


def tasks_of(stage: str, workload: Workload, device: torch.device) -> Mapping[str, TaskMaker]:
    """The contenders of a stage by name."""
    if stage == PLAN:
        return planners(workload, device)
    terms = Terms(workload, device, is_training=stage != INFERENCE)
    makers: Mapping[str, Maker] = {name: make for name, make in MODELS.items() if stage == INFERENCE or name != PEFT}
    if stage == DISPATCH:
        makers = MOVERS
    elif stage == EXPERTS and workload.expert == PRODUCT:
        makers = PRODUCTS
    return {name: partial(_task, name, make, terms) for name, make in makers.items()}


def _task(name: str, make: Maker, terms: Terms) -> Task:
    if terms.device.type == CPU:
        return _made(make, terms)
    try:
        task = _made(make, terms)
        task.step()
    except RuntimeError as error:
        if name in OURS or isinstance(error, AbsentError):
            raise
        # On accelerators other ways to run experts may lack a kernel, and say so in many lines.
        raise AbsentError(f"it fails on {terms.device.type}: {str(error).splitlines()[0]}") from None
    return task


def _made(make: Maker, terms: Terms) -> Task:
    contender = make(terms)
    workload, device = terms.workload, terms.device
    step: Callable[[], None]
    clear: Callable[[], None] = nothing
    if terms.is_training:
        step = training = TrainingStep(contender.forward, contender.module.parameters(), workload, device)
        clear = training.clear
    else:
        step = inference_step(contender.forward, workload, device)

    def step_to_its_end() -> None:
        step()
        finish(device)

    weights = sum(each.nbytes for each in contender.module.parameters())
    claim = claim_of(contender, partial(_evidence, terms))
    return Task(step_to_its_end, nudge([contender.module]), claim.evidence, claim.expected, weights, clear)


def _evidence(terms: Terms, forward: Forward, weights: Weights) -> Evidence:
    if not terms.is_training:
        return inference_evidence(forward, terms.workload, terms.device)
    return training_evidence(forward, weights, terms.workload, terms.device)
