"""The losses of a step, put together by the library's `CELMoELossAPI`.

* ``global.rule``: cross entropy of the edit rule on the fused hidden states: the aim of training.
* ``language.size``: mean square of the words' states after the language level. This loss keeps the states small, and
  so the language experts' share of them, and prevents overfitting of little data.
* ``family->language.distance``: the distance from a word's state after its family's expert to its language's expert's.

The two beside the rule's make the experts learn faster, but do not raise the final accuracy: their weights fall to zero
by the middle of the schedule. ``notes/multilingual.md`` has the figures, and the losses that were tried and dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch.nn import functional

import celmoe
from benchmarks.multilingual.learning.batches import Batch
from benchmarks.multilingual.learning.hierarchy import FAMILY, LANGUAGE, LEVELS
from benchmarks.multilingual.learning.network import Lemmatizer, cross_entropy, rule_targets

# The share of the schedule after which only the rule's loss is left.
FADED_AFTER = 0.5


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights at the start, beside the fused prediction's own, which is 1. A weight of 0 leaves the loss out."""

    size: float = 0.1
    distance: float = 0.1


def mean(loss_sum: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The mean in one process; several ranks have a joined mean."""
    # Not in the loss's dtype: float16 has no number above 65,504.
    return (loss_sum / count.clamp(min=1).float()).to(loss_sum.dtype)


class Losses:
    """The loss bundle of one network; the universal expert alone has but the fused prediction's.

    ``mean`` makes a loss of its sum over the batch and the count of its terms.
    """

    def __init__(
        self,
        network: Lemmatizer,
        weights: LossWeights,
        library: ModuleType = celmoe,
        mean: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = mean,
    ) -> None:
        self._network = network
        self._mean = mean
        # Weights that fade, as tensors that the API multiplies with, and their first values.
        self._fading: list[tuple[torch.Tensor, float]] = []
        self._api: celmoe.CELMoELossAPI = library.CELMoELossAPI()
        self._api.add_global("rule", self._rule)
        if network.levels == LEVELS:
            if weights.size:
                self._api.add_level(LANGUAGE, "size", self._size, self._fading_weight(weights.size))
            if weights.distance:
                weight = self._fading_weight(weights.distance)
                self._api.add_bridge(FAMILY, LANGUAGE, "distance", self._distance, weight)
        self.logits: list[torch.Tensor] = []

    def __call__(self, output: celmoe.CELMoEOutput, batch: Batch) -> celmoe.LossBundle:
        """The losses of this batch; `logits` are the fused prediction's afterwards."""
        return self._api.compute(output, batch)

    def fade(self, done: float) -> None:
        """Set the weights to their values after this share of the schedule."""
        for weight, start in self._fading:
            weight.fill_(start * max(0.0, 1.0 - done / FADED_AFTER))

    def _fading_weight(self, start: float) -> torch.Tensor:
        weight = torch.tensor(start)
        self._fading.append((weight, start))
        return weight

    def _rule(self, output: celmoe.CELMoEOutput, targets: object, _context: object) -> torch.Tensor:
        assert isinstance(targets, Batch)
        self.logits = self._network.logits(output, targets)
        return self._mean(*cross_entropy(self.logits, rule_targets(targets)))

    def _size(
        self, level: celmoe.LevelOutput, _output: celmoe.CELMoEOutput, _targets: object, _context: object
    ) -> torch.Tensor:
        words = self._words(level)
        return self._mean(words.square().sum(), torch.tensor(words.numel()))

    def _distance(
        self,
        parent: celmoe.LevelOutput,
        child: celmoe.LevelOutput,
        _output: celmoe.CELMoEOutput,
        _targets: object,
        _context: object,
    ) -> torch.Tensor:
        words = self._words(child)
        squares = functional.mse_loss(words, self._words(parent).detach(), reduction="sum")
        return self._mean(squares, torch.tensor(words.numel()))

    def _words(self, level: celmoe.LevelOutput) -> torch.Tensor:
        # Proposals' scores may grow as they like.
        return level.hidden[:, : self._network.width]
