"""The oracle's reading of a context: the rule of `celmoe.rows.context` written once more, plainly.

The oracle's reading shares no code with the engines', may walk a context many times, and copies by Python's own means.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import ChainMap, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import partial
from types import FunctionType, MappingProxyType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from .experts import Rows, Shared

# A container's first base among these makes an empty container of its class, without the class's own constructor.
_BASES = (OrderedDict, defaultdict, dict, list, SimpleNamespace, object)


def context_of(context: Any, samples: list[int], batch_size: int) -> Any:
    """The context, its values with a row or item for each sample cut to ``samples``, and all others as they are.

    Raises:
        ValueError: `Rows` in the context has another length than the batch.
    """
    return _part_of(context, samples, batch_size, {}, isinstance(context, Mapping))


def pick(tensor: torch.Tensor, samples: list[int]) -> torch.Tensor:
    """The rows of these samples, one by one."""
    return torch.stack([tensor[sample] for sample in samples])


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors of a context, whole ones too, at any depth, each once."""
    found: list[torch.Tensor] = []
    waiting, seen = [value], set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            found.append(each)
        else:
            waiting += _items_of(each)
    return found


def _part_of(value: Any, samples: list[int], batch_size: int, made: dict[int, Any], must_copy: bool = False) -> Any:
    """One expert's version of a value in the context; ``made`` holds finished containers by the original's id."""
    if isinstance(value, Shared):
        return value.value
    if isinstance(value, Rows):
        if _length(value.value) != batch_size:
            raise ValueError(f"{_length(value.value)} rows in the context for {batch_size} samples")
        return _pick_items(value.value, samples)
    if _has_item_per_sample(value, batch_size):
        return _pick_items(value, samples)
    if id(value) in made:
        return made[id(value)]
    if not _reaches_rows(value, batch_size, set()) and not must_copy:
        return value

    return _container_of(value, lambda item: _part_of(item, samples, batch_size, made), made)


def _container_of(value: Any, cut: Callable[[Any], Any], made: dict[int, Any]) -> Any:
    if isinstance(value, MappingProxyType):
        return MappingProxyType({key: cut(item) for key, item in value.items()})
    if isinstance(value, tuple):
        items = [cut(item) for item in value]
        # Torch's own tuples take their items as one sequence.
        changed = type(value)(items) if hasattr(value, "n_fields") else tuple.__new__(type(value), items)
    else:
        base: Any = next(base for base in _BASES if isinstance(value, base))
        changed = made[id(value)] = base.__new__(type(value))
        if isinstance(value, defaultdict):
            changed.default_factory = value.default_factory
        if isinstance(value, dict):
            for key, item in list(base.items(value)):
                base.__setitem__(changed, key, cut(item))
        if isinstance(value, list):
            changed += [cut(item) for item in value]
    for name, item in _attributes(value):
        held = [cut(each) for each in item] if isinstance(value, ChainMap) and name == "maps" else cut(item)
        object.__setattr__(changed, name, held)
    return changed


def _pick_items(value: Any, samples: list[int]) -> Any:
    if isinstance(value, torch.Tensor):
        if value.is_nested:
            return torch.nested.as_nested_tensor([value.unbind()[sample] for sample in samples], layout=value.layout)
        return pick(value, samples)
    if isinstance(value, np.ndarray):
        return value[samples]
    items = [value[sample] for sample in samples]
    if isinstance(value, tuple):
        return tuple(items) if hasattr(value, "_fields") else tuple.__new__(type(value), items)
    changed = copy.copy(value)
    changed[:] = items
    return changed


def _length(value: Any) -> int | None:
    """The length of the first axis; ``None`` without one."""
    if isinstance(value, torch.Tensor):
        return value.size(0) if value.dim() else None
    if isinstance(value, np.ndarray):
        return value.shape[0] if value.ndim else None
    return len(value) if isinstance(value, list | tuple) else None


def _has_item_per_sample(value: Any, batch_size: int) -> bool:
    """True if a tensor or array is aligned with the batch; or a list or tuple, of anything but tensors and arrays."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return _length(value) == batch_size
    if not isinstance(value, list | tuple) or isinstance(value, torch.Size) or not value or len(value) != batch_size:
        return False
    return not hasattr(value, "_fields") and not hasattr(value, "n_fields") and not _finds_axes(value, set())


def _finds_axes(value: Any, seen: set[int]) -> bool:
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.ndim > 0
    if isinstance(value, Rows | Shared):
        return True
    if id(value) in seen:
        return False
    seen.add(id(value))
    return any(_finds_axes(item, seen) for item in _items_of(value))


def _reaches_rows(value: Any, batch_size: int, seen: set[int]) -> bool:
    """True if there is anything to cut or to unwrap."""
    if isinstance(value, Rows | Shared) or _has_item_per_sample(value, batch_size):
        return True
    if id(value) in seen or isinstance(value, torch.Tensor | np.ndarray):
        return False
    seen.add(id(value))
    if not _is_data(value):
        # A list in an object of any class stays whole, unless tensors beside the list show that the object has samples.
        return _reaches_tensor_rows(value, batch_size, set())
    return any(_reaches_rows(item, batch_size, seen) for item in _items_of(value))


def _reaches_tensor_rows(value: Any, batch_size: int, seen: set[int]) -> bool:
    if isinstance(value, torch.Tensor | np.ndarray):
        return _length(value) == batch_size
    if id(value) in seen:
        return False
    seen.add(id(value))
    return isinstance(value, Rows | Shared) or any(
        _reaches_tensor_rows(item, batch_size, seen) for item in _items_of(value)
    )


def _is_data(value: Any) -> bool:
    return (
        isinstance(value, Mapping | list | tuple | SimpleNamespace)
        or dataclasses.is_dataclass(value)
        or any(hasattr(type(value), name) for name in ("__attrs_attrs__", "model_fields", "__fields__"))
    )


def _items_of(value: Any) -> list[Any]:
    if isinstance(value, str | bytes | type | nn.Module | torch.optim.Optimizer | torch.Size | Iterator):
        return []
    if isinstance(value, FunctionType | MethodType | ModuleType | partial | Enum):
        return []
    if isinstance(value, ChainMap):
        return list(value.maps)
    items = list(value.values()) if isinstance(value, dict | MappingProxyType) else []
    items += list(value) if isinstance(value, list | tuple) else []
    return items + [item for _, item in _attributes(value)]


def _attributes(value: Any) -> list[tuple[str, Any]]:
    if hasattr(value, "n_fields"):
        return []
    found = dict(value.__dict__) if hasattr(value, "__dict__") else {}
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            is_private = slot.startswith("__") and not slot.endswith("__")
            name = f"_{kind.__name__.lstrip('_')}{slot}" if is_private else slot
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return list(found.items())
