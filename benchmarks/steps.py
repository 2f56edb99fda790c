"""One step of a workload as its users take it, and what moves the weights between two of them.

Axes: B samples, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import nn

import celmoe
from benchmarks.workloads import Workload

# ``[B, H]`` or ``[B, S, H]`` to the fused hidden states of the same shape, for another routing at every call.
Forward = Callable[[torch.Tensor], torch.Tensor]

# Names, or what they were compiled to beforehand.
Routes: TypeAlias = celmoe.Routing | celmoe.RoutingPlan

ROUTINGS = 4
HOST = torch.device("cpu")
# Weights move between two timed steps, so that nothing computed from them can be kept: to and fro, so that they stay.
_NUDGES = (1.0009765625, 1 / 1.0009765625)


def turns(length: int) -> Callable[[], int]:
    """0, 1, … up to the length, and from 0 again."""
    position = -1

    def turn() -> int:
        nonlocal position
        position = (position + 1) % length
        return position

    return turn


def routings_of(workload: Workload) -> list[celmoe.Routing]:
    """As many routings as a contender goes through in turn."""
    return [workload.routing(seed) for seed in range(ROUTINGS)]


def cycled(call: Callable[[torch.Tensor, Routes], torch.Tensor], routings: Sequence[Routes]) -> Forward:
    """A forward pass over the routings in turn."""
    turn = turns(len(routings))
    return lambda hidden: call(hidden, routings[turn()])


def routed(model: nn.Module, workload: Workload, routings: Sequence[Routes], device: torch.device = HOST) -> Forward:
    """The model's forward pass, in both libraries."""
    mask = workload.mask()
    mask = mask if mask is None else mask.to(device)

    def call(hidden: torch.Tensor, routes: Routes) -> torch.Tensor:
        fused: torch.Tensor = model(hidden, routes, mask=mask).fused_hidden
        return fused

    return cycled(call, routings)


def string_routed(model: nn.Module, workload: Workload) -> Forward:
    """The same with names for routes."""
    return routed(model, workload, routings_of(workload))


class TrainingStep:
    """What a user does, all but the optimizer's step: forward, a loss, backward, and the clearing of gradients.

    Args:
        forward: The forward pass.
        parameters: What gets gradients, besides the hidden states.
        workload: Gives the hidden states.
        device: Where they go.
    """

    def __init__(
        self, forward: Forward, parameters: Iterable[nn.Parameter], workload: Workload, device: torch.device = HOST
    ) -> None:
        self._forward = forward
        self._hidden = workload.hidden().to(device).requires_grad_()
        self._leaves = [self._hidden, *parameters]

    def clear(self) -> None:
        """Let go of all gradients."""
        for leaf in self._leaves:
            leaf.grad = None

    def __call__(self) -> None:
        """One step."""
        self.clear()
        self._forward(self._hidden).square().mean().backward()


def inference_step(forward: Forward, workload: Workload, device: torch.device = HOST) -> Callable[[], None]:
    """A forward pass without gradients; the model must be in evaluation mode."""
    hidden = workload.hidden().to(device)

    def step() -> None:
        with without_gradients(device):
            forward(hidden)

    return step


def without_gradients(device: torch.device) -> torch.inference_mode | torch.no_grad:
    """``inference_mode``, which DirectML can't do."""
    return torch.no_grad() if device.type == "privateuseone" else torch.inference_mode()


def nudge(models: Iterable[nn.Module]) -> Callable[[], None]:
    """What changes all weights a little, as an optimizer would: seen by version counters, wherever they now lie."""
    parameters: list[torch.Tensor] = [parameter for model in models for parameter in model.parameters()]
    turn = turns(len(_NUDGES))

    def change() -> None:
        with torch.no_grad():
            if parameters:
                torch._foreach_mul_(parameters, _NUDGES[turn()])

    return change
