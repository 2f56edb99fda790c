"""Values that come back from JSON as they were, and fields that a dict must have."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from .errors import ConfigError, ConfigTypeError, listed, nearest


def json_value(value: object, where: str) -> Any:
    """A copy of a value that JSON gives back as it was.

    Args:
        value: ``None``, a bool, a number, a string, or a list or dict of such values.
        where: The value's place, for errors.

    Raises:
        ConfigTypeError, ConfigError: The value is of another kind, or is no finite number.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where!r} must be finite, as JSON has it (got {value!r})")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [json_value(each, f"{where}[{place}]") for place, each in enumerate(value)]
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: json_value(each, f"{where}[{key!r}]") for key, each in value.items()}
    got = f"a mapping with keys {listed(value)}" if isinstance(value, Mapping) else f"{type(value).__name__} {value!r}"
    raise ConfigTypeError(
        f"{where!r} must be a value that JSON gives back: None, bool, int, float, str, list, or dict by str (got {got})"
    )


def checked_fields(data: object, where: str, needed: Collection[str], others: Collection[str]) -> dict[str, Any]:
    """The fields of a dict, all of which are known.

    Args:
        data: The dict.
        where: Its place, for errors.
        needed: The fields that it must have.
        others: The fields that it may have.

    Raises:
        ConfigTypeError, ConfigError: It is no dict by names, lacks a field, or has one that is unknown.
    """
    if not isinstance(data, Mapping):
        raise ConfigTypeError(f"{where!r} must be a dict, as 'to_dict' gives it (got {type(data).__name__})")
    known = [*needed, *others]
    if unknown := [key for key in data if key not in known]:
        raise ConfigError(f"{where!r} must have known fields only (got {listed(unknown)}; known: {', '.join(known)})")
    if missing := [key for key in needed if key not in data]:
        raise ConfigError(f"{where!r} must have {listed(missing)} (got {listed(data)}; {nearest(missing, list(data))})")
    return dict(data)
