"""The workloads that engines and peers are timed on: kinds of experts, sizes, hierarchies, routes.

Every class is made for one package, ours or a peer's, because each has contract types of its own.

Axes: B samples, S positions, H hidden size, E experts of the last level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from benchmarks.workloads.bodies import EXPERTS, WITH_POSITIONS
from benchmarks.workloads.hierarchies import ONE_LEVEL, TREE, UNIFORM, levels_of, routing_of

POSITIONS = 16


@dataclass(frozen=True)
class Workload:
    """One point of the benchmark.

    Attributes:
        expert: A key of `bodies.EXPERTS`.
        hidden_size: Width H.
        batch_size: Samples B.
        num_experts: Experts E of the last level.
        routes: ``"uniform"``, or ``"zipf"``: the n-th expert is drawn 1/n times as often as the first.
        hierarchy: One of `hierarchies.HIERARCHIES`.
    """

    expert: str
    hidden_size: int
    batch_size: int
    num_experts: int
    routes: str = UNIFORM
    hierarchy: str = TREE

    @property
    def positions(self) -> int | None:
        """Positions S if the hidden states are ``[B, S, H]``; ``None`` if they are ``[B, H]``."""
        return POSITIONS if self.expert in WITH_POSITIONS else None

    def hidden(self, seed: int = 0) -> torch.Tensor:
        """``[B, H]`` or ``[B, S, H]`` float32."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch_size, *([] if self.positions is None else [self.positions]), self.hidden_size)
        return torch.randn(shape, generator=generator)

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
        return sum(sizes[place % 2] for names in self.levels().values() for place in range(len(names)))

    def levels(self) -> dict[str, list[str]]:
        """The experts of each level."""
        return levels_of(self.hierarchy, self.num_experts)

    def routing(self, seed: int = 0) -> dict[str, list[str]]:
        """Names at every level."""
        return routing_of(self.hierarchy, self.num_experts, self.routes, self.batch_size, seed)

    def build(self, package: ModuleType, seed: int = 0, **options: Any) -> nn.Module:
        """The hierarchy, in the given package's classes; equal seeds give equal parameters."""
        torch.manual_seed(seed)
        names = self.levels()
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
        if self.hierarchy == ONE_LEVEL:
            options["fusion_module"] = Last()
        model: nn.Module = package.HierarchicalCELMoE(
            config, lambda level, name, _: kind(self.hidden_size, places[level][name]), **options
        )
        return model

    def __str__(self) -> str:
        sizes = f"{self.expert} H={self.hidden_size} B={self.batch_size} E={self.num_experts} {self.routes}"
        return sizes if self.hierarchy == TREE else f"{sizes}, {self.hierarchy}"


class Last(nn.Module):
    """A fusion that returns the last level's hidden states."""

    def forward(self, level_hiddens: Sequence[torch.Tensor]) -> torch.Tensor:
        """The last of the levels' ``[B, ...]``."""
        return level_hiddens[-1]
