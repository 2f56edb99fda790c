"""The processes that torchrun starts: the first rank, the values they agree on, and the message when a rank is gone."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist

from benchmarks.harness.arguments import OptionError

# A rank waits so long for another one in training: a step takes less than a second, a checkpoint a few.
# How ranks share the training: see `layouts`.
DDP, FSDP, EXPERT = "ddp", "fsdp", "expert"
LAYOUTS = (DDP, FSDP, EXPERT)
TIMEOUT = timedelta(seconds=30)
# Ranks wait so long while the first one reads dictionaries, or until all have a loader process that gives batches.
STARTING_TIMEOUT = timedelta(minutes=30)


# The exit code of a rank that is left.
RANK_LOST = 1


class RankLostError(Exception):
    """Another rank is gone, or this one was told to end."""


def launched_ranks() -> int | None:
    """The number of ranks that the launcher announced; ``None`` if this process was started alone."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else None


def launched_rank() -> int:
    """The rank of this process; 0 if it was started alone."""
    return 0 if launched_ranks() is None else int(os.environ["RANK"])


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; by default it is alone, and nothing is sent.

    ``starting`` is a group of them all that waits longer, for the start; by default it is the one that trains.
    """

    rank: int = 0
    size: int = 1
    starting: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """True for the rank that speaks and writes for all."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """True if one of the ranks passes true. All ranks must call this method."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers. All must ask."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MIN)
        return int(numbers)

    def sums(self, numbers: list[float]) -> list[float]:
        """The sums over ranks. All must ask, for as many."""
        if self.size == 1:
            return numbers
        totals = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(totals)
        return totals.tolist()

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The first rank runs the block alone, however long it takes; then the others do."""
        if not self.is_first:
            self.meet()
        yield
        if self.is_first:
            self.meet()

    def meet(self) -> None:
        """Wait for all, however long they take to start."""
        if self.size > 1:
            dist.barrier(self.starting)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn the error of an exchange in the block into one sentence if another rank is gone.

        Raises:
            RankLostError: Another rank is gone.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_loss(error):
                raise
            _end_once()
            raise RankLostError(f"rank {self.rank} of {self.size} has lost another one ({_reason(error)})") from error


ALONE = Ranks()


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Meet the other ranks. A signal that ends this rank, as torchrun sends when another has failed, gets a sentence.

    Raises:
        OptionError: This PyTorch lacks ``celmoe.distributed``'s needs.
        RankLostError: They did not come; in the block: this rank was told to end.
    """
    try:
        import_module("celmoe.distributed")
    except ImportError as error:
        raise OptionError(f"'--parallel' must have a PyTorch that runs celmoe.distributed (got: {error})") from None
    size, rank = launched_ranks(), launched_rank()
    assert size is not None

    def end(number: int, frame: FrameType | None) -> NoReturn:
        del number, frame
        _end_once()
        raise RankLostError(f"rank {rank} of {size} was told to end, as all are when one has failed")

    before = signal.signal(signal.SIGTERM, end)
    with Ranks(rank, size).watched():
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=TIMEOUT)
        starting = dist.new_group(timeout=STARTING_TIMEOUT)
    try:
        yield Ranks(rank, size, starting)
    except RankLostError:
        atexit.register(_leave)
        raise
    dist.destroy_process_group()
    signal.signal(signal.SIGTERM, before)


def _leave() -> None:
    """Without the interpreter's end, in which an exchange that is still under way aborts the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(RANK_LOST)


def _end_once() -> None:
    """End this rank alone: no signal, not even its loader processes' end, may cut its message short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # noqa: ARG005  # called with both


def _is_loss(error: RuntimeError) -> bool:
    # Gloo's own errors have no class.
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _reason(error: RuntimeError) -> str:
    """The first sentence, without the file of the library's that it begins with."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    _, _, text = line.partition("] ") if line.startswith("[/") else ("", "", line)
    return text.partition(". ")[0]
