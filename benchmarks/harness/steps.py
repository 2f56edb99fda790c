"""One step of a workload as its users take it, and the changes of weights between two steps.

Axes: B samples, S positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import nn

import celmoe
from benchmarks.workloads.workload import Workload

# ``[B, H]`` or ``[B, S, H]`` to the fused hidden states of the same shape, for another routing at every call.
Forward = Callable[[torch.Tensor], torch.Tensor]

# Names, or the plan that they were compiled to beforehand.
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
    """The routings that a contender goes through in turn."""
    return [workload.routing(seed) for seed in range(ROUTINGS)]


def cycled(call: Callable[[torch.Tensor, Routes], torch.Tensor], routings: Sequence[Routes]) -> Forward:
    """A forward pass over the routings in turn."""
    turn = turns(len(routings))
    return lambda hidden: call(hidden, routings[turn()])


def mask_on(device: torch.device, workload: Workload) -> torch.Tensor | None:
    """The workload's mask on a device."""
    mask = workload.mask()
    return mask if mask is None else mask.to(device)


def routed(model: nn.Module, workload: Workload, routings: Sequence[Routes], device: torch.device = HOST) -> Forward:
    """The model's forward pass, in both libraries."""
    mask = mask_on(device, workload)

    def call(hidden: torch.Tensor, routes: Routes) -> torch.Tensor:
        fused: torch.Tensor = model(hidden, routes, mask=mask).fused_hidden
        return fused

    return cycled(call, routings)


def string_routed(model: nn.Module, workload: Workload) -> Forward:
    """The same with names for routes."""
    return routed(model, workload, routings_of(workload))


# The largest norm of all gradients together.
CLIP_NORM = 1.0


class Passes:
    """The two passes of a training step: clearing of gradients, forward, a loss, backward.

    The parameters get gradients, and so do the workload's hidden states.
    """

    def __init__(
        self, forward: Forward, parameters: Iterable[nn.Parameter], workload: Workload, device: torch.device = HOST
    ) -> None:
        self._forward = forward
        self._hidden = workload.hidden().to(device).requires_grad_()
        self._parameters = list(parameters)

    def clear(self) -> None:
        """Let go of all gradients."""
        for leaf in (self._hidden, *self._parameters):
            leaf.grad = None

    def prepare(self) -> None:
        """Do the part of a step that must come before its timed part."""

    def loss(self) -> torch.Tensor:
        """The forward pass, up to the loss."""
        return self._forward(self._hidden).square().mean()

    def __call__(self) -> None:
        """Both passes."""
        self.clear()
        self.loss().backward()


class ForwardPass(Passes):
    """The forward pass alone, with a graph for a backward pass that never comes."""

    _loss: torch.Tensor | None = None

    def prepare(self) -> None:
        """Let go of the last graph."""
        self._loss = None

    def __call__(self) -> None:
        """The pass."""
        self._loss = self.loss()


class BackwardPass(Passes):
    """The backward pass alone."""

    _loss: torch.Tensor | None = None

    def prepare(self) -> None:
        """Run the forward pass."""
        self.clear()
        self._loss = self.loss()

    def __call__(self) -> None:
        """The pass."""
        if self._loss is None:
            self.prepare()
        assert self._loss is not None
        self._loss.backward()
        self._loss = None


class TrainingStep(Passes):
    """All that a user does for a step: both passes, clipping of the gradients' norm, AdamW.

    At a rate of zero the optimizer does all its work, and contenders keep their equal weights.
    """

    def __init__(
        self,
        forward: Forward,
        parameters: Iterable[nn.Parameter],
        workload: Workload,
        device: torch.device = HOST,
        rate: float = 0.0,
    ) -> None:
        super().__init__(forward, parameters, workload, device)
        # DirectML has no fused kernel.
        fused = device.type in {"cpu", "cuda"}
        self._optimizer = torch.optim.AdamW(self._parameters, lr=rate, fused=fused)

    def __call__(self) -> None:
        """One step."""
        super().__call__()
        nn.utils.clip_grad_norm_(self._parameters, CLIP_NORM)
        self._optimizer.step()


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
    """Return a function that changes all weights a little in place, as an optimizer would.

    Version counters see the change, wherever the weights now lie.
    """
    parameters: list[torch.Tensor] = [parameter for model in models for parameter in model.parameters()]
    turn = turns(len(_NUDGES))

    def change() -> None:
        with torch.no_grad():
            if parameters:
                torch._foreach_mul_(parameters, _NUDGES[turn()])

    return change
