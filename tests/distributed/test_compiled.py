"""Compiled models under `DistributedDataParallel` train as uncompiled ones do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import celmoe
from celmoe import CELMoEConfig, ExpertConfig, ExpertResult, HierarchicalCELMoE, HierarchyLevelConfig
from tests.slow import slow_after

WIDTH, POSITIONS = 4, 3


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, batch):
        return ExpertResult(batch.hidden + self.layer(batch.hidden)[0])


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch):
        return ExpertResult(batch.hidden + self.layer(batch.hidden))


KINDS = {"recurrent": (Recurrent, Recurrent), "plain": (Dense, Dense), "stacked": (Dense, Dense)}


def gradients(kind, is_compiled, is_outside):
    """The gradients of this rank after a step in which each rank meets all experts with rows of its own."""
    torch.manual_seed(0)
    only, others = KINDS[kind]
    names = {"universal": ["all"], "language": ["de", "en"]}
    levels = [HierarchyLevelConfig(level, {name: ExpertConfig(name) for name in own}) for level, own in names.items()]
    model = HierarchicalCELMoE(
        CELMoEConfig(WIDTH, levels, fusion_dropout=0.0), lambda level, *_: only() if level == "universal" else others()
    ).double()
    if kind == "stacked":
        celmoe.stack_experts(model)
    plan = model.compile_routing({"language": ["de", "en", "de", "en"]})
    if is_compiled and not is_outside:
        model.compile(backend="aot_eager")
    wrapped = DistributedDataParallel(model)
    call = torch.compile(wrapped, backend="aot_eager") if is_compiled and is_outside else wrapped
    for step in range(2):
        torch.manual_seed(1 + step + torch.distributed.get_rank())
        model.zero_grad()
        call(torch.randn(4, POSITIONS, WIDTH, dtype=torch.float64), plan).fused_hidden.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "is_outside"), slow_after(2, [("recurrent", False), ("stacked", True), ("plain", False)])
)
def test_ranks_reduce_all_gradients(two, kind, is_outside):
    wanted = two.run(gradients, kind, False, False)
    found = two.run(gradients, kind, True, is_outside)
    for own, expected in zip(found, wanted, strict=True):
        for name, grad in expected.items():
            torch.testing.assert_close(own[name], grad, msg=lambda text, name=name: f"{name}: {text}")
