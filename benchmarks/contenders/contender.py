"""What takes part in a contest, and under which terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import nn

from benchmarks.equality import Claimed, Evidence, Weights
from benchmarks.steps import Forward
from benchmarks.workloads import Workload

AUTO, STACKED = "celmoe auto", "celmoe stacked"
GROUPED, LOOPED = "celmoe grouped", "celmoe looped"
OURS = (AUTO, STACKED, GROUPED, LOOPED)
PEERS = {f"celmoe-vp {version}": version for version in ("1.1.4", "3.0.0")}
ORACLE, DENSE, STACK, VMAP = "oracle", "dense", "stack", "vmap"
TRANSFORMERS, PEFT, LOOK_UPS = "transformers", "peft", "look-ups"
# Bounds to measure by: they do less than ours.
FLOORS = (DENSE, LOOK_UPS)


class AbsentError(RuntimeError):
    """A contender takes no part, for the reason given; where it can be had, with how to get it."""


@dataclass(frozen=True)
class Terms:
    """What all contenders of one contest are given.

    Attributes:
        workload: What to run.
        device: Where.
        is_training: Whether gradients are wanted.
    """

    workload: Workload
    device: torch.device
    is_training: bool = True


@dataclass(frozen=True)
class Contender:
    """A way to compute the workload.

    Attributes:
        module: Its weights, on the terms' device.
        forward: Its forward pass.
        weights: By our names, its parameters, or the parts of them that stand for one of ours: all that ours has.
        expected: Makes the contender that this one must equal; ``None`` where that is ours.
    """

    module: nn.Module
    forward: Forward
    weights: Weights = field(default_factory=dict)
    expected: Callable[[], Contender] | None = None


def claim_of(contender: Contender, gather: Callable[[Forward, Weights], Evidence]) -> Claimed:
    """What a contender computes, and what it must compute where that is not what ours does; both gathered alike."""
    make = contender.expected

    def expected() -> Evidence:
        assert make is not None
        other = make()
        return gather(other.forward, other.weights)

    return Claimed(lambda: gather(contender.forward, contender.weights), None if make is None else expected)


def nothing() -> None:
    """What there is to do between steps that keep nothing."""


@dataclass(frozen=True)
class Task:
    """A contender's step, and the claim that it computes what the others do.

    Attributes:
        step: What is timed; when it returns, the device is done.
        between: Run before every timed step, unseen by the clock.
        evidence: What it computes.
        expected: What it must compute; ``None`` where that is what ours computes.
        weight_bytes: Bytes of its weights.
        clear: Lets go of all that a step leaves, so that the next one's memory is its own.
    """

    step: Callable[[], object]
    between: Callable[[], object]
    evidence: Callable[[], Evidence]
    expected: Callable[[], Evidence] | None = None
    weight_bytes: int = 0
    clear: Callable[[], object] = nothing


# Raises `AbsentError`.
Maker: TypeAlias = Callable[[Terms], Contender]
TaskMaker: TypeAlias = Callable[[], Task]
