"""Samplers that give each rank a share of global batches; the batches do not depend on the number of ranks."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch.utils.data import Sampler

from celmoe.config import require_finite
from celmoe.errors import ConfigError, ConfigTypeError, InputError


class GlobalBatchSampler(Sampler[list[int]]):
    """Each rank's share of global batches, for ``DataLoader(batch_sampler=...)``.

    Seed and epoch alone determine an epoch's order. A global batch is a run of the order, a rank's share a run of the
    batch: the shares of all ranks, one after another, are the batch that one process would take. Every rank gets
    equally many shares. Shares of the last batch may be smaller, or empty, for no sample is dropped and none is taken
    twice. The loader's ``collate_fn`` must therefore make a batch of no samples, too; PyTorch's default one refuses.

    Args:
        num_samples: The number of samples in the data.
        batch_size: The number of samples in a global batch, of all ranks together.
        seed: The seed of the orders.
        shuffle: If true, orders are random; else samples come as they stand.
        rank: This rank; by default the rank in the process group, or 0 without a group.
        num_ranks: The number of ranks; by default the process group's, or 1 without a group.

    Raises:
        ConfigError, ConfigTypeError: A number is no integer or out of range.

    Example::

        sampler = GlobalBatchSampler(len(data), 1024, seed=7)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            for batch in DataLoader(data, batch_sampler=sampler, collate_fn=collate):
                ...
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        num_ranks: int | None = None,
    ) -> None:
        has_group = dist.is_available() and dist.is_initialized()
        if num_ranks is None:
            num_ranks = dist.get_world_size() if has_group else 1
        if rank is None:
            rank = dist.get_rank() if has_group else 0
        numbers = {"num_samples": (num_samples, 0), "batch_size": (batch_size, 1), "seed": (seed, 0)}
        for name, (value, least) in {**numbers, "num_ranks": (num_ranks, 1), "rank": (rank, 0)}.items():
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise ConfigTypeError(f"{name!r} must be an integer (got {value!r})")
            if value < least:
                raise ConfigError(f"{name!r} must be at least {least} (got {value})")
        if rank >= num_ranks:
            raise ConfigError(f"'rank' must be below 'num_ranks', {num_ranks} (got {rank})")
        # NumPy's integers are no JSON, which keeps `state_dict`.
        self.batch_size = int(batch_size)
        self.num_samples = int(num_samples)
        self._seed = int(seed)
        self._shuffle = bool(shuffle)
        self._rank = rank
        self._num_ranks = num_ranks
        self._epoch = 0
        self._start = 0

    @property
    def num_batches(self) -> int:
        """The number of global batches in an epoch."""
        return -(-self.num_samples // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch at its first batch. The epoch of `load_state_dict` goes on at its batch instead."""
        if epoch != self._epoch:
            self._epoch, self._start = epoch, 0

    def state_dict(self, num_batches_done: int) -> dict[str, Any]:
        """The state of training, from which any number of ranks can go on.

        Args:
            num_batches_done: The number of this epoch's global batches that were trained on. A loader's workers draw
                ahead, so only the training loop knows the number.
        """
        return {**self._options(), "epoch": self._epoch, "batch": num_batches_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of `state_dict`.

        Raises:
            InputError: The state is of another sampler, other data or other options, or past the epoch's end.
        """
        for name, own in self._options().items():
            if state.get(name) != own:
                raise InputError(f"'state' must be of {name} {own} (got {state.get(name)})")
        if not 0 <= state["batch"] <= self.num_batches:
            raise InputError(f"'state' must be within the epoch's {self.num_batches} batches (got {state['batch']})")
        self._epoch, self._start = state["epoch"], state["batch"]

    def _options(self) -> dict[str, Any]:
        """All that decides the batches, beside the epoch."""
        return {
            "sampler": type(self).__name__,
            "seed": self._seed,
            "batch_size": self.batch_size,
            "num_samples": self.num_samples,
            "shuffle": self._shuffle,
        }

    def order(self) -> npt.NDArray[np.int64]:
        """The epoch's samples in order, for all ranks and all batches."""
        if not self._shuffle:
            return np.arange(self.num_samples, dtype=np.int64)
        return self._random().permutation(self.num_samples)

    def _random(self) -> np.random.Generator:
        return np.random.default_rng([self._seed, self._epoch])

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()
        for batch in range(self._start, self.num_batches):
            samples = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            first = len(samples) * self._rank // self._num_ranks
            last = len(samples) * (self._rank + 1) // self._num_ranks
            yield samples[first:last].tolist()

    def __len__(self) -> int:
        return self.num_batches - self._start


class ExpertBalancedSampler(GlobalBatchSampler):
    """A `GlobalBatchSampler` that draws rare experts' samples more often.

    An expert with n samples gets a part of an epoch in proportion to ``n ** exponent``. An epoch takes all samples of
    one expert equally often, give or take one. Parts are rounded at random, so that no expert is left out for good.

    Args:
        experts: Each sample's expert, by name or id; as a rule the last level's expert.
        batch_size: See `GlobalBatchSampler`.
        exponent: 1 takes each sample once; 0 takes all experts equally often.
        epoch_size: The number of samples in an epoch; by default the number of all samples.
        seed: See `GlobalBatchSampler`.
        rank: See `GlobalBatchSampler`.
        num_ranks: See `GlobalBatchSampler`.

    Raises:
        ConfigError, ConfigTypeError: A number is out of range or no number.
    """

    def __init__(
        self,
        experts: Sequence[str] | Sequence[int] | npt.NDArray[np.generic],
        batch_size: int,
        *,
        exponent: float = 0.5,
        epoch_size: int | None = None,
        seed: int = 0,
        rank: int | None = None,
        num_ranks: int | None = None,
    ) -> None:
        names, ids, counts = np.unique(np.asarray(experts), return_inverse=True, return_counts=True)
        size = len(ids) if epoch_size is None else epoch_size
        super().__init__(size, batch_size, seed=seed, rank=rank, num_ranks=num_ranks)
        require_finite("exponent", exponent)
        if not 0 <= exponent <= 1:
            raise ConfigError(f"'exponent' must be between 0 and 1 (got {exponent!r})")
        if size and not len(names):
            raise ConfigError(f"'experts' must hold one for each sample (got none, for an epoch of {size})")
        parts = counts.astype(np.float64) ** exponent
        self._counts = counts
        # A sum of parts that is an integer must not end a rounding error below: `floor` would lose one.
        self._ends = np.round(np.cumsum(parts) / max(parts.sum(), 1.0) * size, 9)
        # Samples by expert.
        self._sorted = np.argsort(ids, kind="stable")
        self._exponent = float(exponent)
        self._checksum = zlib.crc32(ids.astype("<i8").tobytes())

    def _options(self) -> dict[str, Any]:
        return {
            **super()._options(),
            "num_samples": len(self._sorted),
            "epoch_size": self.num_samples,
            "exponent": self._exponent,
            "experts_checksum": self._checksum,
        }

    def order(self) -> npt.NDArray[np.int64]:
        """The epoch's samples in order, for all ranks and all batches."""
        random = self._random()
        if not len(self._counts):
            return np.empty(0, dtype=np.int64)
        # One random shift rounds all parts: each becomes an integer next to it, and the integers add up.
        ends = np.floor(self._ends + random.random()).astype(np.int64)
        ends[-1] = self.num_samples
        quotas = np.diff(ends, prepend=0)
        chosen: list[npt.NDArray[np.int64]] = []
        for samples, quota in zip(np.split(self._sorted, np.cumsum(self._counts)[:-1]), quotas.tolist(), strict=True):
            rounds = -(-quota // len(samples))
            chosen.extend(random.permutation(samples)[: quota - turn * len(samples)] for turn in range(rounds))
        return random.permutation(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
