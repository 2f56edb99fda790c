"""Checks of the experts' arguments."""

from __future__ import annotations

import numbers

import numpy as np

from celmoe.config import require_finite
from celmoe.errors import ConfigError, ConfigTypeError


def require_size(name: str, value: object) -> None:
    """Refuse what is no number of things, at least one.

    Raises:
        ConfigTypeError, ConfigError: The value is no integer, or below 1.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ConfigTypeError(f"{name!r} must be an integer (got {value!r})")
    if value < 1:
        raise ConfigError(f"{name!r} must be at least 1 (got {value!r})")


def require_rate(name: str, value: object) -> None:
    """Refuse what is no rate of dropout.

    Raises:
        ConfigTypeError, ConfigError: The value is no number, or not between 0 and 1.
    """
    require_finite(name, value)
    if not 0 <= value <= 1:  # type: ignore[operator]  # a number
        raise ConfigError(f"{name!r} must be between 0 and 1 (got {value!r})")


def require_flag(name: str, value: object) -> None:
    """Refuse what is no flag.

    Raises:
        ConfigTypeError: The value is no bool.
    """
    if not isinstance(value, bool | np.bool_):
        raise ConfigTypeError(f"{name!r} must be a bool (got {value!r})")


def require_heads(name: str, size: int, heads: object) -> None:
    """Refuse a number of heads that does not divide a width.

    Raises:
        ConfigTypeError, ConfigError: The number is no integer, below 1, or does not divide the width.
    """
    require_size("heads", heads)
    if size % heads:  # type: ignore[operator]  # an integer
        raise ConfigError(f"'heads' must divide {name!r} (got {heads!r} heads for {size!r})")
