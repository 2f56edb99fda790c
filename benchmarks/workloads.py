"""The workloads that engines and peers are timed on: kinds of experts, sizes, routes.

Every class is made for one package, ours or a peer's, because each has contract types of its own.

Axes: B samples, S positions, H hidden size, E experts of the last level.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
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
        routes: ``"uniform"``, or ``"zipf"``: the n-th expert is drawn 1/n times as often as the first.
    """

    expert: str
    hidden_size: int
    batch_size: int
    num_experts: int
    routes: str = "uniform"

    @property
    def has_positions(self) -> bool:
        """Whether the hidden states are ``[B, S, H]``."""
        return self.expert in ("block", "masked-block", "gru")

    def hidden(self, seed: int = 0) -> torch.Tensor:
        """``[B, H]`` or ``[B, S, H]`` float32."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch_size, POSITIONS, self.hidden_size) if self.has_positions else None
        return torch.randn(shape or (self.batch_size, self.hidden_size), generator=generator)

    def mask(self, seed: int = 0) -> torch.Tensor | None:
        """``[B, S]`` bool, true at padding, which follows 1 to S positions of content; ``None`` for kinds without."""
        if self.expert != "masked-block":
            return None
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, POSITIONS + 1, (self.batch_size, 1), generator=generator)
        return torch.arange(POSITIONS) >= lengths

    def parameters_of_experts(self) -> int:
        """Numbers in the parameters of all levels' experts, found without making them."""
        body = EXPERTS[self.expert]
        with torch.device("meta"):
            sizes = [sum(each.numel() for each in body(self.hidden_size, place).parameters()) for place in (0, 1)]
        return sum(sizes[place % 2] for names in self._names().values() for place in range(len(names)))

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
        names = self._names()
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
            def __init__(self, width: int, place: int) -> None:
                super().__init__()
                self.body = body(width, place)

            def forward(self, batch: Any) -> Any:
                return package.ExpertResult(self.body(batch.hidden))

        class MaskedExpert(Expert):
            def forward(self, batch: Any) -> Any:
                return package.ExpertResult(self.body(batch.hidden, src_key_padding_mask=batch.mask))

        kind = MaskedExpert if self.expert == "masked-block" else Expert
        places = {level: {name: place for place, name in enumerate(experts)} for level, experts in names.items()}
        model: nn.Module = package.HierarchicalCELMoE(
            config, lambda level, name, _: kind(self.hidden_size, places[level][name]), **options
        )
        return model

    def _names(self) -> dict[str, Sequence[str]]:
        """The experts of each level."""
        languages = range(self.num_experts)
        return {
            "universal": ["core"],
            "family": list(dict.fromkeys(_family(pick, self.num_experts) for pick in languages)),
            "language": [_language(pick) for pick in languages],
        }

    def __str__(self) -> str:
        return f"{self.expert} H={self.hidden_size} B={self.batch_size} E={self.num_experts} {self.routes}"


class MLP(nn.Module):
    """Norm, two linear layers with the inner width between them, and a residual."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

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


def _linear(width: int, _place: int) -> nn.Module:
    return nn.Linear(width, width)


def _mlp(width: int, _place: int) -> nn.Module:
    return MLP(width, 2 * width)


def _block(width: int, _place: int) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)


def _gru(width: int, _place: int) -> nn.Module:
    return Recurrent(width)


def _two_widths(width: int, place: int) -> nn.Module:
    return MLP(width, (2, 4)[place % 2] * width)


# The experts' bodies, made from width H and the expert's place in its level.
EXPERTS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": _linear,
    "mlp": _mlp,
    "block": _block,
    "masked-block": _block,
    "gru": _gru,
    "two-widths": _two_widths,
}
# Those of the looped engine's grid.
LOOPED_EXPERTS = ("linear", "mlp", "block", "gru")


def grid() -> Iterator[Workload]:
    """Every combination of expert, H, B and E that the looped engine is held to."""
    for expert in LOOPED_EXPERTS:
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
