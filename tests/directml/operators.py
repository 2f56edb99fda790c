"""DirectML's treatment of ATen operators: facts about torch-directml 0.2.5.dev240914, which is for torch 2.4.1.

Nothing here needs that package or its device. The facts are in ``data/``; operators are asked about as a
`TorchDispatchMode` sees them, below autograd, and may be those of a newer torch.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

_DATA = Path(__file__).parent / "data"

MOST_DIMS = 5
# The process is aborted for others. float64 is left out: not every such device has it.
DTYPES = frozenset(
    (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.bool)
)


class Kind(enum.Enum):
    """The device's treatment of an operator."""

    NATIVE = "runs on the device"
    HIDDEN_CPU = "runs on the CPU, without a warning"
    SYNC = "reads values back to the host"
    WRONG = "gives wrong results"
    DOUBLE = "needs float64, which not every device has"
    FALLS_BACK = "falls back to the CPU"
    DECOMPOSES = "runs other operators"


class Verdict(NamedTuple):
    """The device's treatment of a call.

    Attributes:
        kind: The treatment.
        reached: The kernel that decides it, without ``aten::``: ``add.Tensor`` reaches ``add.out``.
    """

    kind: Kind
    reached: str


# The dispatch keys of kernels for all devices; the first also has structured operators.
_STRUCTURED = "CompositeExplicitAutogradNonFunctional"
_COMPOSITE = (_STRUCTURED, "CompositeExplicitAutograd", "CompositeImplicitAutograd")


def _lines(file: str) -> Iterator[list[str]]:
    for line in (_DATA / file).read_text(encoding="ascii").splitlines():
        if line and not line.startswith("#"):
            yield line.split()


NATIVE = frozenset(line[0] for line in _lines("native.txt"))
FALLBACK = frozenset(line[0] for line in _lines("fallback.txt"))
_EXCEPTIONS = list(_lines("exceptions.txt"))
HIDDEN_CPU = frozenset(name for how, name, *_ in _EXCEPTIONS if how == "cpu")
SYNC = frozenset(name for how, name, *_ in _EXCEPTIONS if how == "sync")
DOUBLE = frozenset(name for how, name, *_ in _EXCEPTIONS if how == "double")
COPIES = frozenset(name for how, name, *_ in _EXCEPTIONS if how == "copy")
# By operator: the condition under which it is wrong.
WRONG = {name: when[0] for how, name, *when in _EXCEPTIONS if how == "wrong"}


def name_of(op: Any) -> str:
    """``add.Tensor``; the default overload has no dot."""
    name, overload = op._schema.name.removeprefix("aten::"), op._schema.overload_name
    return f"{name}.{overload}" if overload else name


def verdict(op: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Verdict:
    """Judge an operator; without arguments, conditions of wrong results count as met.

    ``DECOMPOSES`` is for operators made of others by more than naming a result: `decomposed` runs them that way.
    """
    found = _verdict(op)
    if found.kind is Kind.WRONG and args and not _CONDITIONS[WRONG[found.reached]](args, kwargs or {}):
        return Verdict(Kind.NATIVE, found.reached)
    return found


def decomposed(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operator that decomposes as the others that it is made of, on any device."""
    return op._op_dk(_key(op), *args, **kwargs)


@functools.cache
def _key(op: Any) -> Any:
    return getattr(torch._C.DispatchKey, next(key for key in _COMPOSITE if _has_kernel(op, key)))


@functools.cache
def _verdict(op: Any) -> Verdict:
    if not op._schema.name.startswith("aten::"):
        return Verdict(Kind.FALLS_BACK, op._schema.name)
    for reached in (op, *_results_of(op)):
        name = name_of(reached)
        if name in NATIVE:
            return Verdict(_kind_of_native(name), name)
        if name in FALLBACK:
            return Verdict(Kind.FALLS_BACK, name)
    # An operator without a kernel for all devices is newer than the plug-in's torch.
    is_known = any(_has_kernel(op, key) for key in _COMPOSITE)
    return Verdict(Kind.DECOMPOSES if is_known else Kind.FALLS_BACK, name_of(op))


def _kind_of_native(name: str) -> Kind:
    special = {
        Kind.HIDDEN_CPU: HIDDEN_CPU,
        Kind.SYNC: SYNC,
        Kind.DOUBLE: DOUBLE,
        Kind.WRONG: WRONG,
    }
    return next((kind for kind, names in special.items() if name in names), Kind.NATIVE)


def _has_kernel(op: Any, key: str) -> bool:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key):
        return False
    # A structured operator's is nothing but a call of the one that it names.
    return key != _STRUCTURED or not _results_of(op)


def _results_of(op: Any) -> list[Any]:
    """The operators that a structured one calls: overloads with a result to write to, which each device implements."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), _STRUCTURED):
        return []
    base = op._schema.name.removeprefix("aten::")
    packet = getattr(torch.ops.aten, base.removesuffix("_"))
    candidates = [getattr(packet, overload) for overload in packet.overloads()]
    return [
        each
        for each in candidates
        if any(argument.is_out for argument in each._schema.arguments)
        and _inputs(each) == _inputs(op)
        and not torch._C._dispatch_has_kernel_for_dispatch_key(each.name(), "CompositeExplicitAutograd")
    ]


def _inputs(op: Any) -> list[tuple[str, str]]:
    return [(each.name, str(each.type)) for each in op._schema.arguments if not each.is_out]


def _repeats(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """True if an index may name a place twice."""
    index = args[2] if len(args) > 2 else kwargs["index"]
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    return bool(index.is_meta or index.dim() == 0 or (index.sort(dim).values.diff(dim=dim) == 0).any())


def _has_no_reduction(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    # After the gradient, the input, the target and the weight.
    return bool((args[4] if len(args) > 4 else kwargs["reduction"]) == 0)


def _is_bool_by_number(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    dtypes = [each.dtype for each in tree_leaves((args[:2], dict(kwargs))) if isinstance(each, torch.Tensor)]
    return torch.bool in dtypes and len(set(dtypes)) > 1


def _is_not_contiguous(args: Sequence[Any], _: Mapping[str, Any]) -> bool:
    return not args[0].is_contiguous()


_CONDITIONS: dict[str, Callable[[Sequence[Any], Mapping[str, Any]], bool]] = {
    "repeats": _repeats,
    "no_reduction": _has_no_reduction,
    "bool_by_number": _is_bool_by_number,
    "not_contiguous": _is_not_contiguous,
}
