"""Processes that stand ready with a gloo group on loopback: a test sends them a function, and gets their results.

A rank that raises ends the wait of the others soon, one that hangs ends at the time limit; the processes are then
replaced, so that the next test starts anew.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

LIMIT = 60.0
# After one rank's error the others are let wait for it this long: they may be about to report the same.
GRACE = 2.0


class RankError(AssertionError):
    """A rank raised; the message holds every rank's traceback."""


class RankTimeoutError(AssertionError):
    """A rank did not come back in time."""


def _serve(rank: int, size: int, port: int, connection: Any, thresholds: tuple[int, int, int]) -> None:
    import warnings

    import torch
    import torch.distributed as dist

    warnings.simplefilter("error")
    torch.set_num_threads(1)
    gc.set_threshold(*thresholds)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=2 * LIMIT))
    while True:
        task = connection.recv()
        if task is None:
            break
        function, args = task
        # The present objects are frozen: stacking experts goes through all others.
        gc.collect()
        gc.freeze()
        try:
            torch.manual_seed(0)
            connection.send((True, function(*args)))
        except BaseException:  # noqa: BLE001  # it is the test's to see
            connection.send((False, traceback.format_exc()))


class Pool:
    """A number of processes, started when first needed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._connections: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any, limit: float = LIMIT) -> list[Any]:
        """Return the results of each rank's ``function(*args)``, by rank. Each process finds the function by its
        name."""
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, args))
        found: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + limit
        while len(found) + len(errors) < self.size and (left := deadline - time.monotonic()) > 0:
            waiting = {self._connections[rank]: rank for rank in range(self.size) if rank not in {*found, *errors}}
            for connection in wait(list(waiting), left):
                rank = waiting[connection]
                try:
                    is_good, value = connection.recv()
                except EOFError:
                    is_good, value = False, "the process is gone"
                (found if is_good else errors)[rank] = value
                if not is_good:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if len(found) == self.size:
            return [found[rank] for rank in range(self.size)]
        self.close()
        if errors:
            raise RankError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(errors.items())))
        missing = [rank for rank in range(self.size) if rank not in found]
        raise RankTimeoutError(f"ranks {missing} did not come back in {limit:.0f} s")

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        # One import of torch, and of its tracer, for all processes there will ever be.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "celmoe.distributed"]
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, port, theirs, gc.get_threshold()), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
