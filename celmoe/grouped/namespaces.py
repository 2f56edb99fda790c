"""The names in the namespaces that a traced call looked into; the tracer's guards only know names that were found.

A call that caught an ``AttributeError`` or a ``KeyError`` runs differently once the missing name is there.
"""

from __future__ import annotations

import abc
import enum
import os
import re
import sys
import types
import weakref
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_OTHERS = ("torch", "numpy", "celmoe", *sys.stdlib_module_names)
# The tracer's own.
ROOTS = ("G['__builtins", "G['__import_torch_dot_")
# Metaclasses whose answers depend only on state that the tracer's guards, or the guards here, look at.
_PLAIN = (type, abc.ABCMeta, enum.EnumType)
# Functions whose results the tracer takes for constants; each has a function that shows changes of the results.
_FOLDED: dict[Any, Callable[[], Any]] = {
    os.getenv: lambda: dict(os.environ),
    sys.getrecursionlimit: sys.getrecursionlimit,
    sys.get_int_max_str_digits: sys.get_int_max_str_digits,
}
if dist.is_available():
    _FOLDED |= {
        each: lambda: dist.is_initialized() and (dist.get_rank(), dist.get_world_size())
        for each in (dist.is_initialized, dist.get_rank, dist.get_world_size)
    }
# A dict's number of names, and its last name: a new name comes last.
_NAMES = "len(d := {}), last(d), "
# Most experts hold nothing but modules, and every call checks all modules.
_NAMES_OF_MODULE = (
    "len(d := {}), next(reversed(d), None), len(d['_modules']), len(p := d['_parameters']), len(d['_buffers']), "
)


# Dicts of a module, which are checked together with the module; the tracer's own guards count hooks.
_OF_A_MODULE = re.compile(r"\.(?:__dict__|_modules|_parameters|_buffers|_\w*hooks\w*)$")


def is_library(module: str) -> bool:
    """True if nobody adds names to a module of this name, or changes them, for an expert to find."""
    return module.partition(".")[0] in _OTHERS


class Namespaces:
    """The namespaces that a graph's guards mention.

    Args:
        values: The values, by the tracer's expressions that the guards mention; ``None`` if only the tracer can tell.
        arguments: The traced function's arguments, by parameter name.
        scope: The names behind ``G`` in the tracer's expressions.
        inputs: The sources of the graph's inputs.

    Attributes:
        classes: The classes among the values. A graph must not keep them alive.
        foreign: A refusal, if a class has a metaclass of the user's.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        arguments: Mapping[str, Any],
        scope: Mapping[str, Any],
        inputs: AbstractSet[str],
    ) -> None:
        self.classes: list[weakref.ref[type]] = []
        self.foreign: str | None = None
        self._has_abstract = False
        self._scope = scope
        self._folded: list[Callable[[], Any]] = []
        self._module = ""
        groups: dict[str, list[str]] = {"expert": [], "context": [], "G": []}
        for source, value in values.items():
            group = next((name for name in groups if source.startswith((f"L['{name}']", f"{name}["))), None)
            if group is not None and not source.startswith(ROOTS):
                groups[group] += self._found(source, value)
        tensors = [each for each, value in values.items() if isinstance(value, torch.Tensor)]
        own = [each for each in tensors if each.startswith("L['expert']")]
        if not inputs >= set(own):
            # A tensor under two names is another expert's than two tensors are. The tracer guards its graph's inputs.
            groups["expert"].append(f"len({{{', '.join(f'id({each})' for each in own)}}}), ")
        self._expert, self._context, self._shared = map(_reader, groups.values())
        self._of_expert = self._expert(arguments["expert"], scope)
        self._of_context = self._context(arguments["context"], scope)
        self._of_process = self._process()

    def _found(self, source: str, value: Any) -> list[str]:
        """Expressions for the namespaces that belong to one value."""
        if isinstance(value, type):
            if value.__module__.partition(".")[0] == "celmoe":
                return []
            self.classes.append(weakref.ref(value))
            self._has_abstract |= type(value) is abc.ABCMeta
            if type(value) not in _PLAIN and not type(value).__module__.startswith("torch"):
                self.foreign = f"use the class {value.__name__}, for which {type(value).__name__} may answer anything"
            return []
        if isinstance(value, nn.Module):
            self._module = source
            return [_NAMES_OF_MODULE.format(f"{source}.__dict__")]
        if isinstance(value, dict):
            return [] if _OF_A_MODULE.search(source) else [_NAMES.format(source)]
        if isinstance(value, types.ModuleType):
            # Globals of a function come and go too often: functions rarely look for missing ones.
            is_root = source.count("[") == 1 and source.endswith("]")
            is_other = is_library(value.__name__)
            return [] if is_root or is_other else [_NAMES.format(f"{source}.__dict__")]
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType) and value in _FOLDED:
            self._folded.append(_FOLDED[value])
        if isinstance(value, types.FunctionType):
            is_other = is_library(value.__module__ or "")
            names = ("__dict__", "__annotations__")
            return [] if is_other else [_NAMES.format(f"{source}.{name}") for name in names]
        if isinstance(value, torch.Tensor):
            # The expression of the module just before has its parameters at hand.
            return [f"len({source.replace(f'{self._module}._parameters', 'p', 1)}.__dict__), "]
        if not isinstance(getattr(value, "__dict__", None), dict):
            return []
        return [_NAMES.format(f"{source}.__dict__")]

    def _process(self) -> tuple[Any, ...]:
        registered = abc.get_cache_token() if self._has_abstract else None
        return self._shared(None, self._scope), registered, [each() for each in self._folded]

    def are_as_before(self) -> bool:
        """True if all namespaces but those of experts and of the context hold the same names."""
        try:
            return self._process() == self._of_process
        except (LookupError, AttributeError, TypeError):
            return False

    def hold_for(self, expert: nn.Module) -> bool:
        """True if an expert's namespaces hold the same names; the tracer's own guards must hold."""
        return self._expert(expert, self._scope) == self._of_expert

    def hold_in(self, context: Any) -> bool:
        """True if the context's namespaces hold the same names, likewise."""
        return self._context(context, self._scope) == self._of_context


def _last(names: Mapping[Any, Any]) -> Any:
    """The last name, or its id: a graph must not keep an object alive that is a key."""
    name = next(reversed(names), None)
    return name if type(name) is str else id(name)


def _reader(expressions: list[str]) -> Callable[[Any, Mapping[str, Any]], tuple[Any, ...]]:
    """A function that reads all namespaces of an expert or of a context."""
    # In order, and none left out as a repetition: `p` stands for the parameters of the module before.
    parts = "".join(expressions).replace("L['expert']", "L").replace("L['context']", "L")
    read: Callable[..., tuple[Any, ...]] = eval(
        f"lambda L, G: ({parts})", {"id": id, "len": len, "last": _last, "next": next, "reversed": reversed}
    )
    return read
