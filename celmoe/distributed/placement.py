"""Which rank holds which expert."""

from __future__ import annotations

from collections.abc import Sequence


def balanced(costs: Sequence[float], num_ranks: int) -> tuple[int, ...]:
    """A rank for each expert, so that the dearest rank is cheap: the dearest expert first, to the cheapest rank so far.

    The same on every rank: equal costs go by their order, equal ranks by their number of experts, then by theirs.

    Args:
        costs: What each expert costs its rank: its bytes, or the samples expected of it.
        num_ranks: Ranks.
    """
    totals = [(0.0, 0, rank) for rank in range(num_ranks)]
    owners = [0] * len(costs)
    for expert in sorted(range(len(costs)), key=lambda each: -costs[each]):
        total, experts, rank = min(totals)
        owners[expert] = rank
        totals[rank] = (total + costs[expert], experts + 1, rank)
    return tuple(owners)
