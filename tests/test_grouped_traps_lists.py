"""Experts that list their parts, or a table's entries: the tracer guards listings elsewhere than names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from celmoe import ExpertResult
from tests.traps import WIDTH, Batch, Plain, assert_like_oracle, build, second


class Part(nn.Module):
    """A layer with a factor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.value = 1.0

    def forward(self, rows):
        return self.inner(rows) * self.value


class Listing(Plain):
    """An expert that lists its parts some way before it calls them."""

    def __init__(self, count: Callable[[Any], int], kind: type[Part]) -> None:
        super().__init__()
        self.part, self.parts = kind(), nn.ModuleList([kind()])
        self.count = count

    def forward(self, batch):
        return ExpertResult(self.parts[0](self.part(batch.hidden)) * self.count(self))


def _double(part: Part, rows: torch.Tensor) -> torch.Tensor:
    return rows * 2


LISTS: dict[str, Callable[[Any], int]] = {
    "named_modules": lambda expert: len([name for name, _ in expert.named_modules()]),
    "modules": lambda expert: len(list(expert.modules())),
    "children": lambda expert: len(list(expert.children())),
    "named_children": lambda expert: len(dict(expert.named_children())),
    "parameters": lambda expert: len(list(expert.parameters())),
    "parameters of a part": lambda expert: len(list(expert.part.parameters())),
    "state_dict": lambda expert: len(expert.state_dict()),
    "_modules": lambda expert: len([name for name, _ in expert._modules.items()]),
    "a set": lambda expert: len(set(expert.modules())),
}


@pytest.mark.parametrize("name", LISTS)
def test_parts_of_experts_that_list_their_parts(name: str):
    changes: list[Callable[[Any], object]] = [
        lambda expert: None,
        lambda expert: setattr(expert.part, "value", 2.0),
        lambda expert: setattr(expert.parts[0], "value", 3.0),
        lambda expert: setattr(type(expert.part), "forward", _double),
    ]
    subject, twin = (build(partial(Listing, LISTS[name], type("Own", (Part,), {})), "auto") for _ in range(2))
    for change in changes:
        for model in (subject, twin):
            change(second(model))
        assert_like_oracle(subject, twin, Batch)


TABLE: dict[str, torch.Tensor] = {}


class OfATable(Plain):
    """An expert that takes the last tensor of a table of the process."""

    def forward(self, batch):
        return ExpertResult(self.linear(batch.hidden) * list(TABLE.values())[-1])


def test_a_tensor_by_its_place_in_a_table():
    subject, twin = (build(OfATable) for _ in range(2))
    for factor in (2.0, 3.0):
        TABLE[str(factor)] = torch.full((WIDTH,), factor)
        assert_like_oracle(subject, twin, Batch)
