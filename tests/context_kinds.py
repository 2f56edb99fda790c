"""Containers of many kinds, and an expert that watches them."""

from __future__ import annotations

import collections
import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

from celmoe import (
    CELMoEConfig,
    ExpertModule,
    ExpertResult,
    HierarchicalCELMoE,
)
from celmoe.engines.registry import ENGINES
from celmoe.reference import reference_forward
from tests.refusals import level

B = 4
ROUTES = ["b", "a", "b", "b"]
ROWS = {"a": [1], "b": [0, 2, 3]}
TEXTS = ["w", "x", "y", "z"]
ORACLE = "oracle"
WAYS = [*ENGINES, ORACLE]


class Watching(ExpertModule):
    """Keeps the context that it was given."""

    def __init__(self):
        super().__init__()
        self.context = None

    def forward(self, batch):
        self.context = batch.context
        return ExpertResult(batch.hidden)


class Other(Watching):
    """Belongs to another class, so that the two never run as one."""


def seen(context, way, batch_size=B, routes=ROUTES):
    """Each expert's context."""
    engine = "looped" if way == ORACLE else way
    config = CELMoEConfig(2, [level("l", ("a", "b"))])
    model = HierarchicalCELMoE(
        config, lambda _, name, __: (Watching if name == "a" else Other)(), nn.Identity(), engine=engine
    )
    run = functools.partial(reference_forward, model) if way == ORACLE else model
    run(torch.zeros(batch_size, 2), {"l": routes}, context)
    return {name: model.level_modules["l"][name].context for name in sorted(set(routes))}


def aligned(*trailing):
    return torch.randn(B, *trailing)


# --- containers ------------------------------------------------------------------------------------------------------

MADE = collections.Counter()


class Counted:
    """Counts how often its subclasses' own code runs that a copy has no need of."""

    def __new__(cls, *_, **__):
        MADE[cls] += 1
        return super().__new__(cls)


class Plain(Counted):
    def __init__(self, x, texts):
        MADE[Plain] += 1
        self.x, self.texts, self.limit = x, texts, 7

    def __setattr__(self, name, value):
        MADE[Plain] += 1
        super().__setattr__(name, value)

    @property
    def twice(self):
        return self.x * 2


class Fields(NamedTuple):
    x: Any
    texts: Any


def item(value):
    return value["x"], value["texts"]


NESTINGS = {
    "bare": (lambda value: value, lambda context: context),
    "in a dict": (lambda value: {"value": value, "n": 1}, lambda context: context["value"]),
    "deep": (
        lambda value: SimpleNamespace(a=[{"b": (value, "tail")}, 0]),
        lambda context: context.a[0]["b"][0],
    ),
}
