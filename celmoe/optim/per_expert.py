"""Steps over runs of neighbouring members of a stack.

Axes: M members of a stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from celmoe.stacked.presence import reached


class Runs:
    """Runs of neighbouring members that are present and have made equally many steps.

    Args:
        present: ``[M]``: true for the members that are stepped.
        steps: ``[M]``: each member's number of steps until now.

    Attributes:
        steps: The number of steps of each run.
    """

    def __init__(self, present: npt.NDArray[np.bool_], steps: npt.NDArray[np.float32]) -> None:
        numbers = np.where(present, steps, -1.0)
        starts = np.flatnonzero(np.diff(numbers, prepend=-2.0))
        self._sizes = np.diff(starts, append=len(numbers)).tolist()
        self._are_present = present[starts].tolist()
        self.steps = numbers[starts][present[starts]].astype(np.float32)

    def of(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The runs' parts of a tensor ``[M, ...]``."""
        return list(compress(tensor.split(self._sizes), self._are_present))


class PerExpert(torch.optim.Optimizer):
    """A step over the groups' parameters, stacked and ordinary ones."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # as torch's
        """Make one step.

        Args:
            closure: Computes the loss anew, and its gradients.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["params"]:
                self.step_group(group, [each for each in group["params"] if each.grad is not None])
        return loss

    def step_group(self, group: dict[str, Any], parameters: Sequence[torch.Tensor]) -> None:
        """Step a group's parameters that have a gradient."""
        raise NotImplementedError

    def runs_of(self, parameter: torch.Tensor, *, is_counted: bool = True) -> Runs | None:
        """The runs of a stack that are stepped now; ``None`` for an ordinary parameter.

        Args:
            parameter: The parameter.
            is_counted: True if the state keeps each member's number of steps. Else all steps are like first ones.
        """
        state: dict[str, Any] = self.state.get(parameter, {})
        steps: torch.Tensor | None = state.get("step")
        present = reached(parameter)
        if present is None:
            if steps is None or not steps.dim():
                return None
            # A gradient that no backward pass gave is of all members.
            present = np.ones(len(parameter), dtype=np.bool_)
        if not is_counted:
            return Runs(present, np.zeros(len(parameter), dtype=np.float32))
        if steps is None:
            # A state without steps is of steps that were all members'.
            steps = torch.full((len(parameter),), 1.0 if state else 0.0)
        elif not steps.dim() or steps.device.type != "cpu":
            # The host reads which runs there are.
            steps = steps.cpu().expand(len(parameter)).clone()
        runs = Runs(present, steps.numpy())
        self.state[parameter]["step"] = steps + torch.from_numpy(present)
        return runs


def parts_of(runs: Runs | None, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The runs' parts of a stack; an ordinary tensor whole."""
    return [tensor] if runs is None else runs.of(tensor)


def grad_of(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient, which the parameter has."""
    assert parameter.grad is not None
    return parameter.grad
