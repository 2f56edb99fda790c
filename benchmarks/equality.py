"""Whether two contenders compute the same; a ratio of times says nothing of contenders that do not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from benchmarks.steps import HOST, Forward, without_gradients
from benchmarks.workloads import Workload

# Relative to the largest value of a tensor.
TOLERANCE = 1e-4

Evidence = Mapping[str, torch.Tensor | None]


class UnequalError(RuntimeError):
    """Two contenders differ by more than rounding, with the quantity that does."""


def training_evidence(
    forward: Forward, parameters: Mapping[str, nn.Parameter], workload: Workload, device: torch.device = HOST
) -> Evidence:
    """What a training step gives: fused hidden states, and every gradient.

    The loss weighs each number differently. A mean of squares would not do: after the fusion's norm it hardly depends
    on what came before, and gradients would be rounding.
    """
    hidden = workload.hidden().to(device).requires_grad_()
    for parameter in parameters.values():
        parameter.grad = None
    fused = forward(hidden)
    fused.backward(torch.randn(fused.shape, generator=torch.Generator().manual_seed(1)).to(device))
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in parameters.items()}
    return {"output": fused.detach(), "gradient of the input": hidden.grad, **gradients}


def inference_evidence(forward: Forward, workload: Workload, device: torch.device = HOST) -> Evidence:
    """What a forward pass without gradients gives."""
    with without_gradients(device):
        return {"output in inference": forward(workload.hidden().to(device))}


def require_equal(ours: Evidence, theirs: Evidence) -> None:
    """Compare what both have.

    Raises:
        UnequalError: A quantity differs by more than `TOLERANCE`, or is missing from one of the two only.
    """
    for name in ours.keys() & theirs.keys():
        one, other = ours[name], theirs[name]
        if one is None or other is None:
            if one is not other:
                raise UnequalError(f"the {name} is None for one of the two only")
            continue
        scale = other.abs().max().item()
        difference = (one - other).abs().max().item()
        # Not the other way round, which a NaN would pass.
        if not difference <= TOLERANCE * scale:
            raise UnequalError(f"the {name} differs by {difference:.1e}, and its largest value is {scale:.1e}")
