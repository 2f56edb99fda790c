"""Models and encoders for batches without samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from celmoe import (
    CELMoEConfig,
    CELMoEOutput,
    ExpertBatch,
    ExpertConfig,
    ExpertModule,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
)
from celmoe.engines.registry import ENGINES
from celmoe.reference import reference_forward

WIDTH = 4
FUSIONS = ("learned", "position_aware", "mean", "own")
FORWARDS = [*ENGINES, "oracle"]
NONE: dict[str, list[str]] = {"family": [], "language": []}


class Reads(ExpertModule):
    """Reads the mask and the context if there are some, counts its calls, and draws a random number in each."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        hidden = batch.hidden + self.linear(batch.hidden)
        if batch.mask is not None:
            hidden = hidden * batch.mask.reshape(-1, *[1] * (hidden.dim() - 1))
        if isinstance(batch.context, dict) and "row" in batch.context:
            hidden = hidden + batch.context["row"] + batch.context["all"].sum()
        self.calls += 1
        return ExpertResult(hidden + 0 * torch.rand(()), {"size": hidden.square().mean()})


class Looks(ExpertModule):
    """Looks integers up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 1)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        rows = batch.hidden
        return ExpertResult(rows if rows.is_floating_point() else self.table(rows).squeeze(-1))


class InPlace(nn.Module):
    """A user's fusion, which writes into the levels' rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, level_hiddens: list[torch.Tensor]) -> torch.Tensor:
        return level_hiddens[0].mul_(self.weight).add_(level_hiddens[-1])


def build(
    engine: str = "auto", *, fusion: str = "learned", make: Any = Reads, family: Any = None, language: Any = None
) -> HierarchicalCELMoE:
    """Two levels of three experts, whose configs take these options by expert or all the same."""

    def level(name: str, experts: str, options: Any) -> HierarchyLevelConfig:
        of = options if isinstance(options, list) else [options or {}] * 3
        return HierarchyLevelConfig(
            name, {each: ExpertConfig(each, **fields) for each, fields in zip(experts, of, strict=True)}, experts[0]
        )

    config = CELMoEConfig(
        WIDTH,
        [level("family", "abc", family), level("language", "xyz", language)],
        use_learned_fusion=fusion != "mean",
        fusion_type="position_aware" if fusion == "position_aware" else "learned",
        fusion_dropout=0.0,
    )
    torch.manual_seed(0)
    engine = "looped" if engine == "oracle" else engine
    return HierarchicalCELMoE(config, lambda *_: make(), InPlace() if fusion == "own" else None, engine=engine)


def run(model: HierarchicalCELMoE, forward: str, *inputs: Any) -> CELMoEOutput:
    return reference_forward(model, *inputs) if forward == "oracle" else model(*inputs)


def zeros(tensor: torch.Tensor) -> bool:
    """True if there is a gradient, and all of it is zero."""
    return tensor.grad is not None and tensor.grad.shape == tensor.shape and not tensor.grad.any()


DETACHED, HALVED = {"stop_gradient_from_parent": True}, {"gradient_scale": 0.5}


def leaf(*shape: int) -> torch.Tensor:
    return torch.ones(shape, requires_grad=True)
