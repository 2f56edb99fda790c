"""Kinds of ready experts, and their batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from celmoe import (
    HierarchicalCELMoE,
    zoo,
)
from tests.traps import BATCHES, WIDTH, Batch

POSITIONS = 5
INPUT = 6


@dataclass(frozen=True)
class Kind:
    """How an expert of the zoo is made, and what it is given.

    Attributes:
        make: Makes an expert.
        trailing: Axes between samples and width.
        masked: Whether it reads the mask.
    """

    make: Callable[[], nn.Module]
    trailing: tuple[int, ...] = (POSITIONS,)
    masked: bool = False


KINDS: dict[str, Kind] = {
    "Linear": Kind(lambda: zoo.Linear(WIDTH)),
    "Linear without bias": Kind(lambda: zoo.Linear(WIDTH, bias=False), ()),
    "MLP": Kind(lambda: zoo.MLP(WIDTH)),
    "MLP with relu": Kind(lambda: zoo.MLP(WIDTH, 5, activation="relu"), ()),
    "GLU": Kind(lambda: zoo.GLU(WIDTH)),
    "Houlsby": Kind(lambda: zoo.Houlsby(WIDTH, 3)),
    "Pfeiffer": Kind(lambda: zoo.Pfeiffer(WIDTH, 3)),
    "LoRA behind a layer": Kind(lambda: zoo.LoRA(INPUT, WIDTH, rank=2, alpha=3)),
    "Prefix": Kind(lambda: zoo.Prefix(WIDTH, 3, heads=2)),
    "Prefix of one position": Kind(lambda: zoo.Prefix(WIDTH, 3), ()),
    "Convolution": Kind(lambda: zoo.Convolution(WIDTH, 3, inner_size=6)),
    "Convolution with a mask": Kind(lambda: zoo.Convolution(WIDTH, 3), masked=True),
    "Block": Kind(lambda: zoo.Block(WIDTH, 2, inner_size=12)),
    "Block with a mask": Kind(lambda: zoo.Block(WIDTH, 2, inner_size=12, activation="silu"), masked=True),
}


class Given(Batch):
    """A batch with a layer's inputs; the mask leaves some positions out, and all positions of one sample."""

    def __init__(self, kind: Kind, *args: Any, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__(*args, trailing=kind.trailing, dtype=dtype, **options)
        shape = (*self.mask.shape, INPUT)
        generator = torch.Generator().manual_seed(1)
        self.leaves["input"] = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        self.context = {"input": self.leaves["input"]}
        self.mask[0] = False
        self.is_masked = kind.masked

    def __call__(self, forward: Callable[..., Any]) -> Any:
        mask = self.mask if self.is_masked else None
        return forward(self.leaves["hidden"], self.routing, self.context, mask)


def counts_of(batch: Any) -> tuple[Any, ...]:
    """The counts and the seed of one of `BATCHES`."""
    return batch.args if isinstance(batch, partial) else ()


def make_batch(kind: Kind, place: int, dtype: torch.dtype = torch.float32) -> Callable[[], Given]:
    return partial(Given, kind, *counts_of(BATCHES[place]), dtype=dtype)


def trained(model: HierarchicalCELMoE) -> HierarchicalCELMoE:
    """The model with weights like those of a trained one: an expert that is the identity shows no mistake."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model
