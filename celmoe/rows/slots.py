"""The slots of plain objects, which hold attributes in a ``__dict__``, values in slots, or both, and nothing else."""

from __future__ import annotations

import types

_SLOTS: dict[type, tuple[types.MemberDescriptorType, ...] | None] = {}
_MOST_KEPT = 4096


def slots_of(kind: type) -> tuple[types.MemberDescriptorType, ...] | None:
    """The slots of a class's objects; ``None`` if the objects hold something in neither slots nor ``__dict__``.

    Only C code sees such a thing. It shows as more memory in an object than slots and ``__dict__`` account for, or as a
    ``__new__`` in C.
    """
    try:
        return _SLOTS[kind]
    except KeyError:
        if len(_SLOTS) >= _MOST_KEPT:
            _SLOTS.clear()
        found = _SLOTS[kind] = _found(kind)
        return found


def _found(kind: type) -> tuple[types.MemberDescriptorType, ...] | None:
    bases = [base for base in kind.__mro__ if base not in (object, types.SimpleNamespace)]
    if any(isinstance(vars(base).get("__new__"), types.BuiltinFunctionType) for base in bases):
        return None
    members = [each for base in bases for each in vars(base).values() if isinstance(each, types.MemberDescriptorType)]
    pointers = len(members) + (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    size = object.__basicsize__ + pointers * tuple.__itemsize__
    return tuple(members) if kind.__basicsize__ == size and not kind.__itemsize__ else None
