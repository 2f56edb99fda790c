"""The samples of each expert in one batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LevelLoad:
    """The samples of one level's experts in one batch.

    Attributes:
        name: The level's name.
        samples: Samples by expert, in the config's order; zero for absent experts.
    """

    name: str
    samples: dict[str, int]

    @property
    def absent(self) -> tuple[str, ...]:
        """The experts without a sample, in the config's order."""
        return tuple(name for name, count in self.samples.items() if not count)

    @property
    def imbalance(self) -> float:
        """The samples of the busiest expert over the mean of all experts: 1.0 if all have equally many.

        The value is 0.0 for a batch without samples.
        """
        total = sum(self.samples.values())
        return max(self.samples.values()) * len(self.samples) / total if total else 0.0

    def __str__(self) -> str:
        words = f"{self.name}: {sum(self.samples.values())} samples, imbalance {self.imbalance:.2f}"
        return f"{words}, {len(self.absent)} of {len(self.samples)} experts absent"
