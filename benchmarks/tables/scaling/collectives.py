"""The bytes that one collective moves: a rank's payload, and the traffic of a ring for it.

*Given* and *taken* are payload: the bytes of the tensors that a rank passes in and gets out. *Sent* and *received* are
bytes on the rank's links, as a ring sends them: gloo and NCCL use a ring for large payloads, and no all-reduce of two
passes sends less. Headers are not counted.

Axes: N ranks of the collective's group.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL = "all-reduce", "all-gather", "reduce-scatter", "all-to-all"
KINDS = (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL)


class Traffic(NamedTuple):
    """The bytes that one collective, or several of a kind, move at one rank; expected bytes may be fractions.

    Attributes:
        what: The purpose.
        kind: One of `KINDS`.
        given: Payload passed to the collective.
        taken: Payload that the collective returns.
        sent: Bytes that leave the rank.
        received: Bytes that reach the rank.
    """

    what: str
    kind: str
    given: float
    taken: float
    sent: float
    received: float


PAYLOAD = ("given", "taken")
QUANTITIES = (*PAYLOAD, "sent", "received")
NOTHING = Traffic("nothing", "none", 0.0, 0.0, 0.0, 0.0)


def all_reduce(what: str, nbytes: float, num_ranks: int) -> Traffic:
    """Everyone's sum of a tensor of so many bytes: N - 1 parts of 1/N go round to be summed, N - 1 to be known."""
    moved = 2 * nbytes * (num_ranks - 1) / num_ranks
    return Traffic(what, ALL_REDUCE, nbytes, nbytes, moved, moved)


def all_gather(what: str, nbytes: float, num_ranks: int) -> Traffic:
    """Everyone's shares, of ``nbytes / N`` each, known to all: N - 1 of them pass by every rank."""
    moved = nbytes * (num_ranks - 1) / num_ranks
    return Traffic(what, ALL_GATHER, nbytes / num_ranks, nbytes, moved, moved)


def reduce_scatter(what: str, nbytes: float, num_ranks: int) -> Traffic:
    """Give each rank its share of the sum of a tensor of so many bytes: N - 1 parts of 1/N go round.

    Gloo runs an all-reduce and keeps a share, so gloo sends twice as much.
    """
    moved = nbytes * (num_ranks - 1) / num_ranks
    return Traffic(what, REDUCE_SCATTER, nbytes, nbytes / num_ranks, moved, moved)


def all_to_all(what: str, given: float, taken: float, kept: float) -> Traffic:
    """Send each rank its own bytes once and straight; the sender's own share stays.

    Args:
        what: The purpose.
        given: Bytes for all ranks.
        taken: Bytes from all ranks.
        kept: Bytes of both that are the rank's own.
    """
    return Traffic(what, ALL_TO_ALL, given, taken, given - kept, taken - kept)


def total(traffic: Iterable[Traffic], what: str = "all", kind: str = "all") -> Traffic:
    """The sum."""
    return Traffic(
        what, kind, *(sum(moved) for moved in zip(NOTHING[2:], *(each[2:] for each in traffic), strict=True))
    )


def by_kind(traffic: Iterable[Traffic]) -> dict[str, Traffic]:
    """The sums of those kinds that there are."""
    given = list(traffic)
    found = {kind: [each for each in given if each.kind == kind] for kind in KINDS}
    return {kind: total(moved, kind, kind) for kind, moved in found.items() if moved}
