"""LoRA experts on bases that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from celmoe import (
    CELMoEConfig,
    ExpertConfig,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    zoo,
)

WIDTH = 8
INPUT = 6
LEVEL = "language"
NAMES = ("a", "b", "c", "d", "e", "absent")
ROUTES = ["a", "c", "b", "a", "d", "c", "a", "e", "b", "d", "c"]


class Block(nn.Module):
    """A base of several layers, with a norm, a buffer and a product that is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 12)
        self.down = nn.Linear(12, WIDTH, bias=False)
        self.register_buffer("scale", torch.rand(WIDTH) + 0.5)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows + self.down(F.gelu(self.up(self.norm(rows)))) * self.scale


BASES: dict[str, Callable[[], nn.Module]] = {"linear": lambda: nn.Linear(WIDTH, WIDTH), "block": Block}


class Given:
    """One batch of rows, with several positions each."""

    def __init__(self, routes: list[str] = ROUTES, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.routing = {LEVEL: routes}
        self.leaves = {
            name: torch.randn(len(routes), 3, width, generator=generator).to(dtype).requires_grad_()
            for name, width in (("hidden", WIDTH), ("input", INPUT))
        }

    def __call__(self, forward: Callable[..., Any]) -> Any:
        return forward(self.leaves["hidden"], self.routing, {"input": self.leaves["input"]})


def built(make: Callable[[str], nn.Module], engine: str = "grouped", *, trained: bool = True) -> HierarchicalCELMoE:
    """A model of such experts, by name."""
    levels = [HierarchyLevelConfig(LEVEL, {name: ExpertConfig(name) for name in NAMES})]
    config = CELMoEConfig(WIDTH, levels, use_learned_fusion=False)
    torch.manual_seed(0)
    model = HierarchicalCELMoE(config, lambda _, name, __: make(name), engine=engine)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and trained:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def on_base(base: nn.Module, engine: str = "grouped", **options: Any) -> HierarchicalCELMoE:
    return built(lambda name: zoo.LoRA(WIDTH, base=base, **{"rank": 2, **options}), engine)


def expert_of(model: HierarchicalCELMoE, name: str = "a") -> Any:
    return model.level_modules[LEVEL][name]


def base_of(kind: str = "linear", seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return BASES[kind]()


def classes_of(model: HierarchicalCELMoE, routes: list[str] = ROUTES) -> list[tuple[tuple[str, ...], str]]:
    (level,) = model.explain({LEVEL: routes}).levels
    return [(each.experts, each.engine) for each in level.classes]
