"""What takes part in a contest, and under which terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import nn

from benchmarks.equality import Evidence
from benchmarks.steps import Forward
from benchmarks.workloads import Workload

AUTO, GROUPED, LOOPED = "celmoe auto", "celmoe grouped", "celmoe looped"
OURS = (AUTO, GROUPED, LOOPED)
PEERS = {f"celmoe-vp {version}": version for version in ("1.1.4", "3.0.0")}
ORACLE, DENSE, STACK, VMAP = "oracle", "dense", "stack", "vmap"
TRANSFORMERS, PEFT, LOOK_UPS = "transformers", "peft", "look-ups"
# They compute something else: bounds to measure by.
FLOORS = (DENSE, LOOK_UPS)


class AbsentError(RuntimeError):
    """A contender takes no part, for the reason given; where it can be had, with how to get it."""


@dataclass(frozen=True)
class Terms:
    """What all contenders of one contest are given.

    Attributes:
        workload: What to run.
        device: Where.
        is_planned: Whether routes are compiled beforehand, by those who can.
        is_training: Whether gradients are wanted.
    """

    workload: Workload
    device: torch.device
    is_planned: bool = False
    is_training: bool = True


@dataclass(frozen=True)
class Contender:
    """A way to compute the workload.

    Attributes:
        module: Its weights, on the terms' device.
        forward: Its forward pass.
        parameters: Those of its parameters that have the names of ours.
    """

    module: nn.Module
    forward: Forward
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)


def nothing() -> None:
    """What there is to do between steps that keep nothing."""


@dataclass(frozen=True)
class Task:
    """A contender's step, and the proof that it does what the others do.

    Attributes:
        step: What is timed; when it returns, the device is done.
        between: Run before every timed step, unseen by the clock.
        evidence: What it computes.
        weight_bytes: Bytes of its weights.
        clear: Lets go of all that a step leaves, so that the next one's memory is its own.
    """

    step: Callable[[], object]
    between: Callable[[], object]
    evidence: Callable[[], Evidence]
    weight_bytes: int = 0
    clear: Callable[[], object] = nothing


# Raises `AbsentError`.
Maker: TypeAlias = Callable[[Terms], Contender]
TaskMaker: TypeAlias = Callable[[], Task]
