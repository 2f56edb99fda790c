"""The levels of experts: their sizes, their configuration, and the compiler of their routes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, cast

import celmoe
from benchmarks.multilingual.words.evidence import PROPOSALS
from benchmarks.multilingual.words.vocabulary import Vocabulary
from benchmarks.workloads.languages import FAMILY_OF

UNIVERSAL, FAMILY, LANGUAGE = "universal", "family", "language"
LEVELS = (UNIVERSAL, FAMILY, LANGUAGE)
UNIVERSAL_EXPERT = "shared"


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """Sizes, and which levels keep their gradient from the level above.

    ``width`` is D; an expert's MLP for words is as wide inside as its level says, and the one for proposals
    ``evidence_width``.
    """

    width: int = 96
    character_width: int = 24
    universal_width: int = 192
    family_width: int = 128
    language_width: int = 96
    evidence_width: int = 32
    isolated_levels: tuple[str, ...] = ()

    @property
    def hidden_size(self) -> int:
        """A word's state and the scores of its proposals."""
        return self.width + PROPOSALS

    def inner_width(self, level: str) -> int:
        """The inner width of this level's experts."""
        return {UNIVERSAL: self.universal_width, FAMILY: self.family_width, LANGUAGE: self.language_width}[level]

    def universal_alone(self) -> NetworkSettings:
        """One universal expert that computes as much for a word as an expert of each level with their fusion."""
        gates = (len(LEVELS) - 1) * self.hidden_size**2 // (2 * self.width)
        return replace(
            self,
            universal_width=sum(map(self.inner_width, LEVELS)) + gates,
            evidence_width=len(LEVELS) * self.evidence_width,
        )


def hierarchy_config(
    library: ModuleType,
    languages: Sequence[str],
    levels: Sequence[str],
    settings: NetworkSettings,
    family_of: Mapping[str, str] = FAMILY_OF,
    families: Sequence[str] | None = None,
) -> celmoe.CELMoEConfig:
    """The hierarchy over these languages in the terms of ``library`` (ours, or a peer with the same names).

    Only ours knows parents: a peer is told every level's routes instead. ``families`` are the families of all languages
    in the order of their ids, by default sorted.
    """
    experts: Mapping[str, Sequence[str]] = {
        UNIVERSAL: [UNIVERSAL_EXPERT],
        FAMILY: families or sorted({family_of[language] for language in languages}),
        LANGUAGE: list(languages),
    }
    parents: Mapping[str, Mapping[str, str]] = {
        UNIVERSAL: {},
        FAMILY: dict.fromkeys(experts[FAMILY], UNIVERSAL_EXPERT) if UNIVERSAL in levels else {},
        LANGUAGE: {language: family_of[language] for language in languages} if FAMILY in levels else {},
    }

    def expert(level: str, name: str) -> celmoe.ExpertConfig:
        config: Any = library.ExpertConfig(name=name, stop_gradient_from_parent=level in settings.isolated_levels)
        if library is celmoe:
            config.parent = parents[level].get(name)
        return cast("celmoe.ExpertConfig", config)

    config: celmoe.CELMoEConfig = library.CELMoEConfig(
        hidden_size=settings.hidden_size,
        levels=[
            library.HierarchyLevelConfig(name=level, experts={name: expert(level, name) for name in experts[level]})
            for level in levels
        ],
        # Not the library's default: nothing in this network is dropped.
        fusion_dropout=0.0,
    )
    return config


def compiler_for(vocabulary: Vocabulary) -> celmoe.RoutingCompiler:
    """Routes of a language's name to plans of all levels."""
    config = hierarchy_config(celmoe, vocabulary.languages, LEVELS, NetworkSettings(), families=vocabulary.families)
    return celmoe.RoutingCompiler(config)
