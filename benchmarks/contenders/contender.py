"""The contenders of a contest, and their terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TypeAlias, cast

import torch
from torch import nn

import celmoe
from benchmarks.harness.equality import Claimed, Evidence, Weights
from benchmarks.harness.peers import PeerUnavailableError, load_peer
from benchmarks.harness.steps import Forward, routed, routings_of
from benchmarks.workloads.workload import Workload

AUTO, STACKED = "celmoe auto", "celmoe stacked"
GROUPED, LOOPED = "celmoe grouped", "celmoe looped"
OURS = (AUTO, STACKED, GROUPED, LOOPED)
PEERS = {f"celmoe-vp {version}": version for version in ("1.1.4", "3.0.0")}
ORACLE, DENSE, BARE, STACK, VMAP = "oracle", "dense", "bare loop", "stack", "vmap"
TRANSFORMERS, PEFT, LOOK_UPS = "transformers", "peft", "look-ups"
# Bounds to measure by: they do less than ours.
FLOORS = (DENSE, BARE, LOOK_UPS)


PEER, LATER_PEER = PEERS


class AbsentError(RuntimeError):
    """A contender takes no part, for the reason given; the message says how to get it, if one can."""


def load_present(version: str) -> ModuleType:
    """A version of celmoe-vp.

    Raises:
        AbsentError: It can't be had, and why.
    """
    try:
        return load_peer(version)
    except PeerUnavailableError as error:
        raise AbsentError(f"{error} (to get it: a package index that pip can reach)") from None


@dataclass(frozen=True)
class Terms:
    """The terms that all contenders of one contest share; some contests need no gradients."""

    workload: Workload
    device: torch.device
    is_training: bool = True

    def model(self, engine: str) -> celmoe.HierarchicalCELMoE:
        """Ours on the device."""
        return cast(celmoe.HierarchicalCELMoE, self.prepared(self.workload.build(celmoe, engine=engine)))

    def prepared(self, module: nn.Module) -> nn.Module:
        """A module on the device, in the mode of the contest."""
        return module.to(self.device).train(self.is_training)

    def whole(self, model: nn.Module, weights: Weights | None = None) -> Contender:
        """A model of either library as a contender, with its own parameters for weights if none are given."""
        forward = routed(model, self.workload, routings_of(self.workload), self.device)
        return Contender(model, forward, dict(model.named_parameters()) if weights is None else weights)


@dataclass(frozen=True)
class Contender:
    """A way to compute the workload.

    Attributes:
        module: Its weights, on the terms' device.
        forward: Its forward pass.
        weights: By our names, its parameters, or the parts of them that stand for one of ours: all that ours has.
        expected: Makes the contender that this one must equal; ``None`` for ours.
    """

    module: nn.Module
    forward: Forward
    weights: Weights = field(default_factory=dict)
    expected: Callable[[], Contender] | None = None


def claim_of(contender: Contender, gather: Callable[[Forward, Weights], Evidence]) -> Claimed:
    """Gather the contender's evidence and the evidence it must equal, both in the same way."""
    make = contender.expected

    def expected() -> Evidence:
        assert make is not None
        other = make()
        return gather(other.forward, other.weights)

    return Claimed(lambda: gather(contender.forward, contender.weights), None if make is None else expected)


def nothing() -> None:
    """Do nothing between steps: the contender keeps nothing."""


@dataclass(frozen=True, kw_only=True)
class Task(Claimed):
    """A contender's step, and the claim that it computes the same as the others.

    Attributes:
        step: The timed call; it returns when the device is done.
        between: Run before every timed step, unseen by the clock.
        weight_bytes: Bytes of its weights.
        clear: Frees all that a step leaves, so that the next step's peak memory is its own.
    """

    step: Callable[[], object]
    between: Callable[[], object] = nothing
    weight_bytes: int = 0
    clear: Callable[[], object] = nothing


# Raises `AbsentError`.
Maker: TypeAlias = Callable[[Terms], Contender]
TaskMaker: TypeAlias = Callable[[], Task]
