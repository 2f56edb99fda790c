"""The placement of experts on ranks."""

from __future__ import annotations

from collections.abc import Sequence


def balanced(costs: Sequence[float], num_ranks: int) -> tuple[int, ...]:
    """A rank for each expert: the dearest expert first, to the cheapest rank so far, so that the dearest rank is cheap.

    Every rank finds the same owners. Experts of one cost keep their order. Ranks of one cost go by their number of
    experts, then by rank.

    Args:
        costs: The cost of each expert to its rank: its bytes, or its expected samples.
        num_ranks: The number of ranks.
    """
    totals = [(0.0, 0, rank) for rank in range(num_ranks)]
    owners = [0] * len(costs)
    for expert in sorted(range(len(costs)), key=lambda each: -costs[each]):
        total, experts, rank = min(totals)
        owners[expert] = rank
        totals[rank] = (total + costs[expert], experts + 1, rank)
    return tuple(owners)
