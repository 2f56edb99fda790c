"""Notes the members of a stack that a backward pass reaches: only theirs is the gradient, which is zero elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        members: The members' places.
        backward: The number of the last backward pass.
    """

    def __init__(self, backward: int) -> None:
        self.members: set[int] = set()
        self.backward = backward


# By stacked parameter.
_REACHED: Any = WeakTensorKeyDictionary()


def watch(results: Iterable[torch.Tensor], stack: Stack, members: Sequence[int]) -> None:
    """Note members of a stack once a backward pass reaches their results.

    Args:
        results: Tensors that the members gave.
        stack: The stack.
        members: The members' places in it.
    """
    for result in results:
        if result.requires_grad:
            result.register_hook(partial(_note, stack, members))


def _note(stack: Stack, members: Sequence[int], grad: torch.Tensor | None) -> None:
    if grad is None:
        # A backward pass reaches other results of the same step.
        return
    backward = current_backward()
    for path in stack.keys:
        whole = stack.whole(path)
        known = _REACHED.get(whole)
        # Without a gradient, what an earlier backward pass reached has been cleared.
        if known is None or (whole.grad is None and known.backward != backward):
            known = _REACHED[whole] = _Reached(backward)
        known.members.update(members)
        known.backward = backward


def reached(parameter: torch.Tensor) -> npt.NDArray[np.bool_] | None:
    """``[M]``: true for the members that the gradient is of; ``None`` for a parameter that no backward pass noted."""
    known = _REACHED.get(parameter)
    if known is None:
        return None
    found = np.zeros(parameter.shape[0], dtype=np.bool_)
    found[list(known.members)] = True
    return found
