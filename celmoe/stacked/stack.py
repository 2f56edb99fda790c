"""The stacked tensors of alike experts.

Axes: M members of a stack.
"""

from __future__ import annotations

import contextlib
import enum
import threading
import types
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import nn

from celmoe.based import base_tensors
from celmoe.errors import StackedError
from celmoe.names import SLOT, NamedModules
from celmoe.torch_internals import PlainTensor, fill_recurrent, version_of

from .frozen import note
from .rows import is_sharded, local, members_here


class Stack:
    """The tensors of M alike experts, which are parameters of the module that holds the level's experts.

    Args:
        registry: The level's experts by name.
        names: The members' names.
        keys: By path of a tensor in an expert (``"up.weight"``), the stacked parameter's name in the registry.

    Attributes:
        registry: See above.
        names: See above.
        keys: See above.
        version: Grows with every change of a member's attributes, and with every member that is frozen or not any more.
        mark: A text for the version, and for the number of the members' modules that are in training. A compiler
            guards texts by their values.
        frozen: The places of the members that are frozen.
        seen: ``[M]`` int64: the rows of each member that backward passes of compiled graphs have reached, until
            `presence` reads them; ``None`` before there is such a graph.
        bases: The tensors of the members' bases that compiled graphs take, by path: see `take_bases`.
    """

    #: True once a stack was made in this process.
    is_used = False

    def __init__(self, registry: NamedModules, names: Sequence[str], keys: Mapping[str, str]) -> None:
        self.registry = registry
        self.names = tuple(names)
        self.keys = dict(keys)
        self.version = 0
        self._num_training = 0
        self.frozen: frozenset[int] = frozenset()
        # The paths whose parameters are not trained only because all members are frozen.
        self._paused: tuple[str, ...] = ()
        self._forget()

    def _forget(self) -> None:
        Stack.is_used = True
        self.mark = f"{self.version}, {self._num_training}"
        self.seen: torch.Tensor | None = None
        self.bases: dict[str, torch.Tensor] = {}
        # The stacked modules, as long as they live: those that were taken out of the model, too.
        self.modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        # By place, a twin, and the state that it was filled in.
        self._twins: dict[int, tuple[nn.Module, Any]] = {}
        # True if the stacks are gathered for each run. Memory then comes and goes in one storage, which views share.
        self.is_gathered = False
        self._state: Any = None
        self._intact: tuple[Any, frozenset[int]] = None, frozenset()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in _KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()
        if self.frozen:
            note(self)

    def changed(self) -> None:
        """Note a change of a member's attributes."""
        self.version += 1
        self.mark = f"{self.version}, {self._num_training}"
        self.bases = {}

    def take_bases(self, member: nn.Module) -> None:
        """Take the tensors of a member's bases for compiled graphs, in the same memory.

        A tracer marks the parameters that it takes, and guards of captured experts see the marks.
        """
        self.bases = {path: tensor.detach() for path, tensor in base_tensors(member).items()}

    def has_bases_of(self, member: nn.Module) -> bool:
        """True if the tensors that compiled graphs take for those of a member's bases still are."""
        if not self.bases:
            return True
        now = base_tensors(member)
        return now.keys() == self.bases.keys() and all(
            (_address(now[path]), now[path].shape, now[path].dtype) == (_address(taken), taken.shape, taken.dtype)
            for path, taken in self.bases.items()
        )

    def trained(self, num_modules: int) -> None:
        """Note that so many more of the members' modules are in training."""
        self._num_training += num_modules
        self.mark = f"{self.version}, {self._num_training}"

    def whole(self, path: str) -> torch.Tensor:
        """``[M, ...]``: the stacked tensor."""
        return cast(torch.Tensor, self.registry._parameters[self.keys[path]])

    def entry(self, path: str, index: int, *, is_written: bool = False) -> torch.Tensor:
        """A member's tensor, as a view of the stack that carries gradients to the stack.

        Args:
            path: The tensor's path in the expert.
            index: The member's place.
            is_written: True if the forward pass itself writes into the tensor.
        """
        whole = self._gathered(path, index)
        # Asked twice, so that a compiler need not look at the index where nobody is frozen.
        if self.frozen and index in self.frozen:
            whole = whole.detach()
        views: dict[int, Any] | None = getattr(_LOOP, "views", None)
        if views is not None and whole.requires_grad and torch.is_grad_enabled() and not is_written:
            # The gradients of all members are put together once. A write into the stack would spoil earlier views.
            if views.get(id(whole), _NO_VIEWS)[0] != version_of(whole):
                views[id(whole)] = version_of(whole), whole.unbind(0), whole
            found: torch.Tensor = views[id(whole)][1][index]
            return found
        view = whole.select(0, index)
        if views is not None or torch.compiler.is_compiling() or type(view) is not torch.Tensor:
            return view
        entry = view.as_subclass(Entry)
        object.__setattr__(entry, "place", Place(self, path, index))
        return entry

    def parameter(self, path: str, index: int) -> nn.Parameter:
        """A member's tensor as an ordinary parameter, in the stack's memory."""
        whole = self._gathered(path, index)
        return nn.Parameter(whole.detach().select(0, index), requires_grad=self.trains(path, index))

    def _gathered(self, path: str, index: int) -> torch.Tensor:
        """``[M, ...]``: the stacked tensor, which this rank holds as a whole.

        Raises:
            StackedError: Other ranks hold parts of it.
        """
        whole = self.whole(path)
        if is_sharded(whole):
            raise StackedError(
                f"{path!r} of expert {self.names[index]!r} must be read or written while this rank holds the whole "
                f"stack (got one that is sharded over ranks; call the level's unshard() on all ranks, "
                f"model.level_modules[...].unshard(), or save_checkpoint and load_checkpoint)"
            )
        return whole

    def trains(self, path: str, index: int) -> bool:
        """True if a member's tensor requires gradients."""
        return index not in self.frozen and self.whole(path).requires_grad

    @property
    def trained_paths(self) -> tuple[str, ...]:
        """The paths of the tensors that are trained in members that are not frozen."""
        return tuple(path for path in self.keys if path in self._paused or self.whole(path).requires_grad)

    @torch.no_grad()
    def freeze(self, members: Collection[int]) -> None:
        """Freeze members: their tensors get no gradients, and lose those that they have.

        If all members are frozen, the stacked parameters require no gradients.
        """
        if not (new := set(members) - self.frozen):
            return
        self.frozen |= new
        self.changed()
        note(self)
        are_all = len(self.frozen) == len(self.names)
        for whole in map(self.whole, self.keys):
            if are_all:
                whole.grad = None
            elif whole.grad is not None:
                here = members_here(whole)
                local(whole.grad)[[member - here.start for member in sorted(new) if member in here]] = 0
        if are_all:
            self._paused = self.trained_paths
            for path in self._paused:
                self.whole(path).requires_grad_(False)

    def unfreeze(self, members: Collection[int]) -> None:
        """Let members be trained as before they were frozen."""
        if self.frozen.isdisjoint(members):
            return
        self.frozen -= set(members)
        self.changed()
        for path in self._paused:
            self.whole(path).requires_grad_()
        self._paused = ()

    def assign(self, path: str, index: int, tensor: torch.Tensor) -> None:
        """Take over a tensor for a member. The whole stack takes over its dtype and device.

        A stack on the meta device has no values: members that are given none hold NaN then.
        """
        whole = self.whole(path)
        if (whole.dtype, whole.device) != (tensor.dtype, tensor.device):
            if whole.is_meta:
                made = torch.full(whole.shape, float("nan"), dtype=tensor.dtype, device=tensor.device)
            else:
                made = whole.detach().to(tensor.device, tensor.dtype)
            whole = nn.Parameter(made, requires_grad=whole.requires_grad)
            self.registry._parameters[self.keys[path]] = whole
        with torch.no_grad():
            whole[index].copy_(tensor)

    def twins(self, members: Sequence[nn.Module], indices: Sequence[int]) -> list[nn.Module]:
        """Ordinary modules that are like members in all but their class, in the stack's memory.

        Args:
            members: The members.
            indices: Their places in the stack.
        """
        state = self.state
        return [self._twin(member, index, state) for member, index in zip(members, indices, strict=True)]

    def _twin(self, member: nn.Module, index: int, state: Any) -> nn.Module:
        twin, filled_in = self._twins.get(index, (None, None))
        if twin is None or filled_in is not state:
            # The twin stays the same object: findings on it are kept by object.
            twin = ordinary(member, {} if twin is None else {id(member): twin})
            self._twins[index] = twin, state
        return twin

    @property
    def state(self) -> object:
        """An object that stays the same as long as neither the stacks nor any member's attributes are replaced."""
        wholes = [self.whole(path) for path in self.keys]
        addresses = None if self.is_gathered else [_address(each) for each in wholes]
        state = self.mark, addresses, [(id(each), each.dtype, each.requires_grad) for each in wholes]
        if state != self._state:
            self._state = state
        return self._state

    @property
    def intact(self) -> frozenset[int]:
        """The places of the members whose stacked tensors are where they were when they were stacked."""
        state = self.state
        if self._intact[0] is not state:
            members = [self.registry[name] if name in self.registry else None for name in self.names]  # noqa: SIM401  # no `get`
            found = [place for place, member in enumerate(members) if member is not None and self._holds(member, place)]
            self._intact = state, frozenset(found)
        return self._intact[1]

    def holders(self, path: str) -> frozenset[int]:
        """The places of the members that have their tensor at a path from the stack; replaced ones have not."""
        slots = [slot_of(module) for expert in self.registry.values() for module in expert.modules()]
        return frozenset(
            slot.member for slot in slots if slot is not None and slot.stack is self and path in slot.paths.values()
        )

    def _holds(self, member: nn.Module, place: int) -> bool:
        paths = []
        for prefix, module in member.named_modules(remove_duplicate=False):
            slot = slot_of(module)
            if slot is None:
                if any(slot_of(each) is not None for each in module.modules()):
                    return False
                continue
            if slot.stack is not self or slot.member != place:
                return False
            for name, path in slot.paths.items():
                if path is not None:
                    paths.append(path)
                    if path != f"{prefix}{'.' if prefix else ''}{name}":
                        return False
        return sorted(paths) == sorted(self.keys)

    @property
    def is_fixed(self) -> bool:
        """True if members differ in nothing that could change without changing `state`.

        Their attributes are then immutable, or the same objects for all members. To be asked once a state.
        """
        members = [self.registry[name] for name in self.names if name in self.registry]
        modules = [list(member.modules()) for member in members]
        if any(slot_of(each) is None for some in modules for each in some) or len({len(each) for each in modules}) > 1:
            return False
        return all(_are_fixed(alike) for alike in zip(*modules, strict=True))


_KEPT = ("registry", "names", "keys", "version", "frozen", "_num_training", "_paused")
_NO_VIEWS: tuple[int, Any, Any] = -1, None, None


def _address(tensor: torch.Tensor) -> int | None:
    """Where a tensor's memory is; ``None`` for one that stands for others under a transform."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return None


# Dicts and sets of every module: of hooks, buffers and parameters that are not stacked. Additions to them are noted.
_REGISTERED = {name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)} - {"_modules"}
_IMMUTABLE = (
    *(bool, int, float, complex, str, bytes, types.NoneType, type, enum.Enum, types.BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def _are_fixed(modules: Sequence[nn.Module]) -> bool:
    """If the attributes of some members' modules are immutable, or the same objects for all."""
    namespaces = [module.__dict__ for module in modules]
    first = namespaces[0]
    if any(each.keys() != first.keys() for each in namespaces):
        return False
    is_recurrent = isinstance(modules[0], nn.RNNBase)
    for name in first.keys() - {"_modules", SLOT}:
        values = [each[name] for each in namespaces]
        if name in _REGISTERED:
            if any(values):
                return False
        elif any(value is not values[0] for value in values):
            # A recurrent layer's lists of names are never written into.
            lists = (list,) if is_recurrent and name.startswith("_") else ()
            if not all(_is_immutable(value, lists) for value in values):
                return False
    return True


def _is_immutable(value: Any, lists: tuple[type[Any], ...]) -> bool:
    if isinstance(value, (tuple, frozenset, *lists)):
        return all(_is_immutable(each, lists) for each in cast(Sequence[Any], value))
    return isinstance(value, _IMMUTABLE)


class Slot(NamedTuple):
    """Where the tensors of a stacked expert's module are.

    Attributes:
        stack: The stack.
        member: The expert's place in the stack.
        paths: For each parameter of the module, in order, its path in the expert; ``None`` for a parameter that is
            ``None``.
    """

    stack: Stack
    member: int
    paths: Mapping[str, str | None]


class Place(NamedTuple):
    """Where a stacked tensor is one of several."""

    stack: Stack
    path: str
    member: int

    def refuse(self, what: str, instead: str) -> NoReturn:
        """Refuse what can't be done to a view.

        Raises:
            StackedError: Always.
        """
        name = self.stack.names[self.member]
        raise StackedError(
            f"{what!r} must be called on experts that are not stacked (got {self.path!r} of expert {name!r}, a view of "
            f"the stacked parameter; {instead})"
        )


class Entry(PlainTensor):
    """A stacked expert's tensor: a view of the stack. What operations give of it are ordinary tensors."""

    place: Place

    @property
    def grad(self) -> torch.Tensor | None:
        """The expert's part of the stack's gradient."""
        stack, path, member = self.place
        grad = stack._gathered(path, member).grad
        return None if grad is None or member in stack.frozen else grad.select(0, member)

    @grad.setter
    def grad(self, value: object) -> None:
        mine = self.grad
        if mine is None or not _is_same(value, mine):
            self.place.refuse("grad", "set the gradient of the stacked parameter")

    @property
    def data(self) -> torch.Tensor:
        """The values, in the stack's memory."""
        return self.detach()

    @data.setter
    def data(self, value: object) -> None:
        # `data *= 2` has written already, and sets what it has read.
        if not _is_same(value, self):
            self.place.refuse("data", "write into the tensor, under torch.no_grad()")

    @property
    def requires_grad(self) -> bool:
        """True if the stack requires gradients, and the expert is not frozen."""
        return self.place.stack.trains(self.place.path, self.place.member)

    @requires_grad.setter
    def requires_grad(self, _value: bool) -> None:
        self.place.refuse("requires_grad", _FREEZE)

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]  # nobody writes it
        """Always false, so that PyTorch's optimizers refuse the view also where it was read without gradients."""
        return False

    def set_(self, source: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take over another tensor's values."""
        if args or kwargs or not isinstance(source, torch.Tensor) or source.shape != self.shape:
            self.place.refuse("set_", "write into the tensor, under torch.no_grad()")
        return self.copy_(source)

    def register_hook(self, _hook: Any) -> NoReturn:
        """Refused: the next read gives another view."""
        self.place.refuse("register_hook", "register it on the stacked parameter")

    def register_post_accumulate_grad_hook(self, _hook: Any) -> NoReturn:
        """Refused: the gradient is the stack's."""
        self.place.refuse("register_post_accumulate_grad_hook", "register it on the stacked parameter")

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("grad", "data", "requires_grad"):
            self.place.refuse(name, "set the attribute on the stacked parameter")
        object.__setattr__(self, name, value)

    def requires_grad_(self, _requires_grad: bool = True) -> torch.Tensor:
        """Refused: the stacked parameter requires gradients as a whole."""
        self.place.refuse("requires_grad_", _FREEZE)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.detach().clone().requires_grad_(self.requires_grad)


_FREEZE = "call the model's freeze or unfreeze with the expert's name, or celmoe.unstack_experts first"


def _is_same(value: object, tensor: torch.Tensor) -> bool:
    """If a value is a tensor's own memory."""
    return isinstance(value, torch.Tensor) and value.data_ptr() == tensor.data_ptr() and value.shape == tensor.shape


_LOOP = threading.local()


def looping() -> contextlib.AbstractContextManager[None]:
    """Within, a stack is cut once for all its members, so that a backward pass puts their gradients together once."""
    # A compiler sees all cuts, and would guard what a thread holds.
    return contextlib.nullcontext() if torch.compiler.is_dynamo_compiling() else _looping()


@contextlib.contextmanager
def _looping() -> Iterator[None]:
    before = getattr(_LOOP, "views", None)
    _LOOP.views = {}
    try:
        yield
    finally:
        _LOOP.views = before


def slot_of(module: nn.Module) -> Slot | None:
    """Where a module's tensors are stacked; ``None`` for an ordinary module."""
    slot: Slot | None = module.__dict__.get(SLOT)
    return slot


def slots_of(modules: Sequence[nn.Module]) -> Sequence[Slot | None]:
    """Where the modules' tensors are stacked; costs next to nothing where no stack was ever made."""
    return [module.__dict__.get(SLOT) for module in modules] if Stack.is_used else [None] * len(modules)


def stacks_of(registry: nn.Module) -> list[Stack]:
    """The stacks whose members are among a level's experts, in the order of these."""
    return list(dict.fromkeys(slot.stack for module in registry.modules() if (slot := slot_of(module)) is not None))


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The module's own class, whether it is stacked or not."""
    kind = type(module)
    return cast(type[nn.Module], kind.__mro__[2]) if SLOT in module.__dict__ else kind


def ordinary(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    """An ordinary module with the attributes of a stacked one, and with parameters in the stack's memory.

    Args:
        module: A stacked expert, or a module of one.
        memo: By a module's id, the module that stands for it; it is filled anew.
    """
    kind = kind_of(module)
    made = memo.get(id(module))
    if made is None:
        made = memo[id(module)] = object.__new__(kind)
    attributes = dict(module.__dict__)
    slot: Slot | None = attributes.pop(SLOT, None)
    known = made.__dict__.get("_modules", {})
    if slot is not None:
        own = {
            name: None if path is None else slot.stack.parameter(path, slot.member) for name, path in slot.paths.items()
        }
        attributes["_parameters"] = own | attributes["_parameters"]
    made.__dict__.clear()
    made.__dict__.update(attributes)
    made.__dict__["_modules"] = {name: _part(child, known.get(name), memo) for name, child in module._modules.items()}
    fill_recurrent(made)
    return made


def _part(child: nn.Module | None, known: nn.Module | None, memo: dict[int, nn.Module]) -> nn.Module | None:
    if child is None:
        return None
    if id(child) in memo:
        return memo[id(child)]
    if slot_of(child) is None:
        # What is not stacked is the same module: what changes in it is seen.
        return child
    if known is not None and type(known) is kind_of(child):
        memo[id(child)] = known
    return ordinary(child, memo)
