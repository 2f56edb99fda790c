"""Which objects that a traced call looked at are one and the same.

The tracer compares objects by identity, or looks them up in tables, without a guard: ``self is BEST``, ``self in
FAVOURITES``. So a graph holds only where the same objects coincide as in the trace.
"""

from __future__ import annotations

import enum
import types
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .namespaces import ROOTS, is_library

_EXPERT = "L['expert']"
# Rows are new at every call.
_ROWS = ("L['hidden']", "L['mask']")
# Values that are not compared by identity, or are the same for all experts.
_PLAIN = (
    *(bool, int, float, complex, str, bytes, types.NoneType, type, enum.Enum, types.ModuleType, types.FunctionType),
    *(types.BuiltinFunctionType, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.finfo),
)
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.CodeType)
# Parts of functions and classes that are no data.
_OF_CODE = (".__code__", ".__defaults__", ".__kwdefaults__", ".__mro__")
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
# Integers from here on may be an object's id or hash.
_FIRST_ADDRESS = 1 << 24
# Containers of more values are searched at every call only if they held objects during the trace.
_LONG = 256
# Containers within containers that are searched.
_DEPTH = 3

# Objects by id, each with its place.
_Places = Mapping[int, Any]


class Identities:
    """The objects among the values that a graph's guards mention.

    Args:
        values: The values, by the tracer's expressions.
        arguments: The traced function's arguments, by parameter name.
        scope: The names behind ``G`` in the tracer's expressions.

    Attributes:
        state: The sources of values that other experts might change: neither code nor the expert's own.
    """

    def __init__(self, values: Mapping[str, Any], arguments: Mapping[str, Any], scope: Mapping[str, Any]) -> None:
        self._scope = scope
        own = [
            source
            for source, value in values.items()
            if source.startswith(_EXPERT) and not isinstance(value, (*_PLAIN, *_CONTAINERS))
        ]
        others = [
            source
            for source, value in values.items()
            if not source.startswith((_EXPERT, *_ROWS)) and _may_hold_objects(source, value)
        ]
        self.state = [source for source, value in values.items() if _is_state(source, value, values)]
        objects = [source for source in own if not isinstance(values[source], torch.Tensor)]
        self._own, self._objects = _ids(own), _ids(objects)
        self._others = _values(others)
        self._coincidences = _coincidences(self._objects(arguments["expert"], scope))
        self._pattern = self._pattern_of(arguments["expert"], self.others(arguments) or [])

    def others(self, arguments: Mapping[str, Any]) -> list[_Places] | None:
        """The objects that the call reaches by other ways than the expert; ``None`` if a way is gone."""
        try:
            return [_reached(each) for each in self._others(arguments, self._scope)]
        except (LookupError, AttributeError, TypeError):
            return None

    def hold_for(self, expert: nn.Module, others: list[_Places] | None) -> bool:
        """True if the same objects coincide; the tracer's own guards must hold."""
        if others is None:
            return False
        try:
            return _coincidences(self._objects(expert, self._scope)) == self._coincidences and (
                self._pattern_of(expert, others) == self._pattern
            )
        except (LookupError, AttributeError, TypeError):
            return False

    def objects_of(self, expert: nn.Module) -> set[int]:
        """The ids of the objects that the call reaches through an expert; the tracer's own guards must hold."""
        return set(self._objects(expert, self._scope))

    def _pattern_of(self, expert: nn.Module, others: list[_Places]) -> list[Any]:
        """The places of the expert's objects among others."""
        if not any(others):
            return []
        ids = self._own(expert, self._scope)
        # An object's hash is its id without the lowest bits, which are zero.
        return [
            (place, number, places.get(each, places.get(each >> 4)))
            for place, places in enumerate(others)
            for number, each in enumerate(ids)
            if each in places or each >> 4 in places
        ]


def _coincidences(ids: tuple[int, ...]) -> list[int] | None:
    return None if len(set(ids)) == len(ids) else list(map(ids.index, ids))


def _may_hold_objects(source: str, value: Any) -> bool:
    if source in ("L", "G") or source.startswith(ROOTS):
        return False
    if isinstance(value, _PLAIN):
        return False
    return not isinstance(value, _CONTAINERS) or _number_in(value) <= _LONG or bool(_reached(value))


def _number_in(value: Any, depth: int = _DEPTH) -> int:
    """The number of values that a search of a container meets."""
    if not isinstance(value, _CONTAINERS) or not depth:
        return 1
    parts = value.values() if isinstance(value, dict) else value
    return len(value) + sum(_number_in(each, depth - 1) for each in parts if isinstance(each, _CONTAINERS))


def _is_state(source: str, value: Any, values: Mapping[str, Any]) -> bool:
    if not source.startswith(("G[", "L['context']", f"type({_EXPERT})")) or source.startswith(ROOTS):
        return False
    if any(part in source for part in _OF_CODE):
        return False
    if isinstance(value, (*_CODE, torch.Tensor)) or (source == "L['context']" and value is None):
        return False
    root = values.get(source.partition("]")[0] + "]")
    return not isinstance(root, types.ModuleType) or not is_library(root.__name__)


def _reached(value: Any) -> _Places:
    found: dict[int, Any] = {}
    _search(value, (), found)
    return found


def _search(value: Any, place: tuple[int, ...], found: dict[int, Any]) -> None:
    """Note all objects in a value, by id, with their places."""
    if isinstance(value, weakref.ref):
        value = value()
    if isinstance(value, types.MethodType):
        value = value.__self__
    if isinstance(value, int):
        if value >= _FIRST_ADDRESS:
            found.setdefault(value, place)
    elif isinstance(value, _CONTAINERS):
        if len(place) < _DEPTH:
            # A set has no order.
            is_ordered = not isinstance(value, set | frozenset)
            for number, each in enumerate(value):
                _search(each, (*place, number if is_ordered else 0), found)
            if isinstance(value, dict):
                for number, each in enumerate(value.values()):
                    _search(each, (*place, -1 - number), found)
    elif not isinstance(value, _PLAIN):
        found.setdefault(id(value), place)


def _ids(sources: list[str]) -> Callable[[nn.Module, Mapping[str, Any]], tuple[int, ...]]:
    parts = "".join(f"id({source.replace(_EXPERT, 'L')}), " for source in sources)
    read: Callable[..., tuple[int, ...]] = eval(f"lambda L, G: ({parts})", {"id": id, "list": list, "type": type})
    return read


def _values(sources: list[str]) -> Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[Any, ...]]:
    read: Callable[..., tuple[Any, ...]] = eval(f"lambda L, G: ({''.join(f'{each}, ' for each in sources)})", {})
    return read
