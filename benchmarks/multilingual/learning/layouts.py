"""Contenders over several ranks, by the library's own means; a step is that of one process on the ranks' joined batch.

* ``ddp``: every rank has the whole network (`celmoe.distributed.prepare_ddp`).
* ``fsdp``: every rank has a part of each parameter (`celmoe.distributed.shard_levels`).
* ``expert``: every rank has some experts of each level (`celmoe.distributed.shard_experts`).

Under ``fsdp`` and ``expert`` no rank has the whole network, so each has one beside. It is brought up to date before it
is saved or predicts: the job's network is small, and its checkpoint is that of one process in any layout. Weights go
from one network to the other through the library's checkpoints.
"""

from __future__ import annotations

import copy
import shutil
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import celmoe
from benchmarks.multilingual.learning.batches import Batch
from benchmarks.multilingual.learning.hierarchy import LEVELS
from benchmarks.multilingual.learning.losses import Losses, LossWeights
from benchmarks.multilingual.learning.network import Lemmatizer
from benchmarks.multilingual.learning.ranks import DDP, EXPERT, Ranks
from benchmarks.multilingual.learning.training import CLIP_NORM, Contender, StepResult, count_right, make_contender
from celmoe.distributed import (
    ExpertSharding,
    joined_mean,
    load_checkpoint,
    prepare_ddp,
    save_checkpoint,
    shard_experts,
    shard_levels,
)


def mean_over_ranks(loss_sum: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """This rank's part in the mean over all ranks' words."""
    return joined_mean(loss_sum, int(count))


class _OnRanks(Contender):
    """A contender of which each rank trains on its own words."""

    def __init__(self, contender: Contender, ranks: Ranks) -> None:
        super().__init__(**{field.name: getattr(contender, field.name) for field in fields(Contender)})
        self._ranks = ranks

    def read(self, bundle: celmoe.LossBundle, batch: Batch) -> StepResult:
        """The joined batch's result."""
        terms, size = bundle.as_dict(), self._ranks.size
        right = count_right(self.losses.logits, batch)
        total, *parts, all_right = self._ranks.sums([bundle.total.item(), *terms.values(), right])
        return StepResult(
            total / size,
            {name: part / size for name, part in zip(terms, parts, strict=True)},
            all_right / batch.joined_size,
        )


class DataParallel(_OnRanks):
    """Every rank has all of it."""

    def __init__(self, contender: Contender, ranks: Ranks) -> None:
        super().__init__(contender, ranks)
        self._bundle = celmoe.LossBundle()
        self._parallel = prepare_ddp(self.network, self._total)

    def _total(self, network: Lemmatizer, batch: Batch) -> torch.Tensor:
        self._bundle = self.losses(network(batch), batch)
        return self._bundle.total

    def backward(self, batch: Batch) -> celmoe.LossBundle:
        """One process's losses and gradients; the ranks' gradients are averaged on the way."""
        self._parallel(batch).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
        return self._bundle


class _Spread(_OnRanks):
    """Every rank has some of it, and beside it a whole one, which is as old as the last call of `whole`."""

    def __init__(self, contender: Contender, whole: Contender, ranks: Ranks, folder: Path) -> None:
        super().__init__(contender, ranks)
        self.seconds, self.words = whole.seconds, whole.words
        self._whole = whole
        self._folder = folder / f"{whole.name}.part"
        self._bring(whole, self)
        self._is_joined = True

    def backward(self, batch: Batch) -> celmoe.LossBundle:
        """One process's losses and gradients; the layout's own work comes with them, or follows in a subclass."""
        self._is_joined = False
        return super().backward(batch)

    def whole(self) -> Contender:
        """All of it, on every rank; all must ask."""
        if not self._is_joined:
            self._bring(self, self._whole)
            self._is_joined = True
        self._whole.seconds, self._whole.words = self.seconds, self.words
        return self._whole

    def _bring(self, source: Contender, target: Contender) -> None:
        self._clear()
        try:
            save_checkpoint(self._folder, source.network, source.optimizer)
            load_checkpoint(self._folder, target.network, target.optimizer)
        except celmoe.CheckpointError as error:
            if isinstance(error.__cause__, RuntimeError):
                # Another rank is gone, which `Ranks.watched` puts into words.
                raise error.__cause__ from None
            raise
        finally:
            # Loading ends on all ranks at once.
            self._clear()

    def _clear(self) -> None:
        # The first rank alone, which is also the one that tells the others when to write.
        if self._ranks.is_first:
            shutil.rmtree(self._folder, ignore_errors=True)


class FullySharded(_Spread):
    """Every rank has a part of each parameter; gradients are reduced, and clipped, as one process would."""


class ExpertParallel(_Spread):
    """Every rank has some experts of each level that has several."""

    def __init__(
        self, contender: Contender, whole: Contender, ranks: Ranks, folder: Path, sharding: ExpertSharding
    ) -> None:
        super().__init__(contender, whole, ranks, folder)
        self._sharding = sharding

    def backward(self, batch: Batch) -> celmoe.LossBundle:
        """One process's losses and gradients; words travel to their experts, and gradients are averaged afterwards."""
        self._is_joined = False
        bundle = self.losses(self.network(batch), batch)
        bundle.total.backward()
        self._sharding.reduce_gradients(self.network)
        self._sharding.clip_gradients(CLIP_NORM, self.network)
        return bundle


def _losses_of(network: Lemmatizer) -> Losses:
    return Losses(network, LossWeights(), mean=mean_over_ranks)


def spread(layout: str, whole: Contender, ranks: Ranks, folder: Path) -> Contender:
    """The contender over all ranks, in a layout of `ranks.LAYOUTS`, at the step of ``whole``.

    ``folder`` is one that all ranks can write to.
    """
    if layout == DDP or (layout == EXPERT and whole.network.levels != LEVELS):
        # With one expert a level there is none to give away: the ranks share the words alone.
        return DataParallel(replace(whole, losses=_losses_of(whole.network)), ranks)
    network = copy.deepcopy(whole.network)
    if layout == EXPERT:
        mesh = init_device_mesh("cpu", (ranks.size,), mesh_dim_names=("expert",))
        sharding = shard_experts(network.hierarchy, mesh)
        contender = make_contender(whole.name, network, _losses_of(network), whole.stride)
        return ExpertParallel(contender, whole, ranks, folder, sharding)
    mesh = init_device_mesh("cpu", (ranks.size,))
    shard_levels(network.hierarchy, mesh)
    # The head is called after the network.
    fully_shard(network, mesh=mesh, reshard_after_forward=False)
    return FullySharded(make_contender(whole.name, network, _losses_of(network), whole.stride), whole, ranks, folder)
