"""Containers of all kinds: the values in them, and a copy of the same kind around other values.

No constructor, property or method of a user's class runs: the functions read and write contents through the built-in
base, the ``__dict__`` and the slots. Attributes that mirror items (transformers' ``ModelOutput``, a dict that is its
own ``__dict__``) are therefore read and written along with the items.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap, OrderedDict, defaultdict, deque
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType, MemberDescriptorType, SimpleNamespace
from typing import Any, NamedTuple

from .slots import slots_of

# The order matters: the first that is among a class's bases reads and writes the items.
_MAPS: tuple[type[dict[Any, Any]], ...] = (OrderedDict, defaultdict, dict)
_BASES = (*_MAPS, list, tuple, SimpleNamespace, object)
# A class with one of these declares its attributes to be data: attrs, pydantic (2 and 1), msgspec.
_RECORD_MARKS = ("__attrs_attrs__", "model_fields", "__fields__", "__struct_fields__")


class Place(NamedTuple):
    """One place in a container.

    Attributes:
        key: The item's key or index, or the attribute's name.
        slot: Reads and writes the attribute; ``None`` for an item, and for an attribute in the ``__dict__``.
        is_attribute: True for an attribute, false for an item.
    """

    key: Any
    slot: MemberDescriptorType | None = None
    is_attribute: bool = False

    def __str__(self) -> str:
        return f".{self.key}" if self.is_attribute else f"[{self.key!r}]"


def is_record(value: object) -> bool:
    """True if an object declares its attributes to be data, as a dataclass or a mapping does."""
    kind = type(value)
    return (
        isinstance(value, Mapping | SimpleNamespace)
        or dataclasses.is_dataclass(kind)
        or any(hasattr(kind, mark) for mark in _RECORD_MARKS)
    )


def has_attributes(value: object) -> bool:
    """True if an object has a ``__dict__`` or slots for `contents` to read."""
    kind: Any = type(value)
    return bool(kind.__dictoffset__ or _slots(kind))


def contents(value: Any, left_out: Container[object] = ()) -> list[tuple[Place, object]]:
    """The values in a container, each with its place: items first, then attributes.

    Args:
        value: The container.
        left_out: Classes whose objects are left out.
    """
    pairs: Iterable[tuple[Any, object]] = ()
    match value:
        case dict():
            pairs = _map_of(value).items(value)
        case list():
            pairs = enumerate(list.__iter__(value))
        case tuple():
            pairs = enumerate(tuple.__iter__(value))
        case MappingProxyType():
            pairs = value.items()
        case ChainMap():
            # The list of the maps is structure, not data.
            maps = _dict_of(value)["maps"]
            rest = [(place, held) for place, held in _attributes(value) if held is not maps]
            return [*((Place(index), each) for index, each in enumerate(maps)), *rest]
    found: list[tuple[Place, object]] = [(Place(key), item) for key, item in pairs if type(item) not in left_out]
    if has_attributes(value):
        found += [(place, item) for place, item in _attributes(value) if type(item) not in left_out]
    return found


def values(value: Any) -> Collection[object]:
    """The values in a container without their places, and the items of a set or deque."""
    items: Collection[object]
    match value:
        case dict():
            items = _map_of(value).values(value)
        case list() | tuple() | set() | frozenset() | deque():
            items = value
        case _:
            return [item for _, item in contents(value)]
    return [*items, *(item for _, item in _attributes(value))] if has_attributes(value) else items


def is_immutable(value: object) -> bool:
    """True if a copy of the value must be made with its items at hand."""
    return isinstance(value, tuple | MappingProxyType)


def copied(value: Any, changes: Sequence[tuple[Place, Any]] = ()) -> Any:
    """A shallow copy of the same kind, with these changes.

    Raises:
        TypeError: Only the class's own code can copy the value.
    """
    copy: Any
    if isinstance(value, MappingProxyType):
        items = dict(value.items())
        items.update((place.key, new) for place, new in changes)
        return MappingProxyType(items)
    if isinstance(value, tuple):
        listed = list(tuple.__iter__(value))
        for place, new in changes:
            if not place.is_attribute:
                listed[place.key] = new
        # `torch.max` and similar functions return tuples that only their own class makes.
        is_torchs = hasattr(value, "n_sequence_fields")
        copy = type(value)(listed) if is_torchs else tuple.__new__(type(value), listed)
        changes = [each for each in changes if each[0].is_attribute]
    else:
        copy = _blank(value)
        if isinstance(value, dict):
            base = _map_of(value)
            for key, item in base.items(value):
                base.__setitem__(copy, key, item)
        elif isinstance(value, list):
            list.extend(copy, list.__iter__(value))
    if has_attributes(value):
        _copy_attributes(value, copy)
    if isinstance(value, ChainMap):
        _dict_of(copy)["maps"] = list(_dict_of(value)["maps"])
    change(copy, changes)
    return copy


def resized(value: Any, items: list[Any]) -> Any:
    """A list or tuple of the same kind with other items, of any number; a plain tuple for a named one."""
    if type(value) is list:
        return items
    if is_named(value):
        return tuple(items)
    copy: Any = _blank(value) if isinstance(value, list) else tuple.__new__(type(value), items)
    if isinstance(value, list):
        list.extend(copy, items)
    if has_attributes(value):
        _copy_attributes(value, copy)
    return copy


def is_named(value: object) -> bool:
    """True if a tuple's items are fields: a named tuple, or one of torch's own."""
    return hasattr(value, "_fields") or hasattr(value, "n_sequence_fields")


def change(container: Any, changes: Sequence[tuple[Place, Any]]) -> None:
    """Write into a mutable container, or into the attributes of any container."""
    for place, new in changes:
        if place.slot is not None:
            place.slot.__set__(container, new)
        elif place.is_attribute:
            _dict_of(container)[place.key] = new
        elif isinstance(container, ChainMap):
            _dict_of(container)["maps"][place.key] = new
        else:
            base: Any = _map_of(container) if isinstance(container, dict) else list
            base.__setitem__(container, place.key, new)


def _map_of(value: Any) -> Any:
    return next(base for base in _MAPS if isinstance(value, base))


def check_copies(value: object) -> None:
    """Raise the ``TypeError`` that `copied` would raise, if any."""
    if not is_immutable(value):
        _blank(value)


def _blank(value: Any) -> Any:
    kind: Any = type(value)
    base: Any = next(each for each in kind.__mro__ if each in _BASES)
    if base in (object, SimpleNamespace) and slots_of(kind) is None:
        raise TypeError("only its own class can copy it")
    return base.__new__(kind)


def _attributes(value: Any) -> list[tuple[Place, object]]:
    kind: Any = type(value)
    held = _dict_of(value)
    # A dict may be its own `__dict__`: its items are listed already.
    found = [] if held is value else [(Place(name, None, True), item) for name, item in held.items()]
    for slot in _slots(kind):
        try:
            found.append((Place(slot.__name__, slot, True), slot.__get__(value)))
        except AttributeError:
            continue
    return found


def _copy_attributes(value: Any, copy: Any) -> None:
    kind: Any = type(value)
    held = _dict_of(value)
    if held is value:
        object.__setattr__(copy, "__dict__", copy)
    elif held:
        _dict_of(copy).update(held)
    for place, item in _attributes(value) if _slots(kind) else ():
        if place.slot is not None:
            place.slot.__set__(copy, item)


def _dict_of(value: Any) -> dict[str, Any]:
    if not type(value).__dictoffset__:
        return {}
    held: dict[str, Any] = object.__getattribute__(value, "__dict__")
    return held


@lru_cache(4096)
def _slots(kind: type) -> tuple[MemberDescriptorType, ...]:
    if hasattr(kind, "n_sequence_fields"):
        return ()  # the fields of a tuple of torch's own, which are its items
    members = [each for base in kind.__mro__ for each in vars(base).values() if isinstance(each, MemberDescriptorType)]
    # A namespace's ``__dict__`` is one of the members.
    return tuple(each for each in members if each.__name__ != "__dict__")
