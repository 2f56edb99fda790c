"""One language alone, from a checkpoint of many: its expert, the experts above it, and its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import celmoe
from benchmarks.multilingual.learning.checkpoint import vocabulary_of
from benchmarks.multilingual.learning.hierarchy import NetworkSettings
from benchmarks.multilingual.learning.network import Lemmatizer
from benchmarks.multilingual.words.vocabulary import Vocabulary, only

# The system of a run's checkpoint that has experts.
EXPERTS = "experts"

_HIERARCHY = "hierarchy."


def network_of(state: Mapping[str, Any], language: str) -> tuple[Lemmatizer, Vocabulary]:
    """The network of one language, and its vocabulary, from a checkpoint's content.

    No other expert is built. If the checkpoint is mapped into memory, the others are not read either.
    """
    whole = vocabulary_of(state)
    vocabulary, rules = only(whole, language)
    saved: Mapping[str, torch.Tensor] = state["contenders"][EXPERTS]["network"]
    network = Lemmatizer(vocabulary, NetworkSettings())
    report = celmoe.load_experts(
        network.hierarchy,
        {key.removeprefix(_HIERARCHY): value for key, value in saved.items() if key.startswith(_HIERARCHY)},
    )
    assert report.fusion
    assert not any(report.new.values())
    place = whole.languages.index(language)
    first = sum(map(len, whole.candidates[:place]))
    rows: dict[str, Any] = {
        "encoder.languages.weight": slice(place, place + 1),
        "head.rules.weight": rules,
        "head.bias": slice(first, first + len(rules)),
    }
    for name in ("encoder", "head"):
        part = network.get_submodule(name)
        part.load_state_dict({key: saved[f"{name}.{key}"][rows.get(f"{name}.{key}", ...)] for key in part.state_dict()})
    return network, vocabulary
