"""Experts that read one frozen module, which is none of their own parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .experts import ExpertModule

_BASE = "base"


class BasedExpert(ExpertModule):
    """An expert with a ``base``: a frozen module that other experts read, too.

    The base is no child of the expert. It moves with the expert (``to``, ``half``), but neither ``state_dict`` nor
    ``parameters`` has it, and it stays in the mode (``train``, ``eval``) that it is in: a checkpoint would else hold it
    once an expert. Experts with one base run as one, and the base runs once, on the rows of all of them. Experts with
    different bases are of different classes.

    Attributes:
        base: The module, or ``None``. A module that is set is frozen: none of its parameters requires gradients.
    """

    base: nn.Module | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == _BASE:
            if value is not None:
                value.requires_grad_(False)
            # Not as a child, which a module becomes that is set in the ordinary way.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> BasedExpert:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        if recurse and self.base is not None:
            # Several experts move it several times, and only the first time moves anything.
            self.base._apply(fn)
        return self


def bases_of(expert: nn.Module) -> list[nn.Module]:
    """The bases of an expert and of its parts."""
    found = [module.base for module in expert.modules() if isinstance(module, BasedExpert)]
    return [base for base in found if base is not None]


def base_tensors(expert: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers of an expert's bases."""
    return [tensor for base in bases_of(expert) for tensor in (*base.parameters(), *base.buffers())]
