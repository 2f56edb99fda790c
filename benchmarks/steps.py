"""One step of a workload as its users take it, and what moves the weights between two of them.

Axes: B samples, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from benchmarks.workloads import Workload

# ``[B, H]`` or ``[B, S, H]`` to the fused hidden states of the same shape, for another routing at every call.
Forward = Callable[[torch.Tensor], torch.Tensor]

ROUTINGS = 4
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


def string_routed(model: nn.Module, workload: Workload) -> Forward:
    """The model's forward pass with names for routes, in both libraries."""
    routings = [workload.routing(seed) for seed in range(ROUTINGS)]
    mask = workload.mask()
    turn = turns(len(routings))

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        fused: torch.Tensor = model(hidden, routings[turn()], mask=mask).fused_hidden
        return fused

    return forward


def training_step(forward: Forward, parameters: Iterable[nn.Parameter], workload: Workload) -> Callable[[], None]:
    """What a user does, all but the optimizer's step: forward, a loss, backward, and the clearing of gradients."""
    hidden = workload.hidden().requires_grad_()
    leaves = [hidden, *parameters]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward(hidden).square().mean().backward()

    return step


def inference_step(forward: Forward, workload: Workload) -> Callable[[], None]:
    """A forward pass under ``inference_mode``; the model must be in evaluation mode."""
    hidden = workload.hidden()

    def step() -> None:
        with torch.inference_mode():
            forward(hidden)

    return step


def nudge(models: Iterable[nn.Module]) -> Callable[[], None]:
    """What changes all weights a little, as an optimizer would: seen by version counters, wherever they now lie."""
    parameters: list[torch.Tensor] = [parameter for model in models for parameter in model.parameters()]
    turn = turns(len(_NUDGES))

    def change() -> None:
        with torch.no_grad():
            torch._foreach_mul_(parameters, _NUDGES[turn()])

    return change
