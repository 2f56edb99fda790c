"""The hierarchy's share of a training step, for any library."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import celmoe
from benchmarks.harness.devices import finish
from benchmarks.multilingual.learning.network import Lemmatizer


class HierarchyClock:
    """Seconds of the hierarchy's forward and backward pass in each training step.

    Forward: from the return of the encoder to the return of the network. Only the hierarchy runs between them, with its
    routing if the system routes by itself. Backward: from the whole gradient of the fused hidden states to the whole
    gradient of the encoder's output. Autograd goes from the last operation to the first: losses and head come before,
    the encoder after, and the gradients of the experts' parameters between. Clipping and the optimizer's step are left
    out. On CUDA each of the four readings waits for the device.
    """

    def __init__(self, network: Lemmatizer, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: list[float] = []
        self._clock = clock
        self._begun = 0.0
        self._spent = 0.0
        network.encoder.register_forward_hook(self._enter_forward)
        network.register_forward_hook(self._leave_forward)

    def _enter_forward(self, _encoder: object, _args: object, hidden: torch.Tensor) -> None:
        hidden.register_hook(self._leave_backward)
        self._begun = self._now(hidden)

    def _leave_forward(self, _network: object, _args: object, output: celmoe.CELMoEOutput) -> None:
        self._spent = self._now(output.fused_hidden) - self._begun
        output.fused_hidden.register_hook(self._enter_backward)

    def _enter_backward(self, gradient: torch.Tensor) -> None:
        self._begun = self._now(gradient)

    def _leave_backward(self, gradient: torch.Tensor) -> None:
        self.seconds.append(self._spent + self._now(gradient) - self._begun)

    def _now(self, tensor: torch.Tensor) -> float:
        finish(tensor.device)
        return self._clock()
