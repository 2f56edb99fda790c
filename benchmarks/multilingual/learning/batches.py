"""Batches: the words that a step trains on, put together and routed in the loader's processes.

Seed and step alone decide the words of a step: every epoch is a permutation of its own, cut into batches. A resumed
run, or a run with another number of loader processes, therefore meets the same words.
"""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import celmoe
from benchmarks.harness.interrupts import interrupts_held
from benchmarks.multilingual.learning.hierarchy import compiler_for
from benchmarks.multilingual.learning.ranks import ALONE, Ranks
from benchmarks.multilingual.words.vocabulary import Vocabulary, WordTable


@dataclass(kw_only=True)
class Batch:
    """B words of all languages, mixed.

    ``characters`` int32 [B, W]; ``targets`` int64 [B], positions among the candidates of the word's language;
    ``proposals`` int64 [B, M], ``counts`` uint8 [B, M, F] and ``totals`` uint8 [B, T] as in `WordTable`. ``languages``
    are the names behind ``plan``, for readers that route by strings. If several ranks share a batch, a `Batch` holds
    one rank's words, and ``joined`` is the plan of all of them.
    """

    characters: torch.Tensor
    targets: torch.Tensor
    proposals: torch.Tensor
    counts: torch.Tensor
    totals: torch.Tensor
    languages: list[str]
    plan: celmoe.RoutingPlan
    joined: celmoe.RoutingPlan | None = None

    @property
    def words_by_expert(self) -> dict[str, int]:
        """The number of words, all ranks' together, of each ``level/expert`` in the batch."""
        levels = (self.joined or self.plan).levels.values()
        return {
            f"{level.name}/{expert}": words
            for level in levels
            for expert, words in zip(level.present, level.counts, strict=True)
        }

    @property
    def joined_size(self) -> int:
        """Words of all ranks."""
        return (self.joined or self.plan).batch_size

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _MOVED}
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; the loader calls this."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _MOVED})


_MOVED = ("characters", "targets", "proposals", "counts", "totals", "plan")


class Collator:
    """Makes a batch from row numbers, and compiles its routing: the loader's ``collate_fn``.

    The routes are the vocabulary's, by a ``compiler`` that was made for it before, if there is one. Each of several
    ranks takes a run of the rows; one after another their runs are the batch of one process.
    """

    def __init__(
        self,
        words: WordTable,
        vocabulary: Vocabulary,
        compiler: celmoe.RoutingCompiler | None = None,
        *,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self._words = words
        self._languages = np.array(vocabulary.languages, dtype=object)
        self._compiler = compiler or compiler_for(vocabulary)
        self._rank = rank
        self._num_ranks = num_ranks

    def __call__(self, rows: torch.Tensor) -> Batch:
        """Rows [B] -> the batch of those words, or of this rank's of them, in that order."""
        rank, num_ranks = self._rank, self._num_ranks
        joined = None if num_ranks == 1 else self._compiler({"language": self._languages_of(rows)})
        rows = rows[len(rows) * rank // num_ranks : len(rows) * (rank + 1) // num_ranks]
        languages = self._languages_of(rows)
        return Batch(
            characters=self._words.characters[rows].int(),
            targets=self._words.targets[rows].long(),
            proposals=self._words.proposals[rows].long(),
            counts=self._words.counts[rows],
            totals=self._words.totals[rows],
            languages=languages,
            # The upper levels follow from each language expert's parent.
            plan=self._compiler({"language": languages}),
            joined=joined,
        )

    def _languages_of(self, rows: torch.Tensor) -> list[str]:
        return cast("list[str]", self._languages[self._words.language_ids[rows].numpy()].tolist())


class TrainingSteps(Dataset[torch.Tensor]):
    """Item ``step`` is the row numbers [B] that this step trains on; an epoch's last, smaller batch is left out."""

    def __init__(self, word_count: int, batch_size: int, seed: int) -> None:
        self.batch_size = min(batch_size, word_count)
        self._word_count = word_count
        self._seed = seed
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the words."""
        return self._word_count // self.batch_size

    def __getitem__(self, step: int) -> torch.Tensor:
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._permutation = torch.from_numpy(generator.permutation(self._word_count))
            self._epoch = epoch
        return self._permutation[place * self.batch_size : (place + 1) * self.batch_size]


def _begin_worker(worker_id: int) -> None:
    del worker_id
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The loader may stop a worker while the worker's queue thread still shares tensors. Before Python 3.14, an
    # interpreter's end unwinds such a thread out of torch's C++, which aborts the process. The worker therefore leaves
    # without that end, as a forked process does. Errors in here reach the parent by the queue, not by the exit code.
    atexit.register(os._exit, 0)


def training_batches(
    steps: TrainingSteps,
    collator: Collator,
    first: int,
    last: int,
    workers: int,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Generator[Batch, None, None]:
    """The batches of steps ``first`` up to ``last``; the first one comes when all ranks have theirs.

    Workers are spawned, since forking a process that runs torch's threads is not safe; the words are shared memory.
    """
    # Without automatic batching, an item of the loader is a whole batch's row numbers, and collate_fn gets them all.
    collate = cast("Callable[[list[Any]], Any]", collator)
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, last),
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_begin_worker,
        pin_memory=device.type == "cuda",
    )
    with interrupts_held():
        batches = iter(loader)
    for place, batch in enumerate(batches):
        if place == 0:
            ranks.meet()
        yield batch.to(device)


def all_batches(words: WordTable, collator: Collator, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """All words once, in the table's order, in this process."""
    for rows in torch.arange(len(words)).split(batch_size):
        yield collator(rows).to(device)
