"""The modes that a graph was traced in, for what its operators do as if they were called by the user."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from celmoe.torch_internals import above_operators, apart


class Modes(NamedTuple):
    """The modes of a trace.

    Attributes:
        is_grad_enabled: The grad mode.
        device: The type of the device.
        autocast: Autocast's dtype on the device; ``None`` without autocast.
    """

    is_grad_enabled: bool
    device: str
    autocast: torch.dtype | None


def modes_of(device: str) -> Modes:
    """The present modes."""
    is_cast = torch.is_autocast_enabled(device)
    return Modes(torch.is_grad_enabled(), device, torch.get_autocast_dtype(device) if is_cast else None)


@contextlib.contextmanager
def as_called(modes: Modes) -> Iterator[None]:
    """Within an operator, what a user's call in these modes would see."""
    is_cast = modes.autocast is not None
    with (
        torch.inference_mode(False),
        above_operators(),
        apart(),
        torch.set_grad_enabled(modes.is_grad_enabled),
        torch.autocast(modes.device, modes.autocast, enabled=is_cast) if is_cast else contextlib.nullcontext(),
    ):
        yield
