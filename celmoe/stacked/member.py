"""The Python class of an expert's modules while their tensors are stacked.

A stacked module's class is made for its own class and derives from it, as with PyTorch's parametrizations. The module
answers as before, and refuses in words what it can't do.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, cast

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from celmoe.errors import StackedError
from celmoe.names import SLOT
from celmoe.torch_internals import RECURRENT_WEIGHTS, empty_recurrent, fill_recurrent, recurrent_weights

from .rows import is_sharded, local, members_here
from .stack import Entry, Place, Slot, kind_of, ordinary, slot_of

# A weak reference: a class with a module's parametrizations holds the module.
_KINDS: weakref.WeakKeyDictionary[type, weakref.ref[type]] = weakref.WeakKeyDictionary()


def stacked_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a stacked module of this class."""
    known = _KINDS.get(kind)
    made = None if known is None else known()
    if made is None:
        names: dict[str, Any] = {each: getattr(kind, each) for each in ("__module__", "__qualname__", "__doc__")}
        if issubclass(kind, nn.RNNBase):
            # Its list of weights would keep those of the time of stacking.
            names[RECURRENT_WEIGHTS] = property(recurrent_weights, lambda *_: None)
        # Not a name that the class, or one of its own bases, gives a meaning of its own.
        names |= {
            method: _refused(method, instead)
            for method, instead in _OF_PARAMETERS.items()
            if getattr(kind, method, None) is getattr(nn.Module, method)
        }
        # Calling the class makes a module of the user's own class.
        names["__new__"] = lambda _, *args, **kwargs: kind(*args, **kwargs)
        names |= {method: _noting(method) for method in _OF_CONTAINERS if hasattr(kind, method)}
        metaclass: Any = type(kind)
        made = metaclass(kind.__name__, (StackedModule, kind), names)
        _KINDS[kind] = weakref.ref(made)
    return cast(type[nn.Module], made)


def _refused(method: str, instead: str) -> Callable[..., NoReturn]:
    def refuse(self: nn.Module, *_: object, **__: object) -> NoReturn:
        slot: Slot = self.__dict__[SLOT]
        raise StackedError(
            f"{method!r} must be called on experts that are not stacked (got a module of expert "
            f"{slot.stack.names[slot.member]!r}; {instead})"
        )

    refuse.__name__ = method
    return refuse


_ALONE = "call celmoe.unstack_experts first"
_ON_ALL = "call it on the model, or on the level's modules"
# Methods that act on parameters, with the cure.
_OF_PARAMETERS = {
    **dict.fromkeys(("to", "to_empty", "type", "cpu", "cuda", "half", "float", "double", "bfloat16"), _ON_ALL),
    **dict.fromkeys(("share_memory", "zero_grad"), f"{_ON_ALL}, or {_ALONE}"),
    "requires_grad_": f"call the model's freeze or unfreeze with the expert's name, or {_ALONE}",
}


class StackedModule(nn.Module):
    """A module of an expert whose parameters are stacked with those of other experts.

    Reading a parameter gives a view of the stack. Writing into a view writes into the stack.
    """

    def __init_subclass__(cls, **_: Any) -> None:
        # Nobody wrote this class: the hooks of the user's own classes must not see it.
        pass

    def __getattr__(self, name: str) -> Any:
        slot: Slot | None = self.__dict__.get(SLOT)
        if slot is not None and name in slot.paths:
            path = slot.paths[name]
            if path is None:
                return None
            # Embeddings with a largest norm scale their weight as they read it.
            is_written = isinstance(self, nn.Embedding | nn.EmbeddingBag) and self.max_norm is not None
            return slot.stack.entry(path, slot.member, is_written=is_written)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Entry) and self._is_own(name, value):
            # `weight *= 2` has written already, and sets what it has read.
            return
        slot: Slot | None = self.__dict__.get(SLOT)
        if name == "training" and slot is not None:
            # Not a change that stays: evaluation and training alternate.
            slot.stack.trained(bool(value) - bool(self.training))
        else:
            self._changes("set", name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._changes("delete", name)
        super().__delattr__(name)

    def _changes(self, verb: str, name: str) -> None:
        """Note a change of an attribute.

        Raises:
            StackedError: The attribute is a stacked parameter.
        """
        slot: Slot | None = self.__dict__.get(SLOT)
        if slot is None:
            return
        if name in slot.paths:
            raise StackedError(
                f"{name!r} must stay a view of the stacked parameter (got an attempt to {verb} it in expert "
                f"{slot.stack.names[slot.member]!r}; write into the tensor under torch.no_grad(), or {_ALONE})"
            )
        slot.stack.changed()

    def _is_own(self, name: str, value: Entry) -> bool:
        slot = slot_of(self)
        return slot is not None and value.place == Place(slot.stack, slot.paths.get(name) or "", slot.member)

    def __dir__(self) -> list[str]:
        slot = slot_of(self)
        return sorted({*super().__dir__(), *(slot.paths if slot else ())})  # type: ignore[no-untyped-call]  # torch's own

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As usual, for a name that is not stacked."""
        self._changes("set", name)
        if isinstance(param, Entry):
            param.place.refuse("register_parameter", _ALONE)
        super().register_parameter(name, param)

    def get_parameter(self, target: str) -> nn.Parameter:
        """The parameter of this path, as a view of the stacked one."""
        path, _, name = target.rpartition(".")
        module = self.get_submodule(path)
        slot = slot_of(module)
        if slot is not None and slot.paths.get(name) is not None:
            return cast(nn.Parameter, getattr(module, name))
        return super().get_parameter(target)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As usual."""
        self._changes("set", name)
        super().add_module(name, module)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of this module and those below, as views of the stacked ones.

        Alone, without the modules below, the module answers as it holds none: the stack has them. Whoever asks each
        module of a model in turn, as `DistributedDataParallel` does, finds each tensor once.
        """
        if not recurse:
            yield from super().named_parameters(prefix, recurse, remove_duplicate)
            return
        seen: set[int] = set()
        for path, module in self.named_modules(prefix=prefix, remove_duplicate=remove_duplicate):
            for name, tensor in tensors_of(module).items():
                if tensor is None or (remove_duplicate and id(tensor) in seen):
                    continue
                if isinstance(tensor, nn.Parameter):
                    seen.add(id(tensor))
                yield f"{path}{'.' if path else ''}{name}", cast(nn.Parameter, tensor)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        kept = self._parameters
        self.__dict__["_parameters"] = tensors_of(self, prefix)
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self.__dict__["_parameters"] = kept
        slot = slot_of(self)
        for name in () if keep_vars or slot is None else slot.paths:
            if (key := f"{prefix}{name}") in destination:
                destination[key] = _with_own_storage(destination[key])

    def _load_from_state_dict(self, *args: Any) -> None:
        load = kind_of(self)._load_from_state_dict
        with _opened(self):
            load(self, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        kind, slot = kind_of(self), slot_of(self)
        if slot is not None and id(slot.stack.registry) not in memo:
            # Without the other experts there is no stack.
            return copy.deepcopy(ordinary(self, {}), memo)
        own = getattr(kind, "__deepcopy__", None)
        if own is not None and not is_parametrized(self):
            return cast(nn.Module, own(self, memo))
        made = memo[id(self)] = _blank(type(self))
        state = self.__dict__ if is_parametrized(self) else self.__getstate__()  # type: ignore[no-untyped-call]  # object's
        made.__setstate__(copy.deepcopy(state, memo))
        _note(made)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        kind = kind_of(self)
        reduced: Any = super().__reduce_ex__(protocol)
        is_usual = kind.__reduce__ is object.__reduce__ and kind.__reduce_ex__ is object.__reduce_ex__
        return (_unpickled, (kind,), *reduced[2:]) if is_usual else reduced


def _note(module: nn.Module) -> None:
    slot = slot_of(module)
    if slot is not None:
        slot.stack.modules.add(module)


def _noting(method: str) -> Any:
    def noted(self: StackedModule, *args: Any, **kwargs: Any) -> Any:
        self._changes("set", method)
        return getattr(super(StackedModule, self), method)(*args, **kwargs)

    noted.__name__ = method
    noted.__doc__ = "As usual."
    return noted


# Methods of PyTorch's containers that write into their modules without setting an attribute.
_OF_CONTAINERS = ("insert", "pop", "popitem", "clear", "update", "__delitem__")


_REGISTERED = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook", "backward_hook")
for _method in (*_REGISTERED, "buffer"):
    setattr(StackedModule, f"register_{_method}", _noting(f"register_{_method}"))


def _unpickled(kind: type[nn.Module]) -> nn.Module:
    return _blank(stacked_kind(kind))


def _blank(kind: type[nn.Module]) -> nn.Module:
    """A module of a class, without attributes, and not by the class's own ``__new__``."""
    made: nn.Module = object.__new__(kind)
    return made


def _with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage that holds nothing else.

    A file of one expert's tensors would else have the memory of all, and safetensors refuses a part of a storage.
    """
    if type(tensor) is not torch.Tensor or tensor.device.type not in ("cpu", "cuda"):
        return tensor
    return torch.from_dlpack(tensor)  # type: ignore[attr-defined]  # public, though not in its list


def tensors_of(module: nn.Module, prefix: str = "") -> dict[str, Any]:
    """A module's parameters by name, in order, with views for the stacked ones.

    Args:
        module: The module.
        prefix: The beginning of the parameters' names in the model, for `held`.
    """
    slot = slot_of(module)
    if slot is None:
        return dict(module._parameters)
    elsewhere: set[str] | None = getattr(_HELD, "elsewhere", None)
    stacked: dict[str, Any] = {}
    for name, path in slot.paths.items():
        if path is None:
            stacked[name] = None
        elif elsewhere is None or not is_sharded(whole := slot.stack.whole(path)):
            stacked[name] = slot.stack.entry(path, slot.member)
        elif slot.member in (here := members_here(whole)):
            stacked[name] = local(whole.detach()).select(0, slot.member - here.start)
        else:
            elsewhere.add(f"{prefix}{name}")
    return stacked | module._parameters


_HELD = threading.local()


def held(model: nn.Module) -> tuple[dict[str, Any], set[str]]:
    """The ``state_dict`` of a model, with those members of sharded stacks that this rank holds.

    Returns:
        The state, and the names of the members' tensors that are on other ranks.
    """
    elsewhere: set[str] = set()
    _HELD.elsewhere = elsewhere
    try:
        return dict(model.state_dict()), elsewhere
    finally:
        _HELD.elsewhere = None


@contextlib.contextmanager
def _opened(module: nn.Module) -> Iterator[None]:
    """Within, the module is an ordinary one, whose parameters are in the stack's memory.

    Parameters that are replaced meanwhile are taken over by the stack.
    """
    slot: Slot = module.__dict__[SLOT]
    kept, kind = module._parameters, type(module)
    placed = {
        name: None if path is None else slot.stack.parameter(path, slot.member) for name, path in slot.paths.items()
    }
    object.__setattr__(module, "__class__", kind_of(module))
    del module.__dict__[SLOT]
    module.__dict__["_parameters"] = placed | kept
    fill_recurrent(module)
    try:
        yield
    finally:
        found: Mapping[str, Any] = module._parameters
        object.__setattr__(module, "__class__", kind)
        _hold(module, slot)
        for name, path in slot.paths.items():
            new = found.get(name)
            if path is not None and isinstance(new, torch.Tensor) and new is not placed[name]:
                slot.stack.assign(path, slot.member, new.detach())


def close(module: nn.Module, slot: Slot) -> None:
    """Make a module a stacked one; the stack holds its parameters already."""
    slot.stack.trained(bool(module.training))
    object.__setattr__(module, "__class__", stacked_kind(type(module)))
    _hold(module, slot)


def _hold(module: nn.Module, slot: Slot) -> None:
    module.__dict__["_parameters"] = {name: each for name, each in module._parameters.items() if name not in slot.paths}
    module.__dict__[SLOT] = slot
    _note(module)
    empty_recurrent(module)


def reopen(module: nn.Module) -> None:
    """Make a stacked module an ordinary one, with parameters and gradients in memory of their own."""
    slot: Slot = module.__dict__[SLOT]
    own: dict[str, nn.Parameter | None] = {}
    for name, path in slot.paths.items():
        if path is None:
            own[name] = None
            continue
        whole = slot.stack.whole(path)
        own[name] = made = nn.Parameter(
            whole.detach()[slot.member].clone(), requires_grad=slot.stack.trains(path, slot.member)
        )
        if whole.grad is not None and slot.member not in slot.stack.frozen:
            made.grad = whole.grad[slot.member].clone()
    kind = kind_of(module)
    del module.__dict__[SLOT]
    object.__setattr__(module, "__class__", kind)
    module.__dict__["_parameters"] = own | module._parameters
    fill_recurrent(module)
