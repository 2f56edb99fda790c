"""The network: a character encoder, the hierarchy of experts, and a head over each language's edit rules.

Axes: B words, R words sorted by language (R = B), W characters of a window, C width of a character, D hidden width, F
inner width of an expert, K candidate rules of one language.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

import celmoe
from benchmarks.multilingual.batches import Batch
from benchmarks.multilingual.languages import FAMILY_OF, families_of
from benchmarks.multilingual.words import NO_RULE, WINDOW, Vocabulary

UNIVERSAL, FAMILY, LANGUAGE = "universal", "family", "language"
LEVELS = (UNIVERSAL, FAMILY, LANGUAGE)
UNIVERSAL_EXPERT = "shared"


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Sizes, and which levels keep their gradient from the level above."""

    width: int = 192
    character_width: int = 24
    universal_width: int = 512
    family_width: int = 384
    language_width: int = 128
    isolated_levels: tuple[str, ...] = ()

    def inner_width(self, level: str) -> int:
        """The inner width F of this level's experts."""
        return {UNIVERSAL: self.universal_width, FAMILY: self.family_width, LANGUAGE: self.language_width}[level]


class CharacterEncoder(nn.Module):
    """Characters int32 [B, W] and language ids int64 [B] -> hidden [B, D].

    Both windows are flush with their end of the word, so every place has a meaning of its own ("the last but one
    character"), and one matrix over all places reads endings better than pooling would, at a fraction of its cost.
    """

    def __init__(self, settings: NetworkSettings, character_count: int, language_count: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(character_count, settings.character_width)
        self.languages = nn.Embedding(language_count, settings.width)
        self.mix = nn.Linear(WINDOW * settings.character_width, settings.width)

    def forward(self, characters: torch.Tensor, language_ids: torch.Tensor) -> torch.Tensor:
        """Encode the words."""
        places = self.characters(characters).flatten(1)
        return functional.gelu(self.mix(places) + self.languages(language_ids))


class ResidualExpert(celmoe.ExpertModule):
    """hidden + W2 gelu(W1 norm(hidden)): what one family, one language, or all of them together do to a word."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, inner_width)
        self.narrow = nn.Linear(inner_width, width)

    def forward(self, batch: celmoe.ExpertBatch) -> celmoe.ExpertResult:
        """[N, D] -> [N, D]."""
        change = self.narrow(functional.gelu(self.widen(self.norm(batch.hidden))))
        return celmoe.ExpertResult(batch.hidden + change)


class RuleHead(nn.Module):
    """Scores of each language's candidate rules.

    A rule has one weight row whatever the language, and one bias a language. A word is scored against the rules that
    training has seen in its language, some 190 of the 4,000, which costs a twentieth of scoring them all.
    """

    candidates: torch.Tensor

    def __init__(self, width: int, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.languages = {language: place for place, language in enumerate(vocabulary.languages)}
        self.counts = [len(rules) for rules in vocabulary.candidates]
        flat = [rule for rules in vocabulary.candidates for rule in rules]
        self.register_buffer("candidates", torch.tensor(flat, dtype=torch.int64), persistent=False)
        self.rules = nn.Embedding(len(vocabulary.rules), width)
        self.bias = nn.Parameter(torch.zeros(len(flat)))
        nn.init.normal_(self.rules.weight, std=width**-0.5)

    def forward(self, hidden: torch.Tensor, plan: celmoe.LevelPlan) -> list[torch.Tensor]:
        """Logits [N, K] of every language present, in the plan's order of experts; N words of that language."""
        weights = self.rules(self.candidates).split(self.counts)
        biases = self.bias.split(self.counts)
        groups = hidden.index_select(0, plan.order).split(plan.counts)
        places = [self.languages[language] for language in plan.present]
        return [
            torch.addmm(biases[place], group, weights[place].t()) for place, group in zip(places, groups, strict=True)
        ]


def hierarchy_config(
    library: ModuleType, languages: Sequence[str], levels: Sequence[str], settings: NetworkSettings
) -> celmoe.CELMoEConfig:
    """The hierarchy over these languages in the terms of ``library`` (ours, or a peer with the same names).

    Only ours knows parents: a peer is told every level's routes instead.
    """
    experts: Mapping[str, Sequence[str]] = {
        UNIVERSAL: [UNIVERSAL_EXPERT],
        FAMILY: families_of(languages),
        LANGUAGE: list(languages),
    }
    parents: Mapping[str, Mapping[str, str]] = {
        UNIVERSAL: {},
        FAMILY: dict.fromkeys(experts[FAMILY], UNIVERSAL_EXPERT) if UNIVERSAL in levels else {},
        LANGUAGE: {language: FAMILY_OF[language] for language in languages} if FAMILY in levels else {},
    }

    def expert(level: str, name: str) -> celmoe.ExpertConfig:
        config: Any = library.ExpertConfig(name=name, stop_gradient_from_parent=level in settings.isolated_levels)
        if library is celmoe:
            config.parent = parents[level].get(name)
        return cast("celmoe.ExpertConfig", config)

    config: celmoe.CELMoEConfig = library.CELMoEConfig(
        hidden_size=settings.width,
        levels=[
            library.HierarchyLevelConfig(name=level, experts={name: expert(level, name) for name in experts[level]})
            for level in levels
        ],
        # Not the library's default: nothing in this network is dropped.
        fusion_dropout=0.0,
    )
    return config


class Lemmatizer(nn.Module):
    """Encoder, hierarchy and head. The hierarchy is any library's: it is made by ``library.HierarchicalCELMoE``."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        settings: NetworkSettings,
        *,
        levels: Sequence[str] = LEVELS,
        engine: str = "auto",
        library: ModuleType = celmoe,
    ) -> None:
        super().__init__()
        self.encoder = CharacterEncoder(settings, vocabulary.character_count, len(vocabulary.languages))
        options = {"engine": engine} if library is celmoe else {}
        self.hierarchy: celmoe.HierarchicalCELMoE = library.HierarchicalCELMoE(
            hierarchy_config(library, vocabulary.languages, levels, settings),
            lambda level, _name, _metadata: ResidualExpert(settings.width, settings.inner_width(level)),
            **options,
        )
        self.head = RuleHead(settings.width, vocabulary)
        self.levels = tuple(levels)

    def forward(self, batch: Batch) -> celmoe.CELMoEOutput:
        """The hierarchy's output; the losses and the evaluation put the head on it."""
        hidden = self.encoder(batch.characters, batch.plan.levels[LANGUAGE].expert_ids)
        return self.run_hierarchy(hidden, batch)

    def run_hierarchy(self, hidden: torch.Tensor, batch: Batch) -> celmoe.CELMoEOutput:
        """Hidden [B, D] through the experts; a comparison puts another way of running them here."""
        # The plan is for all levels; the universal expert alone has nothing to route.
        routing = batch.plan if self.levels == LEVELS else None
        output: celmoe.CELMoEOutput = self.hierarchy(hidden, routing=routing)
        return output


def rule_targets(batch: Batch) -> tuple[torch.Tensor, ...]:
    """Targets [N] of every language present, aligned with what `RuleHead` gives."""
    plan = batch.plan.levels[LANGUAGE]
    sorted_targets: tuple[torch.Tensor, ...] = batch.targets.index_select(0, plan.order).split(plan.counts)
    return sorted_targets


def cross_entropy(logits: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over the words whose rule is among the candidates, and how many those are."""
    sums = [
        functional.cross_entropy(scores, wanted, ignore_index=NO_RULE, reduction="sum")
        for scores, wanted in zip(logits, targets, strict=True)
    ]
    return torch.stack(sums).sum(), torch.cat(list(targets)).ne(NO_RULE).sum()
