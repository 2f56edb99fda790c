"""The context's rule: experts get their rows of batch-aligned values, and everything else as it is.

Batch-aligned values are

- a tensor or NumPy array whose first axis has the batch's length;
- a list or tuple as long as the batch that holds plain objects only: one text, number or other object a sample.

Batch-aligned values may lie in containers of any kind and depth (see `containers`), each of which keeps its own type.
`Rows` marks a value as batch-aligned, `Shared` as whole. A value that allows both readings is refused, and so is a
container that can't be copied around its rows: no batch-aligned value reaches an expert whole.
"""

from __future__ import annotations

import copy
import enum
import functools
import types
from collections import ChainMap, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias, cast

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from celmoe.errors import InputError, InputTypeError
from celmoe.experts import ExpertContext, Rows, Shared

from .containers import (
    Place,
    change,
    check_copies,
    contents,
    copied,
    has_attributes,
    is_immutable,
    is_named,
    is_record,
    resized,
    values,
)

_LEAVES = frozenset({str, bytes, bytearray, int, float, complex, bool, type(None), torch.dtype, torch.device})
_UNORDERED = (set, frozenset)
_SEQUENCES = "be a tensor, NumPy array, list or tuple"
# The contents of these stay as they are: an expert that calls or draws from one gets the caller's results.
_OPAQUE = (
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial),
    *(nn.Module, torch.optim.Optimizer, torch.Size, np.generic, enum.Enum, Iterator, memoryview),
)


class _Bare(NamedTuple):
    """A bare value in place of a `Shared`."""

    value: object


class _Node:
    """A container that may have to be built anew for each expert.

    Attributes:
        value: The container.
        path: The container's path.
        children: The places that may change, each with an index into the aligned values, a bare value or a node.
        parents: The nodes that hold this node.
        is_changed: True if the container has to be built anew.
        size: The place of a batch's size, which is wrong for an expert's rows, and that size; else ``None``.
    """

    __slots__ = ("children", "is_changed", "parents", "path", "size", "value")

    def __init__(self, value: object, path: _Path) -> None:
        self.value = value
        self.path = path
        self.children: list[tuple[Place, _Child]] = []
        self.parents: list[_Node] = []
        self.is_changed = False
        self.size: tuple[Place, torch.Size] | None = None


_Child: TypeAlias = int | _Bare | _Node
# The path from the context to a value: the container's path, and the place in the container.
_Path: TypeAlias = "tuple[_Path, object] | tuple[()]"


class ContextRows:
    """A batch's context, taken apart once: the batch-aligned values, and the nodes to rebuild around their rows.

    Attributes:
        aligned: The distinct batch-aligned values, each ``[B, ...]``: dense tensors, and others if `irregular` is set.
        irregular: The path of the first value that is no dense tensor, so that `select` must cut it; ``None`` without
            one.
        shared: The tensors that all experts see as they are, by id.
        whole: The context as it was passed.
        is_whole: True if every expert gets `whole`.

    Raises:
        InputError: A value allows both readings; a container can't be copied around its rows; `Rows` marks another
            number of rows; or a batch-aligned tensor lies on another device than the hidden states.
        InputTypeError: `Rows` marks something that has no rows.
    """

    def __init__(self, context: ExpertContext, batch_size: int, device: torch.device) -> None:
        self.aligned: list[Any] = []
        self.irregular: str | None = None
        self.shared: dict[int, torch.Tensor] = {}
        self.whole = context
        self._batch_size = batch_size
        self._device = device
        self._indices: dict[int, int] = {}
        self._nodes: dict[int, _Node] = {}
        # For a flat dict, the usual context: the keys that change, each with an index into `aligned`.
        self._flat: list[tuple[Any, int]] | None = None
        self._root: _Child | None = None
        if type(context) is not dict or not self._is_flat(context):
            self._root = self._rooted(context)
        self.is_whole = self._flat is None and self._root is None

    def build(self, blocks: Sequence[Any]) -> ExpertContext:
        """One expert's context, from the expert's rows of each value in `aligned`."""
        if self._flat is not None:
            flat = dict(cast(dict[Any, Any], self.whole))
            for key, index in self._flat:
                flat[key] = blocks[index]
            return flat
        return self.whole if self._root is None else cast(ExpertContext, _built(self._root, blocks, {}))

    def repeated(self, number: int) -> ExpertContext:
        """The context of a batch that has each sample so many times, one after another, with its values marked."""
        positions = [place for place in range(self._batch_size) for _ in range(number)]
        index = torch.tensor(positions, device=self._device)
        blocks = [
            Rows(each.index_select(0, index) if _is_dense(each) else select(each, positions)) for each in self.aligned
        ]
        if self._flat is not None:
            return self.build(blocks)
        return self.whole if self._root is None else cast(ExpertContext, _built(self._root, blocks, {}, Shared))

    def with_aligned(self, aligned: list[torch.Tensor]) -> ContextRows:
        """The same context with other rows of its batch-aligned tensors."""
        changed = copy.copy(self)
        changed.aligned = aligned
        return changed

    def _is_flat(self, context: dict[Any, Any]) -> bool:
        """True if a dict holds tensors and leaves only; the tensors are then registered."""
        found: list[tuple[Any, int]] = []
        for key, value in context.items():
            if type(value) not in _LEAVES:
                if not isinstance(value, torch.Tensor):
                    return False
                index = self._tensor(value, ((), key))
                if index is not None:
                    found.append((key, index))
        # Every expert may write into the outermost mapping, unseen by other experts, as in celmoe-vp.
        self._flat = found
        return True

    def _rooted(self, context: object) -> _Child | None:
        root = self._child(context, ())
        if isinstance(context, Mapping) and not isinstance(context, types.MappingProxyType):
            root = self._owned(context, root)
        changed = [node for node in self._nodes.values() if node.is_changed]
        for node in changed:
            for parent in node.parents:
                if not parent.is_changed:
                    parent.is_changed = True
                    changed.append(parent)
        for node in changed:
            self._check_copies(node)
            node.children = [each for each in node.children if not isinstance(each[1], _Node) or each[1].is_changed]
        return None if isinstance(root, _Node) and not root.is_changed else root

    def _owned(self, context: Mapping[Any, Any], root: _Child | None) -> _Child | None:
        """Make the outermost mapping each expert's own, along with the dicts that hold its items."""
        if root is None:
            root = self._node(context, ())
        assert isinstance(root, _Node)
        if not isinstance(context, dict):
            try:
                check_copies(context)
            except TypeError:
                return root
            known = dict(root.children)
            for place, held in contents(context):
                if isinstance(held, dict):
                    if place not in known:
                        known[place] = self._node(held, ((), place))
                        root.children.append((place, known[place]))
                    child = known[place]
                    if isinstance(child, _Node):
                        child.is_changed = True
        root.is_changed = True
        return root

    def _child(self, value: Any, path: _Path) -> _Child | None:
        """The recipe of a value for one expert; ``None`` if all experts share the value as it is."""
        kind = type(value)
        if kind in _LEAVES:
            return None
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, np.ndarray):
            return self._array(value, path)
        if kind is Shared:
            self._share(value.value)
            return _Bare(value.value)
        if kind is Rows:
            return self._marked(value.value, path)
        if (node := self._nodes.get(id(value))) is not None:
            return node
        if isinstance(value, list | tuple):
            return self._sequence(value, path)
        if isinstance(value, _OPAQUE):
            return None
        if isinstance(value, dict):
            is_plain = not has_attributes(value) and _LEAVES.issuperset(map(type, dict.values(value)))
            # A vocabulary, say, is recognized at C speed.
            return None if is_plain else self._node(value, path)
        return self._object(value, path)

    def _sequence(self, value: Any, path: _Path) -> _Child | None:
        if isinstance(value, torch.Size):
            return None
        if isinstance(value, PackedSequence):
            if int(value.batch_sizes[:1].sum()) == self._batch_size:
                self._refuse(path, "be padded rows and their lengths", "PackedSequence of the batch")
            return None
        # Texts and numbers of a whole batch are recognized at C speed.
        is_plain = not has_attributes(value) and _LEAVES.issuperset(map(type, value))
        if len(value) != self._batch_size or not value or is_named(value):
            return None if is_plain else self._node(value, path)
        found = [] if is_plain else list(self._tensors_in(value))
        if not found:
            return self._irregular(value, path)
        is_marked = any(isinstance(each, Shared | Rows) for each in found)
        if self._batch_size > 1 and not is_marked and not all(map(self._is_aligned, found)):
            raise InputError(
                f"{_told(path)} must be marked, for its {len(value)} items may be the {len(value)} samples' (got "
                f"{type(value).__name__} with {type(found[0]).__name__}s in it; celmoe.Rows cuts it by item, "
                "celmoe.Shared keeps it whole, and a dict's values are looked at one by one)"
            )
        return self._node(value, path)

    def _object(self, value: Any, path: _Path) -> _Child | None:
        """A value that is neither leaf, tensor, list, tuple nor dict."""
        if is_record(value):
            return self._node(value, path)
        if _is_foreign_array(value):
            if tuple(value.shape[:1]) == (self._batch_size,):
                self._refuse(path, _SEQUENCES, f"{type(value).__name__} of shape {tuple(value.shape)}")
            return None
        if has_attributes(value) and any(map(self._is_aligned, self._tensors_in(value))):
            return self._node(value, path)
        kind = type(value)
        if isinstance(value, deque | set | frozenset) and any(map(self._is_aligned, self._tensors_in(value))):
            self._refuse(path, "be a list", f"{kind.__name__} that holds batch-aligned rows")
        if isinstance(value, _UNORDERED) or not hasattr(kind, "__len__"):
            return None
        if (hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")) and 1 < self._batch_size == len(value):
            self._refuse(path, _SEQUENCES, f"{kind.__name__} of {len(value)} items, as many as samples")
        return None

    def _node(self, value: Any, path: _Path) -> _Node:
        node = self._nodes[id(value)] = _Node(value, path)
        for place, item in contents(value, _LEAVES):
            child = self._child(item, (path, place))
            if child is not None:
                node.children.append((place, child))
                if isinstance(child, _Node):
                    child.parents.append(node)
                else:
                    node.is_changed = True
            elif place.is_attribute and isinstance(item, torch.Size) and item[:1] == (self._batch_size,):
                node.size = (place, item)
        if isinstance(value, Mapping) and not isinstance(value, dict | types.MappingProxyType | ChainMap):
            self._check_items(value, path)
        return node

    def _check_items(self, value: Mapping[Any, Any], path: _Path) -> None:
        """Refuse a mapping that makes its batch-aligned items on access."""
        if not _LEAVES.issuperset(map(type, value.values())):
            for key, item in value.items():
                is_rows = isinstance(item, torch.Tensor | np.ndarray) and self._is_aligned(item)
                if is_rows and id(item) not in self._indices:
                    self._refuse(path, "be a dict", f"{type(value).__name__}, which makes [{key!r}] when asked")

    def _check_copies(self, node: _Node) -> None:
        kind = type(node.value)
        if kind is dict or kind is list or kind is tuple:
            return
        if node.size is not None:
            place, size = node.size
            self._refuse(node.path, "hold no batch size beside its rows", f"{kind.__name__} with {size} in {place}")
        try:
            check_copies(node.value)
        except TypeError:
            self._refuse(node.path, "be a container that can be copied", f"{kind.__name__} around batch-aligned rows")

    def _tensor(self, tensor: torch.Tensor, path: _Path) -> int | None:
        if tensor.dim() == 0 or tensor.size(0) != self._batch_size:
            self.shared[id(tensor)] = tensor
            return None
        if tensor.device != self._device:
            raise InputError(
                f"{_told(path)} must be on {self._device}, where 'hidden' is, for its rows are the samples' (got "
                f"{tensor.device}; celmoe.Shared keeps a tensor whole)"
            )
        if _is_dense(tensor):
            return self._index(tensor)
        is_ragged_later = tensor.layout is torch.jagged and isinstance(tensor.shape[1], int)
        if is_ragged_later or tensor.layout not in (torch.strided, torch.jagged, torch.sparse_coo):
            got = "a nested tensor ragged at a later axis" if tensor.is_nested else str(tensor.layout)
            self._refuse(path, "be dense, sparse COO or nested with its second axis ragged", got)
        return self._irregular(tensor, path)

    def _array(self, array: Any, path: _Path) -> int | None:
        if self._is_aligned(array):
            return self._irregular(array, path)
        if array.dtype.hasobject and any(map(self._is_aligned, self._tensors_in(array.ravel().tolist()))):
            self._refuse(path, "be a list", "array that holds batch-aligned rows")
        return None

    def _marked(self, value: Any, path: _Path) -> int | None:
        if isinstance(value, torch.Tensor | np.ndarray):
            length = value.shape[0] if isinstance(value, np.ndarray) and value.ndim else None
            if isinstance(value, torch.Tensor) and value.dim():
                length = value.size(0)
        elif isinstance(value, list | tuple):
            length = len(value)
        else:
            raise InputTypeError(
                f"{_told(path)} must be a tensor, NumPy array, list or tuple for celmoe.Rows to mark (got "
                f"{type(value).__name__}; mark what is in it)"
            )
        if length != self._batch_size:
            got = "none, a number" if length is None else length
            raise InputError(
                f"{_told(path)} must have one row for each of the {self._batch_size} samples, as celmoe.Rows says (got "
                f"{got})"
            )
        return self._tensor(value, path) if isinstance(value, torch.Tensor) else self._irregular(value, path)

    def _irregular(self, value: Any, path: _Path) -> int:
        if self.irregular is None:
            self.irregular = _told(path)
        return self._index(value)

    def _index(self, value: Any) -> int:
        index = self._indices.setdefault(id(value), len(self.aligned))
        if index == len(self.aligned):
            self.aligned.append(value)
        return index

    def _is_aligned(self, value: object) -> bool:
        """True if a tensor or array is batch-aligned, and for any marked value."""
        if isinstance(value, torch.Tensor):
            return value.dim() > 0 and value.size(0) == self._batch_size
        return not isinstance(value, np.ndarray) or (value.ndim > 0 and value.shape[0] == self._batch_size)

    def _tensors_in(self, value: object) -> Iterator[object]:
        """The tensors and arrays with an axis, and the marked values, within a value."""
        seen, rest = {id(value)}, [value]
        while rest:
            each: Any = rest.pop()
            kind = type(each)
            if kind is list or kind is tuple:
                items: Collection[object] = each
            elif isinstance(each, torch.Tensor | np.ndarray | Shared | Rows):
                if isinstance(each, Shared | Rows) or each.ndim:
                    yield each
                continue
            elif isinstance(each, _OPAQUE) or _is_foreign_array(each):
                continue
            else:
                items = values(each)
            if not _LEAVES.issuperset(map(type, items)):
                news = [item for item in items if type(item) not in _LEAVES and id(item) not in seen]
                seen.update(map(id, news))
                rest += news

    def _share(self, value: object) -> None:
        """Register the tensors in plain containers, and in no others."""
        if isinstance(value, torch.Tensor):
            self.shared[id(value)] = value
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                self._share(item)

    def _refuse(self, path: _Path, rule: str, got: str) -> NoReturn:
        raise InputError(f"{_told(path)} must {rule} (got {got}; celmoe.Shared keeps it whole)")


# The context of a pass without one.
NO_CONTEXT = ContextRows(None, 0, torch.device("cpu"))


def select(value: Any, positions: Sequence[int]) -> Any:
    """The items of some samples in a batch-aligned value that is no dense tensor.

    Args:
        value: A list, tuple, NumPy array, nested or sparse tensor ``[B, ...]``.
        positions: The batch positions of N samples.

    Returns:
        A value of the same kind, ``[N, ...]``, in its own memory except for the items of a list or tuple.
    """
    if isinstance(value, list | tuple):
        base: Any = list if isinstance(value, list) else tuple
        return resized(value, list(map(base.__getitem__.__get__(value), positions)))
    if isinstance(value, np.ndarray):
        return value[np.asarray(positions, dtype=np.int64)]
    if value.is_nested:
        parts = value.unbind()
        return torch.nested.as_nested_tensor([parts[position] for position in positions], layout=value.layout)
    return value.index_select(0, torch.tensor(positions, device=value.device))


def _is_dense(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_nested and value.layout is torch.strided


def _built(
    child: _Child, blocks: Sequence[Any], made: dict[_Node, Any], mark: Callable[[Any], Any] | None = None
) -> Any:
    """A value for one expert; containers that occur twice, or in themselves, are built once.

    Args:
        child: The value's recipe.
        blocks: The batch-aligned values.
        made: The containers that have been built.
        mark: Is put around values that all experts share.
    """
    if isinstance(child, int):
        return blocks[child]
    if isinstance(child, _Bare):
        return child.value if mark is None else mark(child.value)
    if child in made:
        return made[child]
    value = child.value
    if type(value) is dict or type(value) is list:
        plain: Any = value.copy()
        made[child] = plain
        for place, each in child.children:
            plain[place.key] = blocks[each] if type(each) is int else _built(each, blocks, made, mark)
        return plain
    if is_immutable(value):
        changes = [(place, _built(each, blocks, made, mark)) for place, each in child.children]
        if child not in made:
            made[child] = copied(value, changes)
        return made[child]
    new = made[child] = copied(value)
    change(new, [(place, _built(each, blocks, made, mark)) for place, each in child.children])
    return new


def _is_foreign_array(value: object) -> bool:
    """True for another library's array, which can't be cut here."""
    kind = type(value)
    return hasattr(kind, "shape") and hasattr(kind, "dtype") and not is_record(value)


def _told(path: _Path) -> str:
    """The path to a value in Python's notation, quoted."""
    steps: list[str] = []
    while path:
        path, place = path
        steps.append(str(place) if isinstance(place, Place) else f"[{place!r}]")
    return repr("context" + "".join(reversed(steps)))
