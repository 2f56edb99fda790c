"""Constants by type and sign: Python takes 1 for True and 1.0, 0.0 for -0.0, and so for what holds them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any


def canonical(value: Any) -> Any:
    """A value that equals no other constant's: numbers by type and sign, containers by type, other objects as such."""
    if isinstance(value, list | tuple | range):
        return type(value), *map(canonical, value)
    if isinstance(value, slice):
        return slice, *map(canonical, (value.start, value.stop, value.step))
    if isinstance(value, dict):
        return type(value), *((canonical(key), canonical(each)) for key, each in value.items())
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(canonical, value))
    if isinstance(value, float | complex):
        return type(value), repr(value)
    return type(value), (value if isinstance(value, Hashable) else id(value))
