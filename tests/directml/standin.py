"""A device with torch-directml's abilities, which refuses or counts the rest: our machines lack the real one.

It is a backend for the device type that torch-directml has, ``privateuseone``. PyTorch's dispatcher sees the kernels
that the plug-in registers (`operators`) and no others, so it decomposes, falls back and records for autograd as it does
there, and backward passes run in the engine's thread for the device. The kernels themselves are the CPU's, on the same
memory. Beside operators it has the device's other traits: no more than five dimensions, few dtypes, no inference mode,
and splits that are copies.

The stand-in refuses operations that would be slow, wrong or the end of the process on DirectML. `tallied` counts
hidden computations on the CPU and reads of values: a program may want them now and then.

A backend can't be taken back, so `install` is for a process of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.directml import operators, standin_backend
from tests.directml.operators import DTYPES, FALLBACK, MOST_DIMS, NATIVE, Kind, verdict
from tests.directml.standin_backend import DEVICE, Under

_HOST = torch.device("cpu")


class RefusedError(RuntimeError):
    """DirectML can't run the operator, or runs it on the CPU or wrongly."""


class FallbackError(RefusedError):
    """An operator without a kernel: it would be computed on the CPU."""


class WrongResultError(RefusedError):
    """DirectML would compute something else."""


class UnsupportedError(RefusedError):
    """A dtype, a rank or a mode that DirectML doesn't have."""


@dataclass
class Tally:
    """The calls of the device, by operator.

    Attributes:
        kernels: All kernels that ran.
        hidden: Kernels that compute on the CPU without a warning.
        reads: Kernels that read values back to the host, copies included.
        refused: The refused calls, even if the error was caught.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    hidden: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)


_tallies: list[Tally] = []
# Their kernels live as long as they do.
_libraries: list[torch.library.Library] = []
_under: list[Under] = []


@contextmanager
def tallied() -> Iterator[Tally]:
    """Count the calls of the device, in every thread."""
    tally = Tally()
    _tallies.append(tally)
    try:
        yield tally
    finally:
        _tallies.remove(tally)


def install() -> torch.device:
    """Make ``privateuseone`` the stand-in, for the rest of this process."""
    if _libraries:
        return DEVICE
    _under.append(standin_backend.register())
    torch._register_device_module(DEVICE.type, _Module)

    every = torch.library.Library("_", "IMPL", "PrivateUse1")
    # Older PyTorch takes no such kernel in Python: there all operators that would come to it are known by name.
    takes_any = hasattr(every, "fallback")
    if takes_any:
        every.fallback(_fall_back)
    aten = torch.library.Library("aten", "IMPL", "PrivateUse1")
    for name in sorted(NATIVE - _OWN.keys()):
        op = _operator(name)
        # reshape: the plug-in has one below autograd and one above, which do as PyTorch's own.
        if op is not None and not _decomposes_above_autograd(op):
            aten.impl(op, _kernel(_viewing(op) if name in _VIEWS else _computing(op, name)))
    for name, own in _OWN.items():
        aten.impl(name, _kernel(own))
    for name in sorted(FALLBACK):
        op = _operator(name)
        # Newer PyTorch makes some of others, which the plug-in's did not.
        if op is not None and (not takes_any or _is_composite(op)):
            aten.impl(op, lambda *args, _op=op, **kwargs: _fall_back(_op))
    _libraries.extend((every, aten))
    return DEVICE


class _Module:
    """The module that torch-directml registers as ``torch.privateuseone``, with the functions that PyTorch calls."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def is_autocast_enabled() -> bool:
        return False

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16]

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        torch.default_generator.manual_seed(seed)


def _operator(name: str) -> Any:
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, base, None), overload or "default", None)


def _decomposes_above_autograd(op: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


def _is_composite(op: Any) -> bool:
    keys = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key) for key in keys)


def _on_device(tensor: torch.Tensor) -> torch.Tensor:
    return _checked(_under[0](tensor, DEVICE))


def _on_host(value: Any) -> Any:
    """The same with the CPU's tensors, in the same memory."""
    if isinstance(value, torch.Tensor):
        return _under[0](_checked(value), _HOST) if value.device.type == DEVICE.type else value
    if isinstance(value, list | tuple):
        return [_on_host(each) for each in value]
    return value


def _checked(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in DTYPES:
        raise _refused(UnsupportedError(f"DirectML has no {tensor.dtype}, or not on every GPU"))
    if tensor.dim() > MOST_DIMS:
        raise _refused(UnsupportedError(f"DirectML has at most {MOST_DIMS} dimensions (got {tuple(tensor.shape)})"))
    return tensor


def _refused(error: RefusedError) -> RefusedError:
    for tally in _tallies:
        tally.refused.append(str(error))
    return error


def _note(name: str, kind: Kind) -> None:
    for tally in _tallies:
        tally.kernels[name] += 1
        if kind is Kind.HIDDEN_CPU:
            tally.hidden[name] += 1
        elif kind is Kind.SYNC:
            tally.reads[name] += 1


def _fall_back(op: Any, *args: Any, **kwargs: Any) -> Any:
    has_one = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CPU") or _is_composite(op)
    ends = "it falls back to the CPU" if has_one else "it fails, for the CPU, to which it falls back, has none either"
    raise _refused(FallbackError(f"{op} has no kernel on DirectML: {ends}"))


# Kernels.


def _kernel(compute: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_inference_mode_enabled():
            raise _refused(UnsupportedError("DirectML can't set version_counter for inference tensor: use no_grad"))
        # Observers of calls into PyTorch must not see those of a kernel.
        with torch._C.DisableTorchFunction():
            return compute(*args, **kwargs)

    return run


_HOST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_VIEWS = frozenset(("view", "as_strided", "as_strided_", "_reshape_alias", "_unsafe_view", "alias", "unfold"))


def _viewing(op: Any) -> Callable[..., Any]:
    """The CPU's kernel for views looks at sizes alone, so it takes this device's tensors."""

    def view(*args: Any, **kwargs: Any) -> Any:
        _note(operators.name_of(op), Kind.NATIVE)
        return _checked(op.redispatch(_HOST_KEYS, *args, **kwargs))

    return view


def _computing(op: Any, name: str) -> Callable[..., Any]:
    """The CPU's kernel on the same memory."""
    arguments = op._schema.arguments
    takes_tensors = [str(argument.type) == "Tensor" for argument in arguments]
    results = [argument.name for argument in arguments if argument.is_out]
    places = {argument.name: place for place, argument in enumerate(arguments) if not argument.kwarg_only}
    # The source of each of its results that does not come out of the kernel.
    returned = [_written_by(each, arguments) for each in op._schema.returns]

    def compute(*args: Any, **kwargs: Any) -> Any:
        given = [
            # A number in place of a tensor has come here as one.
            torch.tensor(each) if takes and isinstance(each, int | float) else _on_host(each)
            for each, takes in zip(args, takes_tensors, strict=False)
        ]
        named = {key: _on_host(value) for key, value in kwargs.items()}
        if "device" in named:
            named["device"] = _HOST
        kind = verdict(op, given, named).kind
        _note(name, kind)
        if kind is Kind.WRONG:
            raise _refused(WrongResultError(f"{op} gives wrong results on DirectML ({operators.WRONG[name]})"))
        if kind is Kind.DOUBLE:
            raise _refused(UnsupportedError(f"{op} computes in float64 on DirectML, which not every GPU has"))
        if kind is not Kind.HIDDEN_CPU and any(map(_is_of_host, args)):
            raise _refused(UnsupportedError(f"{op} was given tensors of the CPU and of DirectML together"))
        # Results may be resized, which shared memory can't be.
        named |= {key: torch.empty(0, dtype=named[key].dtype) for key in results}
        found = op(*given, **named)
        for key in results:
            _put(kwargs[key], named[key])
        values = [found] if len(returned) == 1 else found
        made = [
            _made(value, name) if source is None else kwargs[source] if source in kwargs else args[places[source]]
            for value, source in zip(values, returned, strict=True)
        ]
        return made[0] if len(made) == 1 else tuple(made)

    return compute


def _is_of_host(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == _HOST.type and value.dim() > 0


def _written_by(result: Any, arguments: Any) -> str | None:
    if result.alias_info is None or not result.alias_info.is_write:
        return None
    return next(
        each.name
        for each in arguments
        if each.alias_info is not None
        and each.alias_info.is_write
        and each.alias_info.before_set == result.alias_info.before_set
    )


def _made(value: Any, name: str) -> Any:
    if isinstance(value, torch.Tensor):
        return _on_device(value.clone() if name in operators.COPIES else value)
    if isinstance(value, list | tuple):
        return [_made(each, name) for each in value]
    return value


def _put(result: torch.Tensor, value: torch.Tensor) -> None:
    if result.shape == value.shape:
        _on_host(result).copy_(value)
    else:
        memory = (_on_device(value).untyped_storage(), 0, value.shape, value.stride())
        torch.ops.aten.set_.source_Storage_storage_offset.redispatch(_HOST_KEYS, result, *memory)


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> torch.Tensor:
    _note("empty.memory_format", Kind.NATIVE)
    return _on_device(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    _note("empty_strided", Kind.NATIVE)
    return _on_device(torch.empty_strided(size, stride, dtype=dtype))


def _resize(tensor: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
    _note("resize_", Kind.NATIVE)
    if list(tensor.shape) != list(size):
        _put(tensor, torch.empty(size, dtype=tensor.dtype))
    return tensor


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    is_read = source.device.type == DEVICE.type and target.device.type == _HOST.type
    _note("copy_", Kind.SYNC if is_read else Kind.NATIVE)
    _on_host(target).copy_(_on_host(source))
    return target


def _convolve(*args: Any) -> torch.Tensor:
    _note("convolution_overrideable", Kind.NATIVE)
    return _on_device(torch.ops.aten.convolution(*map(_on_host, args)))


def _convolve_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Any:
    _note("convolution_backward_overrideable", Kind.NATIVE)
    grads = torch.ops.aten.convolution_backward(*map(_on_host, (grad, x, weight)), [weight.shape[0]], *rest)
    return tuple(None if each is None else _on_device(each) for each in grads)


def _safe_softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    # Attention is made of it from PyTorch 2.5 on, by operators that have no kernel there. Before it was of this:
    return torch.ops.aten._softmax(x if dtype is None else x.to(dtype), dim, False)


# Operators for which the CPU has no kernel of that name, or one that allocates memory of its own.
_OWN: dict[str, Callable[..., Any]] = {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "resize_": _resize,
    "copy_": _copy,
    "_copy_from": lambda source, target, non_blocking=False: _copy(target, source),
    "_copy_from_and_resize": lambda source, target: _copy(_resize(target, source.shape), source),
    "convolution_overrideable": _convolve,
    "convolution_backward_overrideable": _convolve_backward,
    "_safe_softmax": _safe_softmax,
}
