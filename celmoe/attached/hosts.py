"""The modules of a model that have experts behind them."""

from __future__ import annotations

from typing import cast

from torch import nn

from celmoe.errors import ConfigError, InputTypeError

from .place import CHILD, SEAT, Attached, Seat
from .where import named_modules


def hosts_in(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that experts are attached to, by name.

    Raises:
        InputTypeError: ``model`` is no module.
        ConfigError: There are none.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"'model' must be a torch.nn.Module (got {type(model).__name__})")
    found = {name: module for name, module in named_modules(model, Attached) if SEAT in module.__dict__}
    if not found:
        raise ConfigError(
            f"'model' must have experts attached (got a {type(model).__name__} without; see celmoe.attach)"
        )
    return found


def seat_of(host: nn.Module) -> Seat:
    """The seat of a module with experts behind it."""
    return cast(Seat, host.__dict__[SEAT])


def hierarchy_of(host: nn.Module) -> Attached:
    """The hierarchy behind a module."""
    return cast(Attached, host._modules[CHILD])
