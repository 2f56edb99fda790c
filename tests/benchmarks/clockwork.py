"""Rounds with seconds of our choosing, in place of a clock's."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.harness.interleaved import Timings
from benchmarks.workloads.workload import Workload

# A round in which all take twice as long changes no ratio, and shows who divides medians.
SECONDS = {
    "one": [1.0, 2.0, 4.0, 1.0, 1.0],
    "three": [3.0, 8.0, 16.0, 3.0, 5.0],
    "half": [0.5, 1.0, 2.0, 0.5, 0.5],
}
# The ratios of "three" by "one" are 3, 4, 4, 3, 5.
RATIO, LOW, HIGH = 4.0, 3.0, 4.5


@dataclass
class Rounds:
    """Stands in for `interleave`: runs each step once, and notes the parameters that moved between two of them.

    Attributes:
        seconds: By contender, a key of `SECONDS`.
        watched: Gives the modules whose parameters should move before every step.
        runs: Contenders by round, each with true if all watched parameters moved since the last step; zeros can't.
    """

    seconds: dict
    watched: Callable = list
    runs: list = field(default_factory=list)

    def __call__(self, steps, seconds, between=lambda: None):
        for name, step in steps.items():
            after = [each for module in self.watched() for each in module.parameters() if each.any()]
            before = [each.detach().clone() for each in after]
            between()
            self.runs.append((name, all(not torch.equal(*pair) for pair in zip(before, after, strict=True))))
            step()
        return Timings({name: SECONDS[self.seconds[name]] for name in steps})


@dataclass(frozen=True)
class Spied(Workload):
    """A workload that shows the models that are made of it."""

    built: list = field(default_factory=list, compare=False)

    def build(self, package, *args, **options):
        model = super().build(package, *args, **options)
        self.built.append(model)
        return model

    def __str__(self):
        return super().__str__()
