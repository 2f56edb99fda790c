"""The check that contenders compute the same; a ratio of times says nothing of contenders that do not.

Every contender claims something: by default all that ours computes. A floor computes something else on purpose, so a
floor brings the evidence that its claim is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from benchmarks.harness.steps import HOST, Forward, without_gradients
from benchmarks.workloads.workload import Workload

# Relative to the largest value of a tensor.
TOLERANCE = 1e-4

Evidence = Mapping[str, torch.Tensor | None]


class UnequalError(RuntimeError):
    """Two contenders differ by more than rounding, with the quantity that does."""


@dataclass(frozen=True)
class Part:
    """One expert's place in a parameter ``[E, ...]`` of all experts; its two axes may be swapped there."""

    whole: nn.Parameter
    place: int
    is_transposed: bool = False

    @property
    def grad(self) -> torch.Tensor | None:
        """The gradient as the expert's own parameter would have it; ``None`` if the step did not reach the expert.

        The whole parameter gets zeros for absent experts, so a part of zeros alone counts as not reached.
        """
        if self.whole.grad is None or not self.whole.grad[self.place].any():
            return None
        part = self.whole.grad[self.place]
        return part.T if self.is_transposed else part


# By our names, the parameters of a contender, or the parts of them that stand for one of ours.
Weights: TypeAlias = Mapping[str, nn.Parameter | Part]


def training_evidence(forward: Forward, weights: Weights, workload: Workload, device: torch.device = HOST) -> Evidence:
    """Take a training step, and return the fused hidden states, the input's gradient and every parameter's.

    The loss weighs each number differently. A mean of squares would not do: the fusion's norm makes it almost constant,
    and the gradients would be rounding errors.
    """
    hidden = workload.hidden().to(device).requires_grad_()
    for weight in weights.values():
        (weight.whole if isinstance(weight, Part) else weight).grad = None
    fused = forward(hidden)
    fused.backward(torch.randn(fused.shape, generator=torch.Generator().manual_seed(1)).to(device))
    gradients = {f"gradient of {name}": weight.grad for name, weight in weights.items()}
    return {"output": fused.detach(), "gradient of the input": hidden.grad, **gradients}


def inference_evidence(forward: Forward, workload: Workload, device: torch.device = HOST) -> Evidence:
    """Run a forward pass without gradients, and return the fused hidden states."""
    with without_gradients(device):
        return {"output in inference": forward(workload.hidden().to(device))}


@dataclass(frozen=True)
class Claimed:
    """A contender's evidence, and the evidence it must equal; ``None`` for the evidence of ours."""

    evidence: Callable[[], Evidence]
    expected: Callable[[], Evidence] | None = None


def require_all_equal(claims: Mapping[str, Claimed], ours: str) -> None:
    """Compare the evidence of every contender with the evidence it must equal.

    Args:
        claims: By contender.
        ours: The contender that the others must equal.

    Raises:
        UnequalError: One computes something else.
    """
    wanted = claims[ours].evidence()
    for name, claim in claims.items():
        if name == ours:
            continue
        found = claim.evidence()
        # The expected evidence comes second: it may need the routing that the contender's evidence was gathered with.
        other, whose = (wanted, ours) if claim.expected is None else (claim.expected(), "what it must compute")
        try:
            require_equal(other, found)
        except UnequalError as error:
            raise UnequalError(f"{name} is not equal to {whose}: {error}") from None


def require_equal(ours: Evidence, theirs: Evidence) -> None:
    """Compare two, quantity by quantity.

    Raises:
        UnequalError: A quantity differs by more than `TOLERANCE`, or one of the two lacks it.
    """
    if ours.keys() != theirs.keys():
        raise UnequalError(f"only one of the two has {', '.join(sorted(ours.keys() ^ theirs.keys()))}")
    for name in ours:
        one, other = ours[name], theirs[name]
        if one is None or other is None:
            if one is not other:
                raise UnequalError(f"the {name} is None for one of the two only")
            continue
        if one.shape != other.shape:
            raise UnequalError(f"the {name} is {list(one.shape)} for one and {list(other.shape)} for the other")
        scale = other.abs().max().item()
        difference = (one - other).abs().max().item()
        # Not the other way round, which a NaN would pass.
        if not difference <= TOLERANCE * scale:
            raise UnequalError(f"the {name} differs by {difference:.1e}, and its largest value is {scale:.1e}")
