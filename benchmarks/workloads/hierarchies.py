"""The hierarchies of the workloads: the experts of each level, and the names that samples are routed by.

Axes: B samples, E experts of the last level.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from benchmarks.workloads.languages import FAMILY_OF, families_of

# One universal expert, about √E families and E languages; the same with the real languages of the multilingual job;
# three levels of E experts each, routed apart; and the last level alone.
TREE, JOB, EVEN, ONE_LEVEL = "tree", "job", "even", "one level"
HIERARCHIES = (TREE, JOB, EVEN, ONE_LEVEL)
UNIFORM, ZIPF = "uniform", "zipf"
_UNIVERSAL, _FAMILY, _LANGUAGE = "universal", "family", "language"
_CORE = "core"


def levels_of(hierarchy: str, num_experts: int) -> dict[str, list[str]]:
    """The experts of each level, in sorted order.

    Raises:
        ValueError: No hierarchy has this name, or not so many experts.
    """
    if hierarchy not in HIERARCHIES:
        raise ValueError(f"'hierarchy' must be one of {', '.join(HIERARCHIES)} (got {hierarchy!r})")
    if hierarchy == JOB and num_experts != len(FAMILY_OF):
        raise ValueError(f"'num_experts' must be {len(FAMILY_OF)} in the job's hierarchy (got {num_experts})")
    languages = _languages(hierarchy, num_experts)
    if hierarchy == EVEN:
        return {level: [f"{level}-{pick:03d}" for pick in range(num_experts)] for level in ("first", "second", "third")}
    if hierarchy == ONE_LEVEL:
        return {_LANGUAGE: languages}
    families = families_of(languages) if hierarchy == JOB else list(dict.fromkeys(_families(hierarchy, languages)))
    return {_UNIVERSAL: [_CORE], _FAMILY: families, _LANGUAGE: languages}


def routing_of(hierarchy: str, num_experts: int, routes: str, batch_size: int, seed: int) -> dict[str, list[str]]:
    """Names at every level, B each; a family's follow from its languages.

    Args:
        hierarchy: One of `HIERARCHIES`.
        num_experts: Experts E.
        routes: `UNIFORM`, or `ZIPF`: the n-th expert is drawn 1/n times as often as the first.
        batch_size: Samples B.
        seed: Of the draw.
    """
    draw = random.Random(seed)
    weights = _weights(num_experts, routes)
    levels = levels_of(hierarchy, num_experts)
    if hierarchy in (EVEN, ONE_LEVEL):
        return {level: draw.choices(names, weights, k=batch_size) for level, names in levels.items()}
    picks = draw.choices(range(num_experts), weights, k=batch_size)
    languages = levels[_LANGUAGE]
    families = _families(hierarchy, languages)
    # Strings of their own for every sample, as files bring them.
    return {
        _UNIVERSAL: [_CORE] * batch_size,
        _FAMILY: ["".join([*families[pick]]) for pick in picks],
        _LANGUAGE: ["".join([*languages[pick]]) for pick in picks],
    }


def shares_of(hierarchy: str, num_experts: int, routes: str) -> dict[str, dict[str, float]]:
    """By level and expert, in the order of `levels_of`: how likely a sample of `routing_of` takes it."""
    levels = levels_of(hierarchy, num_experts)
    weights = _weights(num_experts, routes)
    shares = [weight / sum(weights) for weight in weights]
    if hierarchy in (EVEN, ONE_LEVEL):
        return {level: dict(zip(names, shares, strict=True)) for level, names in levels.items()}
    families = dict.fromkeys(levels[_FAMILY], 0.0)
    for family, share in zip(_families(hierarchy, levels[_LANGUAGE]), shares, strict=True):
        families[family] += share
    languages = dict(zip(levels[_LANGUAGE], shares, strict=True))
    return {_UNIVERSAL: {_CORE: 1.0}, _FAMILY: families, _LANGUAGE: languages}


def _weights(num_experts: int, routes: str) -> list[float]:
    """The relative frequency of each expert of the last level."""
    return [1.0 if routes == UNIFORM else 1.0 / (rank + 1) for rank in range(num_experts)]


def _languages(hierarchy: str, num_experts: int) -> list[str]:
    return sorted(FAMILY_OF) if hierarchy == JOB else [f"language-{pick:03d}" for pick in range(num_experts)]


def _families(hierarchy: str, languages: Sequence[str]) -> list[str]:
    """The family of each language."""
    if hierarchy == JOB:
        return [FAMILY_OF[language] for language in languages]
    count = max(1, round(math.sqrt(len(languages))))
    return [f"family-{pick % count:02d}" for pick in range(len(languages))]
