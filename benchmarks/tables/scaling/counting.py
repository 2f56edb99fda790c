"""Counting the bytes that a step really moves, in two independent ways.

`Counter` sees each collective as it is dispatched. The functions of ``torch.distributed``, the functional ones, FSDP
and DDP's C++ reducer all end in operators of ``c10d`` or ``_c10d_functional``. `Counter` reads payload off the tensors,
and computes the bytes sent as a ring's.

`socket_bytes` asks the kernel for the bytes on this process's TCP connections, by any sender and any algorithm. A
collective that `Counter` missed, or an algorithm other than a ring, shows there.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.tables.scaling.collectives import Traffic, all_gather, all_reduce, all_to_all, reduce_scatter

_NAMESPACES = ("c10d", "_c10d_functional")
# They move no tensor.
_EMPTY = ("barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd")
# Offsets in Linux's tcp_info of the bytes received, sent, and sent again; 64 bits each.
_RECEIVED_AT, _SENT_AT, _RESENT_AT, _TCP_INFO_BYTES = 128, 200, 208, 216


class UnknownCollectiveError(RuntimeError):
    """A collective that `Counter` can't count: better none than a sum that lacks it."""


class Counter(TorchDispatchMode):
    """Counts, while entered, the collectives of this thread and of the backward passes that this thread starts.

    Attributes:
        traffic: One each, in their order; ``what`` is the operator's name.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch annotates it not
        self.traffic: list[Traffic] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in _NAMESPACES:
            name = func.overloadpacket.__name__
            if name in _COUNTS:
                given = {each.name: value for each, value in zip(func._schema.arguments, args, strict=False)}
                self.traffic.append(_COUNTS[name](name, {**given, **(kwargs or {})}, result))
            elif name not in _EMPTY:
                raise UnknownCollectiveError(f"a collective must be one of {', '.join(_COUNTS)} (got {func.name()!r})")
        return result


class SocketBytes(NamedTuple):
    """The payload that went over TCP so far, on the connections that are open.

    Attributes:
        sent: Bytes.
        received: Bytes.
    """

    sent: int
    received: int


def socket_bytes() -> SocketBytes:
    """Over all TCP connections of this process, headers of the network left out; Linux only.

    Raises:
        OSError: The kernel does not tell.
    """
    infos = [info for path in Path("/proc/self/fd").iterdir() if (info := _tcp_info(int(path.name))) is not None]
    if not infos:
        raise OSError("this process must have a TCP connection (got none)")
    if any(len(info) < _TCP_INFO_BYTES for info in infos):
        raise OSError(f"'TCP_INFO' must have {_TCP_INFO_BYTES} bytes (got {min(map(len, infos))}: an older kernel)")
    sent, resent, received = (
        sum(struct.unpack_from("Q", info, place)[0] for info in infos) for place in (_SENT_AT, _RESENT_AT, _RECEIVED_AT)
    )
    return SocketBytes(sent - resent, received)


def _tcp_info(descriptor: int) -> bytes | None:
    """The kernel's record of a connection; ``None`` if the descriptor is not a TCP connection's."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        return None  # that of the listing itself
    try:
        found = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None
    with found:
        if found.family not in (socket.AF_INET, socket.AF_INET6) or found.type != socket.SOCK_STREAM:
            return None
        return found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)


def _nbytes(tensors: Iterable[Any]) -> int:
    return sum(each.nbytes if isinstance(each, torch.Tensor) else _nbytes(each) for each in tensors)


def _group(given: Mapping[str, Any]) -> dist.ProcessGroup:
    if "group_name" in given:
        return dist.distributed_c10d._resolve_process_group(given["group_name"])  # type: ignore[attr-defined]
    return dist.ProcessGroup.unbox(given["process_group"])


def _all_reduce(name: str, given: Mapping[str, Any], _result: Any) -> Traffic:
    tensors = given["tensors"] if "tensors" in given else [given["input"]]
    return all_reduce(name, _nbytes(tensors), _group(given).size())


def _all_gather(name: str, given: Mapping[str, Any], result: Any) -> Traffic:
    whole = next((given[key] for key in ("output_tensor", "output_tensors") if key in given), result)
    return all_gather(name, _nbytes([whole]), _group(given).size())


def _reduce_scatter(name: str, given: Mapping[str, Any], _result: Any) -> Traffic:
    whole = given["input_tensor"] if "input_tensor" in given else given["input"]
    return reduce_scatter(name, _nbytes([whole]), _group(given).size())


def _all_to_all(name: str, given: Mapping[str, Any], result: Any) -> Traffic:
    rows, taken = (given["input"], given["output"]) if "output" in given else (given["input"], result)
    group = _group(given)
    splits = given["input_split_sizes"]
    own = splits[group.rank()] if splits else len(rows) // group.size()
    return all_to_all(name, rows.nbytes, taken.nbytes, own * (rows.nbytes // len(rows)) if own else 0)


_COUNTS: dict[str, Callable[[str, Mapping[str, Any], Any], Traffic]] = {
    "allreduce_": _all_reduce,
    "allgather_": _all_gather,
    "_allgather_base_": _all_gather,
    "_reduce_scatter_base_": _reduce_scatter,
    "alltoall_base_": _all_to_all,
    "all_reduce": _all_reduce,
    "all_reduce_": _all_reduce,
    "all_gather_into_tensor": _all_gather,
    "reduce_scatter_tensor": _reduce_scatter,
    "all_to_all_single": _all_to_all,
}
