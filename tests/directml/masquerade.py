"""CPU tensors that claim to be DirectML's, and a record of operations that such a device would not do well.

The tests' machine has no such device, but the library chooses by a tensor's device. A mode therefore answers
``privateuseone:0`` for tensors, and takes that device for the CPU when tensors are made or moved. Below autograd
another mode sees every operation, forward and backward, and asks `operators.verdict` about it. Composite operators run
as the operators they are made of; operators that return copies on the device return copies.

Tensors are the host's if they come from NumPy or were moved to the CPU, or are made of the host's tensors alone. All
others are the device's.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import celmoe.grouped.capture
import celmoe.grouped.classes
from celmoe.grouped.capture import Captured
from celmoe.grouped.values import Ragged
from tests.directml.operators import COPIES, DTYPES, MOST_DIMS, Kind, decomposed, verdict

DEVICE = torch.device("privateuseone:0")
_CPU = torch.device("cpu")
_READS = frozenset(
    ("item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__int__", "__float__", "__index__", "is_nonzero")
)


class Finding(NamedTuple):
    """Something that the device does not do well.

    Attributes:
        what: Why not.
        operator: The kernel, or the method, that it is.
    """

    what: str
    operator: str


class Record:
    """The findings so far, and the tensors that are the host's."""

    def __init__(self) -> None:
        self.findings: Counter[Finding] = Counter()
        self.operators: Counter[str] = Counter()
        # By storage; the tensors are kept, so that no other storage takes the place.
        self._host: dict[int, torch.Tensor] = {}

    def is_host(self, tensor: torch.Tensor) -> bool:
        """True if the tensor is the host's."""
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._host

    def to_host(self, tensor: torch.Tensor) -> None:
        """Make the tensor the host's from now on, with all tensors that share its memory."""
        self._host[tensor.untyped_storage()._cdata] = tensor

    def find(self, what: str, operator: str) -> None:
        """Something was found."""
        self.findings[Finding(what, operator)] += 1


class _Answering(TorchFunctionMode):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__":
            attribute = func.__self__.__name__
            if attribute in ("device", "is_cpu") and isinstance(args[0], torch.Tensor):
                is_host = self._record.is_host(args[0])
                return is_host if attribute == "is_cpu" else (_CPU if is_host else DEVICE)
            return func(*args, **kwargs)
        if name in _READS and not self._record.is_host(args[0]):
            self._record.find(Kind.SYNC.value, name)
        if name in ("to", "cpu"):
            return self._moved(func, name, args, kwargs)
        wanted = kwargs.get("device")
        if wanted is not None:
            kwargs["device"] = _CPU
        result = func(*args, **kwargs)
        if wanted is not None and torch.device(wanted).type == "cpu":
            self._record.to_host(result)
        return result

    def _moved(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        tensor = args[0]
        options = [*args[1:], *kwargs.values()]
        wanted = _CPU if name == "cpu" else next(filter(None, map(self._device_in, options)), None)
        args = tuple(_CPU if isinstance(each, torch.device | str) else each for each in args)
        kwargs = {key: _CPU if isinstance(value, torch.device | str) else value for key, value in kwargs.items()}
        was_host = self._record.is_host(tensor)
        result = func(*args, **kwargs)
        if wanted is None or (wanted.type == "cpu") == was_host:
            return result
        if wanted.type == "cpu" and name != "cpu":
            self._record.find(Kind.SYNC.value, "to(cpu)")
        with torch.utils._python_dispatch._disable_current_modes():
            result = result.clone()
        if wanted.type == "cpu":
            self._record.to_host(result)
        return result

    def _device_in(self, option: Any) -> torch.device | None:
        if isinstance(option, torch.Tensor):
            return _CPU if self._record.is_host(option) else DEVICE
        return torch.device(option) if isinstance(option, torch.device | str) else None


class _Watching(TorchDispatchMode):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record
        self._inside: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # Operators inside of this one are nobody's calls.
        with torch._C.DisableTorchFunction():
            return self._seen(func, args, kwargs or {})

    def _seen(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        record, given = self._record, _tensors([*args, *kwargs.values()])
        # Numbers become tensors of no axes on their way.
        sized = [each for each in given if each.dim()] or given
        of_host = [each for each in sized if record.is_host(each)]
        args = _with_tensors(func, args)
        if sized and len(of_host) == len(sized):
            result = func(*args, **kwargs)
            for each in _tensors(result):
                record.to_host(each)
            return result
        found = verdict(func, args, kwargs)
        if found.kind is Kind.DECOMPOSES:
            return self._decomposed(func, args, kwargs)
        record.operators[found.reached] += 1
        if found.kind is not Kind.NATIVE:
            record.find(found.kind.value, found.reached)
        if found.reached != "copy_":
            if of_host and of_host[0].dim():
                record.find("mixes tensors of host and device", found.reached)
        elif record.is_host(args[0]):
            record.find(Kind.SYNC.value, "copy_")
        result = func(*args, **kwargs)
        if found.reached in COPIES:
            result = [each.clone() for each in result]
        for each in (*given, *_tensors(result)):
            if each.dtype not in DTYPES and not record.is_host(each):
                record.find(f"takes or gives {each.dtype}", found.reached)
            if each.dim() > MOST_DIMS:
                record.find(f"takes or gives more than {MOST_DIMS} dimensions", found.reached)
        return result

    def _decomposed(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func in self._inside:
            # Detaching calls itself; an operator that does so launches nothing.
            return func(*args, **kwargs)
        self._inside.append(func)
        try:
            with self:
                return decomposed(func, args, kwargs)
        finally:
            self._inside.remove(func)


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors among an operator's arguments or results."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [each for item in value for each in _tensors(item)] if isinstance(value, list | tuple) else []


def _with_tensors(func: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """Turn numbers into tensors if the operator takes nothing else: composite operators pass numbers on."""
    parameters = zip(func._schema.arguments, args, strict=False)
    return tuple(
        torch.scalar_tensor(value, dtype=torch.int64 if type(value) is int else None)
        if type(value) in (int, float) and str(each.type) == "Tensor"
        else value
        for each, value in parameters
    )


@contextlib.contextmanager
def _graphs_of_the_device() -> Iterator[None]:
    """Make the constants of traced graphs on the device: the mode's answers don't reach the tracer."""
    right = celmoe.grouped.classes.capture

    def capture(expert: Any, sample: Any) -> Any:
        found = right(expert, sample)
        if isinstance(found, Captured):
            for node in found.graph.nodes:
                if node.kwargs.get("device") == _CPU:
                    node.update_kwarg("device", DEVICE)
            found.module.recompile()
        return found

    with (
        mock.patch.object(celmoe.grouped.classes, "capture", capture),
        mock.patch.object(celmoe.grouped.classes, "_RECORDS", weakref.WeakKeyDictionary()),
        mock.patch.object(celmoe.grouped.capture, "_FUNCTIONS", weakref.WeakKeyDictionary()),
    ):
        yield


@contextlib.contextmanager
def masquerade() -> Iterator[Record]:
    """Make tensors claim to be DirectML's, and record the operations on them."""
    record = Record()
    from_numpy = torch.from_numpy

    def of_host(array: Any) -> torch.Tensor:
        tensor = from_numpy(array)
        record.to_host(tensor)
        return tensor

    answering = _Answering(record)
    run_backward = torch.autograd._engine_run_backward

    def answered(*args: Any, **kwargs: Any) -> Any:
        # ``torch.autograd.grad`` is a function like others: the mode is left while it runs.
        with answering:
            return run_backward(*args, **kwargs)

    # A CPU's fused attention is its own: that device has the plain one.
    with (
        _graphs_of_the_device(),
        mock.patch.object(torch, "from_numpy", of_host),
        # The placeholder of rows reads its device past all modes.
        mock.patch.object(Ragged, "device", DEVICE),
        mock.patch.object(torch.autograd, "_engine_run_backward", answered),
        sdpa_kernel(SDPBackend.MATH),
        answering,
        _Watching(record),
    ):
        yield record
