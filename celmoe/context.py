"""The context's rule: batch-aligned tensors go to experts by their rows, everything else as it is.

Batch-aligned is a tensor with at least one axis whose first has the batch's length, at any depth of mappings, lists,
tuples, named tuples and dataclasses. `Shared` keeps a value whole.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import torch

from .errors import InputError
from .experts import ExpertContext, Shared

# Given one expert's blocks, one for each batch-aligned tensor: the context that this expert sees.
_Builder: TypeAlias = Callable[[Sequence[torch.Tensor]], Any]

# The way from the context to a value, in words.
_Path: TypeAlias = tuple[str, ...]

_LEAVES = frozenset({str, bytes, int, float, bool, type(None)})


class ContextRows:
    """A context taken apart once for a batch: its batch-aligned tensors, and how to build it anew around their rows.

    Attributes:
        aligned: The distinct batch-aligned tensors, each ``[B, ...]``.
        shared: The tensors that all experts see as they are, by id.
        whole: The context as it was passed.
        is_whole: Whether every expert is given just that.

    Raises:
        InputError: A batch-aligned tensor does not lie on the hidden states' device.
    """

    def __init__(self, context: ExpertContext, batch_size: int, device: torch.device) -> None:
        self.aligned: list[torch.Tensor] = []
        self.shared: dict[int, torch.Tensor] = {}
        self._batch_size = batch_size
        self._device = device
        self.whole = context
        # The containers that are being entered: one that holds itself is shared at its second coming.
        self._entered: set[int] = set()
        # As in celmoe-vp, every expert may write into the outermost mapping without another one's seeing it.
        self._build = self._builder(context, ("context",), always=True)
        self.is_whole = self._build is None

    def build(self, blocks: Sequence[torch.Tensor]) -> ExpertContext:
        """One expert's context from its rows of each of `aligned`."""
        return self.whole if self._build is None else cast(ExpertContext, self._build(blocks))

    def with_aligned(self, aligned: list[torch.Tensor]) -> ContextRows:
        """The same context with other rows of its batch-aligned tensors."""
        changed = copy.copy(self)
        changed.aligned = aligned
        return changed

    def _builder(self, value: object, path: _Path, *, always: bool = False) -> _Builder | None:
        """How to build this value for one expert; ``None`` where all of it is shared as it is."""
        match value:
            case None:
                return None
            case Shared():
                self._share(value.value)
                return lambda _: value.value
            case torch.Tensor():
                return self._tensor(value, path)
        if id(value) in self._entered:
            return None
        self._entered.add(id(value))
        builder = self._container(value, path, always)
        self._entered.remove(id(value))
        return builder

    def _container(self, value: object, path: _Path, always: bool) -> _Builder | None:
        match value:
            case Mapping():
                if not always and _LEAVES.issuperset(map(type, value.values())):
                    return None  # a vocabulary, say, told at C speed
                keys = list(value)
                items = [value[key] for key in keys]
                builders = [self._builder(item, (*path, f"[{key!r}]")) for key, item in zip(keys, items, strict=True)]
                return _around(items, builders, lambda built: _with_items(value, keys, built), always)
            case list() | tuple():
                if _LEAVES.issuperset(map(type, value)):
                    return None  # texts and numbers of a whole batch, told at C speed
                builders = [self._builder(item, (*path, f"[{index}]")) for index, item in enumerate(value)]
                if isinstance(value, list):
                    return _around(value, builders, lambda built: _with_items(value, range(len(value)), built))
                return _around(value, builders, partial(_tuple_like, type(value)))
            case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
                names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
                items = [getattr(value, name) for name in names]
                builders = [self._builder(item, (*path, f".{name}")) for name, item in zip(names, items, strict=True)]
                return _around(items, builders, lambda built: _with_fields(value, names, built))
        return None

    def _share(self, value: object) -> None:
        """Know the tensors in plain containers; others are nobody's to know."""
        if isinstance(value, torch.Tensor):
            self.shared[id(value)] = value
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                self._share(item)

    def _tensor(self, tensor: torch.Tensor, path: _Path) -> _Builder | None:
        if tensor.dim() == 0 or tensor.shape[0] != self._batch_size:
            self.shared[id(tensor)] = tensor
            return None
        if tensor.device != self._device:
            raise InputError(
                f"{''.join(path)!r} must be on {self._device}, where 'hidden' is, for its rows are the samples' (got "
                f"{tensor.device}; celmoe.Shared keeps a tensor whole)"
            )
        for index, known in enumerate(self.aligned):
            if known is tensor:
                return lambda blocks: blocks[index]
        self.aligned.append(tensor)
        last = len(self.aligned) - 1
        return lambda blocks: blocks[last]


# What a pass without a context has.
NO_CONTEXT = ContextRows(None, 0, torch.device("cpu"))


def _around(
    items: Sequence[object],
    builders: Sequence[_Builder | None],
    make: Callable[[list[object]], object],
    always: bool = False,
) -> _Builder | None:
    """How to build a container around its items; the container itself is shared where all of its items are."""
    if not always and all(builder is None for builder in builders):
        return None
    return lambda blocks: make(
        [item if build is None else build(blocks) for item, build in zip(items, builders, strict=True)]
    )


def _tuple_like(kind: type, items: list[object]) -> object:
    """A tuple of this kind: named, one of torch's own (``torch.max`` gives such), or a user's."""
    if hasattr(kind, "_make"):
        return kind._make(items)
    return kind(items) if hasattr(kind, "n_sequence_fields") else tuple.__new__(kind, items)


def _with_items(original: Any, keys: Iterable[Any], items: Sequence[object]) -> object:
    """A container of the original's kind with other values; a plain dict where it is no dict or list itself."""
    changed = copy.copy(original) if isinstance(original, dict | list) else dict(original)
    for key, item in zip(keys, items, strict=True):
        changed[key] = item
    return changed


def _with_fields(original: object, names: Sequence[str], items: Sequence[object]) -> object:
    """A copy of a dataclass with other values, made without its constructor: that may ask for more, or do more."""
    changed = copy.copy(original)
    for name, item in zip(names, items, strict=True):
        object.__setattr__(changed, name, item)
    return changed
