"""Which experts are the same architecture with other weights, and how to know cheaply that nothing has changed.

A module is taken down to what can be compared: its class, its plain attributes, and by place its parameters and
buffers, its children and those of theirs. Two experts of one signature compute the same function of their input and
of their own tensors. The signature is kept beside what was in every dictionary, list and slot that it was read from; at
every call these are asked for the same objects, at C's speed, so replacing, setting or hooking anything shows.
"""

from __future__ import annotations

import collections
import copy
import enum
import functools
import itertools
import types
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from operator import attrgetter, call, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .inspection import inspect_code, is_trusted
from .ragged import CannotGroupError
from .slots import held_by, held_in_slots, slots_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [
    getattr(torch_module, f"_global_{name}")
    for name in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
]
# What recurrent layers keep beside their parameters, and make anew of them when they differ.
DERIVED = {"_flat_weights", "_flat_weight_refs"}
# What every module has beside what it is made of; the hooks among them do not touch a forward pass.
BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"} | DERIVED
# Of those, what a forward pass never looks at while there are no hooks.
_ASIDE = BOOKKEEPING - {"_parameters", "_buffers", "_modules", *_HOOKS} - DERIVED
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum, slice)
CONTAINERS = (list, tuple, dict, set, frozenset)
# What reads the containers that may come to hold something else. One in order has an order of its own.
_READERS: tuple[tuple[type, tuple[Callable[[Any], Collection[Any]], ...]], ...] = (
    (collections.OrderedDict, (collections.OrderedDict.keys, dict.values)),
    (dict, (dict.keys, dict.values)),
    (list, (list.copy,)),
    (set, (set.copy,)),
)
# What `.data =` may change, beside values.
_facts = attrgetter("requires_grad", "dtype", "shape")
_attributes = attrgetter("__dict__")
_PARTS = attrgetter("func", "args", "keywords")


# Comparing a key costs a walk through it; its number does not.
_NUMBERS: dict[tuple[Any, ...], int] = {}
_MOST_NUMBERS = 65_536
_next_number = itertools.count().__next__


def _number(key: tuple[Any, ...]) -> int:
    if (number := _NUMBERS.get(key)) is None:
        if len(_NUMBERS) >= _MOST_NUMBERS:
            _NUMBERS.clear()
        number = _NUMBERS[key] = _next_number()
    return number


class Leaf(NamedTuple):
    """Where a tensor stands in an expert: the number of its module, and its name there."""

    module: int
    name: str
    is_buffer: bool


class Signature(NamedTuple):
    """What experts of one class share.

    Attributes:
        key: Equal for experts of one class, and for no others.
        leaves: Where each distinct tensor stands; a tied one stands in several places.
        fault: Why experts like this can't run as one, or ``None``.
        objects: What the expert that it was read from holds beside tensors, modules and plain data.
        id: The key's number.
    """

    key: tuple[Any, ...]
    leaves: tuple[tuple[Leaf, ...], ...]
    fault: str | None
    objects: tuple[Any, ...] = ()
    id: int = -1


class _Look(NamedTuple):
    """One look at an expert: what was read, and what it was read from. Many experts' are joined field by field.

    Attributes:
        modules: Its modules.
        kinds: Their classes.
        attributes: Their own dictionaries.
        sizes: How much was in each.
        getters: What reads of each all that matters.
        read: What was read, one after another.
        registries: What its modules hold: their parameters, buffers, children and hooks, where there are any.
        lengths: How many were in each.
        keys: What was in all of those, one after another.
        values: Likewise.
        empty: Registries without anything.
        holders: Its containers, and its objects with slots.
        readers: What reads of each what it holds.
        amounts: How much that was.
        held: What they held, one after another.
        code: The classes and functions whose code it runs, and what is against each.
        facts: Of each tensor.
        tensors: The distinct parameters and buffers.
    """

    modules: list[nn.Module]
    kinds: list[type]
    attributes: list[dict[str, Any]]
    sizes: list[int]
    getters: list[Any]
    read: list[Any]
    registries: list[dict[str, Any]]
    lengths: list[int]
    keys: list[str]
    values: list[Any]
    empty: list[Any]
    holders: list[Any]
    readers: list[Any]
    amounts: list[int]
    held: list[Any]
    code: list[tuple[Any, str | None]]
    facts: list[Any]
    tensors: list[torch.Tensor]


_NO_LOOK = _Look(*([] for _ in _Look._fields))


class Inspected(dict[Any, "str | None"]):
    """What is against each class's code, asked once in a call."""

    def __missing__(self, subject: Any) -> str | None:
        self[subject] = fault = inspect_code(subject)
        return fault


def _is_true(look: _Look, inspected: Inspected) -> bool:
    """Whether nothing has changed since."""
    # The same objects, not equal ones: a parameter may be replaced by one of its value, a zero by one of the other
    # sign, a 1 by `True`.
    try:
        return (
            not any(look.empty)
            and list(map(type, look.modules)) == look.kinds
            and all(map(is_, map(_attributes, look.modules), look.attributes))
            and list(map(len, look.attributes)) == look.sizes
            and all(map(is_, chain.from_iterable(map(call, look.getters, look.attributes)), look.read))
            and list(map(len, look.registries)) == look.lengths
            and list(chain.from_iterable(look.registries)) == look.keys
            and all(map(is_, chain.from_iterable(map(dict.values, look.registries)), look.values))
            and _is_held(look)
            and list(map(_facts, look.tensors)) == look.facts
            and all(inspected[subject] == fault for subject, fault in look.code)
        )
    except KeyError:
        return False


def _is_held(look: _Look) -> bool:
    found = list(map(call, look.readers, look.holders))
    return list(map(len, found)) == look.amounts and all(map(is_, chain.from_iterable(found), look.held))


class Watched:
    """An expert, its signature, and what it was read from.

    Attributes:
        module: The expert.
        look: The last look at it.
        signature: What it is, as of that.
        tensors: The distinct parameters and buffers, aligned with the signature's leaves.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # Two are kept: training and evaluation take turns.
        self._looks: list[tuple[_Look, Signature]] = []
        self.look = _NO_LOOK
        self.signature = Signature((), (), None)
        self.tensors: list[torch.Tensor] = []

    def refresh(self, inspected: Inspected) -> None:
        """Make signature and tensors true now."""
        for look, signature in self._looks:
            if _is_true(look, inspected):
                self._see(look, signature)
                return
        reader = _Reader(inspected)
        signature, tensors = reader.read(self.module)
        look = _looked(reader, tensors)
        self._looks = [(look, signature), *self._looks[:1]]
        self._see(look, signature)

    def _see(self, look: _Look, signature: Signature) -> None:
        self.look, self.signature, self.tensors = look, signature, look.tensors


def _looked(reader: _Reader, tensors: list[torch.Tensor]) -> _Look:
    # All but what hooks of states and flags of hooks are.
    getters = [itemgetter(*(name for name in each if name not in _ASIDE)) for each in reader.attributes]
    found = list(map(call, reader.readers, reader.holders))
    return _Look(
        reader.watched,
        list(map(type, reader.watched)),
        reader.attributes,
        list(map(len, reader.attributes)),
        getters,
        list(chain.from_iterable(map(call, getters, reader.attributes))),
        reader.registries,
        list(map(len, reader.registries)),
        list(chain.from_iterable(reader.registries)),
        list(chain.from_iterable(map(dict.values, reader.registries))),
        reader.empty,
        reader.holders,
        reader.readers,
        list(map(len, found)),
        list(chain.from_iterable(found)),
        list(reader.code.items()),
        list(map(_facts, tensors)),
        tensors,
    )


class Gathered:
    """The last looks at many experts: asked all at once, whether they are true, they take a third of the time.

    Args:
        experts: They, looked at.
    """

    def __init__(self, experts: Sequence[Watched]) -> None:
        looks = [expert.look for expert in experts]
        code = set(chain.from_iterable(look.code for look in looks))
        parts = zip(*looks, strict=True) if looks else [()] * len(_Look._fields)
        self._look = _Look(*(list(chain.from_iterable(part)) for part in parts))._replace(code=list(code))

    def is_true(self, inspected: Inspected) -> bool:
        """Whether nothing has changed in any of them."""
        return _is_true(self._look, inspected)


def global_hooks() -> str | None:
    """Why no expert may run with others as one, for hooks on all modules; ``None`` without any."""
    return "there are hooks on all modules" if any(_GLOBAL_HOOKS) else None


class _Reader:
    """Reads one expert."""

    def __init__(self, inspected: Inspected) -> None:
        self.watched: list[nn.Module] = []
        self.registries: list[dict[str, Any]] = []
        self.attributes: list[dict[str, Any]] = []
        self.holders: list[Any] = []
        self.readers: list[Any] = []
        self.empty: list[Any] = []
        # The classes and functions whose code it runs, and what is against each.
        self.code: dict[Any, str | None] = {}
        self._inspected = inspected
        self.modules: dict[int, int] = {}
        self.places: dict[int, list[Leaf]] = {}
        self.tensors: dict[int, torch.Tensor] = {}
        self.objects: list[Any] = []

    def read(self, module: nn.Module) -> tuple[Signature, list[torch.Tensor]]:
        try:
            key = self._module(module, "")
        except (CannotGroupError, RecursionError) as error:
            # Experts with one fault are told as one class: what they are beyond it is not known.
            faulty = ("fault", type(module), str(error))
            return Signature(faulty, (), str(error), (), _number(faulty)), []
        leaves = tuple(map(tuple, self.places.values()))
        tensors = list(self.tensors.values())
        shapes = tuple((tuple(each.shape), each.dtype, each.device, each.requires_grad) for each in tensors)
        whole = (key, leaves, shapes)
        return Signature(whole, leaves, None, tuple(self.objects), _number(whole)), tensors

    def _watch(self, holder: Any) -> None:
        for kind, readers in _READERS:
            if isinstance(holder, kind):
                self.holders += [holder] * len(readers)
                self.readers += readers
                return

    def _inspect(self, subject: Any) -> None:
        if is_trusted(subject):
            return
        self.code[subject] = fault = self._inspected[subject]
        if fault is not None:
            raise CannotGroupError(fault)

    def _module(self, module: nn.Module, path: str) -> tuple[Any, ...]:
        if id(module) in self.modules:
            return ("again", self.modules[id(module)])
        number = self.modules[id(module)] = len(self.modules)
        kind = type(module)
        attributes = module.__dict__
        self.watched.append(module)
        self.attributes.append(attributes)
        for name in ("_parameters", "_buffers", "_modules", *_HOOKS):
            if attributes[name]:
                self.registries.append(attributes[name])
            else:
                self.empty.append(attributes[name])
        if any(attributes[name] for name in _HOOKS):
            raise CannotGroupError(f"have a module hook{_at(path)}")
        self._inspect(kind)
        plain = []
        for name, value in attributes.items():
            if name in BOOKKEEPING:
                continue
            plain.append((name, self._plain(value, f"{path}.{name}".removeprefix("."))))
        flat = attributes.get("_flat_weights")
        if isinstance(flat, list):
            named = [attributes["_parameters"].get(name) for name in attributes["_flat_weights_names"]]
            if any(each is not parameter for each, parameter in zip(flat, named, strict=False)):
                raise CannotGroupError(f"hold other weights than their parameters{_at(path)}")
            self._watch(flat)
        tensors = []
        for is_buffer, registry in enumerate((attributes["_parameters"], attributes["_buffers"])):
            for name, tensor in registry.items():
                tensors.append((name, self._tensor(tensor, Leaf(number, name, bool(is_buffer)), path)))
        children = [
            (name, None if child is None else self._module(child, f"{path}.{name}".removeprefix(".")))
            for name, child in attributes["_modules"].items()
        ]
        return kind, tuple(plain), tuple(tensors), tuple(children)

    def _tensor(self, tensor: torch.Tensor | None, leaf: Leaf, path: str) -> Any:
        if tensor is None:
            return None
        name = f"{path}.{leaf.name}".removeprefix(".")
        if type(tensor) not in (nn.Parameter, torch.Tensor):
            raise CannotGroupError(f"hold {name!r}, a {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CannotGroupError(f"hold {name!r}, which is {tensor.layout}")
        self.tensors[id(tensor)] = tensor
        places = self.places.setdefault(id(tensor), [])
        places.append(leaf)
        return list(self.places).index(id(tensor)), isinstance(tensor, nn.Parameter)

    def _plain(self, value: Any, path: str) -> Any:
        """An attribute as something that can be compared; what can't be is the same only where it is one object."""
        if isinstance(value, _PLAIN):
            if _has_attributes(value):
                raise CannotGroupError(f"hold {path!r}, a {type(value).__name__} with attributes")
            # Two zeros are equal and differ; what is not a number differs from itself.
            return type(value), repr(value) if isinstance(value, float | complex) else value
        if isinstance(value, torch.Tensor):
            raise CannotGroupError(f"hold a tensor that is not registered, {path!r}")
        if isinstance(value, nn.Module):
            raise CannotGroupError(f"hold a module that is not registered, {path!r}")
        if isinstance(value, CONTAINERS):
            # What a tuple holds stays the same objects.
            self._watch(value)
            return type(value), self._contents(value, path)
        if isinstance(value, type):
            return "type", value
        if isinstance(value, types.BuiltinFunctionType) and getattr(value, "__self__", None) in (
            None,
            torch,
            torch._C._nn,
        ):
            return "function", value
        if isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, types.ModuleType | type):
            return "function", value
        if isinstance(value, types.FunctionType):
            self._inspect(value)
            return "function", value
        return self._object(value, path)

    def _object(self, value: Any, path: str) -> Any:
        if type(value) is functools.partial:
            self.holders.append(value)
            self.readers.append(_PARTS)
            parts = _PARTS(value)
            return type(value), tuple(self._plain(each, path) for each in parts)
        slots = slots_of(type(value))
        if slots is not None and (slots or hasattr(value, "__dict__")):
            for index, each in enumerate(self.objects):
                if value is each:
                    return "again", index
            # A config, say: the same where its fields are.
            self._inspect(type(value))
            self.objects.append(value)
            self.holders.append(value)
            self.readers.append(held_by)
            held = tuple(
                (slot.__name__, self._plain(each, f"{path}.{slot.__name__}")) for slot, each in held_in_slots(value)
            )
            return type(value), held, self._contents(vars(value), path) if hasattr(value, "__dict__") else ()
        raise _incomparable(value, path)

    def _contents(self, value: Any, path: str) -> Any:
        if type(value) not in CONTAINERS:
            # What it holds beside its items, and does with them, is its own.
            if isinstance(value, set | frozenset) or getattr(value, "__dict__", None):
                raise _incomparable(value, path)
            if not hasattr(value, "_fields"):
                self._inspect(type(value))
        if isinstance(value, dict):
            return tuple((self._plain(key, path), self._plain(item, f"{path}[{key!r}]")) for key, item in value.items())
        if isinstance(value, set | frozenset):
            return frozenset(self._plain(item, path) for item in value)
        return tuple(self._plain(item, f"{path}[{index}]") for index, item in enumerate(value))


def _has_attributes(value: Any) -> bool:
    """Whether plain data hold something beside what they are."""
    kind = type(value)
    if kind in _PLAIN or isinstance(value, enum.Enum):
        return False
    own = (each for base in kind.__mro__ if base not in _PLAIN for each in vars(base).values())
    return bool(getattr(value, "__dict__", None)) or any(isinstance(each, types.MemberDescriptorType) for each in own)


def _incomparable(value: object, path: str) -> CannotGroupError:
    return CannotGroupError(f"hold {path!r}, a {type(value).__name__}, which can't be compared")


def _at(path: str) -> str:
    return f" (at {path!r})" if path else ""


def copied(value: Any, of: Callable[[Any], Any] = lambda item: item) -> Any:
    """A copy of containers within containers, of whatever kind, that hold ``of`` what the others hold."""
    kind = type(value)
    if kind is dict:
        return {key: copied(item, of) for key, item in value.items()}
    if kind in (list, set, frozenset):
        return kind(copied(item, of) for item in value)
    if isinstance(value, tuple):
        items = tuple(copied(item, of) for item in value)
        is_same = all(item is was for item, was in zip(items, value, strict=True))
        return value if is_same else tuple.__new__(kind, items)
    if not isinstance(value, CONTAINERS):
        return of(value)
    twin: Any = copy.copy(value)
    if isinstance(value, dict):
        for key, item in value.items():
            dict.__setitem__(twin, key, copied(item, of))
    elif isinstance(value, list):
        list.__setitem__(twin, slice(None), [copied(item, of) for item in value])
    return twin


def shared_tensor(members: Sequence[Watched]) -> str | None:
    """The name of a tensor that two of the experts share; ``None`` where each has its own."""
    seen: dict[int, int] = {}
    for number, member in enumerate(members):
        for tensor, leaves in zip(member.tensors, member.signature.leaves, strict=True):
            if seen.setdefault(id(tensor), number) != number:
                return leaves[0].name
    return None
