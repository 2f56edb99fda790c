"""What the hierarchy takes of a training step, whoever runs it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import celmoe
from benchmarks.multilingual.network import Lemmatizer
from benchmarks.multilingual.training import wait_for


class HierarchyClock:
    """Seconds of the hierarchy's forward and backward pass in each training step.

    Forward: from where the encoder has returned until the network returns, between which only the hierarchy runs;
    routing is in it, where the system routes by itself. Backward: from where the gradient of the fused hidden states is
    whole until that of the encoder's output is. Autograd takes what was computed last first, so losses and head come
    before, the encoder after, and the gradients of the experts' parameters lie between. Clipping them and the
    optimizer's step are not the hierarchy's. On CUDA each of the four readings waits for the device.
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
        wait_for(tensor.device)
        return self._clock()
