"""Which experts can be stacked together, and what holds others back."""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from celmoe.torch_internals import RECURRENT_WEIGHTS

from .member import stacked_kind
from .stack import slot_of

# Containers within containers, and parts of functions, that are searched for tensors and modules.
_DEPTH = 6


def likeness(expert: nn.Module) -> tuple[Any, ...]:
    """A key that experts share whose tensors can be stacked: their modules' classes, and their parameters' facts."""
    return tuple(
        (
            path,
            type_before_parametrizations(module),
            tuple((name, _facts(each)) for name, each in module._parameters.items()),
        )
        for path, module in expert.named_modules()
    )


def _facts(parameter: nn.Parameter | None) -> Any:
    if parameter is None:
        return None
    return tuple(parameter.shape), parameter.dtype, parameter.device, parameter.requires_grad


def owners(model: nn.Module) -> tuple[Counter[int], Counter[int]]:
    """How many modules hold each parameter, by id, and how often each module is reached."""
    holders = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    reached = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return holders, reached


def obstacle(expert: nn.Module, holders: Mapping[int, int], reached: Mapping[int, int]) -> str | None:
    """The reason that an expert can't be stacked, in words that follow "its experts"; or ``None``.

    Args:
        expert: The expert.
        holders: See `owners`.
        reached: See `owners`.
    """
    if slot_of(expert) is not None:
        return "are stacked already"
    if not any(True for _ in expert.parameters()):
        return "have no parameters"
    inside = {id(module) for module in expert.modules()}
    for path, module in expert.named_modules():
        where = f" ({path})" if path else ""
        if reached[id(module)] > 1:
            return f"hold a module that has another place, too{where}"
        if isinstance(module, torch.jit.ScriptModule):
            return f"hold compiled code{where}"
        if (why := _of_class(type(module))) is not None:
            return f"{why}{where}"
        for name, parameter in module._parameters.items():
            if parameter is not None and (why := _of_parameter(parameter, holders)) is not None:
                return f"{why} ({path + '.' if path else ''}{name})"
        tensors = inside | {id(each) for each in expert.parameters()}
        for name, value in module.__dict__.items():
            is_own = name in _OWN or (name == RECURRENT_WEIGHTS and isinstance(module, nn.RNNBase))
            if not is_own and _reaches(value, tensors, _DEPTH):
                return f"hold a parameter or a module of their own in {path + '.' if path else ''}{name}, too"
    return None


_OWN = ("_parameters", "_modules", "_buffers")


def _of_class(kind: type[nn.Module]) -> str | None:
    """The reason that modules of a class can't take another class."""
    try:
        made = stacked_kind(kind)
        object.__setattr__(object.__new__(kind), "__class__", made)
    except Exception as error:  # noqa: BLE001  # a metaclass may raise anything
        return f"are of a class that can't be derived from ({kind.__name__}: {error})"
    return None


def _of_parameter(parameter: nn.Parameter, holders: Mapping[int, int]) -> str | None:
    if nn.parameter.is_lazy(parameter):
        return "have a parameter without a shape yet"
    if type(parameter) is not nn.Parameter:
        return f"have a parameter of class {type(parameter).__name__}"
    if parameter.layout is not torch.strided:
        return f"have a parameter of layout {parameter.layout}"
    if holders[id(parameter)] > 1:
        return "share a parameter"
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        return "have a hook on a parameter"
    if parameter.__dict__:
        return f"have a parameter with attributes of its own, {', '.join(parameter.__dict__)}"
    return None


def _reaches(value: Any, ids: Iterable[int], depth: int) -> bool:
    """If one of the objects can be reached through plain containers and functions."""
    if id(value) in ids:
        return True
    if depth == 0 or isinstance(value, type | types.ModuleType | str | bytes | int | float):
        return False
    return any(_reaches(each, ids, depth - 1) for each in _parts(value))


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), value.__dict__]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, nn.Module | torch.Tensor):
        return []
    return [vars(value)] if hasattr(value, "__dict__") else []


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # reading an empty cell raises
    except ValueError:
        return False
    return True
