"""Ready experts in other people's models: nothing changes at first, training does, and linear ones fold away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import celmoe
from celmoe import CELMoEConfig, ExpertConfig, HierarchyLevelConfig, RoutingCompiler, zoo

WIDTH = 8
INNER = 6
NAMES = "abcd"
ROUTES = list("abcdab")


class Layer(nn.Module):
    """A part of a network: a layer in, one out, a skip connection, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, INNER)
        self.last = nn.Linear(INNER, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.norm(rows + self.last(torch.tanh(self.first(rows))))


# By name the place, its width, and how an expert for it is made.
KINDS: dict[str, tuple[str, int, Callable[[], Any]]] = {
    "LoRA": ("*.first", INNER, lambda: zoo.LoRA(WIDTH, INNER, rank=2, alpha=4)),
    "Linear": ("*.last", WIDTH, lambda: zoo.Linear(WIDTH)),
    "Houlsby": ("*.last", WIDTH, lambda: zoo.Houlsby(WIDTH, 4)),
    "Pfeiffer": ("*.last", WIDTH, lambda: zoo.Pfeiffer(WIDTH, 4)),
    "Prefix": ("*.last", WIDTH, lambda: zoo.Prefix(WIDTH, 4)),
    "Convolution": ("*.norm", WIDTH, lambda: zoo.Convolution(WIDTH, 3)),
    "Block": ("*.norm", WIDTH, lambda: zoo.Block(WIDTH, 2)),
}


def attached(name: str) -> tuple[Any, nn.Module, CELMoEConfig, torch.Tensor]:
    """A host of two layers with experts behind both, a copy of it without, the config, and rows."""
    torch.manual_seed(0)
    where, width, make = KINDS[name]
    host, bare = (nn.Sequential(Layer(), Layer()).double() for _ in range(2))
    bare.load_state_dict(host.state_dict())
    levels = [HierarchyLevelConfig("language", {each: ExpertConfig(each) for each in NAMES})]
    config = CELMoEConfig(width, levels, use_learned_fusion=False)
    celmoe.attach(host, config, lambda *_: make().double(), where)
    celmoe.freeze_host(host)
    return host, bare, config, torch.randn(len(ROUTES), 5, WIDTH, dtype=torch.float64)


def train(host: nn.Module, config: CELMoEConfig, rows: torch.Tensor) -> None:
    plan = RoutingCompiler(config)({"language": ROUTES})
    optimizer = celmoe.optim.AdamW([each for each in host.parameters() if each.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        host(rows, plan=plan).sin().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("stacked", [False, True], ids=["ordinary", "stacked"])
@pytest.mark.parametrize("name", KINDS)
def test_changes_nothing_before_it_is_trained(name: str, stacked: bool):
    host, bare, config, rows = attached(name)
    if stacked:
        celmoe.adapters(host).stack()
    plan = RoutingCompiler(config)({"language": ROUTES})
    assert torch.equal(host(rows, plan=plan), bare(rows))
    before = {key: value.clone() for key, value in bare.state_dict().items()}
    train(host, config, rows)
    assert not torch.allclose(host(rows, plan=plan), bare(rows), atol=1e-3)
    assert all(torch.equal(host.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("stacked", [False, True], ids=["ordinary", "stacked"])
@pytest.mark.parametrize("name", ["LoRA", "Linear"])
def test_linear_experts_fold_into_the_host(name: str, stacked: bool):
    host, bare, config, rows = attached(name)
    if stacked:
        celmoe.adapters(host).stack()
    train(host, config, rows)
    wanted = host(rows, plan=RoutingCompiler(config)({"language": ["b"] * len(ROUTES)}))
    celmoe.merge_adapters(host, {"language": "b"})
    assert list(host.state_dict()) == list(bare.state_dict())
    torch.testing.assert_close(host(rows), wanted)
