"""The samples of each expert, in one batch or in several."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LevelLoad:
    """The samples of one level's experts in one batch, or in several.

    Attributes:
        name: The level's name.
        samples: Samples by expert, in the config's order; zero for absent experts.
    """

    name: str
    samples: Mapping[str, float]

    @property
    def absent(self) -> tuple[str, ...]:
        """The experts without a sample, in the config's order."""
        return tuple(name for name, count in self.samples.items() if not count)

    @property
    def imbalance(self) -> float:
        """The samples of the busiest expert over the mean of all experts; see `imbalance_of`."""
        return imbalance_of(self.samples.values())

    def __str__(self) -> str:
        words = f"{self.name}: {sum(self.samples.values()):.12g} samples, imbalance {self.imbalance:.2f}"
        return f"{words}, {len(self.absent)} of {len(self.samples)} experts absent"


def imbalance_of(loads: Collection[float]) -> float:
    """``max(loads) / mean(loads)``: 1.0 if all experts have equally many samples, their number if one has all.

    This is 1 + MaxVio, the maximal violation of Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for
    Mixture-of-Experts", 2024, https://arxiv.org/abs/2408.15664: ``(max(loads) - mean(loads)) / mean(loads)``.

    Args:
        loads: The samples of each expert of a level, absent ones included.

    Returns:
        The value; 0.0 if there are no samples.
    """
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 0.0
