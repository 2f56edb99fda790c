"""The expected load of a step: the samples of each expert, and so of each rank that holds experts.

Axes: E experts of a level, G ranks that the experts are spread over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.tables.scaling.sizes import ModelSizes
from benchmarks.workloads.hierarchies import shares_of
from benchmarks.workloads.workload import Workload
from celmoe.distributed.placement import balanced

Floats = npt.NDArray[np.float64]


class Load(NamedTuple):
    """By level, in the config's order of experts.

    Attributes:
        shares: ``[E]``, the share of the samples that each expert gets.
        present: ``[E]``, how likely it is that an expert gets any of the step's samples, on whichever rank.
    """

    shares: Mapping[str, Floats]
    present: Mapping[str, Floats]


def expected_load(workload: Workload, num_ranks: int) -> Load:
    """The load of ranks with ``workload.batch_size`` samples each, drawn one by one: present are ``1 - (1 - p)^(N·B)``.

    Args:
        workload: Its B is a rank's.
        num_ranks: Ranks N.
    """
    samples = workload.batch_size * num_ranks
    shares = {
        level: np.array(list(by_name.values()))
        for level, by_name in shares_of(workload.hierarchy, workload.num_experts, workload.routes).items()
    }
    # A share of all would be the logarithm of zero.
    present = {level: -np.expm1(samples * np.log1p(-np.minimum(each, 1 - 1e-12))) for level, each in shares.items()}
    return Load(shares, present)


class Spread(NamedTuple):
    """Where experts are.

    Attributes:
        owners: By spread level ``[E]``, the rank of each expert.
        shares: By spread level ``[G]``, the share of the samples that is sent to each rank.
    """

    owners: Mapping[str, npt.NDArray[np.int64]]
    shares: Mapping[str, Floats]

    @property
    def busiest(self) -> int:
        """The rank that most samples are sent to, all levels together."""
        return int(np.argmax(np.sum(list(self.shares.values()), axis=0)))


def spread(sizes: ModelSizes, load: Load, num_parts: int, *, by_load: bool = False) -> Spread:
    """Compute the places that `celmoe.distributed.shard_experts` chooses: it spreads all levels of several experts.

    Args:
        sizes: The model.
        load: Gives the shares of samples.
        num_parts: Ranks G.
        by_load: Balance samples, as its ``loads`` do, in place of bytes.
    """
    owners, shares = {}, {}
    for level in sizes.levels:
        if len(level.experts) == 1:
            continue
        costs = load.shares[level.name].tolist() if by_load else level.expert_bytes.tolist()
        owners[level.name] = np.array(balanced(costs, num_parts))
        shares[level.name] = np.bincount(owners[level.name], load.shares[level.name], num_parts).astype(np.float64)
    return Spread(owners, shares)
