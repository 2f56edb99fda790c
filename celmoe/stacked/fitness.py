"""Which experts can be stacked together, and what holds others back."""

from __future__ import annotations

import gc
import types
import weakref
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from celmoe.torch_internals import RECURRENT, is_hooked

from .freezing import trained_paths
from .member import stacked_kind
from .stack import slot_of


def likeness(expert: nn.Module, trained: AbstractSet[str] | None = None) -> tuple[Any, ...]:
    """A key that experts share whose tensors can be stacked: their modules' classes, and their parameters' facts.

    Frozen experts have the key that they have when they are trained again.

    Args:
        expert: An ordinary expert.
        trained: The paths of the parameters that are trained then; by default the expert's own.
    """
    trained = trained_paths(expert) if trained is None else trained
    return tuple(
        (
            path,
            type_before_parametrizations(module),
            tuple(
                (name, _facts(each), f"{path}{'.' if path else ''}{name}" in trained)
                for name, each in module._parameters.items()
            ),
        )
        for path, module in expert.named_modules()
    )


def _facts(parameter: nn.Parameter | None) -> Any:
    return None if parameter is None else (tuple(parameter.shape), parameter.dtype, parameter.device)


class Owners:
    """Who holds the parameters and modules of a model.

    Args:
        model: The model.
        experts: All experts that may be stacked.
    """

    def __init__(self, model: nn.Module, experts: Sequence[nn.Module]) -> None:
        tensors = {
            id(tensor): tensor
            for module in model.modules()
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None and not nn.parameter.is_lazy(tensor)
        }
        self._holders = Counter(
            id(tensor) for module in model.modules() for tensor in module._parameters.values() if tensor is not None
        )
        self._memory = Counter(_memory_of(tensor) for tensor in tensors.values() if not tensor.is_meta)
        self._reached = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
        self._parts = {id(module) for expert in experts for module in expert.modules()}
        self._parts |= {id(parameter) for expert in experts for parameter in expert.parameters()}
        inside = {id(module) for module in model.modules()}
        self._outside = {
            id(parameter)
            for module in alive(nn.Module)
            if id(module) not in inside
            for parameter in module.__dict__.get("_parameters", {}).values()
            if parameter is not None
        }

    def obstacle(self, expert: nn.Module) -> str | None:
        """The reason that an expert can't be stacked, in words that follow "its experts"; or ``None``."""
        if slot_of(expert) is not None:
            return "are stacked already"
        if not any(True for _ in expert.parameters()):
            return "have no parameters"
        for path, module in expert.named_modules():
            where = f"{path}." if path else ""
            place = f" ({path})" if path else ""
            if self._reached[id(module)] > 1:
                return f"hold a module that has another place, too{place}"
            if isinstance(module, torch.jit.ScriptModule):
                return f"hold compiled code{place}"
            if (why := _of_class(type(module))) is not None:
                return f"{why}{place}"
            for name, parameter in module._parameters.items():
                if parameter is not None and (why := self._of_parameter(parameter)) is not None:
                    return f"{why} ({where}{name})"
            for name, value in module.__dict__.items():
                is_own = name in _OWN or (isinstance(module, nn.RNNBase) and name in RECURRENT)
                if not is_own and _reaches(value, self._parts):
                    return f"hold a parameter or a module in {where}{name}, too"
        return None

    def _of_parameter(self, parameter: nn.Parameter) -> str | None:
        if nn.parameter.is_lazy(parameter):
            return "have a parameter without a shape yet"
        if type(parameter) is not nn.Parameter:
            return f"have a parameter of class {type(parameter).__name__}"
        if parameter.layout is not torch.strided:
            return f"have a parameter of layout {parameter.layout}"
        if parameter.is_inference():
            return "have a parameter that was made in inference mode"
        if self._holders[id(parameter)] > 1:
            return "share a parameter"
        if id(parameter) in self._outside:
            return "share a parameter with a module outside the model"
        if not parameter.is_meta and self._memory[_memory_of(parameter)] > 1:
            return "have a parameter whose memory is another tensor's, too"
        if is_hooked(parameter):
            return "have a hook on a parameter"
        if parameter.__dict__:
            return f"have a parameter with attributes of its own, {', '.join(parameter.__dict__)}"
        return None


_OWN = ("_parameters", "_modules", "_buffers")


def holding(kind: type, parameters: Sequence[nn.Parameter]) -> list[Any]:
    """The optimizers of a class that hold one of the parameters."""
    ids = set(map(id, parameters))
    return [
        each
        for each in alive(kind)
        if any(id(parameter) in ids for group in each.__dict__.get("param_groups", ()) for parameter in group["params"])
    ]


def alive(kind: type) -> list[Any]:
    """All objects of a class, or of a class below it, in this process."""
    # Not `isinstance`, which asks objects that stand for others.
    return [each for each in gc.get_objects() if issubclass(type(each), kind)]


def _memory_of(tensor: torch.Tensor) -> Any:
    # An empty tensor has no memory to share.
    has_memory = tensor.layout is torch.strided and tensor.numel() > 0
    return (tensor.device, tensor.data_ptr()) if has_memory else id(tensor)


def _of_class(kind: type[nn.Module]) -> str | None:
    """The reason that modules of a class can't take another class."""
    try:
        made = stacked_kind(kind)
        object.__setattr__(object.__new__(kind), "__class__", made)
    except Exception as error:  # noqa: BLE001  # a metaclass may raise anything
        return f"are of a class that can't be derived from ({kind.__name__}: {error})"
    return None


def _reaches(value: Any, ids: AbstractSet[int]) -> bool:
    """If one of the objects can be reached from a value; true, too, if there is too much to search."""
    waiting, seen = [value], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) in ids or len(seen) > _MOST_OBJECTS:
            return True
        if id(each) in seen or isinstance(each, _ENDS):
            continue
        seen.add(id(each))
        waiting += _parts(each)
    return False


# Objects that are searched for one attribute.
_MOST_OBJECTS = 100_000
# Code, tensors and modules end a search: modules are registered, or searched as parts of the model.
_ENDS = (
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    types.CodeType,
    nn.Module,
    torch.Tensor,
    str,
    bytes,
    int,
    float,
)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, types.FunctionType):
        # Not the names of the module that the function is written in.
        cells = [each for cell in value.__closure__ or () for each in gc.get_referents(cell)]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), value.__dict__]
    if isinstance(value, weakref.ReferenceType):
        return [value()]
    return gc.get_referents(value)
