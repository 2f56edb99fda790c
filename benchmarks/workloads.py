"""The workloads that engines and peers are timed on: kinds of experts, sizes, routes.

Every class is made for one package, ours or a peer's, because each has contract types of its own.

Axes: B samples, S positions, H hidden size, E experts of the last level.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

POSITIONS = 16


@dataclass(frozen=True)
class Workload:
    """One point of the benchmark.

    Attributes:
        expert: A key of `EXPERTS`.
        hidden_size: Width H.
        batch_size: Samples B.
        num_experts: Experts E of the last level; the middle one has about √E, the first one.
        routes: ``"uniform"`` or ``"zipf"``.
    """

    expert: str
    hidden_size: int
    batch_size: int
    num_experts: int
    routes: str = "uniform"

    @property
    def has_positions(self) -> bool:
        """Whether the hidden states are ``[B, S, H]``."""
        return self.expert in ("block", "gru")

    def hidden(self, seed: int = 0) -> torch.Tensor:
        """``[B, H]`` or ``[B, S, H]`` float32."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch_size, POSITIONS, self.hidden_size) if self.has_positions else None
        return torch.randn(shape or (self.batch_size, self.hidden_size), generator=generator)

    def routing(self, seed: int = 0) -> dict[str, list[str]]:
        """Names at every level; the middle level's follow from the last one's."""
        draw = random.Random(seed)
        weights = [1.0 if self.routes == "uniform" else 1.0 / (rank + 1) for rank in range(self.num_experts)]
        picks = draw.choices(range(self.num_experts), weights, k=self.batch_size)
        return {
            "universal": ["core"] * self.batch_size,
            "family": [_family(pick, self.num_experts) for pick in picks],
            "language": [_language(pick) for pick in picks],
        }

    def build(self, package: ModuleType, seed: int = 0, **options: Any) -> nn.Module:
        """The hierarchy, in the given package's classes; equal seeds give equal parameters."""
        torch.manual_seed(seed)
        families = dict.fromkeys(_family(pick, self.num_experts) for pick in range(self.num_experts))
        names = {
            "universal": ["core"],
            "family": list(families),
            "language": [_language(pick) for pick in range(self.num_experts)],
        }
        config = package.CELMoEConfig(
            self.hidden_size,
            [
                package.HierarchyLevelConfig(level, {name: package.ExpertConfig(name) for name in experts})
                for level, experts in names.items()
            ],
            fusion_dropout=0.0,
        )
        body = EXPERTS[self.expert]

        class Expert(package.ExpertModule):  # type: ignore[misc, name-defined]  # the package is a run-time choice
            def __init__(self, width: int) -> None:
                super().__init__()
                self.body = body(width)

            def forward(self, batch: Any) -> Any:
                return package.ExpertResult(self.body(batch.hidden))

        model: nn.Module = package.HierarchicalCELMoE(config, lambda *_: Expert(self.hidden_size), **options)
        return model

    def __str__(self) -> str:
        return f"{self.expert} H={self.hidden_size} B={self.batch_size} E={self.num_experts} {self.routes}"


class MLP(nn.Module):
    """Norm, two linear layers and a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` to the same shape."""
        inner = nn.functional.gelu(self.up(self.norm(hidden)))
        result: torch.Tensor = hidden + self.down(inner)
        return result


class Recurrent(nn.Module):
    """One GRU layer over the positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[B, S, H]`` to the same shape."""
        result: torch.Tensor = self.gru(hidden)[0]
        return result


def _linear(width: int) -> nn.Module:
    return nn.Linear(width, width)


def _block(width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)


EXPERTS: dict[str, Callable[[int], nn.Module]] = {
    "linear": _linear,
    "mlp": MLP,
    "block": _block,
    "gru": Recurrent,
}


def grid() -> Iterator[Workload]:
    """Every combination of expert, H, B and E that the looped engine is held to."""
    for expert in EXPERTS:
        for hidden_size in (64, 256):
            for batch_size in (16, 64, 512, 4096, 65536):
                if batch_size == 65536 and expert != "linear":
                    continue
                for num_experts in (4, 32, 256):
                    yield Workload(expert, hidden_size, batch_size, num_experts)


def _language(pick: int) -> str:
    return f"language-{pick:03d}"


def _family(pick: int, num_experts: int) -> str:
    families = max(1, round(math.sqrt(num_experts)))
    return f"family-{pick % families:02d}"
