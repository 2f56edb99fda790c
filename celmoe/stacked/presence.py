"""Notes the members of a stack that a backward pass reaches: only theirs is the gradient, which is zero elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from celmoe.torch_internals import current_backward

from .stack import Stack


class _Reached:
    """What reached one stacked parameter since its gradient was cleared.

    Attributes:
        members: The places of the members that the gradient is of.
        waiting: The members that a backward pass has reached, which may end without a gradient: `torch.autograd.grad`.
        backward: The number of that backward pass.
        late: Members that were frozen after their forward pass, which that backward pass has reached.
    """

    def __init__(self) -> None:
        self.members: set[int] = set()
        self.waiting: set[int] = set()
        self.backward = -1
        self.late: set[int] = set()

    def note(self, members: Sequence[int], frozen: frozenset[int], *, is_first: bool) -> None:
        """Note members that the running backward pass has reached.

        Args:
            members: The members' places.
            frozen: The places of frozen members.
            is_first: True if the parameter has no gradient yet.
        """
        if self.backward != (backward := current_backward()):
            self.waiting, self.late, self.backward = set(), set(), backward
            if is_first:
                # An earlier gradient has been cleared.
                self.members = set()
        self.waiting.update(members)
        if frozen:
            self.late |= self.waiting & frozen
            self.waiting -= frozen

    def keep(self, parameter: torch.Tensor) -> None:
        """Keep the members that wait: the parameter has got its gradient."""
        self.members |= self.waiting
        if self.late and parameter.grad is not None:
            # A parameter that is frozen between the passes gets no gradient.
            with torch.no_grad():
                parameter.grad[sorted(self.late)] = 0


# By stacked parameter.
_REACHED: Any = WeakTensorKeyDictionary()


def watch(results: Iterable[torch.Tensor], stack: Stack, members: Sequence[int]) -> None:
    """Note members of a stack once a backward pass reaches their results.

    Args:
        results: Tensors that the members gave.
        stack: The stack.
        members: The members' places in it.
    """
    if stack.frozen:
        members = sorted(set(members) - stack.frozen)
    for result in results if members else ():
        if result.requires_grad:
            result.register_hook(partial(_note, stack, members))


def _note(stack: Stack, members: Sequence[int], grad: torch.Tensor | None) -> None:
    if grad is None:
        # A backward pass reaches other results of the same step.
        return
    for path in stack.keys:
        whole = stack.whole(path)
        _known(whole).note(members, stack.frozen, is_first=whole.grad is None)


def _known(parameter: torch.Tensor) -> _Reached:
    known: _Reached | None = _REACHED.get(parameter)
    if known is None:
        known = _REACHED[parameter] = _Reached()
        if parameter.is_leaf and parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(known.keep)
    return known


def forget(parameter: torch.Tensor, members: Collection[int]) -> bool:
    """Forget that backward passes reached some members; true if the gradient is of others, too."""
    known = _REACHED.get(parameter)
    if known is None:
        return len(set(members)) < len(parameter)
    known.members -= set(members)
    known.waiting -= set(members)
    return bool(known.members or known.waiting)


def reached(parameter: torch.Tensor) -> npt.NDArray[np.bool_] | None:
    """``[M]``: true for the members that the gradient is of; ``None`` for a parameter that no backward pass noted."""
    known = _REACHED.get(parameter)
    if known is None:
        return None
    found = np.zeros(parameter.shape[0], dtype=np.bool_)
    # If no gradient was added up, someone has set it, as `torch.autograd.grad` gave it.
    found[list(known.members or known.waiting)] = True
    return found


def kept(parameter: torch.Tensor) -> npt.NDArray[np.bool_]:
    """``[M]``: true for the members whose gradient backward passes have added up."""
    known = _REACHED.get(parameter)
    found = np.zeros(parameter.shape[0], dtype=np.bool_)
    found[list(() if known is None else known.members)] = True
    return found


def set_reached(parameter: torch.Tensor, members: npt.NDArray[np.bool_]) -> None:
    """Set the members that a stacked parameter's gradient is of.

    Args:
        parameter: ``[M, ...]``.
        members: ``[M]``: true for these members.
    """
    known = _known(parameter)
    known.members, known.waiting = set(np.flatnonzero(members).tolist()), set()


def forget_cleared(parameters: Iterable[torch.Tensor]) -> None:
    """Forget what reached parameters whose gradients have been cleared."""
    for parameter in parameters:
        if (known := _REACHED.get(parameter)) is not None:
            known.members = set()
