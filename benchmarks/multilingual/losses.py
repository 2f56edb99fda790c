"""The losses of a step, put together by the library's `CELMoELossAPI`.

* ``global.rule``: cross entropy of the edit rule on the fused hidden states. What we want in the end.
* ``universal.cut``: how many characters the rule takes off in front and behind, read from the universal level's output.
  Every word has this target, those too whose rule is none of the candidates, and it means the same in all languages:
  it belongs where all of them meet.
* ``family.rule``, ``language.rule``: the edit rule again, read from that level's output alone by the fusion's own gate
  and norm, so that every level's share of the fusion is worth something by itself.
* ``family->language.agreement``: the family's prediction follows the language's (Kullback-Leibler divergence, the
  language's side detached), which hands what one language has learned to its relatives.
* ``family->language.distance``: how far a language's expert moves a word from where its family's left it.

What each of them brings was measured: see ``notes/data.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

import celmoe
from benchmarks.multilingual.batches import Batch
from benchmarks.multilingual.network import FAMILY, LANGUAGE, LEVELS, UNIVERSAL, Lemmatizer, cross_entropy, rule_targets
from benchmarks.multilingual.words import LONGEST_CUTS


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights beside the fused prediction's own, which is 1. A weight of 0 leaves the loss out."""

    cut: float = 0.0
    family: float = 0.3
    language: float = 0.0
    agreement: float = 0.0
    distance: float = 0.1


def agreement(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
    """Mean divergence of the student's distribution [N, K] from the teacher's, over all words of all languages."""
    sums = [
        functional.kl_div(
            functional.log_softmax(ours, -1),
            functional.log_softmax(theirs.detach(), -1),
            reduction="sum",
            log_target=True,
        )
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(sums).sum() / sum(map(len, student))


class Losses:
    """The loss bundle of one network. The head's logits of a level are made once, however many losses read them."""

    def __init__(self, network: Lemmatizer, weights: LossWeights, library: ModuleType = celmoe) -> None:
        self._network = network
        self._api: celmoe.CELMoELossAPI = library.CELMoELossAPI()
        self._api.add_global("rule", self._rule)
        if weights.cut:
            self._api.add_level(UNIVERSAL, "cut", self._cut, weights.cut)
        if network.levels == LEVELS:
            if weights.family:
                self._api.add_level(FAMILY, "rule", self._level_rule, weights.family)
            if weights.language:
                self._api.add_level(LANGUAGE, "rule", self._level_rule, weights.language)
            if weights.agreement:
                self._api.add_bridge(FAMILY, LANGUAGE, "agreement", self._agreement, weights.agreement)
            if weights.distance:
                self._api.add_bridge(FAMILY, LANGUAGE, "distance", self._distance, weights.distance)
        self.logits: list[torch.Tensor] = []
        self._level_logits: dict[str, list[torch.Tensor]] = {}

    def __call__(self, output: celmoe.CELMoEOutput, batch: Batch) -> celmoe.LossBundle:
        """The losses of this batch; `logits` are the fused prediction's afterwards."""
        self._level_logits = {}
        return self._api.compute(output, batch)

    def _score(self, hidden: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
        logits: list[torch.Tensor] = self._network.head(hidden, batch.plan.levels[LANGUAGE])
        return logits

    def _rule(self, output: celmoe.CELMoEOutput, targets: object, _context: object) -> torch.Tensor:
        assert isinstance(targets, Batch)
        self.logits = self._score(output.fused_hidden, targets)
        return cross_entropy(self.logits, rule_targets(targets))

    def _cut(
        self, level: celmoe.LevelOutput, _output: celmoe.CELMoEOutput, targets: object, _context: object
    ) -> torch.Tensor:
        assert isinstance(targets, Batch)
        normed = functional.layer_norm(level.hidden, level.hidden.shape[-1:])
        front, behind = self._network.cuts(normed).split([longest + 1 for longest in LONGEST_CUTS], dim=-1)
        at_front, at_end = targets.cuts.unbind(-1)
        return functional.cross_entropy(front, at_front) + functional.cross_entropy(behind, at_end)

    def _score_level(self, level: celmoe.LevelOutput, batch: Batch) -> list[torch.Tensor]:
        if level.name not in self._level_logits:
            fusion: Any = self._network.hierarchy.fusion
            gate = fusion.gates[self._network.levels.index(level.name)]
            self._level_logits[level.name] = self._score(fusion.norm(gate(level.hidden)), batch)
        return self._level_logits[level.name]

    def _level_rule(
        self, level: celmoe.LevelOutput, _output: celmoe.CELMoEOutput, targets: object, _context: object
    ) -> torch.Tensor:
        assert isinstance(targets, Batch)
        return cross_entropy(self._score_level(level, targets), rule_targets(targets))

    def _agreement(
        self,
        parent: celmoe.LevelOutput,
        _child: celmoe.LevelOutput,
        _output: celmoe.CELMoEOutput,
        targets: object,
        _context: object,
    ) -> torch.Tensor:
        assert isinstance(targets, Batch)
        return agreement(self._score_level(parent, targets), self.logits)

    def _distance(
        self,
        parent: celmoe.LevelOutput,
        child: celmoe.LevelOutput,
        _output: celmoe.CELMoEOutput,
        _targets: object,
        _context: object,
    ) -> torch.Tensor:
        return functional.mse_loss(child.hidden, parent.hidden.detach())
