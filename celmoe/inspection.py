"""What the code of an expert's class may touch, so that running it once can stand for running it once for every expert.

Values, shapes and attributes are watched while an expert runs. What can't be watched is read off its code beforehand:
state that is neither the expert's own nor constant (global tables, closures over them), the identity of the expert
(``id``), other sources of randomness than PyTorch's, functions that bring an autograd of their own. Names are looked
up when the code is inspected, and whether they still mean the same is asked before every call.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import sys
import types
from collections.abc import Iterator, Mapping
from operator import is_
from typing import Any

import torch
from torch import nn

from .ragged import CannotGroupError

# Modules whose functions depend on their arguments alone. (What PyTorch computes with comes by the engine itself.)
_PURE = {"torch", "math", "cmath", "operator", "functools", "itertools", "typing", "dataclasses", "collections", "enum"}
_PURE |= {
    "celmoe",
    "abc",
    "types",
    "contextlib",
    "numbers",
    "warnings",
    "typing_extensions",
    "builtins",
    "copy",
    "__future__",
}
# In pure modules, but not pure; or with a graph of their own.
_IMPURE = {
    *("id", "hash", "globals", "locals", "vars", "open", "input", "exec", "eval", "delattr", "memoryview", "object"),
    *("checkpoint", "checkpoint_sequential", "compile", "script", "trace", "manual_seed", "seed", "initial_seed"),
    *(
        "set_rng_state",
        "get_rng_state",
        "fork_rng",
        "Generator",
        "default_generator",
        "from_numpy",
        "frombuffer",
        "from_dlpack",
    ),
    *(
        "vmap",
        "grad",
        "vjp",
        "jvp",
        "jacrev",
        "jacfwd",
        "hessian",
        "functional_call",
        "backward",
        "saved_tensors_hooks",
    ),
    *(
        "load",
        "save",
        "lru_cache",
        "cache",
        "set_default_dtype",
        "set_grad_enabled",
        "set_num_threads",
        "deterministic",
    ),
    *(
        "is_autocast_enabled",
        "stack_module_state",
        "custom_op",
        "func",
        "_dynamo",
        "distributed",
        "random",
        "synchronize",
    ),
}
_CONSTANTS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    enum.Enum,
    slice,
    types.NotImplementedType,
)
# What they wrap a class's `__repr__` in keeps a set of those that are being printed.
_PRINTERS = {"dataclasses", "reprlib"}
# What stands for a field that is made anew for every object of a dataclass.
_MARK = dataclasses._HAS_DEFAULT_FACTORY  # type: ignore[attr-defined]  # it has no public name
_ENTRY = ("forward", "__call__", "__getattr__", "__getattribute__", "__enter__", "__exit__")


class Inspection:
    """What was found in the code of a class, or of a function.

    Attributes:
        fault: Why it can't be run once for all, in words that follow "its experts", or ``None``.
    """

    def __init__(self, subject: type | types.FunctionType) -> None:
        # What the finding rests on: names by the namespace they were found in, and what they stood for.
        self._names: list[tuple[Mapping[str, Any], str, Any]] = []
        self._cells: list[tuple[types.CellType, Any]] = []
        self._bodies: list[tuple[types.FunctionType, list[Any]]] = []
        self._classes: list[tuple[type, dict[str, Any]]] = []
        self._seen: set[int] = set()
        self.fault: str | None = None
        try:
            if isinstance(subject, type):
                self._inspect_class(subject, _ENTRY if issubclass(subject, nn.Module) else tuple(vars(subject)))
            else:
                self._inspect_function(subject)
        except CannotGroupError as error:
            self.fault = str(error)

    def is_current(self) -> bool:
        """Whether all that was looked up still means the same."""
        try:
            return (
                all(space.get(name, _MISSING) is value for space, name, value in self._names)
                and all(cell.cell_contents is value for cell, value in self._cells)
                and all(_is_body(function, seen) for function, seen in self._bodies)
                and all(kind.__dict__ == seen for kind, seen in self._classes)
            )
        except Exception:  # noqa: BLE001  # attributes may compare in any way, or a cell be empty: look again
            return False

    def _inspect_class(self, kind: type, entry: tuple[str, ...]) -> None:
        own = [each for each in kind.__mro__ if not _is_trusted(each)]
        for each in own:
            self._classes.append((each, dict(each.__dict__)))
        reached, pending = set(entry), list(entry)
        while pending:
            name = pending.pop()
            for each in own:
                for function in _functions(each.__dict__.get(name)):
                    for used in self._inspect_function(function):
                        if used not in reached:
                            reached.add(used)
                            pending.append(used)

    def _inspect_function(self, function: types.FunctionType) -> set[str]:
        """The attribute names that its code uses."""
        if id(function) in self._seen or function.__globals__.get("__name__") in _PRINTERS:
            return set()
        self._seen.add(id(function))
        self._bodies.append((function, _body(function)))
        code = function.__code__
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if name == "__class__":
                continue
            try:
                value = cell.cell_contents
            except ValueError:
                raise CannotGroupError(f"read the closure's {name!r}, which has no value yet") from None
            self._cells.append((cell, value))
            if name == "__dataclass_builtins_object__" and value is object:
                # What a frozen dataclass sets the fields of a new object with.
                continue
            self._judge(value, name, "the closure's ")
        for default in [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]:
            self._judge(default, function.__name__, "a default of ")
        return self._inspect_code(code, function.__globals__)

    def _inspect_code(self, code: types.CodeType, namespace: Mapping[str, Any]) -> set[str]:
        used: set[str] = set()
        for name, chain, is_written in _accesses(code):
            used.update(chain)
            if is_written:
                raise CannotGroupError(f"wrote {name!r}, which is not their own")
            # What a `__hash__` gives is for dictionaries alone, which show nothing of it.
            is_for_dicts = name == "hash" and code.co_name == "__hash__" and name not in namespace
            if name is not None and not is_for_dicts:
                self._resolve(name, chain, namespace)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                used |= self._inspect_code(constant, namespace)
        return used

    def _resolve(self, name: str, chain: list[str], namespace: Mapping[str, Any]) -> None:
        space: Mapping[str, Any] = namespace
        if name not in namespace:
            space = vars(sys.modules["builtins"])
        if name not in space:
            raise CannotGroupError(f"read the global {name!r}, which has no value yet")
        value, path = space[name], name
        self._names.append((space, name, value))
        for attribute in chain:
            if not isinstance(value, types.ModuleType) or attribute not in vars(value):
                break
            if attribute in _IMPURE and _root(value.__name__) in _PURE:
                break
            self._names.append((vars(value), attribute, vars(value)[attribute]))
            value, path = vars(value)[attribute], f"{path}.{attribute}"
        if isinstance(value, types.ModuleType):
            blocked = next((each for each in chain if each in _IMPURE), None)
            if blocked is not None or _root(value.__name__) not in _PURE:
                raise CannotGroupError(f"used {path}{'.' + blocked if blocked else ''}")
            return
        self._judge(value, path, "the global ")

    def _judge(self, value: object, name: str, where: str) -> None:
        """Refuse what may differ from one expert to the next, or remember anything."""
        if isinstance(value, _CONSTANTS) or _is_constant_tuple(value) or value is _MARK:
            return
        if getattr(value, "__name__", name) in _IMPURE:
            raise CannotGroupError(f"used {name}")
        module = getattr(value, "__module__", None) or ""
        is_pure = not module or _root(module) in _PURE
        match value:
            case types.ModuleType():
                if _root(value.__name__) not in _PURE:
                    raise CannotGroupError(f"used {name}")
            case type():
                self._judge_class(value)
            case types.FunctionType():
                if not is_pure:
                    self._inspect_function(value)
            case types.BuiltinFunctionType() | types.MethodDescriptorType() | types.MethodWrapperType() if is_pure:
                return
            case functools.partial():
                for each in (value.func, *value.args, *value.keywords.values()):
                    self._judge(each, name, where)
            case _ if isinstance(value, torch.Tensor | nn.Module | torch.Generator) or not module.startswith(
                ("typing", "torch")
            ):
                raise CannotGroupError(f"read {where}{name!r} ({type(value).__name__})")

    def _judge_class(self, value: type) -> None:
        if issubclass(value, torch.autograd.Function):
            raise CannotGroupError(f"called the autograd function {value.__name__!r}")
        if issubclass(value, torch.Generator):
            raise CannotGroupError(f"used {value.__name__}")
        if not _is_trusted(value) and id(value) not in self._seen:
            self._seen.add(id(value))
            self._inspect_class(value, (*_ENTRY, "__init__", "__new__", "__post_init__"))


_MISSING = object()


def _body(function: types.FunctionType) -> list[Any]:
    by_name = function.__kwdefaults__ or {}
    return [function.__code__, function.__defaults__, *by_name, *by_name.values()]


def _is_body(function: types.FunctionType, seen: list[Any]) -> bool:
    body = _body(function)
    return len(body) == len(seen) and all(map(is_, body, seen))


def _root(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def _is_trusted(kind: type | types.FunctionType) -> bool:
    return _root(kind.__module__ or "") in _PURE or kind is object


def _is_constant_tuple(value: object) -> bool:
    return isinstance(value, tuple | frozenset) and all(
        isinstance(x, _CONSTANTS) or _is_constant_tuple(x) for x in value
    )


def _functions(value: object) -> Iterator[types.FunctionType]:
    """The functions behind a class's attribute."""
    match value:
        case types.FunctionType():
            yield value
        case property():
            for each in (value.fget, value.fset):
                if isinstance(each, types.FunctionType):
                    yield each
        case staticmethod() | classmethod():
            if isinstance(value.__func__, types.FunctionType):
                yield value.__func__
        case functools.cached_property():
            raise CannotGroupError("kept a property's value")
    if (wrapped := getattr(value, "__wrapped__", None)) is not None and isinstance(wrapped, types.FunctionType):
        yield wrapped


def _accesses(code: types.CodeType) -> Iterator[tuple[str | None, list[str], bool]]:
    """The globals that a code reads or writes, each with the attributes read from it; attributes of others without."""
    name: str | None = None
    chain: list[str] = []
    for instruction in dis.get_instructions(code):
        match instruction.opname:
            case "LOAD_GLOBAL" | "LOAD_NAME" | "IMPORT_NAME":
                if name is not None or chain:
                    yield name, chain, False
                name, chain = str(instruction.argval), []
                if instruction.opname == "IMPORT_NAME":
                    raise CannotGroupError(f"imported {name}")
            case "STORE_GLOBAL" | "DELETE_GLOBAL":
                yield str(instruction.argval), [], True
            case "LOAD_ATTR" | "LOAD_METHOD" | "LOAD_SUPER_ATTR":
                chain.append(str(instruction.argval))
            case "STORE_DEREF" | "DELETE_DEREF" if instruction.argval in code.co_freevars:
                yield str(instruction.argval), [], True
            case "STORE_ATTR" if name is not None:
                yield name, chain, True
                name, chain = None, []
            case "CACHE" | "EXTENDED_ARG" | "PRECALL" | "PUSH_NULL" | "NOP" | "RESUME":
                pass
            case _:
                if name is not None or chain:
                    yield name, chain, False
                name, chain = None, []
    if name is not None or chain:
        yield name, chain, False


_INSPECTIONS: dict[type | types.FunctionType, Inspection] = {}
_MOST_KEPT = 4096


def is_trusted(subject: type | types.FunctionType) -> bool:
    """Whether it is PyTorch's, ours, or of a pure module: what such code computes with is watched as it runs."""
    return _is_trusted(subject)


def inspect_code(subject: type | types.FunctionType) -> str | None:
    """Why the code of a class or function can't be run once for all; ``None`` where nothing is against it."""
    found = _INSPECTIONS.get(subject)
    if found is None or not found.is_current():
        if len(_INSPECTIONS) >= _MOST_KEPT:
            _INSPECTIONS.clear()
        found = _INSPECTIONS[subject] = Inspection(subject)
    return found.fault
